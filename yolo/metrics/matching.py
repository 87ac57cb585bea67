"""Which detection found which object: by the VOC devkit's rule and by COCO's.

Detections and objects of all images are in flat arrays. Only boxes of the same group (image and
class) are compared, a bounded number of pairs at a time: memory grows with the number of
detections, not its square.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

MAX_PAIRS = 1 << 18  # boxes compared at a time: about 50 MB


@dataclass(frozen=True)
class Detections:
    """N detections; among equal scores the earlier row counts as the more confident."""

    images: np.ndarray  # [N] int64
    boxes: np.ndarray  # [N, 4] xyxy in pixels of the original image
    scores: np.ndarray  # [N]
    labels: np.ndarray  # [N] int64

    def __len__(self) -> int:
        return len(self.scores)

    def at(self, rows: np.ndarray | slice) -> "Detections":
        """Return the detections at `rows` (indices, a mask or a slice)."""
        return Detections(self.images[rows], self.boxes[rows], self.scores[rows], self.labels[rows])

    def by_score(self) -> "Detections":
        """Return the most confident first; equals are ordered by image, then as given."""
        by_image = np.argsort(self.images, kind="stable")
        return self.at(by_image[np.argsort(-self.scores[by_image], kind="stable")])


@dataclass(frozen=True)
class Objects:
    """M annotated objects."""

    images: np.ndarray  # [M] int64
    boxes: np.ndarray  # [M, 4] xyxy in pixels of the original image
    labels: np.ndarray  # [M] int64
    ignored: np.ndarray  # [M] bool, VOC's `difficult`: finding one is neither right nor wrong

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, rows: np.ndarray | slice) -> "Objects":
        """Return the objects at `rows` (indices, a mask or a slice)."""
        return Objects(self.images[rows], self.boxes[rows], self.labels[rows], self.ignored[rows])


class Matches(NamedTuple):
    """What became of N detections at T IoU thresholds: right, ignored, or else wrong."""

    right: np.ndarray  # [T, N] bool
    ignored: np.ndarray  # [T, N] bool
    objects: np.ndarray  # [T, N] int64, the object found (right or ignored), else -1


class Pairs(NamedTuple):
    """P pairs of a detection and an object of the same group, sorted by detection."""

    detections: np.ndarray  # [P]
    objects: np.ndarray  # [P]
    iou: np.ndarray  # [P]


def class_groups(detections: Detections, objects: Objects) -> tuple[np.ndarray, np.ndarray]:
    """Return one number per (image, class) for the detections [N], and for the objects [M]."""
    size = int(max(detections.labels.max(initial=0), objects.labels.max(initial=0))) + 1
    return detections.images * size + detections.labels, objects.images * size + objects.labels


def overlapping_pairs(
    detections: Detections,
    objects: Objects,
    detection_groups: np.ndarray,
    object_groups: np.ndarray,
    min_iou: float = 0.0,
    max_pairs: int = MAX_PAIRS,
) -> Iterator[Pairs]:
    """Yield the pairs of each group that overlap by `min_iou` (and at all), in bounded portions.

    A portion holds all pairs of its detections, but not always of their groups.
    """
    order = np.argsort(object_groups, kind="stable")
    sorted_groups = object_groups[order]
    first = np.searchsorted(sorted_groups, detection_groups, "left")
    partners = np.searchsorted(sorted_groups, detection_groups, "right") - first
    candidates = np.flatnonzero(partners)
    portions = partners[candidates].cumsum() // max_pairs
    for rows in np.split(candidates, np.flatnonzero(np.diff(portions)) + 1):
        counts = partners[rows]
        detection = np.repeat(rows, counts)
        start = np.repeat(first[rows] - (counts.cumsum() - counts), counts)
        gt = order[start + np.arange(len(detection))]
        iou = paired_iou(detections.boxes[detection], objects.boxes[gt])
        kept = np.flatnonzero((iou >= min_iou) & (iou > 0))
        yield Pairs(detection[kept], gt[kept], iou[kept])


def paired_iou(boxes_a: np.ndarray, boxes_b: np.ndarray) -> np.ndarray:
    """Return the IoU [N] of boxes [N, 4] with their partners [N, 4], computed in float64.

    Right and bottom edges are exclusive; on the devkit's inclusive pixels that is its + 1.
    """
    a, b = boxes_a.astype(np.float64).T, boxes_b.astype(np.float64).T
    width = np.minimum(a[2], b[2]) - np.maximum(a[0], b[0])
    height = np.minimum(a[3], b[3]) - np.maximum(a[1], b[1])
    shared = width.clip(min=0) * height.clip(min=0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / np.maximum(union, 1e-300)


def match_voc(
    detections: Detections, objects: Objects, iou_threshold: float = 0.5, strict: bool = False
) -> Matches:
    """Match as the VOC devkit does: a detection counts by the object that it overlaps most.

    It is right if that object is found for the first time, ignored if the object is, and otherwise
    wrong: a detection never falls back to its second choice.

    Args:
        detections: sorted by falling score.
        objects: of the same images.
        iou_threshold: least overlap.
        strict: the overlap must exceed the threshold, as in VOC's text (VOCevaldet.m takes >=).

    Returns:
        Matches with T = 1.
    """
    found = np.full(len(detections), -1)
    groups = class_groups(detections, objects)
    for pairs in overlapping_pairs(detections, objects, *groups, iou_threshold):
        # The first pair of each detection is the best: highest overlap, then first annotated.
        order = np.lexsort((pairs.objects, -pairs.iou, pairs.detections))
        detection, position = np.unique(pairs.detections[order], return_index=True)
        best = order[position]
        passed = pairs.iou[best] > iou_threshold if strict else slice(None)
        found[detection[passed]] = pairs.objects[best][passed]
    ignored = (found >= 0) & objects.ignored[found] if len(objects) else np.zeros(len(found), bool)
    right = np.zeros(len(detections), bool)
    hits = np.flatnonzero((found >= 0) & ~ignored)
    right[hits[np.unique(found[hits], return_index=True)[1]]] = True
    return Matches(right[None], ignored[None], np.where(right | ignored, found, -1)[None])


def match_greedy(
    detections: Detections,
    objects: Objects,
    iou_thresholds: np.ndarray,
    detection_groups: np.ndarray | None = None,
    object_groups: np.ndarray | None = None,
) -> Matches:
    """Match as COCO does: by falling score, a detection takes the best free object of its group.

    An object that counts is preferred to an ignored one; among equal overlaps the last annotated
    wins, as in pycocotools. All groups advance together: round r places the r-th candidate of each.

    Args:
        detections: sorted by falling score.
        objects: of the same images.
        iou_thresholds: [T], rising; an overlap equal to the threshold is enough.
        detection_groups: [N] which detections compete; by default those of an image and class.
        object_groups: [M] likewise.

    Returns:
        Matches [T, N].
    """
    if detection_groups is None or object_groups is None:
        detection_groups, object_groups = class_groups(detections, objects)
    thresholds = np.minimum(iou_thresholds, 1 - 1e-10)[:, None]
    found = np.full((len(thresholds), len(detections)), -1)
    free = np.ones((len(thresholds), len(objects)), bool)
    by_group = np.argsort(detection_groups, kind="stable")
    groups = detection_groups[by_group], object_groups
    ordered, least = detections.at(by_group), float(thresholds[0, 0])
    for pairs in overlapping_pairs(ordered, objects, *groups, least):
        # Best partner first, so that the first pair still free is the one to take.
        ignored = objects.ignored[pairs.objects]
        order = np.lexsort((-pairs.objects, -pairs.iou, ignored, pairs.detections))
        detection, gt = by_group[pairs.detections[order]], pairs.objects[order]
        iou = pairs.iou[order]
        for rows, starts in _rounds(pairs.detections[order], detection_groups[detection]):
            open_pairs = free[:, gt[rows]] & (iou[rows] >= thresholds)
            position = np.where(open_pairs, np.arange(len(rows)), len(rows))
            first_open = np.minimum.reduceat(position, starts, axis=1)
            t, segment = np.nonzero(first_open < len(rows))
            taken = rows[first_open[t, segment]]
            free[t, gt[taken]] = False
            found[t, detection[taken]] = gt[taken]
    matched = found >= 0
    ignored = matched & objects.ignored[found] if len(objects) else np.zeros_like(matched)
    return Matches(matched & ~ignored, ignored, found)


def _rounds(detections: np.ndarray, groups: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Split pairs (sorted by group, then detection) into rounds of one detection of each group.

    Yields:
        The pairs' positions, and where each detection's segment starts among them.
    """
    new_detection = np.diff(detections, prepend=-1) != 0
    new_group = np.diff(groups, prepend=-1) != 0
    serial = new_detection.cumsum()
    rank = serial - np.maximum.accumulate(np.where(new_group, serial, 0))
    by_rank = np.argsort(rank, kind="stable")
    for rows in np.split(by_rank, np.flatnonzero(np.diff(rank[by_rank])) + 1):
        if len(rows):
            yield rows, np.flatnonzero(new_detection[rows])
