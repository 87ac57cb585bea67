"""Grad-CAM and its relatives: class activation maps of the detector and of the classifier.

The maps are pytorch-grad-cam's. The detector runs once (`trace_detector`); the library then sees
only a `Tail`, the part of the network from the explained layer up to one scale's output, fed the
traced map once per box: ten boxes cost one forward of the backbone, and no gradient enters it.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import cv2
import numpy as np
import torch
from pytorch_grad_cam import EigenCAM, GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM, XGradCAM
from pytorch_grad_cam.base_cam import BaseCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn
from torch.nn import functional

from yolo.boxes import Letterbox, boxes_to_letterbox, letterbox, shape_iou
from yolo.data.classifier_images import to_32
from yolo.data.images import letterboxed
from yolo.errors import UsageError
from yolo.models.resnet import ResNet
from yolo.models.yolov3 import STRIDES, YoloV3
from yolo.runs.checkpoint import LoadedWeights

Module = TypeVar("Module", bound=nn.Module)
# From raw predictions [..., 5 + C], or logits, to the number that is explained.
Value = Callable[[Tensor], Tensor]

METHODS: dict[str, type[BaseCAM]] = {
    "gradcam": GradCAM,
    "gradcam++": GradCAMPlusPlus,
    "xgradcam": XGradCAM,
    "hirescam": HiResCAM,
    "layercam": LayerCAM,
    "eigencam": EigenCAM,
}
# A detection draws on few cells. Grad-CAM averages its gradient over the whole map: it lights
# whatever has similar features anywhere, or nothing. HiResCAM (https://arxiv.org/abs/2011.08891)
# keeps the gradient of each cell. `gradcam.py --evaluate` measures the difference.
DETECTOR_METHOD = "hirescam"
CLASSIFIER_METHOD = "gradcam"
TARGET_BLIND = {"eigencam"}  # the same map for every target
TARGETS = ("class", "object", "score")
LAYERS = ("auto", *(f"stride{stride}" for stride in STRIDES), "fused")
CLASSIFIER_LAYERS = ("auto", "layer1", "layer2", "layer3", "fused")
BOXES_AT_ONCE = 16
OPACITY = 0.7  # of the hottest pixel of an overlay
REACH = 3  # cells: a neck and a head hold three 3x3 convolutions
ZERO = 1e-3  # the library divides a map by (peak + 1e-7): a quotient below this is rounding


@dataclass(frozen=True)
class CamSettings:
    """How a heat map is made."""

    method: str = DETECTOR_METHOD
    """One of `METHODS`."""
    target: str = "class"
    """What is differentiated: `class` (the logit of the label), `object` (the objectness logit) or
    `score` (the log of their product as probabilities). The logit of an only class is never
    trained: `object` takes its place."""
    layer: str = "auto"
    """`auto` is what enters the neck of the box's own scale; `stride32` and so on what enters that
    neck, if it is upstream of the box; `fused` the mean of all upstream ones. Of a classifier: one
    of `CLASSIFIER_LAYERS`; `auto` is the last map (4 x 4 cells), `fused` the mean of all."""


DETECTOR_CAM = CamSettings()
CLASSIFIER_CAM = CamSettings(CLASSIFIER_METHOD)


class Cell(NamedTuple):
    """One prediction: scale 0 (coarse) to 2 (fine), and its place in that scale's output."""

    scale: int
    anchor: int
    row: int
    column: int


@dataclass(frozen=True)
class Trace:
    """One forward of the detector over one letterboxed image, kept for its explanations."""

    model: YoloV3  # a frozen view: same weights, no gradients
    images: Tensor  # [1, 3, S, S] uint8, the letterboxed image
    neck_inputs: list[Tensor]  # [1, C, H, W] per scale
    outputs: list[Tensor]  # [1, A, H, W, 5 + C] per scale
    place: Letterbox
    height: int  # of the original image
    width: int


