"""The Fabric loop: one optimizer step after another, for any task, on any number of processes."""

import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from yolo.config import Config
from yolo.engine.fabric import (
    LINK_SECONDS,
    PATIENCE_SECONDS,
    Fabric,
    agree,
    agreed_reason,
    average_over_ranks,
    gather,
    lost_link,
    sum_over_ranks,
    wait_at_most,
)
from yolo.engine.loaders import make_eval_loader
from yolo.engine.meter import Meter
from yolo.engine.sharing import Threads
from yolo.engine.state import State, freeze_backbone
from yolo.engine.stopping import StopRequest
from yolo.errors import UserError
from yolo.runs.checkpoint import load_weights
from yolo.runs.logbook import Progress
from yolo.runs.run import Run
from yolo.tasks.base import EvalSplit, Metrics, Task


def optimizer_steps(loader: DataLoader, grad_accum_steps: int) -> Iterator[list[Any]]:
    """Yield the micro-batches of one optimizer step after another, epoch after epoch, endless."""
    batches = iter(loader)
    while micro_batches := list(islice(batches, grad_accum_steps)):
        yield micro_batches


def train_step(
    fabric: Fabric,
    state: State,
    task: Task,
    micro_batches: Sequence[Any],
    *,
    lr: float,
    beta1: float,
) -> None:
    """Make one optimizer step from the micro-batches of this rank; never waits for the device."""
    on_device = [
        [part.to(fabric.device, non_blocking=True) for part in batch] for batch in micro_batches
    ]
    counts = sum_over_ranks(
        fabric, torch.stack([task.count(targets) for _, targets in on_device]).sum(0)
    )
    finite = torch.ones((), dtype=torch.bool, device=fabric.device)
    for i, (images, targets) in enumerate(on_device):
        with fabric.no_backward_sync(state.model, enabled=i + 1 < len(micro_batches)):
            losses = task.criterion(state.model(images), targets, counts)
            terms = torch.stack(list(losses.values()))
            total = terms.sum()
            fabric.backward(total * fabric.world_size)  # DDP averages, the counts are global sums
        finite &= total.detach().isfinite()
        state.add_losses(list(losses), terms.detach())
    for group in state.optimizer.param_groups:
        group["lr"], group["betas"] = lr * group["lr_factor"], (beta1, group["betas"][1])
    if state.scaler:
        state.scaler.unscale_(state.optimizer.optimizer)
    # Fabric's own refuses a fused optimizer under a scaler
    nn.utils.clip_grad_norm_(state.parameters, task.config.max_norm, foreach=True)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    average_over_ranks(fabric, state.statistics())
    state.ema.update(state.step)
    state.bad_steps = torch.where(finite, 0, state.bad_steps + 1)
    state.step += 1
    state.batch += 1


def train_one_epoch(
    fabric: Fabric,
    state: State,
    task: Task,
    steps: Iterator[list[Any]],
    stop: StopRequest,
    run: Run,
) -> None:
    """Train from the state's position to the end of its epoch or the run, or until asked to stop.

    Args:
        fabric: as launched.
        state: says where to go on.
        task: what is learned.
        steps: from `optimizer_steps`, at the state's position; the next epoch goes on with it.
        stop: lets a signal end the training.
        run: where losses and checkpoints go.

    Raises:
        UserError: if the loss is not finite for several steps, the GPU's memory is exhausted, a
            loader's worker was killed, or another rank is lost.
    """
    cfg, schedule = task.config, run.schedule
    freeze_backbone(state, cfg)
    meter = Meter(fabric, cfg, state, run)
    # the first epoch of a start compiles for one image size after another
    patience = PATIENCE_SECONDS if cfg.compile and not state.is_compiled else LINK_SECONDS
    wait_at_most(fabric, patience)
    try:
        for micro_batches in meter.timed(steps):
            lr, beta1 = schedule.lr[state.step], schedule.beta1[state.step]
            train_step(fabric, state, task, micro_batches, lr=lr, beta1=beta1)
            meter.count(micro_batches)
            if (change := state.threads.adapt()) is not None:
                run.record("threads", state.step, {"threads": state.threads.count})
                fabric.print(f"step {state.step}: {change}")
            if state.step % cfg.log_every == 0 or state.step == run.end:
                meter.log()
            epoch_ends = state.batch == schedule.steps_per_epoch
            if epoch_ends:
                state.epoch, state.batch = state.epoch + 1, 0
            state.evaluation_due = epoch_ends or test_is_due(cfg, state, len(schedule))
            stopping, saving = agree(fabric, stop.reason is not None, run.save_is_due(state.step))
            if state.step == run.end or stopping or state.evaluation_due:
                break  # if a save is due as well, the test comes first
            if saving:
                wait_at_most(fabric, PATIENCE_SECONDS)
                run.save()
                agree(fabric, True)  # nobody waits for rank 0's disk in the next step
                wait_at_most(fabric, patience)
    except RuntimeError as error:
        if told := _told(error, cfg, run):
            raise told from None
        raise
    finally:
        meter.close()
        wait_at_most(fabric, PATIENCE_SECONDS)
    state.is_compiled = True


