"""How much of a run of short epochs is spent in steps and tests; the rest are gaps between them.

A real run of train.py on digits, with its loaders, tests, checkpoints and records. Only what a GPU
would do is a stub: a step lasts as long as it would work, and a test's network answers zeros.
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import train
from yolo.data.digits import write_digits
from yolo.engine import loop
from yolo.runs.run import Run

BATCH, SIZE, TEST_IMAGES = 2, 64, 100
WIDTH = 0.145  # a checkpoint of 10 MB, without Adam's values


def lines(epochs: int, steps: int, seconds: float, workers: int) -> Iterator[str]:
    """Yield the table."""
    spent = {"train_step": 0.0, "evaluate": 0.0}
    loop.train_step = _stub_step(seconds)
    loop.predict = _predict_nothing
    for name in spent:
        setattr(loop, name, _timed(getattr(loop, name), spent, name))
    times: list[float] = []  # from the first epoch's start to the last checkpoint's end
    one_epoch, finish = loop.train_one_epoch, Run.finish

    def noted_epoch(*parts: Any) -> None:
        times.append(time.perf_counter())
        one_epoch(*parts)

    def noted_finish(run: Run, results: Any) -> None:
        run.wait()  # for the last checkpoint
        times.append(time.perf_counter())
        finish(run, results)

    loop.train_one_epoch, Run.finish = noted_epoch, noted_finish  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        write_digits(Path(folder) / "digits", 0, {"train": BATCH * steps, "test": TEST_IMAGES})
        flags = {
            "config": "configs/digits.yaml", "data-root": f"{folder}/digits", "epochs": epochs,
            "out-dir": f"{folder}/run", "batch-size": BATCH, "img-sizes": SIZE, "width": WIDTH,
            "workers": workers, "save-every": steps, "eval-every": 1, "log-every": 20,
            "mosaic-prob": 0, "aug-affine": 0, "aug-color": 0, "accelerator": "cpu",
        }  # fmt: skip
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        output, sys.stdout = sys.stdout, sys.stderr
        try:
            train.main(words)
        finally:
            sys.stdout = output
        sizes = [path.stat().st_size for path in Path(folder).glob("run/checkpoints/*.ckpt")]
    total = times[-1] - times[0]
    yield "| run | seconds | in steps | in tests | in both |\n|---|---|---|---|---|"
    yield (
        f"| {epochs} epochs of {steps} steps of {seconds * 1e3:g} ms, {len(sizes)} checkpoints of "
        f"{max(sizes) / 1e6:.0f} MB, tests of {TEST_IMAGES} images | {total:.1f} | "
        f"{spent['train_step']:.1f} | {spent['evaluate']:.1f} | {sum(spent.values()) / total:.0%} |"
    )


def _stub_step(seconds: float) -> Any:
    def step(fabric: Any, state: Any, task: Any, micro_batches: Any, **_: Any) -> None:
        time.sleep(seconds)
        state.add_losses(["box", "object", "no_object", "class"], torch.ones(4))
        state.step += 1
        state.batch += 1

    return step


def _predict_nothing(fabric: Any, model: Any, images: torch.Tensor) -> list[torch.Tensor]:
    sides = [images.shape[-1] // stride for stride in (32, 16, 8)]
    return [torch.full((len(images), 3, side, side, 15), -5.0) for side in sides]


def _timed(function: Any, spent: dict[str, float], name: str) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            spent[name] += time.perf_counter() - start

    return call