@dataclass(frozen=True)
class Explanation:
    """A heat map over the original image and what it is a map of."""

    heat: np.ndarray  # [height, width] float32 in [0, 1]; 1 is the peak, maybe in the padding
    is_zero: bool  # nothing raises the target: `heat` is zero everywhere
    method: str
    target: str  # what was differentiated: class, object or score
    layer: str  # where the map was taken, as in "stride 16"
    label: int
    score: float  # the model's for `label` at this prediction; of a classifier the probability


def trace_detector(model: YoloV3, source: str | Path | np.ndarray, size: int) -> Trace:
    """Run the detector once and keep what its explanations need.

    Args:
        model: on any device; neither its mode nor its gradients are touched.
        source: an image file, or pixels [H, W, 3] uint8 RGB, of any shape.
        size: side of the network input, to which the image is letterboxed.

    Returns:
        The trace; its `outputs` are the model's, ready for `to_detections`.
    """
    image, height, width = letterboxed(source, size)
    model = _frozen(model)
    with torch.no_grad():
        neck_inputs, outputs = model.trace(image[None].to(next(model.parameters()).device))
    place = letterbox(height, width, size)
    return Trace(model, image[None], neck_inputs, outputs, place, height, width)


def trace_picture(loaded: LoadedWeights, source: str | Path | np.ndarray) -> Trace:
    """As `trace_detector`, with the network and the size of a loaded detector."""
    assert isinstance(loaded.model, YoloV3)
    return trace_detector(loaded.model, source, loaded.test_size)


def explain_detections(
    trace: Trace, index: Sequence[int], labels: Sequence[int], settings: CamSettings = DETECTOR_CAM
) -> list[Explanation]:
    """Explain detections of the traced image.

    Args:
        trace: of the image.
        index: the place of each among all predictions, as `to_detections` returns it.
        labels: of each.
        settings: the method, the target and the layer.

    Raises:
        UsageError: for an unknown name, or a layer that is not upstream of a box.
    """
    return explain_cells(trace, [cell_of(i, trace.outputs) for i in index], labels, settings)


def explain_missed(
    trace: Trace, box: Tensor, label: int, anchors: Tensor, settings: CamSettings = DETECTOR_CAM
) -> Explanation:
    """Explain an object that was not found, at the prediction responsible for it.

    Args:
        trace: of the image.
        box: [4] xyxy in pixels of the original image.
        label: of the object.
        anchors: [3, A, 2] pixels of the network input.
        settings: as in `explain_detections`.
    """
    cell = responsible_cell(
        boxes_to_letterbox(box[None].float(), trace.place)[0], anchors, trace.place.size
    )
    return explain_cells(trace, [cell], [label], settings)[0]


def explain_cells(
    trace: Trace, cells: Sequence[Cell], labels: Sequence[int], settings: CamSettings = DETECTOR_CAM
) -> list[Explanation]:
    """Explain any predictions of the traced image; see `explain_detections`."""
    method, target = settings.method, settings.target
    _check(method, METHODS, "method")
    _check(target, TARGETS, "target")
    target = "object" if trace.model.num_classes == 1 and target == "class" else target
    values = [_cell_value(trace, label, target) for label in labels]
    starts = [_start_scales(settings.layer, cell.scale) for cell in cells]
    heats = np.zeros((len(cells), trace.place.size, trace.place.size), dtype=np.float32)
    # the boxes that end at one scale and start at one
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, cell in enumerate(cells):
        for start in starts[i]:
            groups[cell.scale, start].append(i)
    for (_, start), boxes in groups.items():
        heats[boxes] += _cell_maps(
            trace, start, [cells[i] for i in boxes], [values[i] for i in boxes], method
        )
    raws = [trace.outputs[cell.scale][0, cell.anchor, cell.row, cell.column] for cell in cells]
    scores = [float(_log_scores(raw)[label].exp()) for raw, label in zip(raws, labels, strict=True)]
    return [
        Explanation(*_in_original(heat, trace), method, target, _layer_name(start), label, score)
        for heat, start, label, score in zip(heats, starts, labels, scores, strict=True)
    ]


