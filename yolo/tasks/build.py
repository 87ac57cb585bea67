"""What is learned, as a bundle of plain parts: the only module that knows every task.

A `Task` holds a model, a criterion, how a test is scored, and the data, whose collate returns targets as the
criterion wants them. The engine runs any of them through the same loop.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from torchvision.utils import make_grid

from yolo.boxes import boxes_from_letterbox
from yolo.config import Config, anchor_sizes
from yolo.data import labelled, labelled_samples
from yolo.data.anchors import cluster_anchors
from yolo.data.samples import MosaicCollate, TestSamples, TrainSamples, plain_collate
from yolo.data.sources import open_datasets, open_test_set
from yolo.errors import UsageError
from yolo.losses import YoloLoss
from yolo.metrics.average_precision import DetectionMetrics
from yolo.metrics.cell_accuracy import CellAccuracy
from yolo.metrics.classification import ClassificationMetrics
from yolo.metrics.report import SHOWN_SCORE
from yolo.models.resnet import ResNet
from yolo.models.yolov3 import STRIDES, YoloV3, make_anchors, postprocess
from yolo.tasks.assigned import AssignedCollate, assign
from yolo.viz.draw import draw_boxes

PICTURES = 8  # in TensorBoard

T = TypeVar("T")


class Criterion(Protocol):
    """Losses by term, as device scalars; their sum is minimised."""

    def __call__(self, outputs: Any, targets: Any, counts: Tensor) -> dict[str, Tensor]:
        """Return each term summed over its cells and divided by `counts`, those of the whole global batch."""


class Metrics(Protocol):
    """What a test measures; the states of all ranks are merged before `compute`."""

    def update(self, outputs: Any, targets: Any) -> None:
        """Add one batch."""

    def state(self) -> dict[str, Any]:
        """Return this rank's sums, as plain types."""

    def merge(self, states: Sequence[dict[str, Any]]) -> None:
        """Take the sums of all ranks, this one's included."""

    def compute(self) -> dict[str, Any]:
        """Return the results, as they stand in `results.json`."""


@dataclass(frozen=True)
class Test:
    """A split to be tested on: its samples, one image each, and what is measured."""

    __test__ = False  # pytest would collect a class of this name

    dataset: Any
    loader: str  # how an image is shown, for reports
    samples: Dataset
    collate: Callable
    metrics: Callable[[bool], Metrics]  # (with everything that is slow?) -> a fresh accumulator
    picture: Callable[[Callable[[Tensor], Any]], np.ndarray]  # (runs the model) -> RGB picture of predictions


@dataclass(frozen=True)
class Task:
    """The parts that the engine assembles."""

    config: Config
    class_names: tuple[str, ...]
    anchors: Tensor | None  # [3, A, 2] pixels; None for classification
    model: nn.Module
    criterion: nn.Module  # a Criterion
    count: Callable[[Any], Tensor]  # targets of a batch -> the counts that normalise the loss
    score: Callable[[Mapping[str, Any]], float]  # results -> what "best" means
    train_set: Any
    train_samples: Dataset
    train_collate: Callable  # to images uint8 [B, 3, S, S] and targets that have a `to(device)`
    test: Test


def by_task(task: str, *, detection: T, classification: T) -> T:
    """Return what belongs to a task: nothing outside of this module (and the app) asks which one it is."""
    return {"detection": detection, "classification": classification}[task]


def build_task(config: Config) -> Task:
    """Open the data that `config` names and build everything else for it."""
    return by_task(config.task, detection=_build_detection, classification=_build_classification)(config)


def build_model(config: Config, num_classes: int) -> nn.Module:
    """Return the untrained network of a configuration."""
    network: Callable[[int, float], nn.Module]
    network = by_task(config.task, detection=YoloV3, classification=ResNet)
    return network(num_classes, config.width)


