"""What a training step costs the main process besides the network and its loss: CPU milliseconds.

A GPU waits for whatever the main process does between two launches. Here a network and a loss of no
work, with as many parameter tensors as YOLOv3's, leave only that: batches received from the
workers, counts, clipping, Adam, the averaged weights, the meter. On a CPU, fused and foreach calls
still run once per tensor, and memory is not pinned.
"""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from speed import NUM_CLASSES, make_targets, make_task
from torch import Tensor, nn
from torch.utils.data import Dataset

from yolo.config import COCO_ANCHORS, Config
from yolo.data.samplers import SampleKey
from yolo.engine import loop
from yolo.engine.fabric import make_fabric
from yolo.engine.loaders import make_sampler, make_train_loader
from yolo.engine.state import make_state
from yolo.models.yolov3 import YoloV3, make_anchors
from yolo.tasks.assigned import AssignedCollate

VOC_IMAGES = 16_551
WARM_UP = 10  # steps


def lines(size: int, batch: int, workers: int, steps: int) -> Iterator[str]:
    """Yield the table."""
    torch.set_num_threads(1)  # waiting threads would count as work
    training = _training(size, batch, workers)
    training(WARM_UP)
    before, start = os.times(), time.perf_counter()
    training(steps)
    after, elapsed = os.times(), time.perf_counter() - start
    own, system = after.user - before.user, after.system - before.system
    milliseconds = (1e3 * seconds / steps for seconds in (own + system, own, system, elapsed))
    yield (
        "| main process | CPU ms a step | Python and torch | system | elapsed |\n"
        "|---|---|---|---|---|"
    )
    setting = f"batch {batch} at {size} px, {workers} workers"
    yield f"| {setting} | " + " | ".join(f"{value:.1f}" for value in milliseconds) + " |"


class _Touch(torch.autograd.Function):
    """A scalar that gives every parameter a gradient."""

    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> Tensor:
        ctx.shapes = [weight.shape for weight in weights]
        return torch.ones(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(gradient.expand(shape) for shape in ctx.shapes)


class _StubNetwork(nn.Module):
    """The parameters and buffers of YOLOv3, each with a single number."""

    def __init__(self) -> None:
        super().__init__()
        with torch.device("meta"):
            real = YoloV3(NUM_CLASSES)
        self.weights = nn.ParameterList(torch.ones([1] * value.ndim) for value in real.parameters())
        for number, value in enumerate(real.buffers()):
            self.register_buffer(f"buffer{number}", torch.ones([1] * value.ndim, dtype=value.dtype))

    def forward(self, images: Tensor) -> Tensor:
        return _Touch.apply(*self.weights)


class _StubLoss(nn.Module):
    def forward(self, output: Tensor, targets: Any, counts: Tensor) -> dict[str, Tensor]:
        return dict.fromkeys(("box", "object", "no_object", "class"), output)


class _Keys(Dataset[SampleKey]):
    """As many samples as VOC 2007 and 2012 have; the collate makes the images up."""

    def __len__(self) -> int:
        return VOC_IMAGES

    def __getitem__(self, key: SampleKey) -> SampleKey:
        return key


def _collate(keys: Sequence[SampleKey]) -> tuple[Tensor, list[dict[str, Tensor]]]:
    size = keys[0].img_size
    images = torch.from_numpy(np.full((len(keys), size, size, 3), 127, np.uint8)).permute(
        0, 3, 1, 2
    )
    return images, make_targets(len(keys), size, torch.Generator().manual_seed(keys[0].index))


def _training(size: int, batch: int, workers: int) -> Any:
    hardware: Any = {"accelerator": "cpu", "precision": "32-true", "workers": workers}
    config = Config(img_sizes=(size,), batch_size=batch, **hardware)
    fabric, scaler = make_fabric(config)
    anchors = make_anchors(COCO_ANCHORS, size)
    task = replace(
        make_task(config, _StubNetwork()),
        criterion=_StubLoss(),
        train_samples=_Keys(),
        train_collate=AssignedCollate(_collate, anchors, config),
    )
    state = make_state(fabric, scaler, config, task)
    loader = make_train_loader(fabric, config, task, make_sampler(fabric, config, VOC_IMAGES))
    steps = loop.optimizer_steps(loader, 1)
    schedule = SimpleNamespace(lr=[1e-5] * 10**6, beta1=[0.9] * 10**6, steps_per_epoch=10**6)
    run: Any = SimpleNamespace(
        schedule=schedule,
        end=0,
        record=lambda *_: None,
        save_is_due=lambda _: False,
        last_checkpoint=None,
    )
    stop: Any = SimpleNamespace(reason=None)

    def train(count: int) -> None:
        run.end += count
        loop.train_one_epoch(fabric, state, task, steps, stop, run)

    return train