def explain_class(trace: Trace, label: int, settings: CamSettings = DETECTOR_CAM) -> Explanation:
    """Explain where the whole image raises the score of a class, detected or not.

    Per scale the explained value is the log of the class's scores summed over all cells; the maps
    of the scales are added, weighted by their share of that sum. `settings.layer` may name a single
    scale instead; `settings.target` has no say.

    Returns:
        The map; its `score` is the class's highest over all predictions.
    """
    method, layer = settings.method, settings.layer
    _check(method, METHODS, "method")
    scales = range(len(STRIDES)) if layer in ("auto", "fused") else [_scale_of(layer)]
    log_scores = [_log_scores(trace.outputs[scale])[..., label] for scale in scales]
    shares = torch.stack([values.logsumexp((0, 1, 2, 3)) for values in log_scores]).softmax(0)
    heat = np.zeros((trace.place.size, trace.place.size), dtype=np.float32)
    for scale, share in zip(scales, shares.tolist(), strict=True):
        value = [lambda raw: _log_scores(raw)[..., label].logsumexp(0)]
        heat += share * _tail_maps(trace, Tail(trace, scale, scale), value, method)[0]
    best = max(float(values.max().exp()) for values in log_scores)
    return Explanation(
        *_in_original(heat, trace), method, "score", _layer_name(scales), label, best
    )


def explain_classification(
    model: ResNet, image: np.ndarray, label: int, settings: CamSettings = CLASSIFIER_CAM
) -> Explanation:
    """Explain the logit of a class.

    Args:
        model: the classifier; neither its mode nor its gradients are touched.
        image: [H, W, 3] uint8 RGB, resized to 32 x 32 as for training.
        label: of the class.
        settings: the method and the layer; the target is always the class.

    Returns:
        The map; its `score` is the probability of the class.
    """
    method, layer = settings.method, settings.layer
    _check(method, METHODS, "method")
    _check(layer, CLASSIFIER_LAYERS, "layer")
    names = (
        CLASSIFIER_LAYERS[1:-1] if layer == "fused" else ["layer3" if layer == "auto" else layer]
    )
    frozen = _frozen(model)
    score = float(classify(frozen, image)[label])
    layers = [getattr(frozen, name) for name in names]
    pixels = _pixels_32(frozen, image).float() / 255
    heat = _run_library(method, frozen, layers, pixels, [ClassifierOutputTarget(label)])[0]
    is_zero = not heat.max() > ZERO
    heat = np.zeros_like(heat) if is_zero else cv2.resize(heat, image.shape[1::-1])
    return Explanation(heat, is_zero, method, "class", " + ".join(names), label, score)


def classify(model: ResNet, image: np.ndarray) -> Tensor:
    """Return the probability of each class [C] for an image [H, W, 3] uint8 RGB of any shape."""
    with torch.no_grad():
        return model(_pixels_32(model, image)).softmax(1)[0]


def cell_of(index: int, outputs: Sequence[Tensor]) -> Cell:
    """Return the prediction at place `index` of `decode`'s order: scale, anchor, row, column."""
    for scale, output in enumerate(outputs):
        size = output[0, ..., 0].numel()
        if index < size:
            return Cell(scale, *(int(i) for i in np.unravel_index(index, output.shape[1:4])))
        index -= size
    raise IndexError(f"prediction {index} beyond the last")


def responsible_cell(box: Tensor, anchors: Tensor, size: int) -> Cell:
    """Return the prediction responsible for an object: the best anchor's, in its centre's cell.

    Args:
        box: [4] xyxy in pixels of the network input.
        anchors: [3, A, 2] pixels.
        size: side of the network input.
    """
    best = int(shape_iou(box[2:] - box[:2], anchors.to(box)).argmax())
    scale, anchor = divmod(best, anchors.shape[1])
    last = size // STRIDES[scale] - 1
    column, row = (min(int(centre / STRIDES[scale]), last) for centre in (box[:2] + box[2:]) / 2)
    return Cell(scale, anchor, row, column)


