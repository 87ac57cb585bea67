"""What the Detect tab computes: one forward per picture; lists, drawings and maps follow from its trace."""

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
from yolo.boxes import boxes_from_letterbox, boxes_to_letterbox
from yolo.data.dataset import Annotation
from yolo.explain.cam import (
    DETECTOR_METHOD,
    Explanation,
    Trace,
    cell_of,
    explain_class,
    explain_detections,
    explain_missed,
    likeliest_class,
    overlay,
    responsible_cell,
    trace_detector,
)
from yolo.inference.fast import fuse
from yolo.metrics.matching import Detections, Objects, match_voc
from yolo.models.yolov3 import STRIDES, YoloV3
from yolo.runs.checkpoint import LoadedWeights
from yolo.tasks.detection import detect
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


@dataclass(frozen=True)
class MapSettings:
    """How a heat map is made and shown."""

    method: str = DETECTOR_METHOD
    target: str = "class"
    layer: str = "auto"
    opacity: float = 0.7


@dataclass(frozen=True, eq=False)
class Finding:
    """Something that can be explained: a detection, an object that was missed, or the whole picture."""

    kind: Literal["found", "missed", "picture"]
    place: int  # found: among all predictions; missed: among the annotated objects
    label: int
    score: float | None  # of a detection
    box: np.ndarray | None  # [4] xyxy, pixels of the view

    @property
    def key(self) -> str:
        """A name that stays the same when thresholds move; it ends with the label."""
        return f"{self.kind}-{self.place}-{self.label}"


@dataclass(frozen=True, eq=False)
class View:
    """One picture that the detector has seen."""

    picture: Picture
    shown: np.ndarray  # [H, W, 3] uint8, the picture at the size of the screen
    trace: Trace
    annotation: Annotation | None  # in pixels of the original

    @property
    def zoom(self) -> float:
        """Pixels on the screen per pixel of the picture."""
        return self.shown.shape[1] / self.picture.pixels.shape[1]


class Detector:
    """A trained detector; all methods may run in several threads at once."""

    def __init__(self, loaded: LoadedWeights) -> None:
        assert isinstance(loaded.model, YoloV3) and loaded.anchors is not None
        self.model = fuse(loaded.model)  # an eighth faster
        self.anchors = loaded.anchors
        self.class_names = loaded.class_names
        self.size = loaded.test_size
        self.config = loaded.config
        self.default_iou = loaded.config.iou_threshold

    def look(self, picture: Picture, annotation: Annotation | None = None) -> View:
        """Run the network; nothing below does so again."""
        trace = trace_detector(self.model, picture.pixels, self.size)
        return View(picture, _at_screen_size(picture.pixels), trace, annotation)

    def findings(self, view: View, thresholds: Thresholds) -> list[Finding]:
        """Return the detections by falling score (or else the whole picture), then what was missed."""
        found = self._found(view, thresholds)
        if not found:
            label = likeliest_class(view.trace.outputs)
            found = [Finding("picture", 0, label, None, None)]
        return found + _missed(view, [finding for finding in found if finding.kind == "found"])

    def explain(self, view: View, finding: Finding, settings: MapSettings) -> Explanation:
        """Return the heat map of a finding, over the view's picture.

        Raises:
            UsageError: for a layer that is not among `layers`.
        """
        method, target, layer = settings.method, settings.target, settings.layer
        trace, label = view.trace, finding.label
        if finding.kind == "picture":
            return explain_class(trace, label, method=method, layer=layer)
        if finding.kind == "missed":
            box = torch.from_numpy(finding.box)
            return explain_missed(trace, box, label, self.anchors, method=method, target=target, layer=layer)
        detection = {"index": torch.tensor([finding.place]), "labels": torch.tensor([label])}
        return explain_detections(trace, detection, method=method, target=target, layer=layer)[0]

    def layers(self, view: View, finding: Finding) -> list[str]:
        """Return the layers upstream of a finding, the default first."""
        last = len(STRIDES) - 1 if finding.kind == "picture" else self._scale(view, finding)
        return ["auto", *(f"stride{stride}" for stride in STRIDES[: last + 1]), "fused"]

    def _scale(self, view: View, finding: Finding) -> int:
        if finding.kind == "found":
            return cell_of(finding.place, view.trace.outputs).scale
        box = boxes_to_letterbox(torch.from_numpy(finding.box)[None], view.trace.place)[0]
        return responsible_cell(box, self.anchors, view.trace.place.size).scale

    def _found(self, view: View, thresholds: Thresholds) -> list[Finding]:
        trace = view.trace
        config = dataclasses.replace(self.config, iou_threshold=thresholds.iou, max_detections=MAX_DETECTIONS)
        [detections] = detect(config, trace.outputs, self.anchors, thresholds.score)
        boxes = boxes_from_letterbox(detections["boxes"], trace.place, trace.height, trace.width)
        rows = zip(
            *(detections[key].tolist() for key in ("index", "labels", "scores")), boxes.numpy(), strict=True
        )
        return [Finding("found", *row) for row in rows]


