"""A run on the disk: folder, schedule, checkpoints and records, started fresh or continued.

Only rank 0 writes; on the other ranks the writing methods do nothing.
"""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from yolo.atomic import replacing
from yolo.checkpoint import FORMAT_VERSION, CheckpointWriter, load_checkpoint, load_latest
from yolo.config import Config
from yolo.errors import UserError
from yolo.figures import plot_curves
from yolo.logbook import Logbook, duration, read_metrics, summary_lines
from yolo.provenance import provenance
from yolo.run_folder import RunFolder
from yolo.schedule import Schedule, check_resume, plot_schedule, read_schedule, write_schedule
from yolo.tasks import Task


class Run:
    """What a training process writes, and reads back to continue."""

    def __init__(
        self, folder: RunFolder, task: Task, schedule: Schedule, *, writes: bool, say: Callable[[str], None]
    ) -> None:
        """Keep the parts together; nothing is written before `start`.

        Args:
            folder: where the run lives.
            task: for the configuration, classes and anchors that a checkpoint carries.
            schedule: as planned now; `continue_from` replaces it by the stored one.
            writes: whether this is rank 0.
            say: prints a line for the person (on rank 0).
        """
        self.folder = folder
        self.task = task
        self.schedule = schedule
        self.writes = writes
        self.say = say
        self.logbook: Logbook | None = None
        self.checkpoints: CheckpointWriter | None = None
        self.best_pending = False
        self.started = time.monotonic()

    def find_checkpoint(self, source: Path | None) -> Path | None:
        """Return `source`, or the newest readable checkpoint of the folder, or None."""
        if source is not None:
            return source
        found = load_latest(self.folder.checkpoints)
        if found is None:
            return None
        path, _, damaged = found
        for line in damaged:
            self.say(f"warning: {line}")
        return path

    def continue_from(self, path: Path, state: Any) -> None:
        """Load a checkpoint into `state`, and take the schedule that it was trained by.

        Raises:
            UserError: if the checkpoint belongs to other classes, another network, another batch or other
            data.
        """
        content = load_checkpoint(path)
        self._check_same(path, content)
        stored = read_schedule(self.folder.schedule)
        for notice in check_resume(stored, self.schedule, self.folder.schedule):
            self.say(f"note: {notice}")
        self.schedule = stored
        for notice in state.load_state_dict(content):
            self.say(f"note: {notice}")
        torch.set_rng_state(content["rng"]["torch"])
        if content["threads"] != torch.get_num_threads():
            self.say(
                f"note: the run used {content['threads']} threads, now {torch.get_num_threads()}: results may"
                " differ in the last bits (OMP_NUM_THREADS sets them)"
            )
        self.say(f"resumed from {path}: epoch {state.epoch}, step {state.step} of {len(self.schedule)}")

    def start(self, state: Any, *, world_size: int, resumed: bool) -> None:
        """Open the records and, for a new run, write its configuration and schedule."""
        if not self.writes:
            return
        cfg = self.task.config
        self.folder.checkpoints.mkdir(parents=True, exist_ok=True)
        if not resumed:
            self.folder.write_config(cfg)
            self.write_plan()
        self.logbook = Logbook(self.folder.path, state.step if resumed else None)
        self.checkpoints = CheckpointWriter(
            self.folder.checkpoints, lambda: self._content(state, world_size), cfg.save_every, cfg.keep
        )

    def write_plan(self) -> None:
        """Write the schedule as text and as a picture."""
        write_schedule(self.schedule, self.folder.schedule)
        plot_schedule(self.schedule, self.folder.schedule_plot)

    def record(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Write the numbers among `values` to `metrics.jsonl` and TensorBoard."""
        if self.logbook:
            numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
            self.logbook.record(kind, step, numbers)

    def record_evaluation(self, state: Any, results: Mapping[str, Any], *, is_best: bool) -> None:
        """Write the numbers of a test; the next checkpoint is the best so far if `is_best`."""
        self.record("evaluation", state.step, {"epoch": state.epoch, **results})
        self.best_pending = is_best

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        """Show an RGB uint8 image [H, W, 3] in TensorBoard."""
        if self.logbook:
            self.logbook.picture(name, image, step)

    def save_if_due(self, step: int) -> None:
        """Save a checkpoint when `--save-every` says so."""
        if self.checkpoints:
            self.checkpoints.save_if_due(step)

    def save(self) -> None:
        """Save a checkpoint now, and let `best.txt` name it if the test before it was the best so far."""
        if self.checkpoints:
            self.checkpoints.save()
            if self.best_pending:
                self.checkpoints.mark_best()
        self.best_pending = False

    def finish(self, results: Mapping[str, Any], state: Any) -> None:
        """Write `results.json` and the curves, print the closing table, close the records."""
        self.close()
        if not self.writes:
            return
        content = self._results(results, state)
        with replacing(self.folder.results) as temporary:
            temporary.write_text(json.dumps(content, indent=1))

        lines = read_metrics(self.folder.metrics)
        plot_curves(lines, self.folder.plots / "curves.png")
        speeds = [line["images_per_second"] for line in lines if line["kind"] == "train"]
        rows = [
            ("data", content["data"]),
            ("images seen", content["images_seen"]),
            ("images per second", f"{np.median(speeds):.1f}" if speeds else "-"),
            ("time of this process", duration(time.monotonic() - self.started)),
            ("run folder", self.folder.path),
        ]
        self.say("\n".join(summary_lines(content, rows)))

    def _results(self, results: Mapping[str, Any], state: Any) -> dict[str, Any]:
        """Return the numbers and everything needed to make them again."""
        cfg = self.task.config
        return {
            **results,
            "weights": "ema",
            "data": self.task.test.dataset.name,
            "trained_on": self.task.train_set.name,
            "loader": "single images, letterboxed" if cfg.task == "detection" else "single images",
            "test_size": cfg.resolved_test_size,
            "thresholds": {
                name: getattr(cfg, name) for name in ("score_threshold", "iou_threshold", "max_detections")
            },
            "epoch": state.epoch,
            "step": state.step,
            "images_seen": state.step * int(cfg.batch_size),
            "seed": cfg.seed,
            "finished": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            **provenance(),
        }

    def close(self) -> None:
        """Write what is still buffered."""
        if self.logbook:
            self.logbook.close()

    def _content(self, state: Any, world_size: int) -> dict[str, Any]:
        anchors = self.task.anchors
        return {
            **state.state_dict(),
            "config": self.task.config.to_dict(),
            "classes": list(self.task.class_names),
            "anchors": None if anchors is None else anchors.cpu(),
            "rng": {"torch": torch.get_rng_state()},
            "world_size": world_size,
            "threads": torch.get_num_threads(),
            "schedule_digest": self.schedule.digest,
            "lr": self.schedule.lr[max(state.step - 1, 0)],
            "format_version": FORMAT_VERSION,
        }

    def _check_same(self, path: Path, content: Mapping[str, Any]) -> None:
        config = Config.from_dict(content["config"])
        now = self.task.config
        for name in ("task", "width"):
            if getattr(config, name) != getattr(now, name):
                raise UserError(
                    f"{path}: was trained with --{name} {getattr(config, name)}, not {getattr(now, name)}; "
                    "give that value, or start anew from its weights with --init-weights"
                )
        if tuple(content["classes"]) != self.task.class_names:
            raise UserError(
                f"{path}: knows the classes {', '.join(content['classes'])}; the data has "
                f"{', '.join(self.task.class_names)}; use the same data, or start anew with --init-weights"
            )
        if content["anchors"] is not None and not torch.equal(content["anchors"], self.task.anchors.cpu()):  # type: ignore[union-attr]
            raise UserError(
                f"{path}: was trained with other anchors; give the same --anchors and --test-size"
            )