def likeliest_class(trace: Trace) -> int:
    """Return the class of the highest score: what to explain when nothing was detected."""
    scores = [_log_scores(raw).flatten(0, -2).amax(0) for raw in trace.outputs]
    return int(torch.stack(scores).amax(0).argmax())


def from_letterbox(heat: np.ndarray, place: Letterbox, height: int, width: int) -> np.ndarray:
    """Cut the image out of a map [S, S] of the canvas and scale it to [height, width]."""
    inside = heat[place.top : place.top + place.height, place.left : place.left + place.width]
    return cv2.resize(inside, (width, height))


def overlay(image: np.ndarray, heat: np.ndarray, opacity: float = OPACITY) -> np.ndarray:
    """Paint a heat map over its image; where the heat is zero the image stays as it is.

    Args:
        image: [H, W, 3] uint8 RGB.
        heat: [H, W] in [0, 1].
        opacity: of the hottest pixel, in [0, 1]; it falls with the square root of the heat.

    Returns:
        [H, W, 3] uint8 RGB.
    """
    bright = (heat * (0.85 * 255)).astype(np.uint8)  # the colours end in a red too dark for a peak
    colors = cv2.applyColorMap(bright, cv2.COLORMAP_TURBO)[..., ::-1]
    alpha = opacity * np.sqrt(heat)[..., None]
    return (image * (1 - alpha) + colors * alpha).astype(np.uint8)


class Tail(nn.Module):
    """The detector from what enters the neck of scale `start` to raw predictions of scale `end`.

    It starts before the neck, where a prediction draws on 7 x 7 cells; one layer before the output
    HiResCAM and LayerCAM would collapse to the prediction's own cell.
    """

    def __init__(
        self, trace: Trace, start: int, end: int, cells: Sequence[Cell] | None = None
    ) -> None:
        super().__init__()
        self.layer = nn.Identity()
        self.model = trace.model
        self.neck_inputs = trace.neck_inputs
        self.start, self.end = start, end
        self.cells = cells

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to what `cells[i]` predicts in image i [N, 5 + C], or to all."""
        x = self.layer(x)
        for scale in range(self.start, self.end):
            carried = self.model.carry(scale, self.model.necks[scale](x))
            finer = self.neck_inputs[scale + 1][:, carried.shape[1] :]
            x = torch.cat([carried, finer.expand(len(x), -1, -1, -1)], dim=1)
        if self.cells is None:
            return self._predict(x).flatten(1, 3)
        x, rows, columns = _windows(x, self.cells)
        return self._predict(x)[range(len(x)), [cell.anchor for cell in self.cells], rows, columns]

    def _predict(self, x: Tensor) -> Tensor:
        return self.model.predict(self.end, self.model.necks[self.end](x))


def _windows(x: Tensor, cells: Sequence[Cell]) -> tuple[Tensor, list[int], list[int]]:
    """Cut out what each cell's prediction draws on; return it with the cells' rows and columns.

    The windows are shifted into the map, never padded, so the result is exact: what the cut borders
    get wrong lies too far from the cell to reach it through three 3x3 convolutions.
    """
    height, width = x.shape[2:]
    side_y, side_x = min(height, 2 * REACH + 1), min(width, 2 * REACH + 1)
    tops = [min(max(cell.row - REACH, 0), height - side_y) for cell in cells]
    lefts = [min(max(cell.column - REACH, 0), width - side_x) for cell in cells]
    windows = [
        image[:, top : top + side_y, left : left + side_x]
        for image, top, left in zip(x, tops, lefts, strict=True)
    ]
    rows = [cell.row - top for cell, top in zip(cells, tops, strict=True)]
    columns = [cell.column - left for cell, left in zip(cells, lefts, strict=True)]
    return torch.stack(windows).contiguous(memory_format=torch.channels_last), rows, columns


def _run_library(
    method: str,
    model: nn.Module,
    layers: Sequence[nn.Module],
    inputs: Tensor,
    values: Sequence[Value],
) -> np.ndarray:
    """Return the library's maps [N, H, W] at the resolution of `inputs`, of value i on input i."""
    cam = METHODS[method](model, list(layers))
    try:
        with torch.enable_grad():
            return cam(inputs.requires_grad_(), list(values))
    finally:
        cam.activations_and_grads.release()  # hooks and module hold each other: free the maps now


