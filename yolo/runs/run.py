"""A run on the disk: its folder, schedule, checkpoints and records, begun or continued where it stopped.

Only rank 0 writes; on the other ranks the writing methods do nothing.
"""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import BaseFileLock, FileLock, Timeout

from yolo.config import Config
from yolo.errors import UserError
from yolo.files import replacing
from yolo.runs.checkpoint import (
    BEST_FILE,
    FORMAT_VERSION,
    CheckpointWriter,
    load_checkpoint,
    prune_checkpoints,
    set_aside,
)
from yolo.runs.folder import RunFolder
from yolo.runs.logbook import Logbook, duration, read_metrics, summary_lines
from yolo.runs.mirror import Mirror
from yolo.runs.provenance import hardware, provenance
from yolo.schedule import (
    Schedule,
    check_resume,
    differences,
    plot_schedule,
    read_schedule,
    replan,
    write_schedule,
)
from yolo.tasks.base import Task
from yolo.viz.figures import plot_curves

LOCK_SECONDS = 10.0  # a killed start may still be ending
MIRROR_SECONDS = 30.0  # that a stopped run waits for its last copies
MIRROR_SECONDS_AT_END = 600.0  # and a finished one


class Run:
    """What a training process writes, and reads back to continue."""

    def __init__(
        self,
        folder: RunFolder,
        task: Task,
        schedule: Schedule,
        state: Any,
        *,
        writes: bool,
        say: Callable[[str], None],
        mirror: Mirror | None = None,
    ) -> None:
        """Keep the parts together; nothing is written before `start` or `write_plan`.

        Args:
            folder: where the run lives.
            task: for the configuration, classes and anchors that a checkpoint carries.
            schedule: as planned now; `continue_from` replaces it by the stored one.
            state: what a checkpoint holds.
            writes: whether this is rank 0.
            say: prints a line for the person (on rank 0).
            mirror: where rank 0 copies what it has written.
        """
        self.folder = folder
        self.task = task
        self.schedule = schedule
        self.state = state
        self.writes = writes
        self.say = say
        self.mirror = mirror
        self.resumed = False
        self.planned_anew = True  # whether the schedule is not on the disk yet
        self.last_checkpoint: Path | None = None
        self.logbook: Logbook | None = None
        self.checkpoints: CheckpointWriter | None = None
        self.best_pending = False
        self.lock: BaseFileLock | None = None
        self.started = time.monotonic()

    @property
    def end(self) -> int:
        """The number of optimizer steps after which training ends."""
        return min(len(self.schedule), self.task.config.max_steps or len(self.schedule))

    def continue_from(self, path: Path, *, may_replan: bool) -> None:
        """Load a checkpoint and the schedule that it was trained by; `may_replan` lets the schedule change.

        Raises:
            UserError: if the checkpoint belongs to other classes, another network, batch or data set.
        """
        content = load_checkpoint(path)
        self._check_same(path, content)
        for notice in self.state.load_state_dict(content):
            self.say(f"note: {notice}")
        self._take_schedule(path, content["schedule_digest"], may_replan)
        torch.set_rng_state(content["rng"]["torch"])
        if content["threads"] != torch.get_num_threads():
            self.say(
                f"note: the run used {content['threads']} threads, now {torch.get_num_threads()}: results may"
                " differ in the last bits (OMP_NUM_THREADS sets them)"
            )
        self.last_checkpoint, self.resumed = path, True
        self.say(
            f"resumed from {path}: epoch {self.state.epoch}, step {self.state.step} of {len(self.schedule)}"
        )

    def start(self) -> None:
        """Open the records; write the configuration and the schedule if they are new."""
        if not self.writes:
            return
        cfg, state = self.task.config, self.state
        self.folder.checkpoints.mkdir(parents=True, exist_ok=True)
        self._lock()
        self.folder.mark_launch()
        self.folder.write_config(cfg)  # on a resume too: its flags hold from now on
        if self.planned_anew:
            self.write_plan()
        if self.resumed:
            self.folder.results.unlink(missing_ok=True)  # they belong to an earlier end of this run
            self._mirror_remove(self.folder.results)
            for path in set_aside(self.folder.checkpoints, state.step):
                self.say(
                    f"note: {path.name} is newer than this start of the run: set aside as {path.name}.aside"
                )
                self._mirror_remove(path)
        self.logbook = Logbook(self.folder.path, state.step, state.evaluation_due)
        self.checkpoints = CheckpointWriter(self.folder.checkpoints, cfg.save_every)
        self._mirror_copy(self.folder.config, *self.folder.schedules(), self.folder.metrics)

    def write_plan(self) -> None:
        """Write the schedule as text and as a picture."""
        if self.writes:
            path = self.folder.next_schedule() if self.resumed else self.folder.schedule
            write_schedule(self.schedule, path)
            plot_schedule(self.schedule, path.with_suffix(".png"))
            self.say(f"schedule: {path}")

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

    def save_is_due(self, step: int) -> bool:
        """Return whether `--save-every` or a test, the best so far, asks for a checkpoint; rank 0 knows."""
        return self.checkpoints is not None and (self.best_pending or self.checkpoints.is_due(step))

    def save(self) -> None:
        """Save a checkpoint now, and let `best.txt` name it if the test before it was the best so far.

        Every rank has to call it. Weights that are not finite are not saved.
        """
        content = self._content()
        if self.checkpoints is None or self.logbook is None:
            return
        if not self.state.is_finite():
            self.say(f"warning: the weights at step {self.state.step} are not finite: not saved")
            return
        self.logbook.flush()
        path = self.checkpoints.save(content)
        if self.best_pending:
            self.checkpoints.mark_best(path)
        self.last_checkpoint, self.best_pending = path, False
        self._mirror_copy(path, path.with_name(BEST_FILE), self.folder.metrics)
        if (keep := self.task.config.keep) is not None:
            self._mirror_remove(*prune_checkpoints(self.folder.checkpoints, keep))

    def finish(self, results: Mapping[str, Any]) -> None:
        """Write `results.json` and the curves, print the closing table, close the records."""
        if self.writes:
            content = self._results(results)
            with replacing(self.folder.results) as temporary:
                temporary.write_text(json.dumps(content, indent=1))
            self._mirror_copy(self.folder.results)
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
        self.close(MIRROR_SECONDS_AT_END)

    def close(self, mirror_seconds: float = MIRROR_SECONDS) -> None:
        """Write what is still buffered, and give the mirror a while for its last copies."""
        if self.logbook:
            self.logbook.close()
        if self.mirror:
            self.mirror.close(mirror_seconds)
        if self.lock:
            self.lock.release()

    def _lock(self) -> None:
        """Keep other trainings out of the folder until this process ends, however it ends.

        Raises:
            UserError: if one is at work there.
        """
        # not a soft lock, which would outlive a killed process and keep its own resume out
        lock = FileLock(self.folder.lock, is_singleton=True, fallback_to_soft=False)
        try:
            lock.acquire(timeout=LOCK_SECONDS)
        except Timeout:
            raise UserError(
                f"{self.folder.path}: another training is at work in this folder; name another --out-dir"
            ) from None
        except OSError:  # a file system without locks; anything worse shows at the next write
            return
        self.lock = lock

    def _take_schedule(self, checkpoint: Path, digest: str, may_replan: bool) -> None:
        """Go on with the schedule file of that digest, or replan from it."""
        path, stored = self._stored_schedule(checkpoint, digest)
        changed = differences(stored, self.schedule)
        if changed and may_replan:
            step = self.state.step
            self.schedule = replan(stored, self.schedule, step)
            self.state.epoch, self.state.batch = self.schedule.position(step)
            self.say(f"replanned from step {step} ({', '.join(changed)}); {path.name} stays as it was")
            return
        for notice in check_resume(stored, self.schedule, path):
            self.say(f"note: {notice}")
        self.schedule, self.planned_anew = stored, path.parent != self.folder.path

    def _stored_schedule(self, checkpoint: Path, digest: str) -> tuple[Path, Schedule]:
        homes = (self.folder, RunFolder(checkpoint.absolute().parent.parent))
        for path in (file for home in homes for file in home.schedules()):
            schedule = read_schedule(path)
            if schedule.digest == digest:
                return path, schedule
        if self.schedule.digest == digest:  # deleted, but the same settings plan it again
            return checkpoint, self.schedule
        raise UserError(
            f"{checkpoint}: the schedule that it was trained by is not in {self.folder.path}; put its "
            "schedule.txt back (a mirror has a copy)"
        )

    def _content(self) -> dict[str, Any]:
        anchors, step = self.task.anchors, self.state.step
        return {
            **self.state.state_dict(),
            "config": self.task.config.to_dict(),
            "classes": list(self.task.class_names),
            "anchors": None if anchors is None else anchors.cpu(),
            "rng": {"torch": torch.get_rng_state()},
            "world_size": self.schedule.ranks,
            "threads": torch.get_num_threads(),
            "schedule_digest": self.schedule.digest,
            "lr": self.schedule.lr[max(step - 1, 0)],
            "format_version": FORMAT_VERSION,
        }

    def _results(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """Return the numbers and everything needed to make them again."""
        cfg, state = self.task.config, self.state
        return {
            **results,
            "weights": "ema",
            "checkpoint": self.last_checkpoint.name if self.last_checkpoint else None,
            "data": self.task.eval_split.dataset.name,
            "trained_on": self.task.train_set.name,
            "loader": self.task.eval_split.loader,
            "test_size": cfg.resolved_test_size,
            "thresholds": {
                name: getattr(cfg, name)
                for name in ("score_threshold", "iou_threshold", "max_detections", "nms")
            },
            "epoch": state.epoch,
            "step": state.step,
            "images_seen": state.step * int(cfg.batch_size),
            "seed": cfg.seed,
            "finished": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "hardware": hardware(self.state.fabric.device, self.state.fabric.world_size),
            **provenance(),
        }

    def _mirror_copy(self, *paths: Path) -> None:
        if self.mirror:
            for path in paths:
                self.mirror.copy(path, path.relative_to(self.folder.path).as_posix())

    def _mirror_remove(self, *paths: Path) -> None:
        if self.mirror:
            for path in paths:
                self.mirror.remove(path.relative_to(self.folder.path).as_posix())

    def _check_same(self, path: Path, content: Mapping[str, Any]) -> None:
        config = Config.from_dict(content["config"])
        now = self.task.config
        for name in ("task", "backbone", "width"):
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
        anchors = self.task.anchors
        if anchors is not None and not torch.equal(content["anchors"], anchors.cpu()):
            raise UserError(
                f"{path}: was trained with other anchors; give the same --anchors and --test-size"
            )
