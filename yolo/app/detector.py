"""What the Picture tab computes: one forward per picture, from which all else follows."""

import csv
import dataclasses
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import torch

from yolo.app.uploads import Picture
from yolo.boxes import boxes_to_letterbox
from yolo.data.dataset import Annotation
from yolo.explain.cam import (
    CamSettings,
    Explanation,
    Trace,
    cell_of,
    explain_class,
    explain_detections,
    explain_missed,
    likeliest_class,
    overlay,
    responsible_cell,
    trace_picture,
)
from yolo.inference.fast import fuse
from yolo.inference.predict import Detections, Detector
from yolo.metrics import matching
from yolo.metrics.matching import Objects, match_voc
from yolo.models.yolov3 import STRIDES
from yolo.runs.checkpoint import LoadedWeights
from yolo.viz.draw import class_color, draw_boxes

# pixels: the longest side on the screen; small pictures are enlarged so that text stays sharp
SHOWN_SIDE = 960
MAX_DETECTIONS = 100
COLUMNS = ("status", "class", "score", "left", "top", "right", "bottom")
FOUND_IOU = 0.5  # an annotated object that no detection of its class overlaps this much was missed


@dataclass(frozen=True)
class Thresholds:
    """What counts as a detection."""

    score: float
    iou: float  # non-maximum suppression


@dataclass(frozen=True, eq=False)
class Detection:
    """What can be explained: a detection, an object that was missed, or the whole picture."""

    kind: Literal["found", "missed", "picture"]
    index: int  # found: among all predictions; missed: among the annotated objects
    label: int
    score: float | None  # of what was found
    box: np.ndarray | None  # [4] xyxy, pixels of the view

    @property
    def key(self) -> str:
        """A name that stays the same when thresholds move; it ends with the label."""
        return f"{self.kind}-{self.index}-{self.label}"

    @property
    def area(self) -> float:
        """Of its box; 0 without one."""
        return 0.0 if self.box is None else float(np.prod(self.box[2:] - self.box[:2]))


@dataclass(frozen=True, eq=False)
class View:
    """One picture and the trace of the network on it."""

    picture: Picture
    shown: np.ndarray  # [H, W, 3] uint8, the picture at the size of the screen
    trace: Trace
    annotation: Annotation | None  # in pixels of the original

    @property
    def zoom(self) -> float:
        """Pixels on the screen per pixel of the picture."""
        return self.shown.shape[1] / self.picture.pixels.shape[1]


class DetectionExplainer:
    """A trained detector and its heat maps; all methods may run in several threads at once."""

    def __init__(self, loaded: LoadedWeights) -> None:
        fused = fuse(loaded.model)  # an eighth faster
        self.detector = Detector(dataclasses.replace(loaded, model=fused))
        self.anchors = self.detector.anchors
        self.class_names = loaded.class_names
        self.default_iou = loaded.config.iou_threshold
        self.default_score = min(max(round(loaded.confidence, 2), 0.05), 0.95)

    def trace(self, picture: Picture, annotation: Annotation | None = None) -> View:
        """Run the network; nothing below does so again."""
        shown = resized(picture.pixels, SHOWN_SIDE)
        return View(picture, shown, trace_picture(self.detector.loaded, picture.pixels), annotation)

    def detections(self, view: View, thresholds: Thresholds) -> list[Detection]:
        """Return the detections by score (or else the whole picture), then the missed objects."""
        trace = view.trace
        [found] = self.detector.read_outputs(
            trace.outputs,
            [(trace.height, trace.width)],
            thresholds.score,
            thresholds.iou,
            MAX_DETECTIONS,
        )
        rows = zip(
            found.index.tolist(),
            found.labels.tolist(),
            found.scores.tolist(),
            found.boxes,
            strict=True,
        )
        detections = [Detection("found", *row) for row in rows]
        whole = [] if detections else [Detection("picture", 0, likeliest_class(trace), None, None)]
        return detections + whole + _missed(view, found)

    def explain(self, view: View, detection: Detection, settings: CamSettings) -> Explanation:
        """Return the heat map of a detection, over the view's picture.

        Raises:
            UsageError: for a layer that is not among `layers`.
        """
        label = detection.label
        if detection.kind == "picture":
            return explain_class(view.trace, label, settings)
        if detection.kind == "missed":
            box = torch.from_numpy(detection.box)
            return explain_missed(view.trace, box, label, self.anchors, settings)
        return explain_detections(view.trace, [detection.index], [label], settings)[0]

    def layers(self, view: View, detection: Detection) -> list[str]:
        """Return the layers upstream of a detection, the default first."""
        last = len(STRIDES) - 1
        if detection.kind == "found":
            last = cell_of(detection.index, view.trace.outputs).scale
        elif detection.kind == "missed":
            place = view.trace.place
            box = boxes_to_letterbox(torch.from_numpy(detection.box)[None], place)[0]
            last = responsible_cell(box, self.anchors, place.size).scale
        return ["auto", *(f"stride{stride}" for stride in STRIDES[: last + 1]), "fused"]


def at_point(detections: Sequence[Detection], x: float, y: float) -> Detection | None:
    """Return the detection with the smallest box around a point of the picture, or None."""
    around = [
        one
        for one in detections
        if one.box is not None and one.box[0] <= x < one.box[2] and one.box[1] <= y < one.box[3]
    ]
    return min(around, key=lambda one: one.area, default=None)


