"""Average precision by the rules of VOC 2007 (11 points), VOC 2010+ (area) and COCO (50:95).

AP of a class without objects is undefined: it is None, and the mean leaves the class out. The rows
of `per_class` in results.json are made here; class accuracy by class is in cell_accuracy.py.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from yolo.errors import UserError
from yolo.metrics.matching import (
    Detections,
    Matches,
    Objects,
    class_groups,
    match_greedy,
    match_voc,
)

if TYPE_CHECKING:  # scoring does without torch, which takes two seconds to import
    from torch import Tensor

# Added up as in the devkit: a recall of 0.3 does not reach 0.30000000000000004, up to 0.01 AP.
VOC_RECALLS = np.arange(0, 1.1, 0.1)
COCO_RECALLS = np.linspace(0, 1, 101)
COCO_IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
COCO_MAX_DETECTIONS = 100  # per image and class
# px^2, both ends inclusive
COCO_AREAS = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}

Matching = Literal["plain", "devkit"]


class AnnotatedImages(Protocol):
    """The parts of `yolo.data.DetectionDataset` that are read here."""

    class_names: tuple[str, ...]
    image_ids: list[str]

    def annotation(self, index: int) -> Any:
        """Return boxes [M, 4] xyxy, labels [M] and difficult [M] of one image."""


class DetectionMetrics:
    """Collects detections image by image, on any number of ranks, and scores them together."""

    def __init__(self, dataset: AnnotatedImages, matching: Matching = "plain") -> None:
        self.dataset = dataset
        self.matching = matching
        self._images: list[np.ndarray] = []  # those seen, with or without detections
        self._rows: list[np.ndarray] = []  # [N, 7] image, x1, y1, x2, y2, score, label

    def update(self, image_index: int, detection: Mapping[str, "Tensor"]) -> None:
        """Add one image: `boxes` [N, 4] xyxy original pixels, `scores` [N], `labels` [N]."""
        rows = np.empty((len(detection["scores"]), 7))
        rows[:, 0] = image_index
        rows[:, 1:5] = detection["boxes"].cpu().numpy()
        rows[:, 5] = detection["scores"].cpu().numpy()
        rows[:, 6] = detection["labels"].cpu().numpy()
        self._images.append(np.array([image_index]))
        self._rows.append(rows)

    def state(self) -> dict[str, np.ndarray]:
        """Return what this rank has collected."""
        return {
            "images": np.concatenate([np.zeros(0, np.int64), *self._images]),
            "rows": np.concatenate([np.zeros((0, 7)), *self._rows]),
        }

    def merge(self, states: Sequence[Mapping[str, np.ndarray]]) -> None:
        """Replace the contents by those of all ranks' states (this one's included)."""
        self._images = [np.asarray(state["images"]) for state in states]
        self._rows = [np.asarray(state["rows"]) for state in states]

    def detections(self) -> Detections:
        """Return everything collected, by falling score; the same for any number of ranks."""
        rows = self.state()["rows"]
        images, labels = rows[:, 0].astype(np.int64), rows[:, 6].astype(np.int64)
        collected = Detections(images, rows[:, 1:5], rows[:, 5], labels)
        check_detections(collected, self.dataset)
        return collected.by_score()

    def objects(self) -> Objects:
        """Return the annotation of the images seen."""
        return load_objects(self.dataset, np.unique(self.state()["images"]))

    def compute(self) -> dict[str, Any]:
        """Return what `average_precision` says of everything collected."""
        return average_precision(
            self.detections(), self.objects(), self.dataset.class_names, self.matching
        )


def load_objects(dataset: AnnotatedImages, image_indices: Iterable[int]) -> Objects:
    """Return the annotated objects of some images as flat arrays."""
    indices = [int(index) for index in image_indices]
    annotations = [dataset.annotation(index) for index in indices]
    lengths = [len(annotation.labels) for annotation in annotations]
    return Objects(
        np.repeat(np.asarray(indices, np.int64), lengths),
        np.concatenate([np.zeros((0, 4)), *(a.boxes for a in annotations)]),
        np.concatenate([np.zeros(0, np.int64), *(a.labels for a in annotations)]),
        np.concatenate([np.zeros(0, bool), *(a.difficult for a in annotations)]),
    )


def check_detections(detections: Detections, dataset: AnnotatedImages) -> None:
    """Refuse detections that cannot be scored.

    Raises:
        UserError: for boxes that are not finite, scores that are no number, unknown classes; names
            one. A box whose edges are exchanged overlaps nothing, and any order is one of scores.
    """
    boxes = detections.boxes
    problems = {
        "a box that is not finite": ~np.isfinite(boxes).all(1),
        "a score that is no number": np.isnan(detections.scores),
        "an unknown class": ~np.isin(detections.labels, np.arange(len(dataset.class_names))),
    }
    for problem, rows in problems.items():
        if rows.any():
            first = int(rows.argmax())
            raise UserError(
                f"{int(rows.sum())} of {len(rows)} detections have {problem}; the first is in "
                f"image {dataset.image_ids[detections.images[first]]}: "
                f"box {boxes[first].round(1).tolist()}, "
                f"score {detections.scores[first]:.4g}, class {detections.labels[first]}"
            )


def average_precision(
    detections: Detections,
    objects: Objects,
    class_names: Sequence[str],
    matching: Matching = "plain",
) -> dict[str, Any]:
    """Score detections against the annotation of the same images.

    Args:
        detections: sorted by falling score (`Detections.by_score`).
        objects: all annotated ones; the ignored (difficult) count neither for nor against.
        class_names: names of the labels.
        matching: `devkit` asks for an IoU above 0.5, `plain` for at least 0.5.

    Returns:
        `map_50` (area under the curve), `map_50_11pt`, `map_50_95` as fractions, None without any
        object; `best_f1` of all detections together, with `best_f1_confidence`, the score from
        which on they reach it, and `best_f1_precision`, if any is right; `per_class`, by name,
        with `ap_50`, `ap_50_11pt`, `ap_50_95`, `objects`, `difficult`, `detections`;
        `classes_without_objects`, which the means leave out.
    """
    voc = match_voc(detections, objects, strict=matching == "devkit")
    coco_detections, coco = match_coco(detections, objects)
    per_class = {}
    for label, name in enumerate(class_names):
        of_class = objects.labels == label
        num_objects = int((of_class & ~objects.ignored).sum())
        curve = precision_recall(voc, detections.labels == label, num_objects)[0]
        coco_curves = precision_recall(coco, coco_detections.labels == label, num_objects)
        per_class[name] = {
            "ap_50": area_ap(*curve),
            "ap_50_11pt": eleven_point_ap(*curve),
            "ap_50_95": mean_of(coco_ap(*coco_curve) for coco_curve in coco_curves),
            "objects": num_objects,
            "difficult": int((of_class & objects.ignored).sum()),
            "detections": int((detections.labels == label).sum()),
        }
    return {
        **best_f1(detections, voc, int((~objects.ignored).sum())),
        "map_50": mean_of(row["ap_50"] for row in per_class.values()),
        "map_50_11pt": mean_of(row["ap_50_11pt"] for row in per_class.values()),
        "map_50_95": mean_of(row["ap_50_95"] for row in per_class.values()),
        "per_class": per_class,
        "classes_without_objects": [name for name, row in per_class.items() if not row["objects"]],
    }


def best_f1(detections: Detections, matches: Matches, num_objects: int) -> dict[str, float]:
    """Return the best F1 over all classes together, where it is reached, and the precision there.

    Args:
        detections: by falling score.
        matches: of them, at the first of their IoU thresholds.
        num_objects: those that count.
    """
    counted = ~matches.ignored[0]
    right, scores = matches.right[0][counted].cumsum(), detections.scores[counted]
    if not num_objects or not len(right) or not right[-1]:
        return {}
    f1 = 2 * right / (np.arange(1, len(right) + 1) + num_objects)
    f1[:-1][scores[:-1] == scores[1:]] = 0  # a threshold takes all of one score
    best = int(f1.argmax())
    return {
        "best_f1": float(f1[best]),
        "best_f1_confidence": float(scores[best]),
        "best_f1_precision": float(right[best] / (best + 1)),
    }


def match_coco(
    detections: Detections, objects: Objects, area_range: tuple[float, float] = (0, 1e10)
) -> tuple[Detections, Matches]:
    """Match at COCO's ten IoU thresholds, within COCO's limit of detections per image and class.

    Objects outside `area_range` [px^2] are ignored, as are detections outside that find nothing.

    Returns:
        The detections within the limit, and their matches.
    """
    groups, _ = class_groups(detections, objects)
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
    kept = detections.at(np.sort(order[rank < COCO_MAX_DETECTIONS]))
    outside = _outside(objects.boxes, area_range)
    counted = Objects(objects.images, objects.boxes, objects.labels, objects.ignored | outside)
    matches = match_greedy(kept, counted, COCO_IOU_THRESHOLDS)
    unfound = (matches.objects < 0) & _outside(kept.boxes, area_range)
    return kept, matches._replace(ignored=matches.ignored | unfound)


def ap_by_size(
    detections: Detections, objects: Objects, class_names: Sequence[str]
) -> dict[str, Any]:
    """Return `ap_50`, `ap_50_95` and `objects` for COCO's small, medium and large objects.

    The sizes are areas in pixels of the original image, parted at 32 x 32 and 96 x 96.
    """
    report = {}
    for name, area_range in COCO_AREAS.items():
        kept, matches = match_coco(detections, objects, area_range)
        counted = ~objects.ignored & ~_outside(objects.boxes, area_range)
        per_class = [
            precision_recall(
                matches, kept.labels == label, int((counted & (objects.labels == label)).sum())
            )
            for label in range(len(class_names))
        ]
        report[name] = {
            "ap_50": mean_of(coco_ap(*curves[0]) for curves in per_class),
            "ap_50_95": mean_of(
                mean_of(coco_ap(*curve) for curve in curves) for curves in per_class
            ),
            "objects": int(counted.sum()),
        }
    return report


def precision_recall(
    matches: Matches, rows: np.ndarray, num_objects: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return, for each IoU threshold, the raw precision and recall after each detection at `rows`.

    Ignored detections leave the curve out. Without objects recall is undefined: the arrays are NaN.
    """
    curves = []
    for right, ignored in zip(matches.right, matches.ignored, strict=True):
        hits = right[rows & ~ignored]
        total = hits.cumsum()
        recall = total / num_objects if num_objects else np.full(max(1, len(hits)), np.nan)
        precision = total / np.arange(1, len(hits) + 1)
        curves.append((precision, recall))
    return curves


