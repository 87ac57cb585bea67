"""The Picture tab: a picture, its detections, and beside them the heat map of one."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import gradio as gr

from yolo.app.about import literal
from yolo.app.detector import (
    COLUMNS,
    Detection,
    DetectionExplainer,
    Thresholds,
    View,
    at_point,
    draw_detections,
    draw_map,
    to_csv,
    to_json,
    to_rows,
)
from yolo.app.samples import SampleSet
from yolo.app.uploads import Picture, read_picture
from yolo.app.widgets import (
    METHOD_CHOICES,
    METHOD_NAMES,
    QUEUE,
    RESULT,
    SCALE_BAR,
    Updates,
    ask_for_picture,
    clear_on_failure,
    map_notes,
    picture_input,
    samples_gallery,
    store_file,
    store_image,
)
from yolo.explain.cam import DETECTOR_CAM, DETECTOR_METHOD, OPACITY, CamSettings, Explanation
from yolo.metrics.report import SHOWN_SCORE

CACHED_SAMPLES = 32
TARGET_NAMES = {"class": "its class", "object": "that there is an object", "score": "both together"}
LAYER_NAMES = {"auto": "the box's own", "fused": "all of them, averaged"}


class DetectTab:
    """Components and handlers; instances live inside the `gr.Blocks` in which they are made.

    The handlers spell out their inputs because Gradio reads the parameter names of its public
    functions (`/detect`, `/filter`, `/explain`, ...) from them.
    """

    def __init__(self, detector: DetectionExplainer, samples: SampleSet | None) -> None:
        self.detector = detector
        self.samples = samples
        self.trace_sample = lru_cache(CACHED_SAMPLES)(self._trace_sample)
        self.view = gr.State(None, time_to_live=3600)
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                self.upload = picture_input()
                self.gallery = samples_gallery(samples)
            with gr.Column(scale=9, min_width=320):
                self._lay_out_results()
        self._wire()

    def on_open(self) -> Updates:
        """Show the first sample, so that nobody meets an empty page."""
        if not self.samples or not self.samples.samples:
            return gr.skip()
        view = self.trace_sample(0)
        thresholds = Thresholds(SHOWN_SCORE, self.detector.default_iou)
        return {self.view: view, **self._update(view, thresholds, DETECTOR_CAM, OPACITY)}

    def on_picture(
        self,
        picture: Picture | None,
        score: float,
        iou: float,
        method: str,
        target: str,
        layer: str,
        opacity: float,
    ) -> Updates:
        """Detect on a picture of the person's own, and explain the most confident box."""
        if picture is None:
            return gr.skip()
        view = self.detector.trace(picture)
        settings = CamSettings(method, target, layer)
        return {self.view: view, **self._update(view, Thresholds(score, iou), settings, opacity)}

    def on_sample(
        self,
        number: int,
        score: float,
        iou: float,
        method: str,
        target: str,
        layer: str,
        opacity: float,
    ) -> Updates:
        """Detect on a sample; the network runs once for each."""
        view = self.trace_sample(number)
        updates = self._update(
            view, Thresholds(score, iou), CamSettings(method, target, layer), opacity
        )
        return {self.upload: None, self.view: view, **updates}

    def on_thresholds(
        self,
        view: View | None,
        key: str | None,
        score: float,
        iou: float,
        method: str,
        target: str,
        layer: str,
        opacity: float,
    ) -> Updates:
        """Filter the predictions anew; the map changes only if its box is gone."""
        if view is None:
            return ask_for_picture()
        settings = CamSettings(method, target, layer)
        return self._update(view, Thresholds(score, iou), settings, opacity, key)

    def on_choice(
        self,
        view: View | None,
        key: str | None,
        score: float,
        iou: float,
        method: str,
        target: str,
        layer: str,
        opacity: float,
    ) -> Updates:
        """Explain what is chosen in the list, with the method and layer of the menus."""
        if view is None:
            return ask_for_picture()
        detections = self.detector.detections(view, Thresholds(score, iou))
        chosen = _by_key(detections, key) or detections[0]
        return self._explain(view, detections, chosen, CamSettings(method, target, layer), opacity)

    def on_click(
        self,
        view: View | None,
        key: str | None,
        score: float,
        iou: float,
        method: str,
        target: str,
        layer: str,
        opacity: float,
        click: gr.SelectData,
    ) -> Updates:
        """Explain the box under the pointer."""
        if view is None:
            return ask_for_picture()
        detections = self.detector.detections(view, Thresholds(score, iou))
        x, y = (edge / view.zoom for edge in click.index)
        chosen = at_point(detections, x, y)
        if chosen is None:
            return gr.skip()
        settings = CamSettings(method, target, layer)
        return {self.list: chosen.key, **self._explain(view, detections, chosen, settings, opacity)}

    def _trace_sample(self, number: int) -> View:
        assert self.samples is not None
        sample = self.samples.samples[number]
        return self.detector.trace(
            read_picture(self.samples.folder / sample.file), sample.annotation
        )

    def _update(
        self,
        view: View,
        thresholds: Thresholds,
        settings: CamSettings,
        opacity: float,
        key: str | None = None,
    ) -> Updates:
        """Update list, table and files; explain anew unless the detection `key` is still there."""
        names = self.detector.class_names
        detections = self.detector.detections(view, thresholds)
        kept = _by_key(detections, key)
        chosen = kept or detections[0]
        csv, json = to_csv(view, detections, names), to_json(view, detections, names, thresholds)
        updates = {
            self.list: gr.Radio(
                [(_title(one, names), one.key) for one in detections], value=chosen.key
            ),
            self.table: to_rows(view, detections, names),
            self.csv: store_file(csv.encode(), "detections.csv"),
            self.json: store_file(json.encode(), "detections.json"),
        }
        if kept is None:
            return updates | self._explain(view, detections, chosen, settings, opacity)
        return updates | {self.boxes: store_image(draw_detections(view, detections, names, chosen))}

    def _explain(
        self,
        view: View,
        detections: list[Detection],
        chosen: Detection,
        settings: CamSettings,
        opacity: float,
    ) -> Updates:
        layers = self.detector.layers(view, chosen)
        if settings.layer not in layers:
            settings = replace(settings, layer="auto")
        explanation = self.detector.explain(view, chosen, settings)
        names = self.detector.class_names
        return {
            self.boxes: store_image(draw_detections(view, detections, names, chosen)),
            self.map: gr.Image(
                store_image(draw_map(view, chosen, explanation, opacity)),
                label=f"{METHOD_NAMES[settings.method]} · {names[chosen.label]}",
            ),
            self.caption: _caption(chosen, names[chosen.label], explanation),
            self.layer: gr.Dropdown(
                [(_layer_name(layer, view), layer) for layer in layers], value=settings.layer
            ),
        }

    def _lay_out_results(self) -> None:
        with gr.Row():
            self.boxes = gr.Image(
                **RESULT | {"elem_classes": ["picture", "clickable"]},
                label="Detections",
                elem_id="boxes",
                alt_text="The picture with its detections",
            )
            self.map = gr.Image(
                **RESULT,
                label="Heat map",
                elem_id="map",
                alt_text="The heat map of the chosen detection",
            )
        self.caption = gr.Markdown(elem_classes="caption", elem_id="caption")
        gr.HTML(SCALE_BAR)
        self.list = gr.Radio(
            label="Explain: click a box in the picture, or choose here",
            elem_id="detections",
            elem_classes="detections",
        )
        with gr.Row():
            self.score = gr.Slider(
                0.05,
                0.95,
                SHOWN_SCORE,
                step=0.01,
                label="Confidence",
                elem_id="score",
                min_width=240,
            )
            iou, label = self.detector.default_iou, "Overlap at which two boxes are one"
            self.iou = gr.Slider(0.1, 0.9, iou, step=0.05, label=label, min_width=240)
        with gr.Row():
            self.method = gr.Dropdown(
                METHOD_CHOICES, value=DETECTOR_METHOD, label="Method", min_width=140
            )
            self.target = gr.Dropdown(
                [(name, target) for target, name in TARGET_NAMES.items()],
                value="class",
                label="What is explained",
                min_width=140,
            )
            self.layer = gr.Dropdown(
                [(LAYER_NAMES["auto"], "auto")], value="auto", label="Layer", min_width=140
            )
            self.opacity = gr.Slider(0.2, 1.0, OPACITY, step=0.05, label="Opacity", min_width=140)
        self.table = gr.Dataframe(
            headers=list(COLUMNS),
            interactive=False,
            label="Detections, in pixels of the original picture",
            elem_id="table",
            buttons=[],
        )
        with gr.Row():
            self.csv = gr.DownloadButton("Download CSV", size="sm", elem_id="csv")
            self.json = gr.DownloadButton("Download JSON", size="sm", elem_id="json")

    def _wire(self) -> None:
        controls: list[Any] = [
            self.score,
            self.iou,
            self.method,
            self.target,
            self.layer,
            self.opacity,
        ]
        mapped = [self.boxes, self.map, self.caption, self.layer]
        shown = [*mapped, self.list, self.table, self.csv, self.json]
        self.shown = [self.view, *shown]
        current = [self.view, self.list, *controls]
        quick: dict[str, Any] = {"trigger_mode": "always_last", "show_progress": "hidden", **QUEUE}
        uploaded = self.upload.change(
            self.on_picture, [self.upload, *controls], self.shown, api_name="detect", **QUEUE
        )
        clear_on_failure(uploaded, self.upload)
        self.gallery.click(
            self.on_sample,
            [self.gallery, *controls],
            [self.upload, *self.shown],
            api_name="sample",
            **QUEUE,
        )
        self.score.input(self.on_thresholds, current, shown, api_name="filter", **quick)
        self.iou.input(self.on_thresholds, current, shown, api_visibility="private", **quick)
        self.boxes.select(
            self.on_click, current, [self.list, *mapped], api_visibility="private", **QUEUE
        )
        self.list.input(self.on_choice, current, mapped, api_name="explain", **QUEUE)
        for control in controls[2:]:
            control.input(self.on_choice, current, mapped, api_visibility="private", **quick)


