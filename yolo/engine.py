"""The Fabric loop: one optimizer step after another, for any task, on any number of processes."""

import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from yolo.config import Config, HardwareConfig
from yolo.data.anchors import anchors_gained
from yolo.data.collate import init_worker
from yolo.data.samplers import MultiSizeBatchSampler
from yolo.ema import Ema
from yolo.errors import UsageError, UserError
from yolo.inference import cpu_computes_bf16, require_compiler
from yolo.logbook import Progress, duration
from yolo.provenance import available_cpus, hardware
from yolo.run import Run
from yolo.schedule import Schedule, plan_schedule
from yolo.stopping import StopRequest
from yolo.tasks import Task, Test

MAX_BAD_STEPS = 5  # consecutive steps with a loss that is not finite, before giving up


def make_fabric(cfg: HardwareConfig) -> tuple[Fabric, torch.amp.GradScaler | None]:
    """Return a launched Fabric and its gradient scaler (None unless the precision is 16-mixed).

    Under torchrun the world is what torchrun says: left to itself, Fabric forms a world of one per process on
    CPUs. The scaler is ours so that a checkpoint can hold it.
    """
    device = _device_type(cfg.accelerator)
    precision, _ = pick_precision(cfg.precision, device)
    scaler = torch.amp.GradScaler(device) if precision == "16-mixed" else None
    plugins = [MixedPrecision("16-mixed", device, scaler=scaler)] if scaler else None
    devices, num_nodes = _world(cfg)
    fabric = Fabric(
        accelerator=device,
        devices=devices,
        num_nodes=num_nodes,
        precision=None if plugins else precision,  # type: ignore[arg-type]
        plugins=plugins,  # type: ignore[arg-type]
    )
    fabric.launch()
    return fabric, scaler


def pick_precision(wanted: str, device: str) -> tuple[str, str]:
    """Return the precision to use on a device type and, in words, why."""
    if wanted != "auto":
        return wanted, "as asked"
    if device == "cuda":
        return "16-mixed", "CUDA computes half precision several times faster"
    if device == "cpu" and cpu_computes_bf16():
        return "bf16-mixed", "this CPU has native bfloat16 instructions"
    return "32-true", f"no fast half precision on this {device}"


def make_sampler(fabric: Fabric, cfg: Config, num_samples: int) -> MultiSizeBatchSampler:
    """Return this rank's share of the training order.

    Raises:
        UsageError: if ranks x grad_accum_steps does not divide the batch.
    """
    assert cfg.batch_size != "auto"
    shares = fabric.world_size * cfg.grad_accum_steps
    if cfg.batch_size % shares:
        raise UsageError(
            f"--batch-size {cfg.batch_size} cannot be shared by {fabric.world_size} rank(s) x "
            f"--grad-accum-steps {cfg.grad_accum_steps}: choose a multiple of {shares}"
        )
    return MultiSizeBatchSampler(
        num_samples,
        cfg.batch_size,
        cfg.img_sizes,
        cfg.seed,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
        grad_accum_steps=cfg.grad_accum_steps,
    )


def make_train_loader(
    fabric: Fabric, cfg: Config, task: Task, sampler: MultiSizeBatchSampler, start_method: str | None = None
) -> DataLoader:
    """Return the loader of micro-batches. Fabric's wrapper is left out: it would rebuild the sampler."""
    return DataLoader(
        task.train_samples,
        batch_sampler=sampler,  # type: ignore[arg-type]
        collate_fn=task.train_collate,
        **_worker_settings(fabric, cfg, start_method),
    )


