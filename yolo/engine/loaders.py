"""The loaders of one rank: its share of the training order and of a test set."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from yolo.config import Config, ResolvedConfig
from yolo.data.samplers import MultiSizeBatchSampler
from yolo.data.samples import init_worker
from yolo.engine.fabric import Fabric, keep_freed_memory, ranks_per_node
from yolo.errors import UsageError, UserError
from yolo.runs.provenance import available_cpus
from yolo.tasks.base import EvalSplit, Task


def make_sampler(fabric: Fabric, cfg: ResolvedConfig, num_samples: int) -> MultiSizeBatchSampler:
    """Return this rank's share of the training order.

    Raises:
        UsageError: if ranks x grad_accum_steps does not divide the batch.
    """
    shares = fabric.world_size * cfg.grad_accum_steps
    if cfg.batch_size % shares:
        raise UsageError(
            f"--batch-size {cfg.batch_size} cannot be shared by {fabric.world_size} rank(s) x "
            f"--grad-accum-steps {cfg.grad_accum_steps}: choose a multiple of {shares}"
        )
    one_cell = cfg.task == "detection" and min(cfg.img_sizes) == 32
    if one_cell and cfg.batch_size == shares:
        raise UsageError(
            "--img-sizes 32 with one image at a time leaves batch norm a single value per channel: "
            "use larger --img-sizes, a larger --batch-size or fewer --grad-accum-steps"
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
    fabric: Fabric,
    cfg: Config,
    task: Task,
    sampler: MultiSizeBatchSampler,
    start_method: str | None = None,
) -> DataLoader:
    """Return the loader of micro-batches, endless as its sampler, from the sampler's position on.

    Fabric's wrapper is left out: it would rebuild the sampler.
    """
    images = sampler.batch_size // sampler.world_size // sampler.grad_accum_steps
    return DataLoader(
        task.train_samples,
        batch_sampler=sampler,  # type: ignore[arg-type]
        collate_fn=task.train_collate,
        **_worker_settings(fabric, cfg, images, max(sampler.img_sizes), start_method),
    )


def make_eval_loader(fabric: Fabric, cfg: ResolvedConfig, split: EvalSplit) -> DataLoader:
    """Return this rank's share of a test set, every image exactly once over all ranks."""
    share = range(fabric.global_rank, len(split.dataset), fabric.world_size)
    images = max(1, min(32, cfg.batch_size // fabric.world_size))
    return DataLoader(
        Subset(split.samples, share),
        batch_size=images,
        collate_fn=split.collate,
        **_worker_settings(fabric, cfg, images, cfg.resolved_test_size),
    )


def _worker_settings(
    fabric: Fabric, cfg: Config, images: int, img_size: int, start_method: str | None = None
) -> dict[str, Any]:
    """Return the settings of a loader whose batches are `images` of `img_size` pixels."""
    on_gpu = fabric.device.type == "cuda"
    # launching kernels keeps the main process busy
    spare = available_cpus() // ranks_per_node(fabric, cfg) - on_gpu
    workers = max(1, spare) if cfg.workers == "auto" else cfg.workers
    if workers:
        check_shared_memory(workers * ranks_per_node(fabric, cfg), images * 3 * img_size**2)
    return {
        "num_workers": workers,
        "worker_init_fn": start_worker,
        "pin_memory": on_gpu,
        "persistent_workers": workers > 0,  # a test every few seconds should not start them anew
        "multiprocessing_context": start_method if workers else None,
        # else each start of an iterator takes a number from the run's own
        "generator": torch.Generator(),
    }


def start_worker(worker_id: int) -> None:
    """Prepare a worker process; freed images keep their memory, or each would have it cleared."""
    keep_freed_memory()
    init_worker(worker_id)


def check_shared_memory(workers: int, batch_bytes: int, prefetched: int = 2) -> None:
    """Refuse workers whose batches /dev/shm cannot hold: they would wait for ever, or be killed."""
    shared = Path("/dev/shm")
    need = (prefetched * workers + 1) * batch_bytes
    if shared.is_dir() and need > (free := shutil.disk_usage(shared).free):
        raise UserError(
            f"/dev/shm has {free / 1e6:.0f} MB of shared memory free, but the batches of {workers} "
            f"workers need up to {need / 1e6:.0f} MB: use fewer --workers (0 needs "
            "none), or enlarge /dev/shm (docker run --shm-size)"
        )
