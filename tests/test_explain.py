import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from yolo.boxes import letterbox
from yolo.config import COCO_ANCHORS
from yolo.explain import (
    METHODS,
    Cell,
    Trace,
    explain_cells,
    trace_detector,
)
from yolo.models.yolov3 import YoloV3, make_anchors

SIZE = 320
CLASSES = 4
ANCHORS = make_anchors(COCO_ANCHORS, SIZE)


@pytest.fixture(scope="module")
def model() -> YoloV3:
    """A narrow detector whose heads and normalisations are random enough to give every map some life."""
    torch.manual_seed(0)
    model = YoloV3(CLASSES, width=0.125).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.bias, -0.3, 0.3)
    for head in model.heads:
        nn.init.normal_(head[-1].weight, std=0.2)
    return model


@pytest.fixture(scope="module")
def canvas() -> Tensor:
    return torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def trace(model: YoloV3, canvas: Tensor) -> Trace:
    return trace_detector(model, canvas, letterbox(SIZE, SIZE, SIZE), SIZE, SIZE)


class InsertedIdentity(nn.Module):
    """The whole detector with an identity before one neck, and one scale's output: the library's naive use."""

    def __init__(self, model: YoloV3, start: int, end: int) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        self.layer = nn.Identity()
        self.model.necks[start] = nn.Sequential(self.layer, self.model.necks[start])
        self.end = end

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)[self.end]


def naive_map(method: str, model: YoloV3, canvas: Tensor, start: int, cell: Cell, label: int) -> np.ndarray:
    whole = InsertedIdentity(model, start, cell.scale)
    cam = METHODS[method](whole, [whole.layer])
    return cam(canvas, [lambda output: output[cell.anchor, cell.row, cell.column, 5 + label]])[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("cell", "layer", "start"),
    [
        (Cell(0, 1, 4, 5), "auto", 0),
        (Cell(0, 0, 0, 9), "stride32", 0),  # in a corner: the window is shifted into the map
        (Cell(1, 2, 19, 3), "auto", 1),
        (Cell(2, 0, 20, 39), "auto", 2),
        (Cell(2, 0, 20, 11), "stride32", 0),  # two scales upstream
    ],
)
def test_a_map_equals_the_library_on_the_whole_model(method, cell, layer, start, model, canvas, trace):
    [explanation] = explain_cells(trace, [cell], [1], method, "class", layer)
    np.testing.assert_allclose(
        explanation.heat, naive_map(method, model, canvas, start, cell, 1), rtol=0, atol=2e-3
    )
