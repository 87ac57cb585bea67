"""What a run finds out by trying, a batch that fits and a good learning rate; the schedule.

The learning-rate range test is Smith's (arXiv:1506.01186): train briefly while the rate rises
exponentially, and look where the loss is lowest before it diverges. Both work on a copy: the run
itself starts untouched.
"""

import copy
import dataclasses
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from yolo.config import Config, ResolvedConfig, parse_seconds
from yolo.data.samplers import MultiSizeBatchSampler
from yolo.engine.fabric import Fabric, gather, sum_over_ranks
from yolo.engine.loaders import make_sampler, make_train_loader
from yolo.engine.loop import optimizer_steps, predict, train_step
from yolo.engine.state import State, make_optimizer, make_state
from yolo.errors import UserError
from yolo.files import replacing
from yolo.runs.checkpoint import Checkpoint
from yolo.runs.logbook import Progress
from yolo.schedule import Schedule, plan_schedule
from yolo.tasks.base import Task

GPU_BATCH, CPU_BATCH = 256, 16  # largest micro-batches that are tried
RANGE_STEPS = 100
LOWEST_LR, HIGHEST_LR = 1e-7, 1.0
BETA1 = 0.9
MEASURED_STEPS = 8  # for --train-time, at least
MEASURING_SHARE = 0.02  # of the train time
SMOOTHING = 0.9  # weight of the past in the smoothed loss
DIVERGED = 4.0  # times the lowest smoothed loss


def resolve(
    fabric: Fabric,
    scaler: torch.amp.GradScaler | None,
    task: Task,
    folder: Path,
    checkpoint: Checkpoint | None,
) -> ResolvedConfig:
    """Return the configuration with numbers for `auto` and the epochs of `--train-time`.

    They are those of the checkpoint to continue, or found now.
    """
    values, earlier = task.config.to_dict(), checkpoint.content["config"] if checkpoint else {}
    if values["batch_size"] == "auto":
        values["batch_size"] = earlier.get("batch_size") or find_batch_size(
            fabric, task.config, task
        )
        fabric.print(f"--batch-size auto: {values['batch_size']}")
    if values["max_lr"] == "auto":
        trial = ResolvedConfig.from_dict({**values, "max_lr": HIGHEST_LR})
        values["max_lr"] = earlier.get("max_lr") or find_max_lr(fabric, scaler, task, trial, folder)
        fabric.print(f"--max-lr auto: {values['max_lr']}")
    cfg = ResolvedConfig.from_dict(values)
    if cfg.train_time is None and cfg.train_steps is None:
        return cfg
    epochs = earlier.get("epochs") or planned_epochs(fabric, scaler, task, cfg)
    return dataclasses.replace(cfg, epochs=epochs)


def planned_epochs(
    fabric: Fabric, scaler: torch.amp.GradScaler | None, task: Task, cfg: ResolvedConfig
) -> float:
    """Return the epochs of `--train-time` and `--train-steps`, whichever ends first."""
    steps_per_epoch = len(make_sampler(fabric, cfg, len(task.train_set)))
    limits = []
    if cfg.train_time is not None:
        seconds = parse_seconds("--train-time", cfg.train_time)
        limits.append(epochs_in_time(fabric, scaler, task, cfg, seconds))
    if cfg.train_steps is not None:
        limits.append(cfg.train_steps / steps_per_epoch)
    epochs = round(min(limits), 4)
    steps = max(1, round(epochs * steps_per_epoch))
    fabric.print(f"plan         {steps} steps: the same again by --epochs {epochs:g}")
    return epochs


def plan(
    fabric: Fabric, cfg: ResolvedConfig, task: Task, sampler: MultiSizeBatchSampler
) -> Schedule:
    """Plan the one-cycle for this data set and this global batch."""
    return plan_schedule(
        cfg,
        ranks=fabric.world_size,
        dataset_size=len(task.train_set),
        dataset_digest=task.train_set.digest(),
        steps_per_epoch=len(sampler),
    )


@dataclass(frozen=True)
class LrRange:
    """The curve of a range test: one row per optimizer step."""

    lr: tuple[float, ...]
    loss: tuple[float, ...]
    smoothed: tuple[float, ...]

    @property
    def proposal(self) -> float:
        """A tenth of the rate at the lowest smoothed loss: there itself it is too late."""
        best = min(range(len(self.lr)), key=self.smoothed.__getitem__)
        return float(f"{self.lr[best] / 10:.1e}")


def find_max_lr(
    fabric: Fabric,
    scaler: torch.amp.GradScaler | None,
    task: Task,
    cfg: ResolvedConfig,
    folder: Path,
) -> float:
    """Run the range test, write `lr_range.txt` and `.png` to `folder`; return the proposal.

    Raises:
        UserError: if the loss is never finite.
    """
    curve = run_range_test(fabric, scaler, task, cfg)
    if fabric.is_global_zero:
        _write_curve(curve, folder / "lr_range.txt")
        _plot_curve(curve, folder / "lr_range.png")
    fabric.print(
        f"learning-rate range test: try --max-lr {curve.proposal} (see {folder / 'lr_range.png'})"
    )
    return curve.proposal


