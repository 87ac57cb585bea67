"""Detection: YOLOv3 and its loss, tested by the three accuracies on the grids and by mAP."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from yolo.config import AugmentConfig, Config, anchor_sizes
from yolo.data.anchors import cluster_anchors
from yolo.data.dataset import DetectionDataset
from yolo.data.samplers import SampleKey
from yolo.data.samples import EvalSamples, MosaicCollate, TrainSample, TrainSamples, plain_collate
from yolo.data.sources import open_datasets, open_test_set
from yolo.losses import YoloLoss, assign_targets
from yolo.metrics.average_precision import DetectionMetrics
from yolo.metrics.cell_accuracy import CellAccuracy
from yolo.metrics.report import SHOWN_SCORE
from yolo.models.build import build_model
from yolo.models.yolov3 import STRIDES, make_anchors, to_detections, trained_objectness
from yolo.tasks.assigned import AssignedCollate, AssignedTargets, assign
from yolo.tasks.base import EvalSplit, Task, tile
from yolo.viz.draw import draw_boxes


@dataclass(frozen=True)
class DetectionSplit(EvalSplit):
    """Single images, letterboxed."""

    anchors: Tensor  # [3, A, 2] pixels
    calibration: Tensor | None = None  # [3, 2] factors that the heads to be tested carry
    criterion: YoloLoss | None = None  # measures the loss as well

    @classmethod
    def of(cls, config: Config, dataset: DetectionDataset, anchors: Tensor) -> "DetectionSplit":
        """Show each image of a data set alone, at the test size."""
        samples = EvalSamples(dataset, config.resolved_test_size)
        return cls(config, dataset, samples, plain_collate, "single images, letterboxed", anchors)

    def metrics(self, *, full: bool) -> "DetectionEvaluation":
        """Return a fresh accumulator; `full`: with mAP."""
        return DetectionEvaluation(self, with_map=full)

    def draw_predictions(self, predict: Callable[[Tensor], Any]) -> np.ndarray:
        """Draw the first images with the boxes that the model finds in them."""
        images, _ = self.first_batch()
        found = to_detections(
            predict(images), self.anchors, self.config, score_threshold=SHOWN_SCORE
        )
        return tile(
            [
                draw_boxes(
                    image.permute(1, 2, 0).numpy(),
                    detections["boxes"].cpu().numpy(),
                    detections["labels"].tolist(),
                    self.dataset.class_names,
                    detections["scores"].tolist(),
                )
                for image, detections in zip(images, found, strict=True)
            ]
        )


class MosaicSplit(DetectionSplit):
    """The same split as mosaics; mAP needs whole images, so only the cells are measured."""

    @classmethod
    def like(cls, split: DetectionSplit) -> "MosaicSplit":
        """Compose the images of a split by four, as in training but without augmentation."""
        off = {field.name: 0.0 for field in fields(AugmentConfig) if field.name.startswith("aug_")}
        mosaics: dict[str, Any] = {**off, "mosaic_prob": 1.0, "mosaic_off_epochs": 0}
        config = replace(split.config, **mosaics)
        return cls(
            config,
            split.dataset,
            MosaicSamples(split.dataset, config),
            MosaicCollate(config, config.seed),
            "mosaics of four test images",
            split.anchors,
        )

    def metrics(self, *, full: bool) -> "DetectionEvaluation":
        """Return a fresh accumulator, always without mAP."""
        return super().metrics(full=False)


class MosaicSamples(Dataset[TrainSample]):
    """Test images composed by four; the same at each call."""

    def __init__(self, dataset: DetectionDataset, config: Config) -> None:
        self.samples = TrainSamples(dataset, config, config.seed)
        self.img_size = config.resolved_test_size

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> TrainSample:
        """Return mosaic number `index`."""
        return self.samples[SampleKey(0, index, self.img_size)]


@dataclass(frozen=True)
class DetectionTask(Task):
    """Boxes and classes of the objects in an image."""

    @classmethod
    def build(cls, config: Config, processes: int = 1) -> "DetectionTask":
        """Open the data that `config` names and build everything else for it."""
        train_set, eval_set = open_datasets(config, processes)
        sizes = anchor_sizes(config.anchors) or cluster_anchors(train_set, config)
        anchors = make_anchors(sizes, config.resolved_test_size)
        names = train_set.class_names
        criterion = YoloLoss(anchors, config.loss_settings, config.label_smoothing)
        return cls(
            config=config,
            class_names=names,
            model=build_model(config, len(names)),
            criterion=criterion,
            train_set=train_set,
            train_samples=TrainSamples(train_set, config, config.seed),
            train_collate=AssignedCollate(MosaicCollate(config, config.seed), anchors, config),
            eval_split=replace(DetectionSplit.of(config, eval_set, anchors), criterion=criterion),
            test_split=cls.open_split(config, names, anchors) if config.val_split else None,
            anchors=anchors,
        )

    @staticmethod
    def open_split(
        config: Config, class_names: Sequence[str], anchors: Tensor | None
    ) -> DetectionSplit:
        """Open `config.split` for testing a trained model, with its classes and anchors."""
        assert anchors is not None
        return DetectionSplit.of(config, open_test_set(config, config.split, class_names), anchors)

    def with_config(self, config: Config) -> Self:
        """Return the task with settings found later; the end of mosaic follows the epochs."""
        return replace(
            self, config=config, train_samples=TrainSamples(self.train_set, config, config.seed)
        )

    @staticmethod
    def count(targets: AssignedTargets) -> Tensor:
        """Return [3, 2] float32: per scale the number of positive and of empty cells."""
        return targets.counts

    def score(self, results: Mapping[str, Any]) -> float:
        """Return mAP if each test computes it, else the product of the three accuracies at 0.5."""
        if self.config.maps_each_test:
            return results["map_50"] or 0.0
        names = ("class_accuracy", "no_object_accuracy_at_0.5", "object_accuracy_at_0.5")
        return float(np.prod([results[name] or 0.0 for name in names]))


def all_detections(
    outputs: Sequence[Tensor],
    anchors: Tensor,
    config: Config,
    targets: Sequence[Mapping[str, Any]],
) -> list[dict[str, Tensor]]:
    """Return what mAP counts, in pixels of the original images: every class above the threshold."""
    return to_detections(
        outputs,
        anchors,
        config,
        [(target["height"], target["width"]) for target in targets],
        score_threshold=config.score_threshold,
        all_classes=True,
    )


class DetectionEvaluation:
    """Cell accuracies on the grids, and detections in the pixels of the original images."""

    def __init__(self, split: DetectionSplit, *, with_map: bool) -> None:
        self.config, self.anchors, self.calibration = split.config, split.anchors, split.calibration
        self.criterion, self.loss_sum, self.images = split.criterion, 0.0, 0
        dataset = split.dataset
        self.class_names = dataset.class_names
        self.cells = CellAccuracy(len(dataset.class_names))
        self.cells_with_difficult = CellAccuracy(len(dataset.class_names))
        self.detections = DetectionMetrics(dataset) if with_map else None

    def update(self, outputs: Sequence[Tensor], targets: Sequence[Mapping[str, Any]]) -> None:
        """Add one batch of raw outputs and the targets of `EvalSamples`."""
        img_size, device = outputs[0].shape[2] * STRIDES[0], outputs[0].device
        scales = [target["letterbox"].scale for target in targets if "letterbox" in target]
        enlarged = torch.tensor(scales) if scales else None
        # A calibrated score says whether a box is right, the accuracies ask whether a cell is
        # responsible.
        trained = outputs
        if self.calibration is not None:
            trained = trained_objectness(outputs, self.calibration)
        for cells, use_difficult in ((self.cells, False), (self.cells_with_difficult, True)):
            assigned = assign_targets(
                targets, self.anchors, img_size, use_difficult=use_difficult, device=device
            )
            cells.update(trained, assigned, enlarged)
        if self.criterion is not None:
            self.images += len(targets)
            self.loss_sum += len(targets) * self._loss(outputs, targets, img_size)
        if self.detections is None:
            return
        detected = all_detections(outputs, self.anchors, self.config, targets)
        for detections, target in zip(detected, targets, strict=True):
            self.detections.update(target["image_index"], detections)

    def _loss(
        self, outputs: Sequence[Tensor], targets: Sequence[Mapping[str, Any]], img_size: int
    ) -> float:
        assert self.criterion is not None
        scales = assign(self.config, targets, self.anchors.cpu(), img_size)
        assigned = AssignedTargets.pack(scales).to(outputs[0].device)
        terms = self.criterion(outputs, assigned, assigned.counts)
        return float(torch.stack([*terms.values()]).sum())

    def state(self) -> dict[str, Any]:
        """Return this rank's sums and detections."""
        return {
            "loss": (self.loss_sum, self.images),
            "cells": self.cells.state(),
            "cells_with_difficult": self.cells_with_difficult.state(),
            "detections": self.detections.state() if self.detections else None,
        }

    def merge(self, states: Sequence[dict[str, Any]]) -> None:
        """Take the sums and detections of all ranks."""
        self.loss_sum, self.images = map(sum, zip(*(s["loss"] for s in states), strict=True))
        self.cells.merge([state["cells"] for state in states])
        self.cells_with_difficult.merge([state["cells_with_difficult"] for state in states])
        if self.detections:
            self.detections.merge([state["detections"] for state in states])

    def compute(self) -> dict[str, Any]:
        """Return the three accuracies and, where asked for, mAP.

        Objects flagged as difficult are no targets of the accuracies, as in the reference's label
        files; `with_difficult` has the accuracies with those objects.
        """
        cells, others = self.cells.compute(), self.cells_with_difficult.compute()
        by_class = zip(self.class_names, cells["class_accuracy_by_class"], strict=True)
        return {
            **cells,
            "class_accuracy_by_class": dict(by_class),
            "with_difficult": {
                name: value for name, value in others.items() if not isinstance(value, list | dict)
            },
            **({"validation_loss": self.loss_sum / self.images} if self.images else {}),
            **(self.detections.compute() if self.detections else {}),
        }
