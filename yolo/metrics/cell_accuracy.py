"""Class, object and no-object accuracy over the cells of the output grids, pooled over the three scales.

A cell here is one anchor at one grid position. Cells that the assignment ignores (neither positive nor empty)
are left out. What `--assignment paper` ignores by the overlap of its prediction, only the loss knows: here it
counts as empty.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

HEADLINE_THRESHOLD = 0.05  # the reference code's
THRESHOLDS = np.concatenate([np.arange(1, 50) / 1000, np.arange(5, 100) / 100])  # 0.05 and 0.5 are among them


class AssignedScale(Protocol):
    """The parts of `yolo.losses.ScaleTargets` that are counted here."""

    @property
    def cells(self) -> Tensor:
        """[P, 4] image, anchor, row and column of the positive cells."""

    @property
    def labels(self) -> Tensor:
        """[P] class of each positive cell."""

    @property
    def empty(self) -> Tensor:
        """[B, A, H, W] bool, true where there is no object."""


class CellAccuracy:
    """Counts hits batch by batch; the counts of several ranks add up."""

    def __init__(self, num_classes: int, num_scales: int = 3) -> None:
        bins = len(THRESHOLDS) + 1  # bin k counts the cells whose objectness exceeds exactly k thresholds
        self._counts = {
            "images": np.zeros(1, np.int64),
            "positive": np.zeros((num_scales, bins), np.int64),
            "empty": np.zeros((num_scales, bins), np.int64),
            "class_hits": np.zeros((num_scales, num_classes), np.int64),
            "class_total": np.zeros((num_scales, num_classes), np.int64),
        }

    def update(self, outputs: Sequence[Tensor], assigned: Sequence[AssignedScale]) -> None:
        """Add one batch.

        Args:
            outputs: per scale [B, A, H, W, 5 + C] raw predictions.
            assigned: per scale the cells' targets.
        """
        counts = self._counts
        counts["images"] += len(outputs[0])
        num_classes = counts["class_total"].shape[1]
        for scale, (output, targets) in enumerate(zip(outputs, assigned, strict=True)):
            positive = output[tuple(targets.cells.unbind(1))]
            labels = targets.labels.to(positive.device)
            hits = labels[positive[:, 5:].argmax(-1) == labels]
            counts["positive"][scale] += _threshold_bins(positive[:, 4])
            counts["empty"][scale] += _threshold_bins(output[..., 4][targets.empty])
            counts["class_hits"][scale] += _count(hits, num_classes)
            counts["class_total"][scale] += _count(labels, num_classes)

    def state(self) -> dict[str, np.ndarray]:
        """Return the counts of this rank."""
        return dict(self._counts)

    def merge(self, states: Sequence[dict[str, np.ndarray]]) -> None:
        """Replace the counts by the sum over the states of all ranks (this one's included)."""
        self._counts = {key: np.sum([state[key] for state in states], axis=0) for key in self._counts}

    def compute(self) -> dict[str, Any]:
        """Return fractions in [0, 1], or None where there was nothing to count.

        `object_accuracy` and `no_object_accuracy` are at the reference's threshold 0.05; with the suffix
        `_at_0.5` they are at 0.5. `threshold_sweep` has both at all thresholds, and the number of empty cells
        per image that fire. `per_scale` repeats the headline for each grid, coarse to fine.
        """
        pooled = {key: value.sum(0, keepdims=value.ndim == 2) for key, value in self._counts.items()}
        sweep = _sweep(pooled["positive"][0], pooled["empty"][0], int(pooled["images"]))
        return {
            **_headline(pooled, 0, HEADLINE_THRESHOLD),
            **{
                f"{key}_at_0.5": value
                for key, value in _headline(pooled, 0, 0.5).items()
                if key != "class_accuracy"
            },
            "threshold_sweep": sweep,
            "per_scale": [
                _headline(self._counts, scale, HEADLINE_THRESHOLD) | {"positive_cells": int(positive.sum())}
                for scale, positive in enumerate(self._counts["positive"])
            ],
        }


def _threshold_bins(logits: Tensor) -> np.ndarray:
    thresholds = torch.as_tensor(THRESHOLDS, dtype=torch.float32, device=logits.device)
    exceeded = torch.bucketize(logits.float().sigmoid(), thresholds)
    return _count(exceeded, len(THRESHOLDS) + 1)


def _count(values: Tensor, size: int) -> np.ndarray:
    return torch.bincount(values, minlength=size).cpu().numpy()


def _share_above(bins: np.ndarray) -> np.ndarray | None:
    """Return, per threshold, the share of counted cells above it."""
    above = bins[::-1].cumsum()[::-1]
    return above[1:] / above[0] if above[0] else None


def _headline(counts: dict[str, np.ndarray], scale: int, threshold: float) -> dict[str, float | None]:
    at = int(THRESHOLDS.searchsorted(threshold))
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
    sweep = {"threshold": THRESHOLDS.tolist()}
    if found is not None:
        sweep["object_accuracy"] = found.tolist()
    if fired is not None:
        sweep["no_object_accuracy"] = (1 - fired).tolist()
        sweep["false_cells_per_image"] = (fired * empty.sum() / num_images).tolist()
    return sweep