def _told(error: RuntimeError, cfg: Config, run: Run) -> UserError | None:
    """Return what a person can do about an error; torch has hardly any types for them."""
    if isinstance(error, torch.OutOfMemoryError):
        return UserError(
            f"out of GPU memory at --img-sizes {max(cfg.img_sizes)} with --batch-size "
            f"{run.schedule.global_batch}: double --grad-accum-steps (the same batch in smaller "
            "parts), lower --batch-size, or drop the largest of --img-sizes"
        )
    if "DataLoader worker" in str(error):
        saved = run.last_checkpoint.name if run.last_checkpoint else "the start"
        return UserError(
            f"{str(error).strip()} Mostly it lacked memory: use fewer --workers or --cache none, "
            f"and go on from {saved} with --resume {run.folder.path}"
        )
    return lost_link(error)


def test_is_due(cfg: Config, state: State, steps: int) -> bool:
    """Return whether the weights are to be tested now, in a run of so many steps."""
    if cfg.tests:
        return state.step % max(1, round(steps / cfg.tests)) == 0
    return state.batch == 0 and state.epoch % cfg.eval_every == 0


def evaluate_if_due(
    fabric: Fabric, state: State, task: Task, loader: DataLoader, stop: StopRequest, run: Run
) -> dict[str, Any] | None:
    """Test the averaged weights if that is due (at the end it is); None if not, or if stopped."""
    cfg = task.config
    at_end = state.step >= run.end
    is_due = state.evaluation_due and test_is_due(cfg, state, len(run.schedule))
    if not at_end and not is_due:
        state.evaluation_due = False
        return None
    run.wait()  # the first test forks its workers: no thread may hold a lock that they inherit
    full = at_end or cfg.map_is_due(state.epoch)
    model, split, threads = state.ema.module, task.eval_split, state.threads
    results = measure(fabric, model, split, loader, full=full, stop=stop, threads=threads)
    if results is None:
        return None
    state.evaluation_due = False
    stop.reserve = results["seconds"]
    score = task.score(results)
    state.confidence = results.get("best_f1_confidence", state.confidence)
    is_first, is_best = state.best_score < 0, score > state.best_score
    state.best_score = max(score, state.best_score)
    run.record_evaluation(state, results, is_best=is_best)
    first_or_last = at_end or is_first or (not cfg.tests and state.epoch <= cfg.eval_every)
    if fabric.is_global_zero and (
        state.epoch % cfg.plot_every == 0 if cfg.plot_every else first_or_last
    ):
        drawn = task.eval_split.draw_predictions(
            lambda images: predict(fabric, state.ema.module, images)
        )
        run.picture("test", drawn, state.step)
    return results


def headline(
    fabric: Fabric, state: State, task: Task, run: Run, last: dict[str, Any]
) -> dict[str, Any]:
    """Return the figures that stand for the run, on the split that nothing was chosen by.

    They are of the best weights where mAP chose them, else of the last ones, whose test is `last`.
    Without such a split they are of the test that chose.
    """
    has_best = task.config.maps_each_test and run.folder.best.exists()
    best = load_weights(run.folder.best) if fabric.broadcast(has_best) else None
    about = {} if best is None else {"step": best.results["step"], "epoch": best.results["epoch"]}
    if best is not None:
        about |= {"checkpoint": run.folder.best.name, "chosen_on": task.eval_split.dataset.name}
    split = task.test_split
    if split is None:
        return (last if best is None else best.results) | about
    model = (state.ema.module if best is None else best.model).to(fabric.device)
    loader = make_eval_loader(fabric, run.cfg, split)
    results = measure(fabric, model, split, loader, full=True)
    assert results is not None  # nothing stops this test
    return results | about


def measure(
    fabric: Fabric,
    model: nn.Module,
    split: EvalSplit,
    loader: DataLoader,
    *,
    full: bool,
    stop: StopRequest | None = None,
    threads: Threads | None = None,
) -> dict[str, Any] | None:
    """Test a model; return what was measured, the same on all ranks, or None if stopped before."""
    start = time.perf_counter()
    metrics = evaluate(fabric, model, split, loader, full=full, stop=stop, threads=threads)
    if metrics is None:
        return None
    count = {"image_count": len(split.dataset)}
    results = count | metrics.compute() if fabric.is_global_zero else {}
    return fabric.broadcast({**results, "seconds": time.perf_counter() - start})


@torch.no_grad()
def predict(fabric: Fabric, model: nn.Module, images: Tensor) -> Any:
    """Run a bare network on a batch in the run's precision."""
    with fabric.autocast():
        return model(images.to(fabric.device, non_blocking=True))


@torch.no_grad()
def evaluate(
    fabric: Fabric,
    model: nn.Module,
    split: EvalSplit,
    loader: DataLoader,
    *,
    full: bool,
    stop: StopRequest | None = None,
    threads: Threads | None = None,
) -> Metrics | None:
    """Test a model on every rank's share; return the merged metrics, None if stopped before.

    Args:
        fabric: as launched.
        model: a bare network in eval mode, such as the EMA's.
        split: the images and their metrics.
        loader: this rank's share, from `make_eval_loader`.
        full: also measure what is slow (mAP).
        stop: lets a signal end the test early.
        threads: adapts to the machine's load from batch to batch.
    """
    metrics = split.metrics(full=full)
    progress = Progress(len(loader), "test", fabric.is_global_zero)
    # of all ranks
    common_batches = len(split.dataset) // fabric.world_size // (loader.batch_size or 1)
    for i, (images, targets) in enumerate(loader):
        if stop and i < common_batches and agreed_reason(fabric, stop):
            return None
        metrics.update(predict(fabric, model, images), targets)
        if threads and (change := threads.adapt()) is not None:
            fabric.print(f"test: {change}")
        progress.update()
    progress.close()
    metrics.merge(gather(fabric, metrics.state()))
    return metrics
