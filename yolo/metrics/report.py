"""What evaluate.py adds about a detector's boxes to the `average_precision` of a training's test.

Sizes, errors, curves and calibration, in one dictionary for results and figures.
"""

from collections.abc import Sequence
from typing import Any

from yolo.metrics.average_precision import (
    COCO_RECALLS,
    Matching,
    ap_by_size,
    average_precision,
    precision_at,
    precision_recall,
)
from yolo.metrics.calibration import calibration
from yolo.metrics.errors import confusion_matrix, error_budget, find_errors
from yolo.metrics.matching import Detections, Matches, Objects, match_voc

SHOWN_SCORE = 0.3  # from here on a detection counts as one that a person would be shown


def detection_report(
    detections: Detections,
    objects: Objects,
    class_names: Sequence[str],
    matching: Matching = "plain",
) -> dict[str, Any]:
    """Describe detections (by falling score) of the images that `objects` annotate.

    Returns:
        What `average_precision` returns, and beside it `by_size`, `errors` (see `error_budget`),
        `precision_recall` (per class, the best precision at 101 recalls), `confusion_matrix` and
        `shown` (at `SHOWN_SCORE`), and `calibration`, None where scores are no probabilities.
    """
    matches = match_voc(detections, objects, strict=matching == "devkit")
    errors = find_errors(detections, objects, matches)
    counted = ~matches.ignored[0]
    probable = bool(((detections.scores >= 0) & (detections.scores <= 1)).all())
    shown = detections.at(detections.scores >= SHOWN_SCORE)
    return {
        **average_precision(detections, objects, class_names, matching),
        "by_size": ap_by_size(detections, objects, class_names),
        "errors": error_budget(detections, objects, matches, errors, len(class_names)),
        "precision_recall": _curves(detections, objects, matches, class_names),
        "confusion_matrix": confusion_matrix(shown, objects, len(class_names)).tolist(),
        "shown": _operating_point(detections, objects, matches),
        "calibration": calibration(detections.scores[counted], matches.right[0][counted])
        if probable
        else None,
    }


def _curves(
    detections: Detections, objects: Objects, matches: Matches, class_names: Sequence[str]
) -> dict[str, list[float]]:
    curves = {}
    for label, name in enumerate(class_names):
        total = int(((objects.labels == label) & ~objects.ignored).sum())
        if total:
            curve = precision_recall(matches, detections.labels == label, total)[0]
            curves[name] = precision_at(COCO_RECALLS, *curve).round(4).tolist()
    return curves


def _operating_point(
    detections: Detections, objects: Objects, matches: Matches
) -> dict[str, float | int | None]:
    """Return precision and recall over all classes when only confident detections are shown."""
    counted = (detections.scores >= SHOWN_SCORE) & ~matches.ignored[0]
    right, total = int(matches.right[0][counted].sum()), int((~objects.ignored).sum())
    return {
        "score_threshold": SHOWN_SCORE,
        "detections": int(counted.sum()),
        "precision": right / int(counted.sum()) if counted.any() else None,
        "recall": right / total if total else None,
    }