def build_test(config: Config, class_names: Sequence[str], anchors: Tensor | None) -> Test:
    """Open `config.split` for testing a trained model, with its classes and anchors."""
    build = by_task(config.task, detection=_open_detection_test, classification=_open_classification_test)
    return build(config, class_names, anchors)


class DetectionEvaluation:
    """Cell accuracies on the grids, and detections in the pixels of the original images."""

    def __init__(self, config: Config, anchors: Tensor, test_set: Any, *, with_map: bool) -> None:
        self.config = config
        self.anchors = anchors
        self.cells = CellAccuracy(len(test_set.class_names))
        self.detections = DetectionMetrics(test_set) if with_map else None

    def update(self, outputs: Sequence[Tensor], targets: Sequence[Mapping[str, Any]]) -> None:
        """Add one batch of raw outputs and the targets of `TestSamples`."""
        img_size, device = outputs[0].shape[2] * STRIDES[0], outputs[0].device
        self.cells.update(outputs, assign(self.config, targets, self.anchors, img_size, device))
        if self.detections is None:
            return
        threshold = self.config.score_threshold
        found = _postprocess(self.config, outputs, self.anchors, threshold, all_classes=True)
        for detection, target in zip(found, targets, strict=True):
            detection["boxes"] = boxes_from_letterbox(
                detection["boxes"], target["letterbox"], target["height"], target["width"]
            )
            self.detections.update(target["image_index"], detection)

    def state(self) -> dict[str, Any]:
        """Return this rank's sums and detections."""
        return {
            "cells": self.cells.state(),
            "detections": self.detections.state() if self.detections else None,
        }

    def merge(self, states: Sequence[dict[str, Any]]) -> None:
        """Take the sums and detections of all ranks."""
        self.cells.merge([state["cells"] for state in states])
        if self.detections:
            self.detections.merge([state["detections"] for state in states])

    def compute(self) -> dict[str, Any]:
        """Return the three accuracies and, where asked for, mAP."""
        return {**self.cells.compute(), **(self.detections.compute() if self.detections else {})}


class ClassificationLoss(nn.Module):
    """Cross-entropy as `{"class": ...}`, divided by the size of the global batch."""

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, outputs: Tensor, labels: Tensor, counts: Tensor) -> dict[str, Tensor]:
        """Compare logits [B, C] with labels [B]; `counts` is the number of images."""
        total = functional.cross_entropy(
            outputs.float(), labels, reduction="sum", label_smoothing=self.label_smoothing
        )
        return {"class": total / counts.clamp(min=1)}


def _build_detection(config: Config) -> Task:
    train_set, test_set = open_datasets(config)
    sizes = anchor_sizes(config.anchors) or cluster_anchors(train_set, config)
    anchors = make_anchors(sizes, config.resolved_test_size)
    criterion = YoloLoss(anchors, config.loss_settings, config.label_smoothing)
    return Task(
        config=config,
        class_names=train_set.class_names,
        anchors=anchors,
        model=build_model(config, len(train_set.class_names)),
        criterion=criterion,
        count=lambda targets: targets.counts,
        score=_product_of_accuracies,
        train_set=train_set,
        train_samples=TrainSamples(train_set, config, config.seed),
        train_collate=AssignedCollate(MosaicCollate(config, config.seed), anchors, config),
        test=_detection_test(config, test_set, anchors),
    )


def _open_detection_test(config: Config, class_names: Sequence[str], anchors: Tensor | None) -> Test:
    assert anchors is not None
    return _detection_test(config, open_test_set(config, class_names), anchors)


def _detection_test(config: Config, test_set: Any, anchors: Tensor) -> Test:
    return Test(
        dataset=test_set,
        loader="single images, letterboxed",
        samples=TestSamples(test_set, config.resolved_test_size),
        collate=plain_collate,
        metrics=lambda full: DetectionEvaluation(config, anchors, test_set, with_map=full),
        picture=lambda predict: _draw_detections(config, anchors, test_set, predict),
    )


