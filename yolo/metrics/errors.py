"""What each kind of error costs in mAP (after TIDE, Bolya et al. 2020), what is taken for what.

Every wrong detection is of one kind, decided in this order by its overlaps with the objects of its
image: localisation (its own class, IoU 0.1 to 0.5), classification (another class, at least 0.5),
duplicate (its own class, at least 0.5, found already), background (less than 0.1 with everything),
both (the rest). An object is missed when no detection found it, nor would if its class or its box
were right.
"""

from dataclasses import dataclass

import numpy as np

from yolo.metrics.average_precision import area_ap, mean_of, precision_recall
from yolo.metrics.matching import Detections, Matches, Objects, match_greedy, overlapping_pairs

KINDS = ("classification", "localisation", "both", "duplicate", "background", "missed")
CLASSIFICATION, LOCALISATION, BOTH, DUPLICATE, BACKGROUND = range(5)
BACKGROUND_IOU = 0.1
FOREGROUND_IOU = 0.5


@dataclass(frozen=True)
class Errors:
    """The errors among N detections and M objects."""

    kinds: np.ndarray  # [N] place in KINDS, -1 for right and ignored detections
    targets: np.ndarray  # [N] the object that a wrong class or a wrong box was meant for, else -1
    missed: np.ndarray  # [M] bool


def find_errors(detections: Detections, objects: Objects, matches: Matches) -> Errors:
    """Name the error of each detection that `match_voc` found wrong, and the objects missed."""
    own_iou, own = _best_overlap(detections, objects, same_class=True)
    other_iou, other = _best_overlap(detections, objects, same_class=False)
    rules = [
        ((own_iou >= BACKGROUND_IOU) & (own_iou < FOREGROUND_IOU), LOCALISATION),
        (other_iou >= FOREGROUND_IOU, CLASSIFICATION),
        (own_iou >= FOREGROUND_IOU, DUPLICATE),
        (np.maximum(own_iou, other_iou) < BACKGROUND_IOU, BACKGROUND),
    ]
    kinds = np.select([rule for rule, _ in rules], [kind for _, kind in rules], BOTH)
    kinds[matches.right[0] | matches.ignored[0]] = -1
    targets = np.select([kinds == LOCALISATION, kinds == CLASSIFICATION], [own, other], -1)
    missed = ~objects.ignored
    missed[matches.objects[0][matches.right[0]]] = False
    missed[targets[targets >= 0]] = False
    return Errors(kinds, targets, missed)


def error_budget(
    detections: Detections, objects: Objects, matches: Matches, errors: Errors, num_classes: int
) -> dict[str, dict[str, float | int | None]]:
    """Return each kind of error's `count` and `map_cost`, the mAP@0.5 gained by mending it alone.

    Of the detections with a wrong class (or box), the most confident one for each object not found
    becomes right and the others vanish; duplicates, background and both vanish; missed objects are
    no longer asked for. `false_positive` removes every wrong detection, `false_negative` asks only
    for what was found. Costs do not add up: mending one kind changes what another costs.
    """
    right, ignored = matches.right[0], matches.ignored[0]
    labels, counted = detections.labels, ~objects.ignored
    found = np.zeros(len(objects), bool)
    found[matches.objects[0][right]] = True
    wrong = errors.kinds >= 0
    classes = np.unique(objects.labels[counted])

    def mean_ap(
        labels: np.ndarray, right: np.ndarray, dropped: np.ndarray, asked: np.ndarray
    ) -> float | None:
        mended = Matches(right[None], (dropped & ~right)[None], matches.objects)
        totals = np.bincount(objects.labels[asked], minlength=num_classes).tolist()
        curves = ((totals[c], precision_recall(mended, labels == c, totals[c])[0]) for c in classes)
        return mean_of(area_ap(*curve) if total else 1.0 for total, curve in curves)

    mended_maps = {
        "missed": mean_ap(labels, right, ignored, counted & ~errors.missed),
        "false_positive": mean_ap(labels, right, ignored | wrong, counted),
        "false_negative": mean_ap(labels, right, ignored, found),
    }
    for kind in (CLASSIFICATION, LOCALISATION, BOTH, DUPLICATE, BACKGROUND):
        rows = errors.kinds == kind
        aimed = np.flatnonzero(rows & (errors.targets >= 0))
        aimed = aimed[(counted & ~found)[errors.targets[aimed]]]
        winners = aimed[np.unique(errors.targets[aimed], return_index=True)[1]]
        mended_labels, mended_right = labels.copy(), right.copy()
        mended_labels[winners] = objects.labels[errors.targets[winners]]
        mended_right[winners] = True
        mended_maps[KINDS[kind]] = mean_ap(mended_labels, mended_right, ignored | rows, counted)
    before = mean_ap(labels, right, ignored, counted)
    counts = {name: int((errors.kinds == kind).sum()) for kind, name in enumerate(KINDS)} | {
        "missed": int(errors.missed.sum()),
        "false_positive": int(wrong.sum()),
        "false_negative": int((counted & ~found).sum()),
    }
    return {
        name: {
            "count": count,
            "map_cost": None if before is None else (mended_maps[name] or 0) - before,
        }
        for name, count in counts.items()
    }