def _frozen(model: Module) -> Module:
    """Return a view in evaluation mode that shares the weights, without their gradients."""
    shared: dict[int, object] = {
        id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()
    }
    shared |= {id(buffer): buffer for buffer in model.buffers()}
    return copy.deepcopy(model, shared).eval()


def _pixels_32(model: ResNet, image: np.ndarray) -> Tensor:
    return torch.from_numpy(to_32(image)).permute(2, 0, 1)[None].to(next(model.parameters()).device)


def _cell_value(trace: Trace, label: int, target: str) -> Value:
    if target == "score":
        return lambda raw: _log_scores(raw)[..., label]
    return lambda raw: raw[4 if target == "object" else 5 + label]


def _log_scores(raw: Tensor) -> Tensor:
    """Return log(objectness x class probabilities) of raw predictions [..., 5 + C]: [..., C].

    Unlike that of the score its gradient does not die near 0 and 1.
    """
    return functional.logsigmoid(raw[..., 4:5]) + raw[..., 5:].log_softmax(-1)


def _cell_maps(
    trace: Trace, start: int, cells: Sequence[Cell], values: Sequence[Value], method: str
) -> np.ndarray:
    """Return [N, S, S], the maps at the neck of scale `start` for predictions of one scale."""
    if method in TARGET_BLIND and len(cells) > 1:
        return _cell_maps(trace, start, cells[:1], values[:1], method).repeat(len(cells), axis=0)
    maps = []
    for i in range(0, len(cells), BOXES_AT_ONCE):
        chunk = cells[i : i + BOXES_AT_ONCE]
        maps += _tail_maps(
            trace, Tail(trace, start, chunk[0].scale, chunk), values[i : i + BOXES_AT_ONCE], method
        )
    return np.stack(maps)


def _tail_maps(trace: Trace, tail: Tail, values: Sequence[Value], method: str) -> list[np.ndarray]:
    inputs = trace.neck_inputs[tail.start].repeat(len(values), 1, 1, 1)
    cams = _run_library(method, tail, [tail.layer], inputs, values)
    return [cv2.resize(cam, (trace.place.size, trace.place.size)) for cam in cams]


def _in_original(heat: np.ndarray, trace: Trace) -> tuple[np.ndarray, bool]:
    """Return a map of the canvas over the original image, its peak 1, and whether it is zero."""
    over_image = from_letterbox(heat, trace.place, trace.height, trace.width)
    is_zero = not over_image.max() > ZERO
    return np.zeros_like(over_image) if is_zero else over_image / heat.max(), is_zero


def _start_scales(layer: str, end: int) -> list[int]:
    if layer == "auto":
        return [end]
    if layer == "fused":
        return list(range(end + 1))
    start = _scale_of(layer)
    if start > end:
        upstream = ", ".join(f"stride{stride}" for stride in STRIDES[: end + 1])
        raise UsageError(
            f"layer {layer} does not feed this box, which comes from stride {STRIDES[end]}: "
            f"choose {upstream}"
        )
    return [start]


def _scale_of(layer: str) -> int:
    _check(layer, LAYERS, "layer")
    return STRIDES.index(int(layer.removeprefix("stride")))


def _layer_name(scales: Sequence[int]) -> str:
    return "stride " + " + ".join(str(STRIDES[scale]) for scale in scales)


def _check(name: str, known: Collection[str], what: str) -> None:
    if name not in known:
        raise UsageError(f"{what} {name}: choose from {', '.join(known)}")
