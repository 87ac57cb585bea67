"""Ways to break a training process from inside: hooks for `launching.start_training`."""

import errno
import fcntl
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from yolo import files
from yolo.engine import loop, tuning
from yolo.runs import checkpoint, folder
from yolo.tasks.detection import DetectionTask


def impatient() -> None:
    """Do not wait for another training in the same folder to end."""
    folder.LOCK_SECONDS = 0.1


def no_locks() -> None:
    """Train on a file system that knows no locks, as some network drives."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    fcntl.flock = refuse  # type: ignore[assignment]


def after_step(step: int, act: Callable[[Any], None]) -> None:
    """Call `act(state)` as soon as optimizer step number `step` is done."""
    train_step = loop.train_step

    def train_step_then_act(fabric: Any, state: Any, *rest: Any, **options: Any) -> None:
        train_step(fabric, state, *rest, **options)
        if state.step == step:
            act(state)

    loop.train_step = train_step_then_act  # type: ignore[assignment]


def kill_after_step(step: int) -> None:
    """As a power cut or `kill -9` would."""
    after_step(step, lambda state: os.kill(os.getpid(), signal.SIGKILL))


def signal_after_step(step: int, *numbers: int, pause: float = 0.05) -> None:
    """Receive signals, with a pause after each."""

    def send(state: Any) -> None:
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(pause)

    after_step(step, send)


def signal_group_after_step(step: int, number: int) -> None:
    """Receive a signal as Ctrl-C and torchrun send it: to the whole process group."""
    os.setpgid(0, 0)  # not that of the tests
    after_step(step, lambda state: os.killpg(os.getpgrp(), number))


def stop_answering_after_step(step: int) -> None:
    """As a machine whose network cable was pulled: no word, and no end either."""
    loop.LINK_SECONDS = 2.0
    after_step(step, lambda state: os.kill(os.getpid(), signal.SIGSTOP))


def wait_two_seconds_for_other_ranks() -> None:
    """Do not wait two minutes for another rank."""
    loop.LINK_SECONDS = 2.0


def slow_steps(seconds: float) -> None:
    """Let each optimizer step take longer."""
    train_step = loop.train_step

    def slow_train_step(*arguments: Any, **options: Any) -> None:
        time.sleep(seconds)
        train_step(*arguments, **options)

    loop.train_step = slow_train_step  # type: ignore[assignment]


def poison_after_step(step: int) -> None:
    """Make a weight, and with it every later loss, NaN."""

    def poison(state: Any) -> None:
        with torch.no_grad():
            next(state.network.parameters()).fill_(float("nan"))

    after_step(step, poison)


def kill_in_save(moment: str, step: int) -> None:
    """Die in a step's save: at half the `write`, before `fsync` or `rename`, or when `done`."""
    suffix = f"step{step:06d}"
    torch_save, flush, replace = torch.save, files.flush_to_disk, os.replace

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def half_save(content: Any, file: Any) -> None:
        torch_save(content, file)
        if suffix in file.name:
            file.truncate(file.tell() // 2)
            file.flush()
            die()

    def flush_or_die(path: Path) -> None:
        if suffix in path.name:
            die()
        flush(path)

    def replace_or_die(source: Path, target: Path) -> None:
        if suffix in target.name and moment == "rename":
            die()
        replace(source, target)
        if suffix in target.name and moment == "done":
            die()

    if moment == "write":
        checkpoint.torch.save = half_save  # type: ignore[assignment]
    if moment == "fsync":
        files.flush_to_disk = flush_or_die
    files.os.replace = replace_or_die  # type: ignore[assignment]


def save_slowly(seconds: float, then: Callable[[], None] = lambda: None) -> None:
    """Let each save take longer, so that steps and signals come while one is in flight."""
    torch_save = torch.save

    def slow_save(content: Any, file: Any) -> None:
        time.sleep(seconds)
        torch_save(content, file)

    checkpoint.torch.save = slow_save  # type: ignore[assignment]
    then()


def limit_file_size(num_bytes: int) -> None:
    """Let writing fail beyond a size, as on a full disk; file permissions do not stop root."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def shorten_range_test(steps: int) -> None:
    """Let `--find-lr` take fewer steps."""
    tuning.RANGE_STEPS = steps


def best_in_the_second_test() -> None:
    """Let each test score worse than the one before it, except the second."""
    scores = iter([0.5, 0.9, 0.4, 0.3])
    DetectionTask.score = staticmethod(lambda results: next(scores))  # type: ignore[assignment]
