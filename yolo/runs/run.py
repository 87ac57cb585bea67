"""What training writes to its run folder: configuration, schedule, records, checkpoints, results.

Only rank 0 writes; on the other ranks the writing methods do nothing.
"""

import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import BaseFileLock
from torch import nn
from torch.utils._pytree import tree_map_only

from yolo.config import ResolvedConfig
from yolo.data.splits import parse_split
from yolo.errors import UserError
from yolo.files import replacing, write_json
from yolo.runs.advice import advice, training_facts
from yolo.runs.checkpoint import (
    BEST_FILE,
    FORMAT_VERSION,
    CheckpointWriter,
    load_weights,
    prune_checkpoints,
    save_weights,
    set_aside,
)
from yolo.runs.folder import RunPlan, checkpoint_name, note_run
from yolo.runs.logbook import Logbook, summary_lines, test_line
from yolo.runs.mirror import Mirror
from yolo.runs.results import about_model, result_record, write_results
from yolo.runs.resume import Start
from yolo.schedule import Schedule, plot_schedule, write_schedule
from yolo.tasks.base import Task

MIRROR_SECONDS = 30.0  # that a stopped run waits for its last copies
MIRROR_SECONDS_AT_END = 600.0  # and a finished one


class Run:
    """What a training process writes."""

    def __init__(
        self,
        plan: RunPlan,
        start: Start,
        cfg: ResolvedConfig,
        task: Task,
        state: Any,
        *,
        writes: bool,
        log: Callable[[str], None],
        mirror: Mirror | None = None,
    ) -> None:
        """Keep the parts together; nothing is written before `open`.

        Args:
            plan: where the run lives.
            start: its schedule, and the checkpoint that it continues.
            cfg: what a checkpoint and the results carry.
            task: for the classes and anchors that a checkpoint carries.
            state: what a checkpoint holds.
            writes: whether this is rank 0.
            log: prints a line for the person (on rank 0).
            mirror: where rank 0 copies what it has written.
        """
        self.plan = plan
        self.folder = plan.folder
        self.start = start
        self.schedule = start.schedule
        self.cfg = cfg
        self.task = task
        self.state = state
        self.writes = writes
        self.log = log
        self.mirror = mirror
        self.last_checkpoint = start.checkpoint
        self.best = start.best
        self.logbook: Logbook | None = None
        self.checkpoints: CheckpointWriter | None = None
        self.best_pending = False
        self.writer = ThreadPoolExecutor(1, "checkpoint")
        self.saving: Future[None] | None = None
        self.lock: BaseFileLock | None = None
        self.started = time.monotonic()

    @property
    def end(self) -> int:
        """The number of optimizer steps after which training ends."""
        return min(len(self.schedule), self.cfg.max_steps or len(self.schedule))

    def open(self) -> None:
        """Open the records; write the configuration and the schedule if they are new."""
        if not self.writes:
            return
        folder, resumed = self.folder, self.start.checkpoint is not None
        folder.checkpoints.mkdir(parents=True, exist_ok=True)
        self.lock = folder.lock()
        if folder.state() != self.plan.seen:  # it was read before the lock was ours
            raise UserError(
                f"{folder.path}: another training wrote here while this one started; start again, "
                "with --resume auto to go on from there"
            )
        if self.plan.launch:
            self.plan.launch.mark(folder)
        if self.plan.config_name:
            note_run(self.plan.config_name, folder.path)
        folder.write_config(self.cfg)  # on a resume too: its flags hold from now on
        if not self.start.schedule_is_stored:
            write_plan(
                self.schedule, folder.next_schedule() if resumed else folder.schedule, self.log
            )
        if resumed:
            for results in (folder.results, folder.stopped):  # of an earlier end of this run
                results.unlink(missing_ok=True)
            self._mirror_remove(folder.results)
            for path in set_aside(folder.checkpoints, self.state.step):
                self.log(
                    f"note: {path.name} is newer than this start of the run: set aside as "
                    f"{path.name}.aside"
                )
                self._mirror_remove(path)
            self._set_best_aside()
        if parse_split(self.cfg.train_split)[1]:
            self._write_splits()
        self.logbook = Logbook(folder.path, self.state.step, self.state.evaluation_due)
        self.checkpoints = CheckpointWriter(folder.checkpoints, self.cfg.save_every)
        self._mirror_copy(folder.config, *folder.schedules(), folder.metrics)

    def _set_best_aside(self) -> None:
        """Rename the best weights if they are of a test after this start of the run."""
        best = self.folder.best
        try:
            step = load_weights(best).results.get("step", 0) if best.exists() else 0
        except UserError as error:
            self.log(f"warning: {error}")
            step = math.inf
        if step > self.state.step:
            best.replace(best.with_name(best.name + ".aside"))
            self._mirror_remove(best)

    def _write_splits(self) -> None:
        """Write which pictures were drawn for what."""
        task = self.task
        sets = {"train": task.train_set, "val": task.eval_split.dataset}
        self.folder.splits.mkdir(exist_ok=True)
        for name, dataset in sets.items():
            listed = getattr(dataset, "paths", dataset.image_ids)
            with replacing(self.folder.splits / f"{name}.txt") as temporary:
                temporary.write_text("".join(f"{path}\n" for path in listed))

    def record(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Write the numbers among `values` to `metrics.jsonl` and TensorBoard."""
        if self.logbook:
            numbers = {
                key: value for key, value in values.items() if isinstance(value, int | float)
            }
            self.logbook.record(kind, step, numbers)

    def record_evaluation(self, state: Any, results: Mapping[str, Any], *, is_best: bool) -> None:
        """Write a test's numbers; if it `is_best`, its weights or the next checkpoint are kept."""
        self.record("evaluation", state.step, {"epoch": state.epoch, **results})
        self.log(test_line(state.step, results, state.best_score, self.cfg.maps_each_test))
        self.best_pending = is_best and not self.cfg.maps_each_test
        if is_best and self.cfg.maps_each_test and self.writes and state.is_finite():
            about = {"step": state.step, "epoch": state.epoch}
            self._write_best({**results, **about}, state.ema.module, state.confidence)

    def _write_best(
        self, results: Mapping[str, Any], model: nn.Module, confidence: float | None
    ) -> None:
        """Write weights as the best of this run, with what was measured of them."""
        names, anchors = self.task.class_names, self.task.anchors
        path = self.folder.best
        try:
            save_weights(path, model, self.cfg, names, anchors, results, confidence=confidence)
        except UserError as error:  # beyond half precision, which ends no training
            self.log(f"warning: {error}")
        self._mirror_copy(path)

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        """Show an RGB uint8 image [H, W, 3] in TensorBoard."""
        if self.logbook:
            self.logbook.picture(name, image, step)

    def save_is_due(self, step: int) -> bool:
        """Return whether `--save-every` or the best test yet asks for a checkpoint; rank 0 knows.

        Raises:
            UserError: if the last one could not be written.
        """
        if self.saving is not None and self.saving.done():
            self.wait()
        return self.checkpoints is not None and (self.best_pending or self.checkpoints.is_due(step))

    def save(self) -> None:
        """Copy what a checkpoint holds, and let a thread write it while the training goes on.

        Every rank has to call it. Weights that are not finite are not saved. `best.txt` will name
        it if the test before it was the best so far.

        Raises:
            UserError: if the checkpoint before it could not be written.
        """
        content = self._content()
        if self.checkpoints is None or self.logbook is None:
            return
        if not self.state.is_finite():
            self.log(f"warning: the weights at step {self.state.step} are not finite: not saved")
            return
        self.wait()
        self.logbook.flush()
        copied = tree_map_only(
            torch.Tensor, lambda value: value.detach().to("cpu", copy=True), content
        )
        if self.best_pending:
            self.best = checkpoint_name(content["epoch"], content["step"], content["lr"])
        copied["best"] = self.best
        self.saving = self.writer.submit(self._write, self.checkpoints, copied, self.best_pending)
        self.checkpoints.last_time, self.best_pending = time.monotonic(), False

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is whole.

        Raises:
            UserError: if it could not be written.
        """
        saving, self.saving = self.saving, None
        if saving is not None:
            saving.result()

    def finish(self, results: Mapping[str, Any]) -> None:
        """Write `results.json` and the curves, print the closing table, close the records.

        Args:
            results: the headline; where they are not of the last weights they say of which.
        """
        if self.writes:
            record = self._record(results)
            if "chosen_on" in results:
                best = load_weights(self.folder.best)
                self._write_best(record, best.model, best.confidence)
            self.log(write_results(self.folder, record, time.monotonic() - self.started))
            if "chosen_on" in results and self.task.test_split is None:
                self.log(
                    "note: these pictures chose the best weights; on others expect a little less"
                )
            for sentence in advice(self.folder, record):
                self.log(f"advice: {sentence}")
            self._mirror_copy(self.folder.results)
        self.close(MIRROR_SECONDS_AT_END)

    def report_stop(self, results: Mapping[str, Any]) -> None:
        """Print and write the test of a run that was stopped in time; it can still go on."""
        if self.writes:
            write_json(self.folder.stopped, self._record(results))
            self.log("\n".join(summary_lines(results, [("written to", self.folder.stopped)])))

    def _record(self, results: Mapping[str, Any]) -> dict[str, Any]:
        fabric, split = self.state.fabric, self.task.test_split or self.task.eval_split
        about = {
            "checkpoint": self.last_checkpoint.name if self.last_checkpoint else None,
            "trained_on": self.task.train_set.name,
            "epoch": self.state.epoch,
            "step": self.state.step,
            "images_seen": self.state.step * self.cfg.batch_size,
            "seed": self.cfg.seed,
            "training": training_facts(self.task.train_set, self.cfg.resolved_test_size),
        }
        about |= {name: results[name] for name in about if name in results}
        about |= about_model(self.cfg, split, fabric.device, fabric.world_size)
        return result_record(results, split.dataset, **about)

    def close(self, mirror_seconds: float = MIRROR_SECONDS) -> None:
        """Write what is still buffered, and give the mirror a while for its last copies.

        Raises:
            UserError: if the last checkpoint could not be written.
        """
        self.wait()
        if self.logbook:
            self.logbook.close()
        if self.mirror:
            self.mirror.close(mirror_seconds)
        if self.lock:
            self.lock.release()

    def _write(self, checkpoints: CheckpointWriter, content: dict[str, Any], is_best: bool) -> None:
        path = checkpoints.save(content, anew=is_best)
        if is_best:
            checkpoints.mark_best(path)
        self.last_checkpoint = path
        self._mirror_copy(path, path.with_name(BEST_FILE), self.folder.metrics)
        if (keep := self.cfg.keep) is not None:
            self._mirror_remove(*prune_checkpoints(self.folder.checkpoints, keep))

    def _content(self) -> dict[str, Any]:
        anchors, step = self.task.anchors, self.state.step
        return {
            **self.state.state_dict(),
            "config": self.cfg.to_dict(),
            "classes": list(self.task.class_names),
            "anchors": None if anchors is None else anchors.cpu(),
            "rng": {"torch": torch.get_rng_state()},
            "world_size": self.schedule.ranks,
            "threads": torch.get_num_threads(),
            "schedule_digest": self.schedule.digest,
            "lr": self.schedule.lr[max(step - 1, 0)],
            "format_version": FORMAT_VERSION,
        }

    def _mirror_copy(self, *paths: Path) -> None:
        if self.mirror:
            for path in paths:
                self.mirror.copy(path, path.relative_to(self.folder.path).as_posix())

    def _mirror_remove(self, *paths: Path) -> None:
        if self.mirror:
            for path in paths:
                self.mirror.remove(path.relative_to(self.folder.path).as_posix())


def write_plan(schedule: Schedule, path: Path, log: Callable[[str], None]) -> None:
    """Write a schedule as text and, beside it, as a picture."""
    write_schedule(schedule, path)
    plot_schedule(schedule, path.with_suffix(".png"))
    log(f"schedule: {path}")
