"""A detector's scores made honest: objectness is refit to how often its detections are right."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from yolo.data.dataset import DetectionDataset
from yolo.metrics.average_precision import load_objects
from yolo.metrics.calibration import calibration, fit_objectness
from yolo.metrics.matching import Detections, match_voc
from yolo.models.yolov3 import decode
from yolo.tasks.detection import DetectionSplit, all_detections


@dataclass(frozen=True)
class CalibrationSplit(DetectionSplit):
    """The same split, from which the objectness is to be refit."""

    @classmethod
    def like(cls, split: DetectionSplit) -> "CalibrationSplit":
        """Show the images as `split` does."""
        return cls(
            split.config, split.dataset, split.samples, split.collate, split.loader, split.anchors
        )

    def metrics(self, *, full: bool) -> "CalibrationData":  # type: ignore[override]
        """Return a fresh accumulator."""
        return CalibrationData(self)


class CalibrationData:
    """What every detection's score was made of, and later whether it is right."""

    def __init__(self, split: CalibrationSplit) -> None:
        self.split = split
        self.dataset: DetectionDataset = split.dataset
        # image, x1, y1, x2, y2, score, label, logit, class prob, scale
        self._rows = np.zeros((0, 10))

    def update(self, outputs: Sequence[Tensor], targets: Sequence[Mapping[str, Any]]) -> None:
        """Add one batch of raw outputs and the targets of `EvalSamples`."""
        config, anchors = self.split.config, self.split.anchors
        probs = decode(outputs, anchors.to(outputs[0].device))[2]
        logits = torch.cat([output[..., 4].flatten(1) for output in outputs], dim=1).float()
        ends = torch.tensor([output[0, ..., 4].numel() for output in outputs]).cumsum(0)
        detected = all_detections(outputs, anchors, config, targets)
        for i, (one, target) in enumerate(zip(detected, targets, strict=True)):
            index, labels = one["index"], one["labels"]
            columns = (
                torch.full_like(labels, target["image_index"]),
                one["boxes"],
                one["scores"],
                labels,
                logits[i, index],
                probs[i, index, labels],
                torch.bucketize(index.cpu(), ends, right=True),
            )
            rows = [column.cpu().double().numpy() for column in columns]
            self._rows = np.concatenate([self._rows, np.column_stack(rows)])

    def state(self) -> dict[str, Any]:
        """Return this rank's detections."""
        return {"rows": self._rows}

    def merge(self, states: Sequence[dict[str, Any]]) -> None:
        """Take the detections of all ranks, this one's included, the most confident first."""
        rows = np.concatenate([state["rows"] for state in states])
        rows = rows[np.argsort(rows[:, 0], kind="stable")]
        self._rows = rows[np.argsort(-rows[:, 5], kind="stable")]

    def compute(self) -> dict[str, Any]:
        """Return `factors` [3, 2] for `rescale_objectness`, and the `expected_error` before."""
        rows = self._rows
        images, labels = rows[:, 0].astype(np.int64), rows[:, 6].astype(np.int64)
        detections = Detections(images, rows[:, 1:5], rows[:, 5], labels)
        matches = match_voc(detections, load_objects(self.dataset, range(len(self.dataset))))
        counted = ~matches.ignored[0]
        right = matches.right[0][counted]
        logits, probs, scales = torch.from_numpy(rows[counted, 7:]).unbind(1)
        return {
            "factors": fit_objectness(logits, probs, scales.long(), torch.from_numpy(right)),
            "expected_error": calibration(rows[counted, 5], right)["expected_error"],
        }