def at_point(findings: Sequence[Finding], x: float, y: float) -> Finding | None:
    """Return the finding with the smallest box around a point of the picture, None if there is none."""
    hit = [
        finding
        for finding in findings
        if finding.box is not None
        and finding.box[0] <= x < finding.box[2]
        and finding.box[1] <= y < finding.box[3]
    ]
    return min(hit, key=_area, default=None)


def draw_findings(
    view: View, findings: Sequence[Finding], class_names: Sequence[str], chosen: Finding | None = None
) -> np.ndarray:
    """Draw detections with their scores, missed objects dashed, and a frame around the chosen one."""
    found = [finding for finding in findings if finding.kind == "found"]
    canvas = view.shown.copy()
    if chosen is not None and chosen.box is not None:
        _frame(canvas, _corners(view, chosen))
    canvas = draw_boxes(
        canvas,
        np.array([finding.box for finding in found]).reshape(-1, 4) * view.zoom,
        [finding.label for finding in found],
        class_names,
        [finding.score or 0.0 for finding in found],
    )
    for finding in findings:
        if finding.kind == "missed":
            _dash(canvas, _corners(view, finding))
    return canvas


def draw_map(view: View, finding: Finding, explanation: Explanation, opacity: float) -> np.ndarray:
    """Paint a heat map over the picture, with the box that it explains."""
    heat = cv2.resize(explanation.heat, view.shown.shape[1::-1])
    canvas = overlay(view.shown, heat, opacity)
    if finding.kind == "missed":
        _dash(canvas, _corners(view, finding))
    elif finding.kind == "found":
        left, top, right, bottom = _corners(view, finding)
        cv2.rectangle(canvas, (left, top), (right, bottom), class_color(finding.label), _line_width(canvas))
    return canvas


def to_json(
    view: View, findings: Sequence[Finding], class_names: Sequence[str], thresholds: Thresholds
) -> str:
    """Return detections and missed objects in pixels of the original picture, with what produced them."""
    content = {
        "image": {"width": view.picture.width, "height": view.picture.height},
        "score_threshold": thresholds.score,
        "iou_threshold": thresholds.iou,
        "detections": [_record(view, f, class_names) for f in findings if f.kind == "found"],
        "missed": [_record(view, f, class_names) for f in findings if f.kind == "missed"],
    }
    return json.dumps(content, indent=1)


def to_rows(view: View, findings: Sequence[Finding], class_names: Sequence[str]) -> list[list[str | float]]:
    """Return one row per detection and missed object, in the order of `COLUMNS`."""
    records = [(f.kind, _record(view, f, class_names)) for f in findings if f.kind != "picture"]
    return [[kind, record["class"], record.get("score", ""), *record["box"]] for kind, record in records]


def to_csv(view: View, findings: Sequence[Finding], class_names: Sequence[str]) -> str:
    """Return the rows under a line of column names."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *to_rows(view, findings, class_names)])
    return text.getvalue()


def _record(view: View, finding: Finding, class_names: Sequence[str]) -> dict:
    assert finding.box is not None
    box = [round(float(edge), 1) for edge in finding.box * view.picture.scale]
    score = {} if finding.score is None else {"score": round(finding.score, 4)}
    return {"class": class_names[finding.label], **score, "box": box}


def _missed(view: View, found: Sequence[Finding]) -> list[Finding]:
    note = view.annotation
    if note is None or not len(note.boxes):
        return []
    boxes = note.boxes / np.float32(view.picture.scale)
    objects = Objects(np.zeros(len(boxes), np.int64), boxes, note.labels, note.difficult)
    detections = Detections(
        np.zeros(len(found), np.int64),
        np.array([finding.box for finding in found]).reshape(-1, 4),
        np.array([finding.score for finding in found], float),
        np.array([finding.label for finding in found], np.int64),
    )
    seen = set(match_voc(detections, objects, FOUND_IOU).objects[0].tolist())
    return [
        Finding("missed", i, int(note.labels[i]), None, boxes[i])
        for i in range(len(boxes))
        if i not in seen and not note.difficult[i]
    ]


def _at_screen_size(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    zoom = SHOWN_SIDE / max(height, width)
    size = (max(1, round(width * zoom)), max(1, round(height * zoom)))
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if zoom < 1 else cv2.INTER_CUBIC)


def _area(finding: Finding) -> float:
    assert finding.box is not None
    return float((finding.box[2] - finding.box[0]) * (finding.box[3] - finding.box[1]))


def _corners(view: View, finding: Finding) -> tuple[int, int, int, int]:
    assert finding.box is not None
    left, top, right, bottom = (round(float(edge)) for edge in finding.box * view.zoom)
    return left, top, right - 1, bottom - 1


def _line_width(canvas: np.ndarray) -> int:
    return max(2, round(max(canvas.shape[:2]) / 240))


def _frame(canvas: np.ndarray, corners: tuple[int, int, int, int]) -> None:
    """Draw white just outside of a box."""
    left, top, right, bottom = corners
    width = _line_width(canvas)
    cv2.rectangle(
        canvas, (left - width, top - width), (right + width, bottom + width), (255, 255, 255), width
    )


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
