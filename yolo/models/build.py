"""From a configuration to its network."""

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
    if config.task == "classification":
        return ResNet(num_classes, config.width)
    return YoloV3(num_classes, config.width, config.backbone)
