"""Which sample comes when, and at which size: a batch sampler that starts at any batch.

Nothing here is remembered from batch to batch. The order follows from (seed, epoch), the size from
(seed, step) and everything inside a sample from (seed, epoch, sample index); so batches are equal
for any number of workers and ranks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
from torch.utils.data import Sampler


@dataclass(frozen=True, slots=True)
class SampleKey:
    """What a training data set needs to know to make one sample."""

    epoch: int
    index: int  # modulo the size of the data set; beyond it, a repeat with other augmentations
    img_size: int
    passed: float = 0.0  # share of the epoch before this sample's step, in [0, 1)


class MultiSizeBatchSampler(Sampler[list[SampleKey]]):
    """Yields this rank's micro-batches; those of a step share one image size, on all ranks.

    For each optimizer step it yields `grad_accum_steps` lists of `batch_size / world_size /
    grad_accum_steps` keys. An epoch leaves out the samples that do not fill a batch (others each
    time); a data set smaller than a batch is repeated to fill one.

    Args:
        num_samples: Size of the data set.
        batch_size: Global batch of one optimizer step; `world_size * grad_accum_steps` must divide
            it.
        img_sizes: Sizes to draw from, in pixels.
        seed: Seed of the run.
        rank: This process.
        world_size: Number of processes.
        grad_accum_steps: Micro-batches per optimizer step.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        img_sizes: Sequence[int],
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        grad_accum_steps: int = 1,
    ) -> None:
        if batch_size % (world_size * grad_accum_steps):
            raise ValueError(
                f"{world_size} ranks x {grad_accum_steps} micro-batches do not divide {batch_size}"
            )
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.img_sizes = tuple(img_sizes)
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.grad_accum_steps = grad_accum_steps
        self.epoch = 0
        self.first_batch = 0

    def __len__(self) -> int:
        """Return the optimizer steps of an epoch."""
        return max(1, self.num_samples // self.batch_size)

    def set_position(self, epoch: int, batch: int) -> None:
        """Let the next iteration start at optimizer step `batch` of `epoch`."""
        self.epoch = epoch
        self.first_batch = batch

    def __iter__(self) -> Iterator[list[SampleKey]]:
        """Yield from the position on, epoch after epoch without an end.

        So workers go on with the next epoch while a test runs or a checkpoint is written.
        """
        first_batch = self.first_batch
        for epoch in count(self.epoch):
            order = self._order(epoch)
            for batch in range(first_batch, len(self)):
                size = self.img_size(epoch * len(self) + batch)
                indices = order[batch * self.batch_size :][: self.batch_size]
                for mine in indices.reshape(self.grad_accum_steps, self.world_size, -1)[
                    :, self.rank
                ]:
                    yield [SampleKey(epoch, int(index), size, batch / len(self)) for index in mine]
            first_batch = 0

    def img_size(self, step: int) -> int:
        """Return the image size of one optimizer step, counted from the start of the run."""
        return self.img_sizes[
            np.random.default_rng([self.seed, step]).integers(len(self.img_sizes))
        ]

    def _order(self, epoch: int) -> np.ndarray:
        """Return an epoch's permutation, repeated with new indices if it does not fill a batch."""
        order = np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)
        repeats = -(-self.batch_size // self.num_samples)
        return np.concatenate([order + repeat * self.num_samples for repeat in range(repeats)])
