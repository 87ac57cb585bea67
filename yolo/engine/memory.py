"""What fits: a smaller batch, then smaller images, where free memory does not hold the asked for.

A trial would be killed where a computer has no more; so what a step needs is reckoned before.
"""

import dataclasses
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from yolo.config import Config
from yolo.engine.fabric import Fabric, gather, pick_precision, ranks_per_node
from yolo.models.build import build_model
from yolo.models.yolov3 import STRIDES

# of what the forward pass keeps for the backward pass: gradients of activations, workspaces,
# batches in flight. EfficientNet-Lite2, batch 16 at 416 px: 6.3 GB kept, 9.3 GB used
OVERHEAD = 1.5
PER_PARAMETER = 20  # bytes: weight, gradient, two moments, average
BASE = 1e9  # bytes: libraries, workers
HALF = 0.55  # of it in half precision
USABLE = 0.9  # of the free memory
SMALLEST_BATCH = 4
CGROUP = Path("/sys/fs/cgroup")


def fit_memory(fabric: Fabric, cfg: Config) -> Config:
    """Return the configuration with batch and image sizes that each rank's free memory holds."""
    free = min(gather(fabric, free_bytes(fabric.device)))
    model = build_model(cfg, 20)
    ranks = ranks_per_node(fabric, cfg) if fabric.device.type == "cpu" else 1
    shares = fabric.world_size * cfg.grad_accum_steps
    half = pick_precision(cfg.precision, fabric.device.type)[0] != "32-true"
    per_pixel = OVERHEAD * kept_bytes_per_pixel(model) * (HALF if half else 1)
    fixed = BASE + PER_PARAMETER * sum(parameter.numel() for parameter in model.parameters())

    def need(option: Config) -> float:
        images = int(option.batch_size) / shares
        return ranks * (fixed + images * max(option.img_sizes) ** 2 * per_pixel)

    options = list(smaller(cfg, shares))
    fitting = (option for option in options if need(option) <= USABLE * free)
    chosen = next(fitting, options[-1])
    sizes = ",".join(map(str, chosen.img_sizes))
    fabric.print(
        f"memory       {free / 1e9:.1f} GB free, {need(chosen) / 1e9:.1f} GB needed: "
        f"--batch-size {chosen.batch_size} --img-sizes {sizes} --test-size "
        f"{chosen.resolved_test_size}"
    )
    return chosen


def smaller(cfg: Config, shares: int) -> list[Config]:
    """Return the configuration, then with halved batches, then images of 3/4 and half the side."""
    batch = int(cfg.batch_size)
    batches = [batch >> halving for halving in range(8) if batch >> halving >= SMALLEST_BATCH]
    batches = [size for size in batches if size % shares == 0] or [batch]
    options = []
    for scale in (1.0, 0.75, 0.5):
        *sizes, test_size = (
            max(STRIDES[0], round(scale * side / STRIDES[0]) * STRIDES[0])
            for side in (*cfg.img_sizes, cfg.resolved_test_size)
        )
        kept = tuple(dict.fromkeys(sizes))
        options += [
            dataclasses.replace(cfg, batch_size=size, img_sizes=kept, test_size=test_size)
            for size in batches
        ]
    return options


def kept_bytes_per_pixel(model: nn.Module) -> float:
    """Return what a forward pass keeps for the backward pass, per image pixel, in float32."""
    kept = []
    for side in (64, 128):
        storages: dict[int, int] = {}

        def note(value: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return value

        images = torch.zeros(2, 3, side, side, dtype=torch.uint8)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
            _outputs = model.train()(images)
        kept.append(sum(storages.values()) / 2)
    return (kept[1] - kept[0]) / (128**2 - 64**2)


def free_bytes(device: torch.device) -> float:
    """Return the free memory: the GPU's, or this machine's within the limit of a container."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    free = float(psutil.virtual_memory().available)
    try:
        limit, used = ((CGROUP / f"memory.{name}").read_text() for name in ("max", "current"))
        return min(free, float(limit) - float(used))
    except (OSError, ValueError):  # no container, or no limit: `max`
        return free