def make_test_loader(fabric: Fabric, cfg: Config, test: Test) -> DataLoader:
    """Return this rank's share of a test set, every image exactly once over all ranks."""
    share = range(fabric.global_rank, len(test.dataset), fabric.world_size)
    batch_size = max(1, min(32, int(cfg.batch_size) // fabric.world_size)) if cfg.batch_size != "auto" else 16
    return DataLoader(
        Subset(test.samples, share),
        batch_size=batch_size,
        collate_fn=test.collate,
        **{**_worker_settings(fabric, cfg), "persistent_workers": False},
    )


def plan(fabric: Fabric, cfg: Config, task: Task, sampler: MultiSizeBatchSampler) -> Schedule:
    """Plan the one-cycle for this data set and this global batch."""
    return plan_schedule(
        cfg,
        ranks=fabric.world_size,
        dataset_size=len(task.train_set),
        dataset_digest=task.train_set.digest(),
        steps_per_epoch=len(sampler),
    )


def end_of(cfg: Config, schedule: Schedule) -> int:
    """Return the number of optimizer steps after which training ends."""
    return min(len(schedule), cfg.max_steps or len(schedule))


def introduction(fabric: Fabric, cfg: Config, task: Task, run: Run) -> str:
    """Say what is about to run, and where."""
    precision, why = pick_precision(cfg.precision, fabric.device.type)
    parameters = sum(parameter.numel() for parameter in task.model.parameters())
    lines = [
        f"run folder   {run.folder.path}",
        f"data         {task.train_set.name}: {len(task.train_set)} images; test {task.test.dataset.name}: "
        f"{len(task.test.dataset)} images; {len(task.class_names)} classes",
        f"model        {type(task.model).__name__}, width {cfg.width:g}, {parameters:,} parameters",
        f"hardware     {fabric.world_size} process(es) on {hardware()}; precision {precision}: {why}",
        f"schedule     {len(run.schedule)} steps of batch {cfg.batch_size} at "
        f"{','.join(map(str, cfg.img_sizes))} px, test at {cfg.resolved_test_size} px",
    ]
    if torch.cuda.is_available() and torch.cuda.device_count() > fabric.world_size:
        lines.append(
            f"hint         {torch.cuda.device_count()} GPUs are visible: --devices auto uses all of them"
        )
    if cfg.mosaic_prob > 0.75:
        lines.append("hint         --mosaic-prob 0.5 to 0.75 is advised: no object in a mosaic is large")
    if cfg.anchors == "auto" and task.anchors is not None:
        lines += [f"anchors      {line}" for line in anchors_gained(task.train_set, cfg)]
    for split in (task.train_set, task.test.dataset):
        lines += [f"skipped      {defect}" for defect in split.skipped]
    return "\n".join(lines)


@dataclass
class State:
    """Everything that changes while training, and therefore everything that a checkpoint holds."""

    fabric: Fabric
    network: nn.Module  # the bare network: its weights are what is saved
    model: Any  # the same, as Fabric wrapped it
    optimizer: Any
    ema: Ema
    scaler: torch.amp.GradScaler | None
    bad_steps: Tensor  # consecutive steps whose loss was not finite, on this rank
    loss_sums: dict[str, Tensor] = field(default_factory=dict)  # of this rank, since the last log line
    logged_scale: float = 1.0  # the scaler's factor at the last log line
    step: int = 0  # optimizer steps done
    epoch: int = 0
    batch: int = 0  # optimizer steps done within the epoch
    evaluation_due: bool = False  # an epoch has ended and was not tested yet
    best_score: float = -1.0

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain types only. Every rank has to call it: each adds its own loss sums."""
        return {
            "model": self.network.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "loss_sums": gather(self.fabric, {name: float(value) for name, value in self.loss_sums.items()}),
            "logged_scale": self.logged_scale,
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "evaluation_due": self.evaluation_due,
            "best_score": self.best_score,
        }

    def load_state_dict(self, content: dict[str, Any]) -> list[str]:
        """Take over what `state_dict` returned; return notices worth printing."""
        self.network.load_state_dict(content["model"])
        self.ema.module.load_state_dict(content["ema"])
        own_groups = self.optimizer.state_dict()["param_groups"]  # the flags of this start
        self.optimizer.load_state_dict({**content["optimizer"], "param_groups": own_groups})
        for name in ("step", "epoch", "batch", "evaluation_due", "best_score"):
            setattr(self, name, content[name])
        self.loss_sums = self._own_loss_sums(content["loss_sums"])
        if (self.scaler is None) != (content["scaler"] is None):
            return ["the checkpoint was made in another precision: the gradient scaler starts fresh"]
        if self.scaler is not None:
            self.scaler.load_state_dict(content["scaler"])
            self.logged_scale = content["logged_scale"]
        return []

    def _own_loss_sums(self, by_rank: list[dict[str, float]]) -> dict[str, Tensor]:
        rank, world_size = self.fabric.global_rank, self.fabric.world_size
        mine = by_rank[rank::world_size]  # all of them, whatever the number of ranks was
        device = self.bad_steps.device
        return {
            name: torch.tensor(sum(sums[name] for sums in mine), dtype=torch.float64, device=device)
            for name in by_rank[0]
        }

    def is_finite(self) -> bool:
        """Return whether all weights are finite; waits for the device."""
        return all(bool(value.isfinite().all()) for value in self.network.parameters())


def make_state(fabric: Fabric, scaler: torch.amp.GradScaler | None, cfg: Config, task: Task) -> State:
    """Move the task to the device, wrap the model and build optimizer and EMA."""
    network = task.model
    if cfg.sync_batchnorm and fabric.world_size > 1:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    network = network.to(fabric.device).to(memory_format=torch.channels_last)
    task.criterion.to(fabric.device)
    ema = Ema(network, cfg.ema_decay)
    optimizer = make_optimizer(network, cfg, fused=scaler is None)  # a scaler clips only without fusing
    if cfg.compile:
        require_compiler()
    runnable: Any = torch.compile(network, dynamic=False) if cfg.compile else network
    model, optimizer = fabric.setup(runnable, optimizer)
    zero = torch.zeros((), dtype=torch.int64, device=fabric.device)
    scale = scaler.get_scale() if scaler else 1.0
    return State(fabric, network, model, optimizer, ema, scaler, zero, logged_scale=scale)


def make_optimizer(network: nn.Module, cfg: Config, *, fused: bool = False) -> torch.optim.Adam:
    """Return Adam; only weights of two or more dimensions decay. The schedule sets its rate."""
    weights = [parameter for parameter in network.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in network.parameters() if parameter.ndim <= 1]
    groups = [{"params": weights, "weight_decay": cfg.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.Adam(groups, fused=fused)


def optimizer_steps(loader: DataLoader, grad_accum_steps: int) -> Iterator[list[Any]]:
    """Yield the micro-batches of one optimizer step after another."""
    batches = iter(loader)
    while micro_batches := list(islice(batches, grad_accum_steps)):
        yield micro_batches


def train_step(
    fabric: Fabric, state: State, task: Task, micro_batches: Sequence[Any], *, lr: float, beta1: float
) -> None:
    """Make one optimizer step from the micro-batches of this rank; never waits for the device."""
    cfg = task.config
    images_on_device = [images.to(fabric.device, non_blocking=True) for images, _ in micro_batches]
    assigned = [task.assign(targets, images.shape[-1]) for images, targets in micro_batches]
    counts = sum_over_ranks(fabric, torch.stack([task.count(part) for part in assigned]).sum(0))
    finite = torch.ones((), dtype=torch.bool, device=fabric.device)
    for i, images in enumerate(images_on_device):
        with fabric.no_backward_sync(state.model, enabled=i + 1 < len(micro_batches)):
            losses = task.criterion(state.model(images), assigned[i], counts)
            total = torch.stack(list(losses.values())).sum()
            fabric.backward(total * fabric.world_size)  # DDP averages, the counts are global sums
        finite &= total.detach().isfinite()
        for name, loss in losses.items():
            state.loss_sums[name] = state.loss_sums.get(name, 0.0) + loss.detach().double()
    for group in state.optimizer.param_groups:
        group["lr"], group["betas"] = lr, (beta1, group["betas"][1])
    fabric.clip_gradients(state.model, state.optimizer, max_norm=cfg.max_norm, error_if_nonfinite=False)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.ema.update(state.network, state.step)
    state.bad_steps = torch.where(finite, 0, state.bad_steps + 1)
    state.step += 1
    state.batch += 1


def train_one_epoch(
    fabric: Fabric,
    state: State,
    task: Task,
    loader: DataLoader,
    stop: StopRequest,
    run: Run,
) -> None:
    """Train from the state's position to the end of its epoch, of the run, or until somebody asks to stop.

    Raises:
        UserError: if the loss is not finite for several steps, or the GPU's memory is exhausted.
    """
    cfg, schedule = task.config, run.schedule
    sampler: MultiSizeBatchSampler = loader.batch_sampler  # type: ignore[assignment]
    sampler.set_position(state.epoch, state.batch)
    end = end_of(cfg, schedule)
    meter = Meter(fabric, cfg, state, run)
    steps = meter.timed(optimizer_steps(loader, cfg.grad_accum_steps))
    try:
        for micro_batches in steps:
            lr, beta1 = schedule.lr[state.step], schedule.beta1[state.step]
            train_step(fabric, state, task, micro_batches, lr=lr, beta1=beta1)
            meter.count(micro_batches)
            if state.step % cfg.log_every == 0 or state.step == end:
                meter.log()
            if state.batch == len(sampler):
                state.epoch, state.batch, state.evaluation_due = state.epoch + 1, 0, True
            stopping, saving = agree(fabric, stop.reason is not None, run.save_is_due(state.step))
            if state.step == end or stopping:
                return
            if saving and not state.evaluation_due:  # else the test comes first, and a save after it
                run.save()
    except torch.OutOfMemoryError:
        raise UserError(
            f"out of GPU memory at --img-sizes {max(cfg.img_sizes)} with --batch-size {cfg.batch_size}: "
            "double --grad-accum-steps (the same batch in smaller parts), lower --batch-size, or drop the "
            "largest of --img-sizes"
        ) from None
    finally:
        meter.close()


class Meter:
    """Speed, losses and time to go, logged every `log_every` steps: the only waits for the device."""

    def __init__(self, fabric: Fabric, cfg: Config, state: State, run: Run) -> None:
        self.fabric, self.cfg, self.state, self.run = fabric, cfg, state, run
        title = f"epoch {state.epoch + 1}/{cfg.epochs}"
        self.progress = Progress(run.schedule.steps_per_epoch, title, fabric.is_global_zero)
        self.progress.update(state.batch)
        self._restart()

    def timed(self, steps: Iterator[list[Any]]) -> Iterator[list[Any]]:
        """Pass the steps on, and add up the time spent waiting for them."""
        while True:
            start = time.perf_counter()
            try:
                micro_batches = next(steps)
            except StopIteration:
                return
            self.waited += time.perf_counter() - start
            yield micro_batches

    def count(self, micro_batches: Sequence[Any]) -> None:
        """Count the images of an optimizer step, over all ranks."""
        self.images += sum(len(images) for images, _ in micro_batches) * self.fabric.world_size
        self.steps += 1
        self.img_size = micro_batches[0][0].shape[-1]
        self.progress.update()

    def log(self) -> None:
        """Write the mean losses since the last line.

        Raises:
            UserError: if the loss has not been finite for `MAX_BAD_STEPS` steps, on all ranks.
        """
        state = self.state
        sums = torch.stack([*state.loss_sums.values(), (state.bad_steps >= MAX_BAD_STEPS).double()])
        *losses, hopeless = sum_over_ranks(self.fabric, sums).tolist()  # waits for the device
        if hopeless:
            raise UserError(
                f"the loss has not been finite for {MAX_BAD_STEPS} steps (now step {state.step}); the last "
                f"good checkpoint is {self.run.last_checkpoint}: go on from it with a lower --max-lr "
                "(--resume auto --replan) or with --precision 32-true"
            )
        seconds = time.perf_counter() - self.start
        count = state.step - (state.step - 1) // self.cfg.log_every * self.cfg.log_every
        means = {name: value / count for name, value in zip(state.loss_sums, losses, strict=True)}
        speed = self.images / seconds
        values = {
            "epoch": state.epoch,
            "loss": sum(means.values()),
            **means,
            "lr": self.run.schedule.lr[state.step - 1],
            "img_size": self.img_size,
            "images_per_second": speed,
            "data_wait_share": self.waited / seconds,
            "peak_memory_gib": peak_memory_gib(self.fabric.device),
            **self._skipped_steps(),
        }
        self.run.record("train", state.step, values)
        self.progress.note(self._line(values, seconds))
        state.loss_sums = {}
        self._restart()

    def close(self) -> None:
        """Remove the bar."""
        self.progress.close()

    def _restart(self) -> None:
        self.start, self.waited, self.images, self.steps, self.img_size = time.perf_counter(), 0.0, 0, 0, 0

    def _skipped_steps(self) -> dict[str, int]:
        """Steps that the gradient scaler left out since the last line: each halves the scale."""
        if self.state.scaler is None:
            return {}
        previous, self.state.logged_scale = self.state.logged_scale, self.state.scaler.get_scale()
        return {"skipped_steps": max(0, round(math.log2(previous / self.state.logged_scale)))}

    def _line(self, values: dict[str, Any], seconds: float) -> str:
        steps_left = end_of(self.cfg, self.run.schedule) - self.state.step
        eta = steps_left * seconds / max(self.steps, 1)
        terms = " ".join(f"{name} {values[name]:.3f}" for name in ("loss", *self.state.loss_sums))
        return (
            f"step {self.state.step} {terms} lr {values['lr']:.2e} size {values['img_size']} "
            f"{values['images_per_second']:.0f} img/s (wait {values['data_wait_share']:.0%}) "
            f"{values['peak_memory_gib']:.1f} GiB, {duration(eta)} to go"
        )


def evaluate_if_due(
    fabric: Fabric, state: State, task: Task, loader: DataLoader, stop: StopRequest, run: Run
) -> dict[str, Any] | None:
    """Test the averaged weights at the end and every `eval_every` epochs; None if not due or stopped."""
    cfg = task.config
    at_end = state.step >= end_of(cfg, run.schedule)
    if not at_end and (not state.evaluation_due or state.epoch % cfg.eval_every):
        state.evaluation_due = False
        return None
    full = at_end or (cfg.map_every != "last" and state.epoch % cfg.map_every == 0)
    results = evaluate(fabric, state.ema.module, task.test, loader, full=full, stop=stop)
    if results is None:
        return None
    state.evaluation_due = False
    score = task.score(results)
    run.record_evaluation(state, results, is_best=score > state.best_score)
    state.best_score = max(score, state.best_score)
    first_or_last = at_end or state.epoch <= cfg.eval_every
    if fabric.is_global_zero and (state.epoch % cfg.plot_every == 0 if cfg.plot_every else first_or_last):
        run.picture(
            "test", task.test.picture(lambda images: predict(fabric, state.ema.module, images)), state.step
        )
    return results


@torch.no_grad()
def predict(fabric: Fabric, model: nn.Module, images: Tensor) -> Any:
    """Run a bare network on a batch in the run's precision."""
    with fabric.autocast():
        return model(images.to(fabric.device, non_blocking=True))


@torch.no_grad()
def evaluate(
    fabric: Fabric,
    model: nn.Module,
    test: Test,
    loader: DataLoader,
    *,
    full: bool,
    stop: StopRequest | None = None,
    description: str = "test",
) -> dict[str, Any] | None:
    """Test a model on every rank's share and return the merged results on all ranks; None if stopped before.

    Args:
        fabric: as launched.
        model: a bare network in eval mode, such as the EMA's.
        test: the split and its metrics.
        loader: this rank's share, from `make_test_loader`.
        full: also compute what is slow (mAP).
        stop: lets a signal end the test early.
        description: of the progress bar.
    """
    for buffer in model.buffers() if fabric.world_size > 1 else ():
        dist.broadcast(buffer, 0)  # each rank averaged the batch statistics that it saw; rank 0's are saved
    metrics = test.metrics(full)
    start = time.perf_counter()
    progress = Progress(len(loader), description, fabric.is_global_zero)
    common_batches = len(test.dataset) // fabric.world_size // (loader.batch_size or 1)  # that all ranks have
    for i, (images, targets) in enumerate(loader):
        if stop and i < common_batches and agreed_reason(fabric, stop):
            return None
        metrics.update(predict(fabric, model, images), targets)
        progress.update()
    progress.close()
    metrics.merge(gather(fabric, metrics.state()))
    results = {"image_count": len(test.dataset), **metrics.compute()} if fabric.is_global_zero else {}
    results["seconds"] = time.perf_counter() - start
    return fabric.broadcast(results)


def sum_over_ranks(fabric: Fabric, values: Tensor) -> Tensor:
    """Add up a tensor over all ranks, in place. Fabric's `all_reduce` would wait for the device."""
    if fabric.world_size > 1:
        dist.all_reduce(values)
    return values


def gather(fabric: Fabric, value: Any) -> list[Any]:
    """Return every rank's picklable value, in the order of ranks, on every rank."""
    if fabric.world_size == 1:
        return [value]
    values: list[Any] = [None] * fabric.world_size
    dist.all_gather_object(values, value)
    return values


def agreed_reason(fabric: Fabric, stop: StopRequest) -> str | None:
    """Return why to stop, the same on all ranks: the first rank's reason that has one."""
    (stopping,) = agree(fabric, stop.reason is not None)
    return next(reason for reason in gather(fabric, stop.reason) if reason) if stopping else None


def agree(fabric: Fabric, *flags: bool) -> list[bool]:
    """Return each flag as true if it is true on any rank: the same answer on all of them."""
    if fabric.world_size == 1:
        return list(flags)
    votes = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=_cpu_group())  # asking the GPU would wait for it
    return votes.bool().tolist()


@cache
def _cpu_group() -> Any:
    if dist.get_backend() == "gloo":  # the ranks are connected that way already
        return dist.group.WORLD
    return dist.new_group(backend="gloo")


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory used so far: the GPU's, or this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _worker_settings(fabric: Fabric, cfg: Config, start_method: str | None = None) -> dict[str, Any]:
    local_ranks = fabric.world_size // _world(cfg)[1]
    workers = max(1, available_cpus() // local_ranks) if cfg.workers == "auto" else cfg.workers
    return {
        "num_workers": workers,
        "worker_init_fn": init_worker,
        "pin_memory": fabric.device.type == "cuda",
        "persistent_workers": workers > 0,
        "multiprocessing_context": start_method if workers else None,
    }


def _device_type(accelerator: str) -> str:
    if accelerator in ("auto", "gpu"):
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    if accelerator not in ("cpu", "cuda", "mps"):
        raise UsageError(f"--accelerator {accelerator}: want cpu, cuda, mps or auto")
    return accelerator


def _world(cfg: HardwareConfig) -> tuple[int | str, int]:
    environment = os.environ
    if "LOCAL_WORLD_SIZE" in environment and "WORLD_SIZE" in environment:  # torchrun
        local = int(environment["LOCAL_WORLD_SIZE"])
        return local, int(environment["WORLD_SIZE"]) // local
    if "SLURM_NTASKS_PER_NODE" in environment and "SLURM_NNODES" in environment:  # srun
        return int(environment["SLURM_NTASKS_PER_NODE"]), int(environment["SLURM_NNODES"])
    if cfg.devices == "auto":
        return 1 if not torch.cuda.is_available() else "auto", cfg.num_nodes
    return cfg.devices, cfg.num_nodes
