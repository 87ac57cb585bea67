"""The Classify tab: a picture, its likeliest classes, heat maps, and the misclassified images."""

from typing import Any

import gradio as gr

from yolo.app.about import literal
from yolo.app.classifier import Classification, Classifier, draw_map
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
    store_image,
)
from yolo.explain.cam import CLASSIFIER_LAYERS, CLASSIFIER_METHOD, OPACITY, CamSettings, Explanation

TOP_CLASSES = 5
PREDICTED = -1  # the choice of the target menu that follows the prediction
LAYER_NAMES = {"auto": "the last one", "fused": "all of them, averaged"}


class ClassifyTab:
    """Components and handlers; instances live inside the `gr.Blocks` in which they are made."""

    def __init__(self, classifier: Classifier, samples: SampleSet | None) -> None:
        self.use(classifier, samples)
        self.result = gr.State(None, time_to_live=3600)
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                self.upload = picture_input()
                self.gallery = gr.Dataset(**samples_gallery(samples))
            with gr.Column(scale=9, min_width=320):
                self._lay_out_results()
        self._lay_out_misclassified()
        self._wire()

    def use(self, classifier: Classifier, samples: SampleSet | None) -> None:
        """Show this model from now on, with its samples."""
        self.classifier = classifier
        self.samples = samples

    def on_switch(self) -> Updates:
        """Show the model and the samples that `use` was given."""
        tiles = self._tiles()
        return {
            self.upload: None,
            self.gallery: gallery_update(samples_gallery(self.samples)),
            self.target: gr.Dropdown(self._target_choices(), value=PREDICTED),
            self.errors: _errors_heading(self.samples),
            self.misclassified: gr.Gallery(tiles, visible=bool(tiles)),
            **(self.on_open() if self.samples and self.samples.samples else {}),
        }

    def on_open(self) -> Updates:
        """Show the first sample, so that nobody meets an empty page."""
        if not self.samples or not self.samples.samples:
            return gr.skip()
        picture = self._read(self.samples.samples[0].file)
        return self._classify(picture, PREDICTED, CLASSIFIER_METHOD, "auto", OPACITY)

    def on_picture(
        self, picture: Picture | None, target: int, method: str, layer: str, opacity: float
    ) -> Updates:
        """Classify a picture of the person's own."""
        return (
            gr.skip()
            if picture is None
            else self._classify(picture, target, method, layer, opacity)
        )

    def on_sample(
        self, number: int, target: int, method: str, layer: str, opacity: float
    ) -> Updates:
        """Classify a sample."""
        assert self.samples is not None
        picture = self._read(self.samples.samples[number].file)
        return {self.upload: None, **self._classify(picture, target, method, layer, opacity)}

    def on_setting(
        self, result: Classification | None, target: int, method: str, layer: str, opacity: float
    ) -> Updates:
        """Explain again, with other settings."""
        if result is None:
            return ask_for_picture()
        return self._explain(result, target, method, layer, opacity)

    def on_misclassified(
        self, method: str, layer: str, opacity: float, choice: gr.SelectData
    ) -> Updates:
        """Show a misclassified image large, with the heat map of the predicted class."""
        assert self.samples is not None
        picture = self._read(self.samples.misclassified[choice.index].file)
        return {
            self.target: PREDICTED,
            **self._classify(picture, PREDICTED, method, layer, opacity),
        }

    def _read(self, file: str) -> Picture:
        assert self.samples is not None
        return read_picture(self.samples.folder / file)

    def _classify(
        self, picture: Picture, target: int, method: str, layer: str, opacity: float
    ) -> Updates:
        result = self.classifier.classify(picture.pixels)
        names = self.classifier.class_names
        return {
            self.result: result,
            self.probabilities: dict(zip(names, result.probabilities.tolist(), strict=True)),
            **self._explain(result, target, method, layer, opacity),
        }

    def _explain(
        self, result: Classification, target: int, method: str, layer: str, opacity: float
    ) -> Updates:
        label = result.label if target == PREDICTED else target
        explanation = self.classifier.explain(
            result.pixels, label, CamSettings(method, layer=layer)
        )
        name = self.classifier.class_names[label]
        picture = store_image(draw_map(result.pixels, explanation, opacity))
        return {
            self.map: gr.Image(picture, label=f"Why {name}? ({METHOD_NAMES[method]})"),
            self.caption: _caption(name, explanation),
        }

    def _lay_out_results(self) -> None:
        with gr.Row():
            self.map = gr.Image(
                **RESULT,
                label="Why?",
                elem_id="class-map",
                alt_text="The places that spoke for the chosen name",
            )
            self.probabilities = gr.Label(
                label="What it is, by how sure the model is",
                num_top_classes=TOP_CLASSES,
                min_width=300,
                elem_id="probabilities",
            )
        self.caption = gr.Markdown(elem_classes="caption")
        gr.HTML(SCALE_BAR)
        with gr.Accordion("How the map is made", open=False), gr.Row():
            self.target = gr.Dropdown(
                self._target_choices(),
                value=PREDICTED,
                label="Name",
                info="Which name the map explains",
                min_width=140,
            )
            self.method = method_menu(CLASSIFIER_METHOD)
            layers = [(LAYER_NAMES.get(layer, layer), layer) for layer in CLASSIFIER_LAYERS]
            self.layer = gr.Dropdown(
                layers,
                value="auto",
                label="Layer",
                info="The step of the network that is looked at",
                min_width=140,
            )
            self.opacity = opacity_slider()

    def _target_choices(self) -> list[tuple[str, int]]:
        names = self.classifier.class_names
        return [("what it says", PREDICTED), *((name, label) for label, name in enumerate(names))]

    def _lay_out_misclassified(self) -> None:
        self.errors = gr.Markdown(_errors_heading(self.samples))
        tiles = self._tiles()
        self.misclassified = gr.Gallery(
            tiles, show_label=False, columns=4, height="auto", object_fit="contain",
            allow_preview=False, interactive=False, format="png", elem_id="misclassified",
            elem_classes="misclassified", buttons=[], visible=bool(tiles),
        )  # fmt: skip

    def _tiles(self) -> list[tuple[str, str]]:
        names, tiles = self.classifier.class_names, []
        for image in self.samples.misclassified if self.samples else ():
            assert self.samples is not None
            tile = store_image(self.classifier.misclassified_tile(self.samples, image))
            said = f"says {names[image.predicted]} ({image.confidence:.0%} sure)"
            tiles.append((tile, f"{said}, is {names[image.label]}"))
        return tiles

    def _wire(self) -> None:
        settings: list[Any] = [self.target, self.method, self.layer, self.opacity]
        mapped = [self.map, self.caption]
        self.shown = [self.result, self.probabilities, *mapped]
        panels = [self.upload, self.gallery, self.target, self.errors, self.misclassified]
        self.switched = [*panels, *self.shown]
        uploaded = self.upload.change(
            self.on_picture, [self.upload, *settings], self.shown, api_name="classify", **QUEUE
        )
        clear_on_failure(uploaded, self.upload)
        self.gallery.click(
            self.on_sample,
            [self.gallery, *settings],
            [self.upload, *self.shown],
            api_name="classify_sample",
            **QUEUE,
        )
        for control in settings:
            control.input(
                self.on_setting, [self.result, *settings], mapped, trigger_mode="always_last",
                show_progress="hidden", api_name="explain_class", **QUEUE,
            )  # fmt: skip
        self.misclassified.select(
            self.on_misclassified,
            settings[1:],
            [self.target, *self.shown],
            api_visibility="private",
            **QUEUE,
        )


def _caption(name: str, explanation: Explanation) -> str:
    name = literal(name)
    text = f"**{name}, {explanation.score:.1%} sure.** The red places spoke for *{name}*."
    return text + map_notes(explanation)


def _errors_heading(samples: SampleSet | None) -> str:
    return f"### Pictures that it gets wrong\n{errors_text(samples)}"


def errors_text(samples: SampleSet | None) -> str:
    """Return what the gallery of misclassified images shows, or why there is none."""
    if samples is None or not samples.tested:
        return (
            "They are looked for in the test pictures, which do not come with this app: "
            "`python app.py --data-root DIR` opens it with those in that folder."
        )
    if not samples.misclassified:
        return f"Of {samples.tested:,} test pictures ({literal(samples.data)}), it got none wrong."
    return (
        f"Of {samples.tested:,} test pictures ({literal(samples.data)}), the wrong answers of "
        "which it was most sure. On the right of each the places that spoke for the wrong name."
    )
