"""The page as a whole: its tabs, its limits, and how it is served."""

from collections.abc import Mapping

import gradio as gr
from gradio import processing_utils

from yolo.app.about import HOW_TO_READ, classes_html, model_card, model_name, results_markdown
from yolo.app.classifier import Classifier
from yolo.app.classify_tab import ClassifyTab
from yolo.app.detect_tab import DetectTab
from yolo.app.detector import DetectionExplainer
from yolo.app.models import Model
from yolo.app.samples import SampleSet
from yolo.app.style import THEME, style_sheet
from yolo.app.uploads import MAX_FILE_SIZE
from yolo.app.widgets import QUEUE
from yolo.errors import UsageError

WAITING_PEOPLE = 64  # further ones are told to try again, instead of waiting for minutes
PEOPLE_IN_MEMORY = 100  # a picture with its trace is up to 25 MB
SUBTITLE = "Predictions, each with its Grad-CAM heat map."
FORGET_FILES = (600, 3600)  # seconds: look for old files, and how old they may get


def build_page(models: Mapping[str, Model], samples: Mapping[str, SampleSet | None]) -> gr.Blocks:
    """Return the app: a tab per model, by task, and the About tab."""
    title = model_name(*(model.loaded for model in models.values()))
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=FORGET_FILES) as page:
        gr.HTML(f'<div class="hero"><h1>{title}</h1><p>{SUBTITLE}</p></div>')
        with gr.Tabs():
            if "detection" in models:
                with gr.Tab("Picture", id="picture"):
                    detect = DetectTab(
                        DetectionExplainer(models["detection"].loaded), samples["detection"]
                    )
                    page.load(detect.on_open, None, detect.shown, api_visibility="private", **QUEUE)
            if "classification" in models:
                with gr.Tab("Classify", id="classify"):
                    classify = ClassifyTab(
                        Classifier(models["classification"].loaded), samples["classification"]
                    )
                    page.load(
                        classify.on_open, None, classify.shown, api_visibility="private", **QUEUE
                    )
            with gr.Tab("About", id="about"):
                for task, model in models.items():
                    _lay_out_model(model, samples[task])
                gr.Markdown(HOW_TO_READ)
    page.queue(max_size=WAITING_PEOPLE, default_concurrency_limit=2)
    return page


async def _refuse_address(url: str, cache_dir: str) -> str:
    raise gr.Error("Please upload the picture itself, not its address.", print_exception=False)


# Gradio fetches what a request names by its address, of any size, before a handler sees it.
processing_utils.async_ssrf_protected_download = _refuse_address


def serve(page: gr.Blocks, models: Mapping[str, Model], host: str | None, port: int | None) -> None:
    """Serve until stopped; nothing but the page's own pictures is ever handed out."""
    num_classes = max(len(model.loaded.class_names) for model in models.values())
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
            f"--port {port}: another program listens there; name another port, or leave --port out for "
            "the first free one from 7860"
        ) from None


def _lay_out_model(model: Model, samples: SampleSet | None) -> None:
    gr.Markdown(f"## {model_name(model.loaded)}")
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            gr.Markdown("### Classes")
            gr.HTML(classes_html(model.loaded.class_names))
            gr.Markdown("### Model card\n" + model_card(model.loaded, samples, model.url))
        with gr.Column(scale=4, min_width=320):
            gr.Markdown("### Results\n" + results_markdown(model.loaded))
