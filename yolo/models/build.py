"""From a configuration to its network."""

from torch import nn

from yolo.config import Config
from yolo.models.resnet import ResNet
from yolo.models.yolov3 import YoloV3


def build_model(config: Config, num_classes: int) -> nn.Module:
    """Return the untrained network of a configuration."""
    if config.task == "classification":
        return ResNet(num_classes, config.width)
    return YoloV3(num_classes, config.width, config.backbone)