def _build_classification(config: Config) -> Task:
    if {*config.img_sizes, config.resolved_test_size} != {labelled.IMAGE_SIZE}:
        raise UsageError("--img-sizes, --test-size: the classifier works on 32 x 32 pixels; want 32")
    train_set, test_set = labelled.open_datasets(config)
    model = build_model(config, len(train_set.class_names))
    return Task(
        config=config,
        class_names=train_set.class_names,
        anchors=None,
        model=model,
        criterion=ClassificationLoss(config.label_smoothing),
        count=lambda labels: torch.full((), float(len(labels)), device=labels.device),
        score=lambda results: results["accuracy"],
        train_set=train_set,
        train_samples=labelled_samples.TrainImages(train_set, config, config.seed),
        train_collate=labelled_samples.collate_images,
        test=_classification_test(config, test_set),
    )


def _open_classification_test(config: Config, class_names: Sequence[str], anchors: Tensor | None) -> Test:
    return _classification_test(config, labelled.open_dataset(config, config.split, class_names))


def _classification_test(config: Config, test_set: Any) -> Test:
    return Test(
        dataset=test_set,
        loader="single images",
        samples=labelled_samples.TestImages(test_set),
        collate=labelled_samples.collate_images,
        metrics=lambda full: ClassificationMetrics(test_set.class_names),
        picture=lambda predict: _draw_classes(test_set, predict),
    )


def _postprocess(
    config: Config, outputs: Any, anchors: Tensor, score_threshold: float, *, all_classes: bool = False
) -> list[dict[str, Tensor]]:
    return postprocess(
        outputs,
        anchors.to(outputs[0].device),
        score_threshold=score_threshold,
        iou_threshold=config.iou_threshold,
        max_detections=config.max_detections,
        all_classes=all_classes,
        nms=config.nms,
        class_loss=config.loss_settings.class_loss,
    )


def _draw_detections(
    config: Config, anchors: Tensor, test_set: Any, predict: Callable[[Tensor], Any]
) -> np.ndarray:
    """Draw the first test images with what the model finds in them."""
    samples = TestSamples(test_set, config.resolved_test_size)
    images, _ = plain_collate([samples[i] for i in range(min(PICTURES, len(test_set)))])
    found = _postprocess(config, predict(images), anchors, SHOWN_SCORE)
    drawn = [
        draw_boxes(
            image.permute(1, 2, 0).numpy(),
            detection["boxes"].cpu().numpy(),
            detection["labels"].tolist(),
            test_set.class_names,
            detection["scores"].tolist(),
        )
        for image, detection in zip(images, found, strict=True)
    ]
    return _tile(drawn)


def _draw_classes(test_set: Any, predict: Callable[[Tensor], Any]) -> np.ndarray:
    """Show the first test images, framed green where the model is right and red where it is wrong."""
    samples = labelled_samples.TestImages(test_set)
    images, labels = labelled_samples.collate_images(
        [samples[i] for i in range(min(PICTURES, len(test_set)))]
    )
    right = (predict(images).argmax(-1).cpu() == labels).tolist()
    frames = [(40, 170, 80) if hit else (220, 50, 50) for hit in right]
    return _tile(
        [
            cv2.copyMakeBorder(image.permute(1, 2, 0).numpy(), 3, 3, 3, 3, cv2.BORDER_CONSTANT, value=color)
            for image, color in zip(images, frames, strict=True)
        ]
    )


def _tile(pictures: Sequence[np.ndarray]) -> np.ndarray:
    grid = make_grid([torch.from_numpy(picture).permute(2, 0, 1) for picture in pictures], nrow=4, padding=2)
    return grid.permute(1, 2, 0).numpy()


def _product_of_accuracies(results: Mapping[str, Any]) -> float:
    names = ("class_accuracy", "no_object_accuracy_at_0.5", "object_accuracy_at_0.5")
    product = 1.0
    for name in names:
        product *= results[name] or 0.0
    return product
