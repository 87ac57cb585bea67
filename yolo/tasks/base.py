"""What the loop asks of a task: a model, a criterion, the data, and a split to be tested on.

`DetectionTask` and `ClassificationTask` answer the same questions, so nobody else asks which one it
is.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.utils import make_grid

from yolo.config import Config

PICTURES = 8  # in TensorBoard


class Metrics(Protocol):
    """What a test measures; the states of all ranks are merged before `compute`."""

    def update(self, outputs: Any, targets: Any) -> None:
        """Add one batch."""

    def state(self) -> dict[str, Any]:
        """Return this rank's sums, as plain types."""

    def merge(self, states: Sequence[dict[str, Any]]) -> None:
        """Take the sums of all ranks, this one's included."""

    def compute(self) -> dict[str, Any]:
        """Return the results, as they stand in `results.json`."""


@dataclass(frozen=True)
class EvalSplit(ABC):
    """A split to be tested on: its samples, one image each, and what is measured."""

    config: Config
    dataset: Any
    samples: Dataset
    collate: Callable[[Any], Any]
    loader: str  # how an image is shown, for reports

    @abstractmethod
    def metrics(self, *, full: bool) -> Metrics:
        """Return a fresh accumulator; `full`: with everything that is slow (mAP)."""

    @abstractmethod
    def draw_predictions(self, predict: Callable[[Tensor], Any]) -> np.ndarray:
        """Draw the first images with what the model makes of them, as one RGB picture.

        Args:
            predict: maps images uint8 [B, 3, S, S] to the network's raw output.
        """

    def first_batch(self) -> Any:
        """Return the images that `draw_predictions` shows, collated."""
        return self.collate([self.samples[i] for i in range(min(PICTURES, len(self.dataset)))])


@dataclass(frozen=True)
class Task(ABC):
    """The parts that the engine assembles. Picklable, for workers that are spawned."""

    config: Config
    class_names: tuple[str, ...]
    model: nn.Module
    criterion: nn.Module  # (outputs, targets, counts) -> losses by term, as device scalars
    train_set: Any
    train_samples: Dataset
    # to images uint8 [B, 3, S, S] and targets with a `to(device)`
    train_collate: Callable[[Any], Any]
    eval_split: EvalSplit  # tested on while training
    test_split: EvalSplit | None = None  # looked at once, at the end; None: it is the same
    anchors: Tensor | None = None  # [3, A, 2] pixels; None for classification

    def with_config(self, config: Config) -> Self:
        """Return the task with settings found after it was built (batch size, rate, epochs)."""
        return replace(self, config=config)

    @staticmethod
    @abstractmethod
    def count(targets: Any) -> Tensor:
        """Return the counts that normalise the loss, to be added over ranks and micro-batches."""

    @abstractmethod
    def score(self, results: Mapping[str, Any]) -> float:
        """Return what "best" means: higher is better."""


def tile(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Lay RGB pictures [H, W, 3] of one size out in rows of four."""
    grid = make_grid([torch.from_numpy(picture).permute(2, 0, 1) for picture in pictures], nrow=4)
    return grid.permute(1, 2, 0).numpy()
