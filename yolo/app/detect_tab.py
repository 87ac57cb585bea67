"""The Picture tab: a picture, its detections, and beside them the heat map of one."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from json import loads
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
    METHOD_NAMES,
    QUEUE,
    RESULT,
    SCALE_BAR,
    Updates,
    ask_for_picture,
    clear_on_failure,
    gallery_update,
    map_notes,
    method_menu,
    opacity_slider,
    picture_input,
    samples_gallery,
    store_file,
    store_image,
    threshold_sliders,
)
from yolo.explain.cam import DETECTOR_CAM, DETECTOR_METHOD, OPACITY, CamSettings, Explanation

CACHED_SAMPLES = 32
TARGET_NAMES = {"class": "its name", "object": "that something is there", "score": "both together"}
LAYER_NAMES = {"auto": "as the box was found", "fused": "all of them, averaged"}
FOUND = {  # what the red places did, by what is explained
    "class": "made the model call it *{name}*",
    "object": "told the model that something is there",
    "score": "made the model find it and call it *{name}*",
}


class DetectTab:
    """Components and handlers; instances live inside the `gr.Blocks` in which they are made.

    The handlers spell out their inputs because Gradio reads the parameter names of its public
    functions (`/detect`, `/filter`, `/explain`, ...) from them.
    """

    def __init__(self, detector: DetectionExplainer, samples: SampleSet | None) -> None:
        self.use(detector, samples)
        self.view = gr.State(None, time_to_live=3600)
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                self.upload = picture_input()
                self.gallery = gr.Dataset(**samples_gallery(samples))
                self.missed = gr.Dataset(**self._missed_gallery())
            with gr.Column(scale=9, min_width=320):
                self._lay_out_results()
        self._wire()

    def use(self, detector: DetectionExplainer, samples: SampleSet | None) -> None:
        """Show this model from now on, with its samples."""
        self.detector = detector
        self.samples = samples
        self.trace_sample = lru_cache(CACHED_SAMPLES)(self._trace_sample)

    def on_switch(self) -> Updates:
        """Show the model and the samples that `use` was given."""
        return {
            self.upload: None,
            self.gallery: gallery_update(samples_gallery(self.samples)),
            self.missed: gallery_update(self._missed_gallery()),
            self.iou: self.detector.default_iou,
            **(self.on_open() if self.samples and self.samples.samples else {}),
        }

    def on_open(self) -> Updates:
        """Show the first sample, so that nobody meets an empty page."""
        if not self.samples or not self.samples.samples:
            return gr.skip()
        view = self.trace_sample(0)
        thresholds = Thresholds(self.detector.default_score, self.detector.default_iou)
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

    def on_missed(
        self,
        score: float,
        iou: float,
        method: str,
        target: str,
        layer: str,
        opacity: float,
    ) -> Updates:
        """Detect on the sample that shows a miss, and explain what was missed."""
        assert self.samples is not None and self.samples.missed is not None
        view = self.trace_sample(self.samples.missed)
        thresholds = Thresholds(score, iou)
        detections = self.detector.detections(view, thresholds)
        missed = [one for one in detections if one.kind == "missed"]
        chosen = max(missed, key=lambda one: one.area) if missed else detections[0]
        settings = CamSettings(method, target, layer)
        return {
            self.upload: None,
            self.view: view,
            **self._listed(view, detections, chosen, thresholds),
            **self._explain(view, detections, chosen, settings, opacity),
        }

    def _missed_gallery(self) -> dict[str, Any]:
        number = self.samples.missed if self.samples else None
        label = "One with something that the model misses"
        return samples_gallery(self.samples, [] if number is None else [number], label)

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
        updates = self._listed(view, detections, chosen, thresholds)
        if kept is None:
            return updates | self._explain(view, detections, chosen, settings, opacity)
        return updates | {self.boxes: store_image(draw_detections(view, detections, names, chosen))}

    def _listed(
        self, view: View, detections: list[Detection], chosen: Detection, thresholds: Thresholds
    ) -> Updates:
        names = self.detector.class_names
        csv, json = to_csv(view, detections, names), to_json(view, detections, names, thresholds)
        return {
            self.list: gr.Radio(
                [(_title(one, names), one.key) for one in detections], value=chosen.key
            ),
            self.table: to_rows(view, detections, names),
            self.csv: store_file(csv.encode(), "detections.csv"),
            self.json: store_file(json.encode(), "detections.json"),
            self.answer: loads(json),
        }

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
                label=f"Why {names[chosen.label]}? ({METHOD_NAMES[settings.method]})",
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
                label="What the model found",
                elem_id="boxes",
                alt_text="The picture with a frame around everything that was found",
            )
            self.map = gr.Image(
                **RESULT,
                label="Why?",
                elem_id="map",
                alt_text="The places that mattered for the chosen frame",
            )
        self.caption = gr.Markdown(elem_classes="caption", elem_id="caption")
        gr.HTML(SCALE_BAR)
        self.list = gr.Radio(
            label="Click a frame in the picture, or choose here, to see why it was found",
            elem_id="detections",
            elem_classes="detections",
        )
        with gr.Row():
            self.score, self.iou = threshold_sliders(
                self.detector.default_score, self.detector.default_iou
            )
        with gr.Accordion("How the map is made", open=False):
            self._lay_out_map_settings()
        self.table = gr.Dataframe(
            headers=list(COLUMNS),
            interactive=False,
            label="All that was found, in pixels of your picture",
            elem_id="table",
            buttons=[],
        )
        with gr.Row():
            self.csv = gr.DownloadButton("Download the table (CSV)", size="sm", elem_id="csv")
            self.json = gr.DownloadButton("Download as JSON", size="sm", elem_id="json")
        with gr.Accordion("The same as JSON, as programs get it", open=False):
            self.answer = gr.JSON(show_label=False)

    def _lay_out_map_settings(self) -> None:
        with gr.Row():
            self.method = method_menu(DETECTOR_METHOD)
            self.target = gr.Dropdown(
                [(name, target) for target, name in TARGET_NAMES.items()],
                value="class",
                label="What is explained",
                info="The name of the frame, or the frame itself",
                min_width=140,
            )
            self.layer = gr.Dropdown(
                [(LAYER_NAMES["auto"], "auto")],
                value="auto",
                label="Detail",
                info="How finely the picture is divided",
                min_width=140,
            )
            self.opacity = opacity_slider()

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
        shown = [*mapped, self.list, self.table, self.csv, self.json, self.answer]
        self.shown = [self.view, *shown]
        self.switched = [self.upload, self.gallery, self.missed, self.iou, *self.shown]
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
        self.missed.click(
            self.on_missed,
            controls,
            [self.upload, *self.shown],
            api_visibility="private",
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
        return f"nothing found: what looks most like {name}"
    return f"{name} · missed" if detection.score is None else f"{name} · {detection.score:.0%}"


def _layer_name(layer: str, view: View) -> str:
    if layer in LAYER_NAMES:
        return LAYER_NAMES[layer]
    cells = view.trace.place.size // int(layer.removeprefix("stride"))
    return f"{cells} x {cells} places"


def _caption(detection: Detection, name: str, explanation: Explanation) -> str:
    name = literal(name)
    sure = f"{explanation.score:.1%}" if explanation.score >= 0.001 else "less than 0.1%"
    if detection.kind == "found":
        what = FOUND[explanation.target].format(name=name)
        text = f"**{name}, {explanation.score:.0%} sure.** The red places {what}."
    elif detection.kind == "missed":
        text = (
            f"**{name}, missed.** The red places look most like *{name}* to the model where it "
            f"should have found one; it was {sure} sure."
        )
    else:
        text = (
            "**Nothing found of which the model is sure enough.** The red places look most like "
            f"*{name}* to it; it is {sure} sure."
        )
    return text + map_notes(explanation)
