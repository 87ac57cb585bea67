"""The Your runs tab, on one's own machine only: the models that were trained here, to be chosen."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from yolo.app.about import literal, model_card, results_markdown
from yolo.app.models import Model
from yolo.app.samples import SampleSet
from yolo.app.widgets import Updates, shown_errors
from yolo.runs.checkpoint import load_weights, resolve_checkpoint
from yolo.runs.folder import RunFolder, list_checkpoints, list_runs

HELP = (
    "Models that you trained in this folder (under `runs/`), the newest first. Choose one, and the "
    "other tabs show it."
)
NOTHING = "There is none yet: `python train.py --data-root FOLDER` trains one on your pictures."
FIGURES = (("map_50", "mAP {:.3f}"), ("accuracy", "{:.1%} right"))
Opened = Callable[[Model], tuple[Any, SampleSet | None]]  # a tab that shows it, and its samples


class RunsTab:
    """Components and handlers; instances live inside the `gr.Blocks` in which they are made."""

    def __init__(self, tabs: Mapping[str, Any], opened: Opened) -> None:
        """Offer the runs of the tasks of `tabs`, each of which has `on_switch` and `switched`."""
        self.opened = opened
        gr.Markdown(HELP)
        with gr.Row():
            self.choice = gr.Dropdown(run_choices(), label="Your runs", scale=4, elem_id="runs")
            again = gr.Button("Look again", scale=1)
            show = gr.Button("Show it", variant="primary", scale=1, elem_id="show-run")
        self.card = gr.Markdown("" if run_choices() else NOTHING, elem_id="run-card")
        again.click(lambda: gr.Dropdown(run_choices()), None, self.choice, api_visibility="private")
        switched = [component for tab in tabs.values() for component in tab.switched]
        show.click(self.on_show, self.choice, [self.card, *switched], api_visibility="private")

    def on_show(self, run: str | None) -> Updates:
        """Open a run's best weights, and show them in the tab of their task."""
        if not run:
            return gr.skip()
        with shown_errors():
            loaded = load_weights(resolve_checkpoint(run))
            model = Model(loaded, None)
            tab, samples = self.opened(model)
        text = f"### {literal(Path(run).name)}\n{model_card(loaded, samples, None)}"
        return {self.card: f"{text}\n\n{results_markdown(loaded)}", **tab.on_switch()}


def run_choices() -> list[tuple[str, str]]:
    """Return the runs on this machine, newest first: what they are called, and their folders."""
    choices = []
    for folder in map(RunFolder, list_runs()):
        results = folder.read_results()
        figures = [
            text.format(results[key]) for key, text in FIGURES if _is_figure(results.get(key))
        ]
        steps = f"{len(list_checkpoints(folder.checkpoints))} checkpoints"
        choices.append((", ".join([folder.path.name, *(figures or [steps])]), str(folder.path)))
    return choices


def _is_figure(value: Any) -> bool:
    return isinstance(value, int | float) and value != 0