def run_range_test(
    fabric: Fabric, scaler: torch.amp.GradScaler | None, task: Task, cfg: ResolvedConfig
) -> LrRange:
    """Train a copy of the model while the learning rate rises; stop when the loss has diverged."""
    rates = rising_rates(RANGE_STEPS)
    losses: list[float] = []
    progress = Progress(RANGE_STEPS, "learning-rate range test", fabric.is_global_zero)
    sampler = make_sampler(fabric, cfg, len(task.train_set))
    loader = make_train_loader(fabric, cfg, task, sampler)
    steps = optimizer_steps(loader, cfg.grad_accum_steps)
    with _trial_of(fabric, scaler, task, cfg) as (trial, state):
        for lr, micro_batches in zip(rates, steps, strict=False):
            train_step(fabric, state, trial, micro_batches, lr=lr, beta1=BETA1)
            loss = float(sum_over_ranks(fabric, torch.stack([*state.loss_sums.values()]).sum()))
            state.loss_sums.clear()
            progress.update()
            if not math.isfinite(loss) or (losses and loss > DIVERGED * min(smooth(losses))):
                break
            losses.append(loss)
    progress.close()
    if not losses:
        raise UserError(
            f"the loss is not finite even at --max-lr {LOWEST_LR}: check the data with --check-data"
        )
    return LrRange(tuple(rates[: len(losses)]), tuple(losses), tuple(smooth(losses)))


@contextmanager
def _trial_of(
    fabric: Fabric, scaler: torch.amp.GradScaler | None, task: Task, cfg: ResolvedConfig
) -> Iterator[tuple[Task, State]]:
    """Yield a copy of the task and its state to train for a while; the scaler is put back."""
    trial = dataclasses.replace(task, model=copy.deepcopy(task.model))
    scaler_before = copy.deepcopy(scaler.state_dict()) if scaler else None
    yield trial, make_state(fabric, scaler, cfg, trial)
    if scaler and scaler_before:
        scaler.load_state_dict(scaler_before)


