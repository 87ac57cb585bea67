"""From a configuration to its network."""

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from yolo.config import Config
from yolo.models.resnet import ResNet
from yolo.models.yolov3 import YoloV3

T = TypeVar("T")


def by_task(task: str, *, detection: T, classification: T) -> T:
    """Return what belongs to a task."""
    return {"detection": detection, "classification": classification}[task]


def build_model(config: Config, num_classes: int) -> nn.Module:
    """Return the untrained network of a configuration."""
    network: Callable[[int, float], nn.Module]
    network = by_task(config.task, detection=YoloV3, classification=ResNet)
    return network(num_classes, config.width)
