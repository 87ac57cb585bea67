"""Launch the processes of a run, and what they say to one another."""

import ctypes
import inspect
import os
import platform
from datetime import timedelta
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from lightning.fabric.strategies import DDPStrategy
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.nn.parallel import DistributedDataParallel

from yolo.config import HardwareConfig
from yolo.engine.stopping import StopRequest
from yolo.errors import UsageError, UserError
from yolo.inference.fast import cpu_computes_bf16

LINK_SECONDS = 120.0  # in the step loop no rank is later than this, unless the link to it is lost
PATIENCE_SECONDS = 1800.0  # elsewhere: for compiling, a download, a test, a slow disk
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of malloc.h, see mallopt(3)


def make_fabric(cfg: HardwareConfig) -> tuple[Fabric, torch.amp.GradScaler | None]:
    """Return a launched Fabric and its gradient scaler (None unless the precision is 16-mixed).

    Under torchrun the world is what torchrun says: left to itself, Fabric forms a world of one per
    process on CPUs. The scaler is ours so that a checkpoint can hold it.
    """
    device = _device_type(cfg.accelerator)
    if cfg.threads != "auto":
        torch.set_num_threads(cfg.threads)
    if device == "cpu":
        keep_freed_memory()
    precision, _ = pick_precision(cfg.precision, device)
    scaler = torch.amp.GradScaler(device) if precision == "16-mixed" else None
    plugins = [MixedPrecision("16-mixed", device, scaler=scaler)] if scaler else None
    devices, num_nodes = world(cfg)
    several = num_nodes * (torch.cuda.device_count() if devices == "auto" else int(devices)) > 1
    known = inspect.signature(DistributedDataParallel).parameters
    name = next(name for name in ("forward_sync_buffers", "broadcast_buffers") if name in known)
    own_statistics: dict[str, Any] = {name: False}
    fabric = Fabric(
        accelerator=device,
        devices=devices,
        num_nodes=num_nodes,
        # of the statistics DDP would keep rank 0's alone: `average_over_ranks` takes all of them
        strategy=DDPStrategy(**own_statistics) if several else "auto",
        precision=None if plugins else precision,  # type: ignore[arg-type]
        plugins=plugins,  # type: ignore[arg-type]
    )
    fabric.launch()
    return fabric, scaler


@cache
def keep_freed_memory() -> None:
    """Let this process keep the memory of freed tensors for the next ones, where malloc is glibc's.

    As it comes, glibc gives large blocks back to the system, which clears their pages anew for each
    step. Before a fork they are given back: a worker would hold all of them as they were, and this
    process a second copy as soon as it used them again.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(M_TOP_PAD, 2**28)
    os.register_at_fork(before=partial(libc.malloc_trim, 0))


def pick_precision(wanted: str, device: str) -> tuple[str, str]:
    """Return the precision to use on a device type and, in words, why."""
    if wanted != "auto":
        return wanted, "as asked"
    if device == "cuda":
        return "16-mixed", "CUDA computes half precision several times faster"
    if device == "cpu" and cpu_computes_bf16():
        return "bf16-mixed", "this CPU has native bfloat16 instructions"
    return "32-true", "this CPU has no native bfloat16 instructions"


def world(cfg: HardwareConfig) -> tuple[int | str, int]:
    """Return (devices per node, nodes): what torchrun or srun say, else the flags."""
    environment = os.environ
    if "LOCAL_WORLD_SIZE" in environment and "WORLD_SIZE" in environment:  # torchrun
        local = int(environment["LOCAL_WORLD_SIZE"])
        return local, int(environment["WORLD_SIZE"]) // local
    if "SLURM_NTASKS_PER_NODE" in environment and "SLURM_NNODES" in environment:  # srun
        return int(environment["SLURM_NTASKS_PER_NODE"]), int(environment["SLURM_NNODES"])
    if cfg.devices == "auto":
        return 1 if not torch.cuda.is_available() else "auto", cfg.num_nodes
    return cfg.devices, cfg.num_nodes


def ranks_per_node(fabric: Fabric, cfg: HardwareConfig) -> int:
    """Return how many processes of this run share a machine."""
    return fabric.world_size // world(cfg)[1]


def sum_over_ranks(fabric: Fabric, values: Tensor) -> Tensor:
    """Add up a tensor over all ranks, in place. Fabric's `all_reduce` would wait for the device."""
    if fabric.world_size > 1:
        dist.all_reduce(values)
    return values


def average_over_ranks(fabric: Fabric, values: list[Tensor]) -> None:
    """Let each tensor, in place, be its mean over all ranks: one collective for all of them."""
    if fabric.world_size > 1 and values:
        flat = torch.cat([value.flatten() for value in values])
        means = sum_over_ranks(fabric, flat).div_(fabric.world_size)
        parts = means.split([value.numel() for value in values])
        torch._foreach_copy_(values, [p.view_as(v) for p, v in zip(parts, values, strict=True)])


def gather(fabric: Fabric, value: Any) -> list[Any]:
    """Return every rank's picklable value, in the order of ranks, on every rank."""
    if fabric.world_size == 1:
        return [value]
    values: list[Any] = [None] * fabric.world_size
    dist.all_gather_object(values, value)
    return values


def agree(fabric: Fabric, *flags: bool) -> list[bool]:
    """Return each flag as true if it is true on any rank: the same answer on all of them."""
    if fabric.world_size == 1:
        return list(flags)
    votes = torch.tensor(flags, dtype=torch.int32)
    # asking the GPU would wait for it
    dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=_cpu_group())
    return votes.bool().tolist()


def wait_at_most(fabric: Fabric, seconds: float) -> None:
    """Let waiting for another rank, in the group that `agree` uses, end after so many seconds."""
    if fabric.world_size > 1:
        # before PyTorch 2.13 it had another name
        set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
        set_timeout(timedelta(seconds=seconds), _cpu_group())


def lost_link(error: RuntimeError) -> UserError | None:
    """Return what to tell of an error raised by another rank's end or silence; None for others."""
    if not isinstance(error, dist.DistError) and "gloo" not in str(error):
        return None
    reason = str(error).strip().splitlines()[0]
    return UserError(
        f"another rank ended, or did not answer for {LINK_SECONDS:g} s: see its own output, or the "
        f"network between the machines; go on with --resume auto ({reason})"
    )


def agreed_reason(fabric: Fabric, stop: StopRequest) -> str | None:
    """Return why to stop, the same on all ranks: the first rank's reason that has one."""
    (stopping,) = agree(fabric, stop.reason is not None)
    return next(reason for reason in gather(fabric, stop.reason) if reason) if stopping else None


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory used so far: the GPU's, or this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@cache
def _cpu_group() -> Any:
    if dist.get_backend() == "gloo":  # the ranks are connected that way already
        return dist.group.WORLD
    return dist.new_group(backend="gloo")


def _device_type(accelerator: str) -> str:
    if accelerator == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if accelerator not in ("cpu", "cuda"):
        raise UsageError(f"--accelerator {accelerator}: want cpu, cuda or auto")
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise UsageError("--accelerator cuda: no CUDA device is visible to torch; want cpu or auto")
    return accelerator
