"""What the tabs have in common: taking pictures, showing results, and the errors that people see."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

from yolo.demo.pictures import Picture, read_picture
from yolo.demo.samples import SampleSet
from yolo.errors import UserError
from yolo.explain import METHODS

Updates = dict[Any, Any]  # component -> new value, as Gradio takes them

_SPELLING = {
    "gradcam": "Grad-CAM",
    "gradcam++": "Grad-CAM++",
    "xgradcam": "XGrad-CAM",
    "hirescam": "HiResCAM",
    "layercam": "LayerCAM",
    "eigencam": "EigenCAM",
}
METHOD_NAMES = {method: _SPELLING.get(method, method) for method in METHODS}
METHOD_CHOICES = [(name, method) for method, name in METHOD_NAMES.items()]
QUEUE: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 2}
RESULT: dict[str, Any] = {
    "format": "jpeg",  # encoded in a tenth of WebP's time
    "interactive": False,
    "buttons": ["download", "fullscreen"],
    "min_width": 300,
    "elem_classes": "picture",
}
SCALE_BAR = '<div class="scale"><span>weak</span><i></i><span>strongest evidence in this picture</span></div>'


def picture_input() -> gr.Image:
    """Return the place to drop, paste or take a picture; handlers receive it as a `Picture`."""
    component = gr.Image(
        sources=["upload", "clipboard", "webcam"],
        label="Your picture",
        placeholder="Drop a picture here\nor click to choose one",
        height=236,
    )
    # Gradio's own decoding knows no limits, and a subclass would have it write stub files into this package.
    component.preprocess = _read_upload  # type: ignore[method-assign, assignment]
    return component


@contextmanager
def shown_errors() -> Iterator[None]:
    """Turn our errors into messages on the page, without a traceback in the log."""
    try:
        yield
    except UserError as error:
        raise gr.Error(str(error), title="Sorry", duration=10, print_exception=False) from None


def _read_upload(payload: Any) -> Picture | None:
    if payload is None or not payload.path:
        return None
    with shown_errors():
        return read_picture(payload.path)


def samples_gallery(samples: SampleSet | None) -> gr.Dataset:
    """Return the samples as thumbnails; a click hands over the number."""
    files = [[str(samples.folder / sample.thumbnail)] for sample in samples.samples] if samples else []
    return gr.Dataset(
        components=[gr.Image(visible=False)],
        samples=files,
        type="index",
        label="Or one from the test data",
        layout="gallery",
        samples_per_page=16,
        elem_classes="samples",
        visible=bool(files),
    )


def ask_for_picture() -> Updates:
    """Tell somebody whose picture was forgotten, or who never chose one."""
    gr.Info("Please choose a picture first: there is none, or it was not used for an hour.")
    return {}
