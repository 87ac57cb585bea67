"""Class, object and no-object accuracy over the cells of the three output grids together.

A cell here is one anchor at one grid position. Cells that the assignment ignores (neither positive
nor empty) are left out. So that runs can be compared, the cells are assigned by the reference's
rule, whatever they were trained with.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from yolo.metrics.average_precision import COCO_AREAS

HEADLINE_THRESHOLD = 0.05  # the reference code's
NO_OBJECT_TARGET = 0.98  # objectness thresholds are chosen where so many empty cells are silent
# with 0.05 and 0.5; the fine ones hold them all
THRESHOLDS = np.concatenate([np.arange(1, 50) / 1000, np.arange(5, 100) / 100])
FINE_THRESHOLDS = np.union1d(np.arange(1, 100) / 10000, np.arange(1, 1000) / 1000)


class AssignedScale(Protocol):
    """The parts of `yolo.losses.ScaleTargets` that are counted here."""

    @property
    def cells(self) -> Tensor:
        """[P, 4] image, anchor, row and column of the positive cells."""

    @property
    def boxes(self) -> Tensor:
        """[P, 4] xyxy pixels of the network input."""

    @property
    def labels(self) -> Tensor:
        """[P] class of each positive cell."""

    @property
    def empty(self) -> Tensor:
        """[B, A, H, W] bool, true where there is no object."""


class CellAccuracy:
    """Counts hits batch by batch; the counts of several ranks add up."""

    def __init__(self, num_classes: int, num_scales: int = 3) -> None:
        bins = len(FINE_THRESHOLDS) + 1  # bin k: objectness exceeds exactly k of them
        self._counts = {
            "images": np.zeros(1, np.int64),
            "positive": np.zeros((num_scales, bins), np.int64),
            "empty": np.zeros((num_scales, bins), np.int64),
            "class_hits": np.zeros((num_scales, num_classes), np.int64),
            "class_total": np.zeros((num_scales, num_classes), np.int64),
            "size_hits": np.zeros((num_scales, len(COCO_AREAS)), np.int64),
            "size_total": np.zeros((num_scales, len(COCO_AREAS)), np.int64),
        }

    def update(
        self,
        outputs: Sequence[Tensor],
        assigned: Sequence[AssignedScale],
        enlarged: Tensor | None = None,
    ) -> None:
        """Add one batch.

        Args:
            outputs: per scale [B, A, H, W, 5 + C] raw predictions.
            assigned: per scale the cells' targets.
            enlarged: [B] pixels of the input per pixel of each image, if sizes are to count.
        """
        counts = self._counts
        counts["images"] += len(outputs[0])
        num_classes = counts["class_total"].shape[1]
        for scale, (output, targets) in enumerate(zip(outputs, assigned, strict=True)):
            positive = output[tuple(targets.cells.unbind(1))]
            labels = targets.labels.to(positive.device)
            right = positive[:, 5:].argmax(-1) == labels
            counts["positive"][scale] += _threshold_bins(positive[:, 4])
            counts["empty"][scale] += _threshold_bins(output[..., 4][targets.empty])
            counts["class_hits"][scale] += _count(labels[right], num_classes)
            counts["class_total"][scale] += _count(labels, num_classes)
            if enlarged is not None:
                scale_of_image = enlarged.to(targets.boxes.device)[targets.cells[:, 0]]
                sides = (targets.boxes[:, 2:] - targets.boxes[:, :2]) / scale_of_image[:, None]
                limits = sides.new_tensor([area for _, area in COCO_AREAS.values()][:-1])
                sizes = torch.bucketize(sides.prod(1), limits).to(right.device)
                counts["size_hits"][scale] += _count(sizes[right], len(COCO_AREAS))
                counts["size_total"][scale] += _count(sizes, len(COCO_AREAS))

    def state(self) -> dict[str, np.ndarray]:
        """Return the counts of this rank."""
        return dict(self._counts)

    def merge(self, states: Sequence[dict[str, np.ndarray]]) -> None:
        """Replace the counts by the sum over the states of all ranks (this one's included)."""
        self._counts = {
            key: np.sum([state[key] for state in states], axis=0) for key in self._counts
        }

    def compute(self) -> dict[str, Any]:
        """Return fractions in [0, 1], or None where there was nothing to count.

        `object_accuracy` and `no_object_accuracy` are at the reference's threshold 0.05; with the
        suffix `_at_0.5` they are at 0.5. `at_no_object_98` has both at the lowest threshold at
        which no-object is 98 % or more. `threshold_sweep` has both at all thresholds, and the
        number of empty cells per image that fire. `per_scale` repeats the headline for each grid,
        coarse to fine. `class_accuracy_by_class` is a list, `class_accuracy_by_size` has COCO's
        small, medium and large.
        """
        pooled = self._pooled()
        sweep = _sweep(pooled["positive"][0], pooled["empty"][0], int(pooled["images"]))
        size_shares = _shares(pooled["size_hits"][0], pooled["size_total"][0])
        at_half = self.at(0.5)
        return {
            **_headline(pooled, 0, HEADLINE_THRESHOLD),
            "no_object_accuracy_at_0.5": at_half["no_object_accuracy"],
            "object_accuracy_at_0.5": at_half["object_accuracy"],
            "at_no_object_98": self.at(self.silent_threshold()),
            "class_accuracy_by_class": _shares(pooled["class_hits"][0], pooled["class_total"][0]),
            "class_accuracy_by_size": dict(zip(COCO_AREAS, size_shares, strict=True)),
            "threshold_sweep": sweep,
            "per_scale": [
                _headline(self._counts, scale, HEADLINE_THRESHOLD)
                | {"positive_cells": int(positive.sum())}
                for scale, positive in enumerate(self._counts["positive"])
            ],
        }

    def silent_threshold(self) -> float | None:
        """Return the lowest of `FINE_THRESHOLDS` where no-object accuracy is 98 %, or None."""
        fired = _share_above(self._pooled()["empty"][0])
        enough = np.zeros(1, bool) if fired is None else 1 - fired >= NO_OBJECT_TARGET
        return float(FINE_THRESHOLDS[enough.argmax()]) if enough.any() else None

    def at(self, threshold: float | None) -> dict[str, float | None]:
        """Return `threshold` (of `FINE_THRESHOLDS`) and no-object and object accuracy there."""
        if threshold is None:
            return dict.fromkeys(("threshold", "no_object_accuracy", "object_accuracy"))
        headline = _headline(self._pooled(), 0, threshold)
        del headline["class_accuracy"]
        return {"threshold": threshold, **headline}

    def _pooled(self) -> dict[str, np.ndarray]:
        return {key: value.sum(0, keepdims=value.ndim == 2) for key, value in self._counts.items()}


def _threshold_bins(logits: Tensor) -> np.ndarray:
    thresholds = torch.as_tensor(FINE_THRESHOLDS, dtype=torch.float32, device=logits.device)
    exceeded = torch.bucketize(logits.float().sigmoid(), thresholds)
    return _count(exceeded, len(FINE_THRESHOLDS) + 1)


def _count(values: Tensor, size: int) -> np.ndarray:
    return torch.bincount(values, minlength=size).cpu().numpy()


def _share_above(bins: np.ndarray) -> np.ndarray | None:
    """Return, per threshold, the share of counted cells above it."""
    above = bins[::-1].cumsum()[::-1]
    return above[1:] / above[0] if above[0] else None


def _shares(hits: np.ndarray, totals: np.ndarray) -> list[float | None]:
    return [float(hit / total) if total else None for hit, total in zip(hits, totals, strict=True)]


def _headline(
    counts: dict[str, np.ndarray], scale: int, threshold: float
) -> dict[str, float | None]:
    at = int(FINE_THRESHOLDS.searchsorted(threshold))
    found = _share_above(counts["positive"][scale])
    fired = _share_above(counts["empty"][scale])
    hits, total = counts["class_hits"][scale].sum(), counts["class_total"][scale].sum()
    return {
        "class_accuracy": float(hits / total) if total else None,
        "no_object_accuracy": None if fired is None else float(1 - fired[at]),
        "object_accuracy": None if found is None else float(found[at]),
    }


def _sweep(positive: np.ndarray, empty: np.ndarray, num_images: int) -> dict[str, list[float]]:
    found, fired = _share_above(positive), _share_above(empty)
    shown = FINE_THRESHOLDS.searchsorted(THRESHOLDS)
    sweep = {"threshold": THRESHOLDS.tolist()}
    if found is not None:
        sweep["object_accuracy"] = found[shown].tolist()
    if fired is not None:
        sweep["no_object_accuracy"] = (1 - fired[shown]).tolist()
        sweep["false_cells_per_image"] = (fired[shown] * empty.sum() / num_images).tolist()
    return sweep
