"""How long explaining the boxes of an image takes: here, and by the library on the whole model."""

import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from pytorch_grad_cam import GradCAM
from torch import Tensor, nn

from yolo.data.images import letterboxed
from yolo.explain import cam
from yolo.models.yolov3 import STRIDES, YoloV3

CLASSES = 20


def lines(width: float, size: int, boxes: int, repeats: int) -> Iterator[str]:
    """Yield a table: one forward with `boxes` explained boxes, spread over the three scales."""
    model = YoloV3(CLASSES, width).eval().to(memory_format=torch.channels_last)
    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    cells = [cam.Cell(i % 3, 0, *[size // STRIDES[i % 3] // 2] * 2) for i in range(boxes)]

    def answer(method: str, layer: str = "auto") -> None:
        trace = cam.trace_detector(model, image, size)
        cam.explain_cells(trace, cells, [0] * boxes, cam.CamSettings(method, layer=layer))

    threads = torch.get_num_threads()
    yield f"{threads} threads, {size} pixels, width {width:g}, {boxes} boxes; median of {repeats}"
    yield (
        f"{_seconds(lambda: cam.trace_detector(model, image, size), repeats):8.2f} s  "
        "the forward alone"
    )
    for method in cam.METHODS:
        yield (
            f"{_seconds(lambda m=method: answer(m), repeats):8.2f} s  "  # type: ignore
            f"forward and boxes, {method}"
        )
    yield (
        f"{_seconds(lambda: answer('gradcam', 'fused'), repeats):8.2f} s  "
        "the same with fused layers"
    )
    whole = WholeModel(model)
    once = _seconds(lambda: whole.explain(letterboxed(image, size).image[None] / 255), repeats)
    yield f"{once * boxes:8.2f} s  the library on the whole model: {boxes} calls of {once:.2f} s"


class WholeModel(nn.Module):
    """The detector as the library is usually used: gradients through everything, once per box."""

    def __init__(self, model: YoloV3) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)[0]

    def explain(self, images: Tensor) -> None:
        cam = GradCAM(self, [self.model.backbone.stages[-1]])
        cam(images, [lambda output: output[0, 0, 0, 5]])
        cam.activations_and_grads.release()


def _seconds(work: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):  # the first one warms up
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))
