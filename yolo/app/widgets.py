"""What the tabs have in common: taking pictures, showing results, and errors that people see."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import cv2
import gradio as gr
import numpy as np
from gradio.utils import get_upload_folder

from yolo.app.samples import SampleSet
from yolo.app.uploads import Picture, read_picture
from yolo.errors import UserError
from yolo.explain.cam import METHODS, OPACITY, TARGET_BLIND, Explanation

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
    "interactive": False,
    "buttons": ["download", "fullscreen"],
    "min_width": 300,
    "elem_classes": "picture",
}
SCALE_BAR = (
    '<div class="scale"><span>mattered little</span><i></i>'
    "<span>mattered most in this picture</span></div>"
)


def picture_input() -> gr.Image:
    """Return the place to drop, paste or take a picture; handlers receive it as a `Picture`."""
    component = gr.Image(
        sources=["upload", "clipboard", "webcam"],
        label="Your picture",
        placeholder="Drop a picture here\nor click to choose one",
        height=236,
    )
    # Gradio's own decoding knows no limits; for a subclass it writes stub files into this package
    component.preprocess = _read_upload  # type: ignore[method-assign, assignment]
    return component


def method_menu(method: str) -> gr.Dropdown:
    """Return the choice of how a map is made, which begins at `method`."""
    return gr.Dropdown(
        METHOD_CHOICES,
        value=method,
        label="Method",
        info="Ways to measure which places mattered",
        min_width=140,
    )


def opacity_slider() -> gr.Slider:
    """Return how much the colours of a map cover the picture."""
    return gr.Slider(
        0.2,
        1.0,
        OPACITY,
        step=0.05,
        label="Colour",
        info="How much it covers the picture",
        min_width=140,
    )


@contextmanager
def shown_errors() -> Iterator[None]:
    """Turn our errors into messages on the page, without a traceback in the log."""
    try:
        yield
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from None


def _read_upload(payload: Any) -> Picture | None:
    if payload is None or not payload.path:
        return None
    with shown_errors():
        return read_picture(payload.path)


def store_image(image: np.ndarray) -> str:
    """Return the path of a JPEG of an RGB image [H, W, 3], for the page to fetch."""
    encoded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])[1]
    return store_file(encoded.tobytes(), "picture.jpg")


def store_file(data: bytes, name: str) -> str:
    """Return the path of a file for the page to fetch.

    Equal content shares one file that is never written twice: Gradio's own cache rewrites it, and
    whoever is fetching the same result at that moment gets half of it.
    """
    folder = Path(get_upload_folder()) / hashlib.sha256(data).hexdigest()
    path = folder / name
    if path.exists():
        path.touch()  # old files are deleted
    else:
        folder.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=folder, delete=False) as temporary:
            temporary.write(data)
        os.replace(temporary.name, path)
    return str(path)


def clear_on_failure(event: Any, upload: gr.Image) -> None:
    """After a picture that could not be read, clear its place: only the message is left."""
    event.failure(lambda: None, None, upload, api_visibility="private", show_progress="hidden")


def samples_gallery(
    samples: SampleSet | None, numbers: Sequence[int] | None = None, label: str = "Or one of these"
) -> dict[str, Any]:
    """Return settings of a `gr.Dataset` of samples as thumbnails; a click hands over the place."""
    shown = samples.samples if samples else ()
    if numbers is not None:
        shown = tuple(shown[number] for number in numbers)
    return {
        "components": [gr.Image(visible=False, render=False)],
        "samples": [[str(samples.folder / one.thumbnail)] for one in shown] if samples else [],
        "type": "index",
        "label": label,
        "layout": "gallery",
        "samples_per_page": 16,
        "elem_classes": "samples",
        "visible": bool(shown),
    }


def gallery_update(settings: Mapping[str, Any]) -> Any:
    """Return what shows other samples in a gallery that is on the page."""
    return gr.update(samples=settings["samples"], visible=settings["visible"])


def threshold_sliders(default_score: float, default_iou: float) -> tuple[gr.Slider, gr.Slider]:
    """Return the sliders Confidence and Overlap."""
    return gr.Slider(
        0.05,
        0.95,
        default_score,
        step=0.01,
        label="Confidence",
        info="Show what the model is at least this sure of",
        elem_id="score",
        min_width=240,
    ), gr.Slider(
        0.1,
        0.9,
        default_iou,
        step=0.05,
        label="Overlap",
        info="Two frames that overlap more are one thing",
        min_width=240,
    )


def map_notes(explanation: Explanation) -> str:
    """Return what a caption adds about an empty map, or one that is the same for every target."""
    if explanation.is_zero:
        return " **The map is empty: no place mattered to this method.**"
    blind = explanation.method in TARGET_BLIND
    return " This method gives the same map for everything in the picture." if blind else ""


def ask_for_picture() -> Updates:
    """Ask for a picture where none was chosen, or it was deleted."""
    gr.Info("Please choose a picture first: there is none, or it was not used for an hour.")
    return gr.skip()
