"""What a run writes while it learns: `metrics.jsonl`, TensorBoard events, a bar or lines."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from yolo.files import replacing

HEADLINES = {
    "class_accuracy": "class accuracy",
    "no_object_accuracy": "no-object accuracy (objectness > 0.05)",
    "object_accuracy": "object accuracy (objectness > 0.05)",
    "no_object_accuracy_at_0.5": "no-object accuracy (objectness > 0.5)",
    "object_accuracy_at_0.5": "object accuracy (objectness > 0.5)",
    "accuracy": "accuracy",
    "map_50": "mAP@0.5 (area)",
    "map_50_11pt": "mAP@0.5 (11 points)",
    "map_50_95": "mAP@0.5:0.95",
}
TIMINGS = frozenset({"seconds", "images_per_second", "data_wait_share", "peak_memory_gib"})


class Logbook:
    """Rank 0's records; what an earlier start of the run wrote too far is cut: no step doubles."""

    def __init__(self, run_dir: Path, step: int = 0, evaluation_due: bool = False) -> None:
        """Open the records of `run_dir`.

        Args:
            run_dir: folder of the run.
            step: number of optimizer steps done.
            evaluation_due: whether the test after that step is still to come, or to be repeated.
        """
        # here, since scoring somebody's detections does without torch
        from torch.utils.tensorboard import SummaryWriter

        self.path = run_dir / "metrics.jsonl"
        _cut(self.path, step, evaluation_due)
        self._file = self.path.open("a")
        self.tensorboard = SummaryWriter(str(run_dir), purge_step=step + 1)

    def record(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append `{"kind": "train" | "evaluation" | "threads", "step": ...}`.

        Its numbers go to TensorBoard.
        """
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, int | float) and name != "epoch":
                self.tensorboard.add_scalar(f"{kind}/{name}", value, step)

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        """Show an RGB uint8 image [H, W, 3] in TensorBoard."""
        self.tensorboard.add_image(name, image, step, dataformats="HWC")

    def flush(self) -> None:
        """Put the records on the disk, so that a checkpoint never knows more than they do."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self.tensorboard.flush()

    def close(self) -> None:
        """Write what is still buffered, and end."""
        self._file.close()
        self.tensorboard.close()


class Progress:
    """A progress bar on a terminal, plain lines elsewhere, silent on ranks that do not print."""

    def __init__(self, total: int, description: str, enabled: bool) -> None:
        self.enabled = enabled
        self.description = description
        interactive = enabled and sys.stderr.isatty()
        self._bar = tqdm(
            total=total, desc=description, disable=not interactive, leave=False, dynamic_ncols=True
        )
        self._plain = enabled and not interactive

    def update(self, count: int = 1) -> None:
        """Advance the bar."""
        self._bar.update(count)

    def note(self, text: str) -> None:
        """Show the latest numbers beside the bar, or print them as a line."""
        self._bar.set_postfix_str(text, refresh=False)
        if self._plain:
            print(f"{self.description}: {text}", flush=True)

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a `metrics.jsonl`; what is no whole line is left out, nothing else."""
    lines = []
    for text in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            line = json.loads(text)
            if isinstance(line["kind"], str) and isinstance(line["step"], int):
                lines.append(line)
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
    return lines


def duration(seconds: float) -> str:
    """Write seconds as `45s`, `12m05s` or `3h07m`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def test_line(step: int, results: Mapping[str, Any], best: float, by_map: bool) -> str:
    """Return what a test found, in a line: the accuracies, mAP, and the best so far."""
    names = {
        "class_accuracy": "class",
        "no_object_accuracy": "no-object",
        "object_accuracy": "object",
        "map_50": "mAP",
        "accuracy": "accuracy",
    }
    found = [
        f"{name} {results[key]:.3f}" for key, name in names.items() if results.get(key) is not None
    ]
    measure = "accuracy" if "accuracy" in results else "product of the accuracies at 0.5"
    return (
        f"test at step {step}: {', '.join(found)}; best {'mAP' if by_map else measure} so far "
        f"{best:.3f}"
    )


def summary_lines(results: Mapping[str, Any], rows: list[tuple[str, Any]]) -> list[str]:
    """Return a closing table: the headline results that are there, then `rows`."""
    table = [
        (title, f"{results[key]:.4f}")
        for key, title in HEADLINES.items()
        if results.get(key) is not None
    ]
    table += [(title, str(value)) for title, value in rows]
    width = max(len(title) for title, _ in table)
    return [f"  {title:<{width}}  {value}" for title, value in table]


def _cut(path: Path, last_step: int, evaluation_due: bool) -> None:
    kept = [
        line
        for line in read_metrics(path)
        if line["step"] <= last_step - (evaluation_due and line["kind"] == "evaluation")
    ]
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
