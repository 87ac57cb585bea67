"""Targets that the loader's workers have assigned to cells, in one block of bytes.

Each tensor that a worker sends costs the main process a file descriptor and a fraction of a
millisecond, and each that goes to a GPU a launch. A batch of 64 images has 192 tensors of boxes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from yolo.config import Config
from yolo.losses import ScaleTargets, assign_targets, count_targets

# bytes: a view of the block as wider numbers has to start at a multiple of their size
ALIGNMENT = 16


@dataclass(frozen=True)
class AssignedTargets:
    """What the scales of one batch are taught, coarse to fine, as views of one block of bytes."""

    block: Tensor  # [N] uint8
    layout: tuple[tuple[torch.dtype, torch.Size, int], ...]  # of each tensor, with its first byte

    @classmethod
    def pack(cls, scales: Sequence[ScaleTargets]) -> "AssignedTargets":
        """Copy the tensors of all scales and their counts into one block, a shared one once."""
        tensors = [count_targets(scales), *(tensor for scale in scales for tensor in scale)]
        starts: dict[int, int] = {}
        size = 0
        for tensor in tensors:
            if id(tensor) not in starts:
                starts[id(tensor)] = size
                size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        block = torch.zeros(size, dtype=torch.uint8)
        for tensor in tensors:
            start = starts[id(tensor)]
            block[start : start + tensor.nbytes] = tensor.reshape(-1).view(torch.uint8)
        layout = tuple((tensor.dtype, tensor.shape, starts[id(tensor)]) for tensor in tensors)
        return cls(block, layout)

    @property
    def counts(self) -> Tensor:
        """As from `count_targets`: [3, 2] positive and empty cells of each scale."""
        return self._view(0)

    def __iter__(self) -> Iterator[ScaleTargets]:
        """Yield the targets of each scale: views, nothing is copied."""
        fields = len(ScaleTargets._fields)
        for first in range(1, len(self.layout), fields):
            yield ScaleTargets(*(self._view(first + field) for field in range(fields)))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "AssignedTargets":
        """Return the same on a device: one copy."""
        return AssignedTargets(self.block.to(device, non_blocking=non_blocking), self.layout)

    def pin_memory(self) -> "AssignedTargets":
        """Return the same in memory that a GPU reads without the CPU; the loader asks for it."""
        return AssignedTargets(self.block.pin_memory(), self.layout)

    def _view(self, index: int) -> Tensor:
        dtype, shape, start = self.layout[index]
        return self.block[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)


@dataclass(frozen=True)
class AssignedCollate:
    """A collate whose targets are assigned in the same worker. Picklable, for spawned workers."""

    collate: Callable[[Any], tuple[Tensor, Any]]  # to images [B, 3, S, S] and their targets
    anchors: Tensor  # [3, A, 2] pixels, on the CPU
    config: Config

    def __call__(self, samples: Any) -> tuple[Tensor, AssignedTargets]:
        """Return the images of a batch, and what each scale is taught by them."""
        images, targets = self.collate(samples)
        return images, AssignedTargets.pack(
            assign(self.config, targets, self.anchors, images.shape[-1])
        )


def assign(
    config: Config,
    targets: Sequence[Mapping[str, Tensor]],
    anchors: Tensor,
    img_size: int,
) -> list[ScaleTargets]:
    """Assign targets by the rule that a run trains with; see `assign_targets`."""
    loss = config.loss_settings
    return assign_targets(
        targets,
        anchors,
        img_size,
        rule=loss.assignment,
        ignore_iou=loss.ignore_iou,
        use_difficult=config.train_difficult,
    )
