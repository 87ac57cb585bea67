"""Explanations as pictures: an image with its detections or classes, beside their heat maps."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from yolo.data.dataset import read_rgb
from yolo.errors import UsageError, UserError
from yolo.explain import cam
from yolo.explain.cam import OPACITY, CamSettings, Explanation, Trace, trace_picture
from yolo.files import replacing
from yolo.inference.predict import Detections, Detector
from yolo.metrics.report import SHOWN_SCORE
from yolo.models.resnet import ResNet
from yolo.runs.checkpoint import LoadedWeights
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

    cams: tuple[CamSettings, ...]  # a panel for each
    box: int | None = 0  # which detection, counted from the most confident; None: all
    label: int | None = None  # this class: over the whole image, or of the missed object
    missed: tuple[float, ...] | None = None  # xyxy pixels of an object that was not found
    score_threshold: float = SHOWN_SCORE  # of a detection
    opacity: float = OPACITY


class Answer(NamedTuple):
    """A heat map, what it is of, and the box [4] that it explains."""

    what: str
    box: np.ndarray | None
    explanation: Explanation


def make_panels(loaded: LoadedWeights, path: Path, question: Question) -> list[Panel]:
    """Return a picture with what the model finds in it, then one panel for each answer and method.

    Raises:
        UserError: if the picture cannot be read, there is no such detection, or the missed box is
            outside of the image.
        UsageError: for an unknown method, target or layer, or a question that a classifier cannot
            answer.
    """
    image = read_rgb(path)
    if loaded.anchors is None:
        return _classifier_panels(loaded, image, question)
    return _detector_panels(Detector(loaded), path, image, question)


def _detector_panels(
    detector: Detector, path: Path, image: np.ndarray, question: Question
) -> list[Panel]:
    """Without any detection the whole-image map of the likeliest class is the answer."""
    trace = trace_picture(detector.loaded, path)
    found = detector.read_outputs(
        trace.outputs, [(trace.height, trace.width)], score_threshold=question.score_threshold
    )[0]
    class_names = detector.loaded.class_names
    drawn, factor = _enlarge(image)
    picture = draw_boxes(
        drawn, found.boxes * factor, found.labels.tolist(), class_names, found.scores.tolist()
    )
    count = f"{len(found)} detection" + "s" * (len(found) != 1)
    panels = [Panel(f"{count}\nwith a score of at least {question.score_threshold:g}", picture)]
    for settings in question.cams:
        for what, box, explanation in _answers(trace, detector.anchors, found, question, settings):
            picture = _paint(image, explanation, question.opacity)
            if box is not None:
                picture = draw_boxes(picture, box[None] * factor, [explanation.label], class_names)
            panels.append(
                Panel(_title(explanation, f"{what} {class_names[explanation.label]}"), picture)
            )
    return panels


def _classifier_panels(loaded: LoadedWeights, image: np.ndarray, question: Question) -> list[Panel]:
    assert isinstance(loaded.model, ResNet)
    if question.missed is not None:
        raise UsageError("--missed: a classifier has no boxes; give a detector as --checkpoint")
    probabilities = cam.classify(loaded.model, image)
    best = probabilities.argsort(descending=True)[:TOP_CLASSES].tolist()
    classes = ", ".join(
        f"{loaded.class_names[label]} {float(probabilities[label]):.0%}" for label in best
    )
    panels = [Panel(f"classified as\n{classes}", _enlarge(image)[0])]
    label = best[0] if question.label is None else question.label
    for settings in question.cams:
        explanation = cam.explain_classification(loaded.model, image, label, settings)
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
    trace: Trace, anchors: Tensor, found: Detections, question: Question, settings: CamSettings
) -> list[Answer]:
    if question.missed is not None and question.label is not None:
        box = _inside(question.missed, trace)
        missed = cam.explain_missed(trace, torch.from_numpy(box), question.label, anchors, settings)
        return [Answer("missed", box, missed)]
    if question.label is not None:
        return [Answer("whole picture,", None, cam.explain_class(trace, question.label, settings))]
    if not len(found):
        whole = cam.explain_class(trace, cam.likeliest_class(trace), settings)
        return [Answer("nothing detected; whole picture,", None, whole)]
    if question.box is not None and question.box >= len(found):
        raise UserError(f"--box {question.box}: there are {len(found)} detections, counted from 0")
    which = list(range(len(found))) if question.box is None else [question.box]
    maps = cam.explain_detections(
        trace, found.index[which].tolist(), found.labels[which].tolist(), settings
    )
    return [Answer(f"box {i}:", found.boxes[i], one) for i, one in zip(which, maps, strict=True)]


def _inside(missed: tuple[float, ...], trace: Trace) -> np.ndarray:
    box = np.asarray(missed, np.float32)
    middle = (box[:2] + box[2:]) / 2
    if not (
        (box[2:] > box[:2]).all()
        and (middle >= 0).all()
        and (middle < (trace.width, trace.height)).all()
    ):
        shown = ",".join(f"{value:g}" for value in missed)
        size = f"{trace.width}x{trace.height}"
        raise UsageError(
            f"--missed {shown}: is no left,top,right,bottom in this picture of {size} pixels"
        )
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
    line = f"score {explanation.score:.2g}, {explanation.layer}"
    if explanation.is_zero:
        line = f"all zero: nothing at {explanation.layer} raises it"
    return f"{explanation.method} of {explanation.target}, {what}\n{line}"
