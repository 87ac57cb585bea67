"""The page as a whole: its tabs, its limits, and how it is served."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
from gradio import processing_utils

from yolo.app.about import (
    HOW_TO_READ,
    TASKS,
    classes_html,
    model_card,
    model_name,
    results_markdown,
)
from yolo.app.classifier import Classifier
from yolo.app.classify_tab import ClassifyTab
from yolo.app.detect_tab import DetectTab
from yolo.app.detector import DetectionExplainer
from yolo.app.limits import limit
from yolo.app.models import Model
from yolo.app.runs_tab import RunsTab
from yolo.app.samples import SampleSet
from yolo.app.style import THEME, style_sheet
from yolo.app.uploads import MAX_FILE_SIZE
from yolo.app.video_tab import VideoTab
from yolo.app.widgets import QUEUE, store_file
from yolo.errors import UsageError, UserError
from yolo.runs.checkpoint import LoadedWeights, publish_weights

PEOPLE_IN_MEMORY = 100  # a picture with its trace is up to 25 MB
SUBTITLE = "Finds things in your pictures, and shows which places made it say so."
FORGET_FILES = (600, 3600)  # seconds: look for old files, and how old they may get


def build_page(
    models: Mapping[str, Model],
    samples: Mapping[str, SampleSet | None],
    find_samples: Callable[[Model], SampleSet | None] | None = None,
) -> gr.Blocks:
    """Return the app: a tab per model, by task, and the About tab.

    Args:
        models: by task.
        samples: by task.
        find_samples: of another model; with it the runs of this machine can be chosen.
    """
    title = model_name(*(model.loaded for model in models.values()))
    tabs: dict[str, Any] = {}
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=FORGET_FILES) as page:
        gr.HTML(f'<div class="hero"><h1>{title}</h1><p>{SUBTITLE}</p></div>')
        with gr.Tabs():
            if "detection" in models:
                with gr.Tab("Picture", id="picture"):
                    detect = tabs["detection"] = DetectTab(
                        DetectionExplainer(models["detection"].loaded), samples["detection"]
                    )
                with gr.Tab("Video", id="video"):
                    VideoTab(detect)
            if "classification" in models:
                with gr.Tab("Classify", id="classify"):
                    tabs["classification"] = ClassifyTab(
                        Classifier(models["classification"].loaded), samples["classification"]
                    )
            with gr.Tab("About", id="about"):
                for task, model in models.items():
                    _lay_out_model(model, samples[task])
                gr.Markdown(HOW_TO_READ)
            if find_samples:
                with gr.Tab("Your runs", id="runs"):
                    RunsTab(tabs, partial(_open_run, tabs, find_samples))
        for tab in tabs.values():
            page.load(tab.on_open, None, tab.shown, api_visibility="private", **QUEUE)
    limit(page)
    return page


def _open_run(
    tabs: Mapping[str, Any], find_samples: Callable[[Model], SampleSet | None], model: Model
) -> tuple[Any, SampleSet | None]:
    """Let the tab of its task show a model; return the tab and the samples."""
    task = model.loaded.task
    if task not in tabs:
        raise UserError(f"This app was opened without a model for {TASKS[task]}.")
    samples = find_samples(model)
    kind = DetectionExplainer if task == "detection" else Classifier
    tabs[task].use(kind(model.loaded), samples)
    return tabs[task], samples


async def _refuse_address(url: str, cache_dir: str) -> str:
    raise gr.Error("Please upload the picture itself, not its address.", print_exception=False)


# Gradio fetches what a request names by its address, of any size, before a handler sees it.
processing_utils.async_ssrf_protected_download = _refuse_address


def serve(page: gr.Blocks, models: Mapping[str, Model], host: str | None, port: int | None) -> None:
    """Serve until stopped; nothing but the page's own pictures is ever handed out."""
    num_classes = max(80, *(len(model.loaded.class_names) for model in models.values()))
    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            allowed_paths=[],
            max_file_size=MAX_FILE_SIZE,
            state_session_capacity=PEOPLE_IN_MEMORY,
            show_error=False,
            ssr_mode=False,
            run_history=False,
            enable_monitoring=False,
            footer_links=["api", "gradio"],
            theme=THEME,
            css=style_sheet(num_classes),
        )
    except OSError as error:
        if port is None or "port" not in str(error):
            raise
        raise UsageError(
            f"--port {port}: another program listens there; name another port, or leave --port out "
            "for the first free one from 7860"
        ) from None


def _lay_out_model(model: Model, samples: SampleSet | None) -> None:
    gr.Markdown(f"## {model_name(model.loaded)}")
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            gr.Markdown("### What it knows")
            gr.HTML(classes_html(model.loaded.class_names))
            gr.Markdown("### The model\n" + model_card(model.loaded, samples, model.url))
            if model.url is None:
                gr.DownloadButton(
                    "Download the model", partial(_weights_file, model.loaded), size="sm"
                )
        with gr.Column(scale=4, min_width=320):
            gr.Markdown("### How good it is\n" + results_markdown(model.loaded))


def _weights_file(loaded: LoadedWeights) -> str:
    """Return a model's weights as a file that the page may hand out."""
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / f"{loaded.task}.safetensors"
        publish_weights(path, loaded)
        return store_file(path.read_bytes(), path.name)