def confusion_matrix(detections: Detections, objects: Objects, num_classes: int) -> np.ndarray:
    """Count which class was found as which.

    Objects are paired with detections of IoU >= 0.5 by falling score, first within the classes,
    then what is left across them. Ignored objects and their detections are left out.

    Args:
        detections: sorted by falling score; those that would be shown, not the whole list for mAP.
        objects: of the same images.
        num_classes: C.

    Returns:
        Counts int64 [C + 1, C + 1], rows the truth, columns the detections; the last row and column
        are the background: detections of nothing (or of an object found already) and objects not
        found.
    """
    threshold = np.array([FOREGROUND_IOU])
    same = match_greedy(detections, objects, threshold).objects[0]
    left, free = np.flatnonzero(same < 0), np.ones(len(objects), bool)
    free[same[same >= 0]] = False
    remaining = np.flatnonzero(free)
    rest, targets = detections.at(left), objects.at(remaining)
    across = match_greedy(rest, targets, threshold, rest.images, targets.images).objects[0]
    partner = same.copy()
    partner[left[across >= 0]] = remaining[across[across >= 0]]

    truth_of = np.append(objects.labels, num_classes)  # index -1: background
    counted = (partner < 0) | ~np.append(objects.ignored, False)[partner]
    unfound = ~objects.ignored
    unfound[partner[partner >= 0]] = False
    truth = np.concatenate([truth_of[partner[counted]], objects.labels[unfound]])
    predicted = np.concatenate(
        [detections.labels[counted], np.full(int(unfound.sum()), num_classes)]
    )
    size = num_classes + 1
    return np.bincount(truth * size + predicted, minlength=size**2).reshape(size, size)


def worst_false_positives(errors: Errors, limit: int) -> np.ndarray:
    """Return the rows of the most confident wrong detections, given detections by falling score."""
    return np.flatnonzero(errors.kinds >= 0)[:limit]


def largest_misses(objects: Objects, found: np.ndarray, limit: int) -> np.ndarray:
    """Return the largest objects that are neither ignored nor among `found` (numbers, -1: none)."""
    missed = ~objects.ignored
    missed[found[found >= 0]] = False
    size = objects.boxes[:, 2:] - objects.boxes[:, :2]
    area = np.where(missed, size.prod(1), -1)
    return np.argsort(-area, kind="stable")[: min(limit, int(missed.sum()))]


def _best_overlap(
    detections: Detections, objects: Objects, *, same_class: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return each detection's highest IoU with an object of its image, and that object or -1."""
    best_iou, best = np.zeros(len(detections)), np.full(len(detections), -1)
    for pairs in overlapping_pairs(detections, objects, detections.images, objects.images):
        same = detections.labels[pairs.detections] == objects.labels[pairs.objects]
        rows = np.flatnonzero(same == same_class)
        order = rows[np.lexsort((pairs.objects[rows], -pairs.iou[rows], pairs.detections[rows]))]
        detection, first = np.unique(pairs.detections[order], return_index=True)
        best_iou[detection], best[detection] = pairs.iou[order[first]], pairs.objects[order[first]]
    return best_iou, best
