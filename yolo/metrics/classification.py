"""What a classifier is judged by: accuracy, per class too, confusion matrix and calibration."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from yolo.metrics.calibration import calibration


class ClassificationMetrics:
    """Keeps four numbers per image, in the order of the updates."""

    def __init__(self, class_names: Sequence[str]) -> None:
        self.class_names = tuple(class_names)
        self._kept: dict[str, np.ndarray] = {
            "labels": np.zeros(0, np.int64),
            "predicted": np.zeros(0, np.int64),
            "confidence": np.zeros(0, np.float32),
            "nll": np.zeros(0, np.float32),
        }

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add one batch: logits [B, C] and labels [B]."""
        log_probs = torch.log_softmax(logits.float(), dim=-1)
        labels = labels.to(logits.device)
        confidence, predicted = log_probs.exp().max(-1)
        batch = {
            "labels": labels,
            "predicted": predicted,
            "confidence": confidence,
            "nll": -log_probs.gather(1, labels[:, None])[:, 0],
        }
        for key, value in batch.items():
            self._kept[key] = np.concatenate([self._kept[key], value.cpu().numpy()])

    def state(self) -> dict[str, np.ndarray]:
        """Return this rank's `labels`, `predicted`, `confidence` and `nll`, each [N]."""
        return dict(self._kept)

    def merge(self, states: Sequence[dict[str, np.ndarray]]) -> None:
        """Replace what is kept by the states of all ranks (this one's included).

        Rank r of R tested the images r, r + R, ...: the result is in the order of the data set.
        """
        for key in self._kept:
            merged = np.empty(sum(len(state[key]) for state in states), self._kept[key].dtype)
            for rank, state in enumerate(states):
                merged[rank :: len(states)] = state[key]
            self._kept[key] = merged

    def compute(self) -> dict[str, Any]:
        """Return fractions in [0, 1], or None where there was no image.

        `accuracy`, `mean_class_accuracy`, `nll` (nats per image), `per_class` (name -> accuracy,
        images), `confusion_matrix` (rows true, columns predicted, counts) and `calibration` (see
        `calibration`).
        """
        matrix = self.confusion_matrix()
        images, hits = matrix.sum(1), matrix.diagonal()
        accuracies = [float(h / n) if n else None for h, n in zip(hits, images, strict=True)]
        seen = [value for value in accuracies if value is not None]
        return {
            "accuracy": float(hits.sum() / images.sum()) if images.sum() else None,
            "mean_class_accuracy": float(np.mean(seen)) if seen else None,
            "nll": float(self._kept["nll"].mean(dtype=np.float64)) if images.sum() else None,
            "per_class": {
                name: {"accuracy": accuracy, "images": int(n)}
                for name, accuracy, n in zip(self.class_names, accuracies, images, strict=True)
            },
            "confusion_matrix": matrix.tolist(),
            "calibration": calibration(
                self._kept["confidence"], self._kept["predicted"] == self._kept["labels"]
            ),
        }

    def confusion_matrix(self) -> np.ndarray:
        """Return counts int64 [C, C], rows true classes, columns predicted ones."""
        num_classes = len(self.class_names)
        pairs = self._kept["labels"] * num_classes + self._kept["predicted"]
        return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)

    def worst_mistakes(self, limit: int) -> np.ndarray:
        """Return the places [<= limit] of the wrong predictions, the most confident first."""
        wrong = np.flatnonzero(self._kept["predicted"] != self._kept["labels"])
        return wrong[np.argsort(-self._kept["confidence"][wrong], kind="stable")][:limit]
