"""Explanations as pictures: what the model says about an image, and beside it the heat map of each answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from yolo.boxes import boxes_from_letterbox
from yolo.errors import UsageError, UserError
from yolo.explain import cam
from yolo.explain.cam import Explanation, Trace
from yolo.files import replacing
from yolo.models.resnet import ResNet
from yolo.models.yolov3 import YoloV3
from yolo.runs.checkpoint import LoadedWeights
from yolo.tasks.detection import detect
from yolo.viz.draw import draw_boxes

SHARP_SIDE = 480  # pixels: smaller images are enlarged to this, so that lines and text are sharp
PANELS_PER_ROW = 4
TOP_CLASSES = 3


class Panel(NamedTuple):
    """A picture [H, W, 3] uint8 RGB and what it shows."""

    title: str
    picture: np.ndarray


@dataclass(frozen=True)
class Question:
    """What to explain about an image."""

    methods: tuple[str, ...]
    target: str = "class"
    layer: str = "auto"
    box: int | None = 0  # which detection, counted from the most confident; None: all
    label: int | None = None  # this class: over the whole image, or of the missed object
    missed: tuple[float, ...] | None = None  # xyxy pixels of an object that was not found
    score_threshold: float = 0.3  # of a detection
    opacity: float = 0.7


def detector_panels(loaded: LoadedWeights, image: np.ndarray, question: Question) -> list[Panel]:
    """Return the image with its detections, then one panel for each answer and method.

    Without any detection the whole-image map of the likeliest class is the answer.

    Raises:
        UserError: if there is no such detection or the missed box lies outside of the image.
        UsageError: for an unknown method, target or layer.
    """
    assert isinstance(loaded.model, YoloV3) and loaded.anchors is not None
    trace = cam.trace_detector(loaded.model, image, loaded.test_size)
    [found] = detect(loaded.config, trace.outputs, loaded.anchors, question.score_threshold)
    boxes = boxes_from_letterbox(found["boxes"], trace.place, trace.height, trace.width).cpu().numpy()
    labels, scores = found["labels"].tolist(), found["scores"].tolist()
    drawn, factor = _enlarge(image)
    seen = draw_boxes(drawn, boxes * factor, labels, loaded.class_names, scores)
    count = f"{len(boxes)} detection" + "s" * (len(boxes) != 1)
    panels = [Panel(f"{count}\nwith a score of at least {question.score_threshold:g}", seen)]
    for method in question.methods:
        for what, box, answer in _answers(trace, loaded.anchors, found, boxes, question, method):
            name = loaded.class_names[answer.label]
            picture = _paint(image, answer, question.opacity)
            if box is not None:
                picture = draw_boxes(picture, box[None] * factor, [answer.label], loaded.class_names)
            panels.append(Panel(_title(answer, f"{what} {name}"), picture))
    return panels


def classifier_panels(loaded: LoadedWeights, image: np.ndarray, question: Question) -> list[Panel]:
    """Return the image with its likeliest classes, then per method the map of the asked or likeliest one.

    Raises:
        UsageError: for an unknown method or layer, or if the question is about a missed object.
    """
    assert isinstance(loaded.model, ResNet)
    if question.missed is not None:
        raise UsageError("--missed: a classifier has no boxes; give a detector as --checkpoint")
    probabilities = cam.classify(loaded.model, image)
    best = probabilities.argsort(descending=True)[:TOP_CLASSES].tolist()
    said = ", ".join(f"{loaded.class_names[label]} {float(probabilities[label]):.0%}" for label in best)
    panels = [Panel(f"classified as\n{said}", _enlarge(image)[0])]
    label = best[0] if question.label is None else question.label
    for method in question.methods:
        explanation = cam.explain_classification(
            loaded.model, image, label, method=method, layer=question.layer
        )
        picture = _paint(image, explanation, question.opacity)
        panels.append(Panel(_title(explanation, loaded.class_names[label]), picture))
    return panels


def save_panels(panels: Sequence[Panel], path: Path) -> None:
    """Write panels side by side as one PNG.

    Raises:
        UserError: if the file cannot be written.
    """
    columns = min(len(panels), PANELS_PER_ROW)
    rows = -(-len(panels) // columns)
    height, width = panels[0].picture.shape[:2]
    figure = Figure((4 * columns, (4 * height / width + 0.6) * rows), layout="constrained", dpi=140)
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.imshow(panel.picture)
        axes.set_title(panel.title, fontsize=9)
        axes.axis("off")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            FigureCanvasAgg(figure).print_png(temporary)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror})") from None


def _answers(
    trace: Trace,
    anchors: torch.Tensor,
    found: dict[str, torch.Tensor],
    boxes: np.ndarray,
    question: Question,
    method: str,
) -> list[tuple[str, np.ndarray | None, Explanation]]:
    """Return what is asked as (words, its box, its map)."""
    if question.missed is not None and question.label is not None:
        box = _inside(question.missed, trace)
        missed = cam.explain_missed(
            trace,
            torch.from_numpy(box),
            question.label,
            anchors,
            method=method,
            target=question.target,
            layer=question.layer,
        )
        return [("missed", box, missed)]
    if question.label is not None:
        whole = cam.explain_class(trace, question.label, method=method, layer=question.layer)
        return [("whole picture,", None, whole)]
    if not len(boxes):
        label = cam.likeliest_class(trace.outputs)
        whole = cam.explain_class(trace, label, method=method, layer=question.layer)
        return [("nothing detected; whole picture,", None, whole)]
    if question.box is not None and question.box >= len(boxes):
        raise UserError(f"--box {question.box}: there are {len(boxes)} detections, counted from 0")
    which = range(len(boxes)) if question.box is None else [question.box]
    maps = cam.explain_detections(
        trace, found, which, method=method, target=question.target, layer=question.layer
    )
    return [(f"box {i}:", boxes[i], answer) for i, answer in zip(which, maps, strict=True)]


def _inside(missed: tuple[float, ...], trace: Trace) -> np.ndarray:
    box = np.asarray(missed, np.float32)
    middle = (box[:2] + box[2:]) / 2
    if not (
        (box[2:] > box[:2]).all() and (middle >= 0).all() and (middle < (trace.width, trace.height)).all()
    ):
        shown = ",".join(f"{value:g}" for value in missed)
        size = f"{trace.width}x{trace.height}"
        raise UsageError(f"--missed {shown}: is no left,top,right,bottom in this picture of {size} pixels")
    return box


def _enlarge(image: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the image at a size at which lines are sharp, and by how much it grew."""
    factor = max(1.0, SHARP_SIDE / max(image.shape[:2]))
    return cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC), factor


def _paint(image: np.ndarray, explanation: Explanation, opacity: float) -> np.ndarray:
    large, _ = _enlarge(image)
    heat = cv2.resize(explanation.heat, large.shape[1::-1])
    return cam.overlay(large, heat, opacity)


def _title(explanation: Explanation, what: str) -> str:
    said = f"score {explanation.score:.2g}, {explanation.layer}"
    if explanation.is_zero:
        said = f"all zero: nothing at {explanation.layer} speaks for it"
    return f"{explanation.method} of {explanation.target}, {what}\n{said}"