def smooth(losses: list[float]) -> list[float]:
    """Return the exponential moving average of the losses, corrected for its start as in Adam."""
    average, smoothed = 0.0, []
    for count, loss in enumerate(losses, start=1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        smoothed.append(average / (1 - SMOOTHING**count))
    return smoothed


def epochs_in_time(
    fabric: Fabric,
    scaler: torch.amp.GradScaler | None,
    task: Task,
    cfg: ResolvedConfig,
    seconds: float,
) -> float:
    """Return how many epochs, tests included, there is room for in `seconds`; at least one step.

    A copy of the model trains for a while; rank 0's clock counts for all.
    """
    start = time.perf_counter()
    with _trial_of(fabric, scaler, task, cfg) as (trial, state):
        step_seconds = _seconds_of_a_step(fabric, state, trial, cfg, MEASURING_SHARE * seconds)
        test_seconds = _seconds_of_a_test(fabric, state.ema.module, trial)
    steps_per_epoch = len(make_sampler(fabric, cfg, len(task.train_set)))
    epoch_seconds = steps_per_epoch * step_seconds
    fabric.print(
        f"speed        {cfg.batch_size / step_seconds:.1f} images/s, "
        f"{epoch_seconds:.0f} s an epoch, {test_seconds:.0f} s a test"
    )
    left = seconds - (time.perf_counter() - start) - test_seconds  # the last test is always made
    if task.test_split is not None:
        left -= test_seconds * len(task.test_split.dataset) / len(task.eval_split.dataset)
    if cfg.tests:
        left -= (cfg.tests - 1) * test_seconds
    else:
        epoch_seconds += test_seconds / cfg.eval_every
    return fabric.broadcast(max(1 / steps_per_epoch, left / epoch_seconds))


def _seconds_of_a_step(
    fabric: Fabric, state: State, task: Task, cfg: ResolvedConfig, at_most: float
) -> float:
    """Train for `at_most` seconds or MEASURED_STEPS, the later, but 10 s do; return a step's time.

    Steps differ with their image size: a mean step has the mean area of `--img-sizes`.
    """
    loader = make_train_loader(fabric, cfg, task, make_sampler(fabric, cfg, len(task.train_set)))
    steps = optimizer_steps(loader, cfg.grad_accum_steps)
    lr = cfg.max_lr / cfg.div_factor
    # slow first calls, and full queues
    for micro_batches in islice(steps, 3 + 2 * loader.num_workers):
        train_step(fabric, state, task, micro_batches, lr=lr, beta1=BETA1)
    start, areas = time.perf_counter(), 0
    for count, micro_batches in enumerate(steps, start=1):
        train_step(fabric, state, task, micro_batches, lr=lr, beta1=BETA1)
        areas += micro_batches[0][0].shape[-1] ** 2
        elapsed = time.perf_counter() - start
        if fabric.broadcast(count >= MEASURED_STEPS and elapsed >= min(10.0, at_most)):
            break
    if fabric.device.type == "cuda":
        torch.cuda.synchronize(fabric.device)
    mean_area = sum(size**2 for size in cfg.img_sizes) / len(cfg.img_sizes)
    return (time.perf_counter() - start) * mean_area / areas


def _seconds_of_a_test(fabric: Fabric, model: nn.Module, task: Task) -> float:
    """Estimate the time of a whole test from its first images, decoded here one by one."""
    split = task.eval_split
    predict(fabric, model, split.first_batch()[0])  # the first call of a device is slow
    start = time.perf_counter()
    images, targets = split.first_batch()
    split.metrics(full=True).update(predict(fabric, model, images), targets)
    share = len(images) * fabric.world_size / len(split.dataset)
    return (time.perf_counter() - start) / share


def find_batch_size(fabric: Fabric, cfg: Config, task: Task, largest: int | None = None) -> int:
    """Return the largest global batch whose parts fit on every rank at the largest image size.

    Micro-batches are powers of two up to `largest`: 256, or 16 without a GPU, where more does not
    pay.

    Raises:
        UserError: if not even one image fits.
    """
    from accelerate.utils import find_executable_batch_size

    task.criterion.to(fabric.device)
    top = largest or (GPU_BATCH if fabric.device.type == "cuda" else CPU_BATCH)
    sizes = [2**power for power in range(int(math.log2(top)), -1, -1)]
    smaller = iter([*sizes[1:], 0])

    @find_executable_batch_size(
        starting_batch_size=sizes[0], reduce_batch_size_fn=lambda: next(smaller)
    )
    def largest_fitting(batch_size: int) -> int:
        _try_micro_batch(fabric, cfg, task, batch_size)
        return batch_size

    try:
        found = largest_fitting()
    except RuntimeError as error:
        if "No executable batch size" not in str(error):
            raise
        found = 0
    micro_batch = min(gather(fabric, found))
    if micro_batch == 0:
        raise UserError(
            f"not even one image of --img-sizes {max(cfg.img_sizes)} fits into memory: choose "
            "smaller "
            "--img-sizes or --width"
        )
    return micro_batch * fabric.world_size * cfg.grad_accum_steps


def _try_micro_batch(fabric: Fabric, cfg: Config, task: Task, batch_size: int) -> None:
    """Make two optimizer steps at the largest size: the second one holds Adam's state as well."""
    images, targets = (part.to(fabric.device) for part in _repeated_batch(cfg, task, batch_size))
    network = copy.deepcopy(task.model).to(fabric.device).to(memory_format=torch.channels_last)
    optimizer = make_optimizer(network, cfg)
    for _ in range(2):
        with fabric.autocast():
            losses = task.criterion(network(images), targets, task.count(targets))
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _repeated_batch(cfg: Config, task: Task, batch_size: int) -> Any:
    """Collate `batch_size` samples of the largest size, few of them distinct to save time."""
    distinct = MultiSizeBatchSampler(
        len(task.train_set), min(batch_size, 4), (max(cfg.img_sizes),), cfg.seed
    )
    samples = [task.train_samples[key] for key in next(iter(distinct))]
    return task.train_collate((samples * batch_size)[:batch_size])


def rising_rates(steps: int) -> list[float]:
    """Return `steps` learning rates from lowest to highest, evenly spaced on a log scale."""
    growth = (HIGHEST_LR / LOWEST_LR) ** (1 / max(1, steps - 1))
    return [LOWEST_LR * growth**step for step in range(steps)]


def _write_curve(curve: LrRange, path: Path) -> None:
    rows = zip(curve.lr, curve.loss, curve.smoothed, strict=True)
    lines = [f"{lr!r} {loss!r} {smoothed!r}" for lr, loss, smoothed in rows]
    with replacing(path) as temporary:
        temporary.write_text(
            "\n".join([f"# proposed max_lr {curve.proposal}", "# lr loss smoothed", *lines]) + "\n"
        )


def _plot_curve(curve: LrRange, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.add_subplot(
        xlabel="learning rate", ylabel="loss", xscale="log", title="Learning-rate range test"
    )
    axes.plot(curve.lr, curve.loss, color="tab:blue", alpha=0.3, label="loss")
    axes.plot(curve.lr, curve.smoothed, color="tab:blue", label="smoothed")
    axes.axvline(
        curve.proposal,
        color="tab:orange",
        linestyle="--",
        label=f"proposed --max-lr {curve.proposal}",
    )
    axes.set_ylim(0, 2 * curve.smoothed[0])
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
