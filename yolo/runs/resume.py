"""How a run goes on where it stopped: its checkpoint, and the schedule it was trained by."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from yolo.config import Config
from yolo.errors import UserError
from yolo.runs.checkpoint import Checkpoint, find_newest, load_resumable, marked_best
from yolo.runs.folder import RunFolder, RunPlan
from yolo.runs.resumable import check_fits
from yolo.schedule import Schedule, check_resume, differences, read_schedule, replan
from yolo.tasks.base import Task


@dataclass(frozen=True)
class Start:
    """Where a start of a run begins."""

    schedule: Schedule
    checkpoint: Path | None = None  # that it continues; None: from the first step
    schedule_is_stored: bool = False  # in the run's folder
    best: str | None = None  # name of the best checkpoint so far


def open_checkpoint(plan: RunPlan, fabric: Any) -> Checkpoint | None:
    """Return the checkpoint to continue, the same on all ranks; each rank reads it once.

    Without `--resume CHECKPOINT` it is the newest intact one that rank 0 sees; None if there is
    none.

    Raises:
        UserError: if it is damaged, or all of them are.
    """
    if not plan.resuming:
        return None
    newest, path = None, plan.checkpoint
    if path is None:
        if fabric.is_global_zero:
            newest = find_newest(plan.folder.checkpoints, fabric.print)
        path = fabric.broadcast(newest.path if newest else None)
        if path is None:
            fabric.print(f"nothing to resume in {plan.folder.path}: starting fresh")
            return None
    return newest or Checkpoint(path, load_resumable(path))


def check_settings(plan: RunPlan, checkpoint: Checkpoint | None, config: Config) -> None:
    """Refuse a run's `config.yaml` that was changed after it was written, where that has an effect.

    Args:
        plan: with the keys of that file which no flag replaces, if it was changed.
        checkpoint: of the run, which says what it was trained with.
        config: of this start.

    Raises:
        UserError: with the keys that changed, and the ways out.
    """
    if not plan.unsure:
        return
    file = f"{plan.stored_config}: was changed after it was written"
    if checkpoint is None:
        raise UserError(
            f"{file}, and there is no checkpoint to compare it with: --replan takes it as it is, "
            "or start in another --out-dir"
        )
    trained = Config.from_dict(checkpoint.content["config"])
    pairs = ((name, getattr(trained, name), getattr(config, name)) for name in sorted(plan.unsure))
    if changed := [f"{name} {old} -> {new}" for name, old, new in pairs if old != new]:
        raise UserError(
            f"{file} ({', '.join(changed)}): undo that, or give the new value as a flag, or "
            "--replan to take over the file as it is"
        )


def resume(
    checkpoint: Checkpoint,
    folder: RunFolder,
    task: Task,
    planned: Schedule,
    state: Any,
    *,
    may_replan: bool,
    log: Callable[[str], None],
) -> Start:
    """Take over a checkpoint into `state`; return the schedule to go on by.

    Args:
        checkpoint: as read.
        folder: of the run, with its schedules.
        task: what would be trained now.
        planned: the schedule of the present settings.
        state: as made for the present settings.
        may_replan: whether `planned` may replace a schedule that does not fit any more.
        log: prints a line for the person.

    Raises:
        UserError: if the checkpoint belongs to other classes, another network, batch or data set.
    """
    path, content = checkpoint.path, checkpoint.content
    _check_same(checkpoint, task)
    check_fits(path, content, state)
    for notice in state.load_state_dict(content):
        log(f"note: {notice}")
    file, schedule = _stored_schedule(checkpoint, folder, planned)
    is_stored = file.parent == folder.path
    changed = differences(schedule, planned)
    if changed and may_replan:
        schedule, is_stored = replan(schedule, planned, state.step), False
        state.epoch, state.batch = schedule.position(state.step)
        log(f"replanned from step {state.step} ({', '.join(changed)}); {file.name} stays as it was")
    else:
        for notice in check_resume(schedule, planned, file):
            log(f"note: {notice}")
    torch.set_rng_state(content["rng"]["torch"])
    if content["threads"] != torch.get_num_threads():
        log(
            f"note: the run used {content['threads']} threads, now {torch.get_num_threads()}: "
            "results may differ in the last bits (--threads fixes their number)"
        )
    log(f"resumed from {path}: epoch {state.epoch}, step {state.step} of {len(schedule)}")
    best = content["best"] if "best" in content else marked_best(path.parent)
    return Start(schedule, path, is_stored, best)


def _check_same(checkpoint: Checkpoint, task: Task) -> None:
    path, content = checkpoint.path, checkpoint.content
    trained, now = Config.from_dict(content["config"]), task.config
    for name in ("task", "backbone", "width"):
        if getattr(trained, name) != getattr(now, name):
            raise UserError(
                f"{path}: was trained with --{name} {getattr(trained, name)}, not "
                f"{getattr(now, name)}; give that value, or start anew from its weights with "
                "--init-weights"
            )
    if tuple(content["classes"]) != task.class_names:
        raise UserError(
            f"{path}: knows the classes {', '.join(content['classes'])}; the data has "
            f"{', '.join(task.class_names)}; use the same data, or start anew with --init-weights"
        )
    anchors, now_anchors = (
        None if values is None else values.cpu() for values in (content["anchors"], task.anchors)
    )
    if now_anchors is not None and (anchors is None or not torch.equal(anchors, now_anchors)):
        raise UserError(
            f"{path}: was trained with other anchors; give the same --anchors and --test-size"
        )


def _stored_schedule(
    checkpoint: Checkpoint, folder: RunFolder, planned: Schedule
) -> tuple[Path, Schedule]:
    """Return the schedule that has the checkpoint's digest, and its file."""
    digest = checkpoint.content["schedule_digest"]
    homes = (folder, RunFolder(checkpoint.path.absolute().parent.parent))
    for file in (file for home in homes for file in home.schedules()):
        schedule = read_schedule(file)
        if schedule.digest == digest:
            return file, schedule
    if planned.digest == digest:  # deleted, but the same settings plan it again
        return checkpoint.path, planned
    raise UserError(
        f"{checkpoint.path}: the schedule that it was trained by is not in {folder.path}; put its "
        "schedule.txt back (a mirror has a copy)"
    )
