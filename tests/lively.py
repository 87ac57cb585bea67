"""A detector that finds something without having been trained."""

from pathlib import Path

import torch

from yolo.config import Config, anchor_sizes
from yolo.models.yolov3 import YoloV3, make_anchors
from yolo.runs.checkpoint import LoadedWeights

DIGITS = tuple("0123456789")


def lively_detector(width: float = 0.125, size: int = 128) -> LoadedWeights:
    """An untrained detector with raw outputs spread like a trained one's: it finds things."""
    torch.manual_seed(0)
    config = Config(width=width, img_sizes=(size,), test_size=size)
    model = YoloV3(len(DIGITS), width).eval()
    spread = torch.tensor(
        [0.5] * 4 + [1.5] + [3.0] * len(DIGITS)
    )  # of tx ty tw th, objectness, classes
    with torch.no_grad():
        outputs = model(torch.rand(4, 3, size, size))
        for head, output in zip(model.heads, outputs, strict=True):
            factor = spread / output.std((0, 2, 3))  # [A, 5 + C]
            head[-1].weight *= factor.view(-1, 1, 1, 1)
            head[-1].bias.copy_(
                ((head[-1].bias.view(3, -1) - output.mean((0, 2, 3))) * factor).view(-1)
            )
            head[-1].bias.view(3, -1)[:, 4] -= 2  # most cells hold nothing
    anchors = make_anchors(anchor_sizes(config.anchors), config.resolved_test_size)
    return LoadedWeights(model, config, DIGITS, anchors, {}, "0" * 16, Path("detector.safetensors"))
