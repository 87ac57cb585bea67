"""Real training processes for the tests, forked from one server that has imported everything."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

PRELOAD = ["train", "timm", "yolo.engine.tuning", "yolo.runs.pretrained", "torch.utils.tensorboard"]


def start_training(
    argv: Sequence[str],
    log: Path,
    *,
    hook: Callable[[], None] | None = None,
    env: Mapping[str, str] | None = None,
) -> BaseProcess:
    """Start `train.main(argv)` in a process of its own.

    Args:
        argv: the flags.
        log: receives what the process prints.
        hook: called in the process before training starts, to break something.
        env: added to the process's environment.
    """
    return start_process(partial(_train, list(argv), hook), log, env=env)


def start_process(
    target: Callable[[], None], log: Path, *, env: Mapping[str, str] | None = None
) -> BaseProcess:
    """Call `target` in a process of its own that prints into `log`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=_run, args=(target, str(log), dict(env or {})))
    process.start()
    return process


def train(
    argv: Sequence[str], log: Path, *, hook: Callable[[], None] | None = None, timeout: float = 300
) -> int:
    """Train in a process of its own and return its exit code (negative: killed by that signal)."""
    process = start_training(argv, log, hook=hook)
    process.join(timeout)
    assert process.exitcode is not None, f"still running after {timeout} s: {log.read_text()}"
    return process.exitcode


def rank_env(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return what torchrun sets for a process of a single node."""
    values = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "GROUP_RANK": 0,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_RESTART_COUNT": 0,
        "TORCHELASTIC_MAX_RESTARTS": 0,
    }
    return {name: str(value) for name, value in values.items()}


def _run(target: Callable[[], None], log: str, env: dict[str, str]) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(env)
    multiprocessing.set_start_method("fork", force=True)  # for the loader: as on its own
    import torch

    torch.set_num_threads(1)  # tiny networks; and equal results need equal threads
    target()


def _train(argv: list[str], hook: Callable[[], None] | None) -> None:
    import train as script
    from yolo.cli import run as run_script
    from yolo.runs import run

    run.plot_curves = lambda *arguments: None  # a second each, and not what is tested here
    if "--plan-only" not in argv:
        run.plot_schedule = lambda *arguments: None
    if hook:
        hook()
    sys.argv = ["train.py", *argv]
    run_script(script.main)