def envelope(precision: np.ndarray) -> np.ndarray:
    """Return at each point the highest precision from there on."""
    return np.maximum.accumulate(precision[::-1])[::-1]


def precision_at(recalls: np.ndarray, precision: np.ndarray, recall: np.ndarray) -> np.ndarray:
    """Return the best precision from each of `recalls` on, 0 where the curve does not reach."""
    best = np.append(envelope(precision), 0.0)
    return best[np.searchsorted(recall, recalls, "left")]


def area_ap(precision: np.ndarray, recall: np.ndarray) -> float | None:
    """Return the area under the envelope of the curve (VOC 2010+), None if recall is undefined."""
    if np.isnan(recall).any():
        return None
    return float((np.diff(recall, prepend=0) * envelope(precision)).sum())


def eleven_point_ap(precision: np.ndarray, recall: np.ndarray) -> float | None:
    """Return the mean over recalls 0, 0.1 ... 1 of the best precision from there on (VOC 2007)."""
    return _sampled_ap(precision, recall, VOC_RECALLS)


def coco_ap(precision: np.ndarray, recall: np.ndarray) -> float | None:
    """Return the mean over 101 recalls of the best precision from there on (COCO)."""
    return _sampled_ap(precision, recall, COCO_RECALLS)


def mean_of(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are defined, None if there are none."""
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None


def _sampled_ap(precision: np.ndarray, recall: np.ndarray, at: np.ndarray) -> float | None:
    return None if np.isnan(recall).any() else float(precision_at(at, precision, recall).mean())


def _outside(boxes: np.ndarray, area_range: tuple[float, float]) -> np.ndarray:
    area = (boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(1)  # exchanged edges: nothing, but wrong
    return (area < area_range[0]) | (area > area_range[1])