def draw_detections(
    view: View,
    detections: Sequence[Detection],
    class_names: Sequence[str],
    chosen: Detection | None = None,
) -> np.ndarray:
    """Draw detections with their scores, missed objects dashed, the chosen one framed."""
    found = [one for one in detections if one.kind == "found"]
    canvas = view.shown.copy()
    if chosen is not None and chosen.box is not None:
        left, top, right, bottom = _corners(view, chosen)
        width = _line_width(canvas)  # white just outside of its box
        frame = (left - width, top - width), (right + width, bottom + width)
        cv2.rectangle(canvas, *frame, (255, 255, 255), width)
    canvas = draw_boxes(
        canvas,
        np.array([one.box for one in found]).reshape(-1, 4) * view.zoom,
        [one.label for one in found],
        class_names,
        [one.score or 0.0 for one in found],
    )
    for one in detections:
        if one.kind == "missed":
            _dash(canvas, _corners(view, one))
    return canvas


def draw_map(
    view: View, detection: Detection, explanation: Explanation, opacity: float
) -> np.ndarray:
    """Paint a heat map over the picture, with the box that it explains."""
    heat = cv2.resize(explanation.heat, view.shown.shape[1::-1])
    canvas = overlay(view.shown, heat, opacity)
    if detection.kind == "missed":
        _dash(canvas, _corners(view, detection))
    elif detection.kind == "found":
        left, top, right, bottom = _corners(view, detection)
        cv2.rectangle(
            canvas, (left, top), (right, bottom), class_color(detection.label), _line_width(canvas)
        )
    return canvas


def to_json(
    view: View, detections: Sequence[Detection], class_names: Sequence[str], thresholds: Thresholds
) -> str:
    """Return detections and missed objects in pixels of the original, with the thresholds."""
    content = {
        "image": {"width": view.picture.width, "height": view.picture.height},
        "score_threshold": thresholds.score,
        "iou_threshold": thresholds.iou,
        "detections": [
            _record(view, one, class_names) for one in detections if one.kind == "found"
        ],
        "missed": [_record(view, one, class_names) for one in detections if one.kind == "missed"],
    }
    return json.dumps(content, indent=1)


def to_rows(
    view: View, detections: Sequence[Detection], class_names: Sequence[str]
) -> list[list[str | float]]:
    """Return one row per detection and missed object, in the order of `COLUMNS`."""
    records = [
        (one.kind, _record(view, one, class_names)) for one in detections if one.kind != "picture"
    ]
    return [
        [kind, record["class"], record.get("score", ""), *record["box"]] for kind, record in records
    ]


def to_csv(view: View, detections: Sequence[Detection], class_names: Sequence[str]) -> str:
    """Return the rows under a line of column names."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        [COLUMNS, *to_rows(view, detections, class_names)]
    )
    return text.getvalue()


def resized(pixels: np.ndarray, side: int) -> np.ndarray:
    """Return a picture whose longest side is `side` pixels."""
    zoom = side / max(pixels.shape[:2])
    size = tuple(max(1, round(edge * zoom)) for edge in pixels.shape[1::-1])
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if zoom < 1 else cv2.INTER_CUBIC)


def _record(view: View, detection: Detection, class_names: Sequence[str]) -> dict:
    assert detection.box is not None
    box = [round(float(edge), 1) for edge in detection.box * view.picture.scale]
    score = {} if detection.score is None else {"score": round(detection.score, 4)}
    return {"class": class_names[detection.label], **score, "box": box}


def _missed(view: View, found: Detections) -> list[Detection]:
    annotation = view.annotation
    if annotation is None or not len(annotation.boxes):
        return []
    boxes = annotation.boxes / np.float32(view.picture.scale)
    objects = Objects(
        np.zeros(len(boxes), np.int64), boxes, annotation.labels, annotation.difficult
    )
    of_image = matching.Detections(
        np.zeros(len(found), np.int64), found.boxes, found.scores, found.labels
    )
    hit = set(match_voc(of_image, objects, FOUND_IOU).objects[0].tolist())
    return [
        Detection("missed", i, int(annotation.labels[i]), None, boxes[i])
        for i in range(len(boxes))
        if i not in hit and not annotation.difficult[i]
    ]


def _corners(view: View, detection: Detection) -> tuple[int, int, int, int]:
    assert detection.box is not None
    left, top, right, bottom = (round(float(edge)) for edge in detection.box * view.zoom)
    return left, top, right - 1, bottom - 1


def _line_width(canvas: np.ndarray) -> int:
    return max(2, round(max(canvas.shape[:2]) / 240))


def _dash(canvas: np.ndarray, corners: tuple[int, int, int, int]) -> None:
    left, top, right, bottom = corners
    width = _line_width(canvas)
    for ink, thickness in (((0, 0, 0), width + 2), ((255, 255, 255), width)):
        for x in range(left, right, 6 * width):
            stop = min(x + 3 * width, right)
            cv2.line(canvas, (x, top), (stop, top), ink, thickness)
            cv2.line(canvas, (x, bottom), (stop, bottom), ink, thickness)
        for y in range(top, bottom, 6 * width):
            stop = min(y + 3 * width, bottom)
            cv2.line(canvas, (left, y), (left, stop), ink, thickness)
            cv2.line(canvas, (right, y), (right, stop), ink, thickness)