def _by_key(detections: Sequence[Detection], key: str | None) -> Detection | None:
    return next((one for one in detections if one.key == key), None)


def _title(detection: Detection, class_names: Sequence[str]) -> str:
    name = class_names[detection.label]
    if detection.kind == "picture":
        return f"{name} · whole picture"
    return f"{name} · missed" if detection.score is None else f"{name} · {detection.score:.0%}"


def _layer_name(layer: str, view: View) -> str:
    if layer in LAYER_NAMES:
        return LAYER_NAMES[layer]
    stride = int(layer.removeprefix("stride"))
    cells = view.trace.place.size // stride
    return f"stride {stride}: {cells} x {cells} cells"


def _caption(detection: Detection, name: str, explanation: Explanation) -> str:
    method, layer = METHOD_NAMES[explanation.method], explanation.layer
    name = literal(name)
    if detection.kind == "found":
        target = TARGET_NAMES[explanation.target]
        text = f"**{name}, {explanation.score:.0%}.** {method} of {target}, at {layer}."
    elif detection.kind == "missed":
        text = (
            f"**{name}, missed.** {method} where it should have been found, at {layer}; "
            f"its score there is {explanation.score:.1%}."
        )
    else:
        text = (
            f"**No detection with this confidence.** {method} of the likeliest class, {name}, over "
            f"the whole picture, at {layer}; its best score is {explanation.score:.1%}."
        )
    return text + map_notes(explanation)
