"""The Detect tab: a picture, its detections, and beside them why."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import gradio as gr

from yolo.app.detector import (
    COLUMNS,
    Detector,
    Finding,
    MapSettings,
    Thresholds,
    View,
    at_point,
    draw_findings,
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
    OPACITY,
    QUEUE,
    RESULT,
    SCALE_BAR,
    Updates,
    ask_for_picture,
    clear_on_failure,
    picture_input,
    samples_gallery,
    store_file,
    store_image,
)
from yolo.explain.cam import DETECTOR_METHOD, TARGET_BLIND, Explanation
from yolo.metrics.report import SHOWN_SCORE

CACHED_SAMPLES = 32
TARGET_NAMES = {"class": "its class", "object": "that there is an object", "score": "both together"}
LAYER_NAMES = {"auto": "the box's own", "fused": "all of them, averaged"}


class DetectTab:
    """Components and handlers; instances live inside the `gr.Blocks` in which they are made.

    The handlers spell out their inputs because Gradio reads the parameter names of its public functions
    (`/detect`, `/filter`, `/explain`, ...) from them.
    """

    def __init__(self, detector: Detector, samples: SampleSet | None) -> None:
        self.detector = detector
        self.samples = samples
        self.look_at_sample = lru_cache(CACHED_SAMPLES)(self._look_at_sample)
        self.view = gr.State(None, time_to_live=3600)
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                self._lay_out_inputs()
            with gr.Column(scale=9, min_width=320):
                self._lay_out_results()
        self._wire()

    def on_open(self) -> Updates:
        """Show the first sample, so that nobody meets an empty page."""
        if not self.samples or not self.samples.samples:
            return gr.skip()
        view = self.look_at_sample(0)
        thresholds = Thresholds(SHOWN_SCORE, self.detector.default_iou)
        return {self.view: view, **self._present(view, thresholds, MapSettings())}

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
        view = self.detector.look(picture)
        settings = MapSettings(method, target, layer, opacity)
        return {self.view: view, **self._present(view, Thresholds(score, iou), settings)}

    def on_sample(
        self, number: int, score: float, iou: float, method: str, target: str, layer: str, opacity: float
    ) -> Updates:
        """Detect on a sample; the network sees each sample once."""
        view = self.look_at_sample(number)
        settings = MapSettings(method, target, layer, opacity)
        return {self.upload: None, self.view: view, **self._present(view, Thresholds(score, iou), settings)}

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
        """Filter anew what the network said; the map changes only if its box is gone."""
        if view is None:
            return ask_for_picture()
        return self._present(view, Thresholds(score, iou), MapSettings(method, target, layer, opacity), key)

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
        findings = self.detector.findings(view, Thresholds(score, iou))
        chosen = _by_key(findings, key) or findings[0]
        return self._explained(view, findings, chosen, MapSettings(method, target, layer, opacity))

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
        findings = self.detector.findings(view, Thresholds(score, iou))
        x, y = (edge / view.zoom for edge in click.index)
        chosen = at_point(findings, x, y)
        if chosen is None:
            return gr.skip()
        settings = MapSettings(method, target, layer, opacity)
        return {self.list: chosen.key, **self._explained(view, findings, chosen, settings)}

    def _look_at_sample(self, number: int) -> View:
        assert self.samples is not None
        sample = self.samples.samples[number]
        return self.detector.look(read_picture(self.samples.folder / sample.file), sample.annotation)

    def _present(
        self, view: View, thresholds: Thresholds, settings: MapSettings, key: str | None = None
    ) -> Updates:
        """Update list, table and files; explain anew unless the finding `key` is still there."""
        names = self.detector.class_names
        findings = self.detector.findings(view, thresholds)
        kept = _by_key(findings, key)
        chosen = kept or findings[0]
        csv, json = to_csv(view, findings, names), to_json(view, findings, names, thresholds)
        updates = {
            self.list: gr.Radio(
                [(_title(finding, names), finding.key) for finding in findings], value=chosen.key
            ),
            self.table: to_rows(view, findings, names),
            self.csv: store_file(csv.encode(), "detections.csv"),
            self.json: store_file(json.encode(), "detections.json"),
        }
        if kept is None:
            return updates | self._explained(view, findings, chosen, settings)
        return updates | {self.boxes: store_image(draw_findings(view, findings, names, chosen))}

    def _explained(
        self, view: View, findings: list[Finding], chosen: Finding, settings: MapSettings
    ) -> Updates:
        layers = self.detector.layers(view, chosen)
        if settings.layer not in layers:
            settings = replace(settings, layer="auto")
        explanation = self.detector.explain(view, chosen, settings)
        name = self.detector.class_names[chosen.label]
        return {
            self.boxes: store_image(draw_findings(view, findings, self.detector.class_names, chosen)),
            self.map: gr.Image(
                store_image(draw_map(view, chosen, explanation, settings.opacity)),
                label=f"{METHOD_NAMES[settings.method]} · {name}",
            ),
            self.caption: _caption(chosen, name, explanation),
            self.layer: gr.Dropdown(
                [(_layer_name(layer, view), layer) for layer in layers], value=settings.layer
            ),
        }

    def _lay_out_inputs(self) -> None:
        self.upload = picture_input()
        self.gallery = samples_gallery(self.samples)

    def _lay_out_results(self) -> None:
        with gr.Row():
            self.boxes = gr.Image(
                **RESULT | {"elem_classes": ["picture", "clickable"]},
                label="Detections",
                elem_id="boxes",
                alt_text="The picture with its detections",
            )
            self.map = gr.Image(
                **RESULT, label="Heat map", elem_id="map", alt_text="The heat map of the chosen detection"
            )
        self.caption = gr.Markdown(elem_classes="caption", elem_id="caption")
        gr.HTML(SCALE_BAR)
        self.list = gr.Radio(
            label="Explain: click a box in the picture, or choose here",
            elem_id="findings",
            elem_classes="findings",
        )
        with gr.Row():
            self.score = gr.Slider(
                0.05, 0.95, SHOWN_SCORE, step=0.01, label="Least score", elem_id="score", min_width=240
            )
            iou, label = self.detector.default_iou, "Overlap at which two boxes are one"
            self.iou = gr.Slider(0.1, 0.9, iou, step=0.05, label=label, min_width=240)
        with gr.Row():
            self.method = gr.Dropdown(METHOD_CHOICES, value=DETECTOR_METHOD, label="Method", min_width=140)
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
        controls: list[Any] = [self.score, self.iou, self.method, self.target, self.layer, self.opacity]
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
            self.on_sample, [self.gallery, *controls], [self.upload, *self.shown], api_name="sample", **QUEUE
        )
        self.score.input(self.on_thresholds, current, shown, api_name="filter", **quick)
        self.iou.input(self.on_thresholds, current, shown, api_visibility="private", **quick)
        self.boxes.select(self.on_click, current, [self.list, *mapped], api_visibility="private", **QUEUE)
        self.list.input(self.on_choice, current, mapped, api_name="explain", **QUEUE)
        for control in controls[2:]:
            control.input(self.on_choice, current, mapped, api_visibility="private", **quick)


def _by_key(findings: Sequence[Finding], key: str | None) -> Finding | None:
    return next((finding for finding in findings if finding.key == key), None)


def _title(finding: Finding, class_names: Sequence[str]) -> str:
    name = class_names[finding.label]
    if finding.kind == "picture":
        return f"{name} · whole picture"
    return f"{name} · missed" if finding.score is None else f"{name} · {finding.score:.0%}"


def _layer_name(layer: str, view: View) -> str:
    if layer in LAYER_NAMES:
        return LAYER_NAMES[layer]
    stride = int(layer.removeprefix("stride"))
    cells = view.trace.place.size // stride
    return f"stride {stride}: {cells} x {cells} cells"


def _caption(finding: Finding, name: str, explanation: Explanation) -> str:
    how = f"{METHOD_NAMES[explanation.method]}, {explanation.layer}"
    if finding.kind == "found":
        text = (
            f"**{name}, {explanation.score:.0%}.** What spoke for {TARGET_NAMES[explanation.target]} ({how})."
        )
    elif finding.kind == "missed":
        text = (
            f"**{name}, missed.** What the network saw where it should have been found; its score there is "
            f"{explanation.score:.1%} ({how})."
        )
    else:
        text = (
            "**Nothing found with this score.** The map shows where the whole picture speaks for the "
            f"likeliest class, {name}, whose best score is {explanation.score:.1%} ({how})."
        )
    if explanation.is_zero:
        return f"{text} **Nothing in this layer speaks for it: the map is empty.**"
    if explanation.method in TARGET_BLIND:
        return f"{text} This method ignores the question: every box gets the same map."
    return text
