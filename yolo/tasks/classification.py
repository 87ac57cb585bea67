"""Classification: the custom ResNet on 32 x 32 images, tested by its accuracy."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from yolo.config import Config
from yolo.data.classifier_images import IMAGE_SIZE, ImageDataset, open_dataset, open_datasets
from yolo.data.classifier_samples import EvalImages, TrainImages, collate_images
from yolo.errors import UsageError
from yolo.metrics.classification import ClassificationMetrics
from yolo.models.build import build_model
from yolo.tasks.base import EvalSplit, Task, tile

RIGHT, WRONG = (40, 170, 80), (220, 50, 50)  # RGB frames: green and red


@dataclass(frozen=True)
class ClassificationSplit(EvalSplit):
    """Single images, as they are."""

    @classmethod
    def of(cls, config: Config, dataset: ImageDataset) -> "ClassificationSplit":
        """Show each image of a data set alone."""
        return cls(config, dataset, EvalImages(dataset), collate_images, "single images")

    def metrics(self, *, full: bool) -> ClassificationMetrics:
        """Return a fresh accumulator; nothing here is slow."""
        return ClassificationMetrics(self.dataset.class_names)

    def draw_predictions(self, predict: Callable[[Tensor], Any]) -> np.ndarray:
        """Frame the first images green where the model is right and red where it is wrong."""
        images, labels = self.first_batch()
        right = (predict(images).argmax(-1).cpu() == labels).tolist()
        return tile(
            [
                cv2.copyMakeBorder(
                    image.permute(1, 2, 0).numpy(),
                    *(3, 3, 3, 3),
                    borderType=cv2.BORDER_CONSTANT,
                    value=RIGHT if hit else WRONG,
                )
                for image, hit in zip(images, right, strict=True)
            ]
        )


@dataclass(frozen=True)
class ClassificationTask(Task):
    """One class for a whole image."""

    @classmethod
    def build(cls, config: Config, processes: int = 1) -> "ClassificationTask":
        """Open the data that `config` names and build everything else for it.

        Raises:
            UsageError: if another image size than 32 is asked for.
        """
        if {*config.img_sizes, config.resolved_test_size} != {IMAGE_SIZE}:
            raise UsageError(
                "--img-sizes, --test-size: the classifier works on 32 x 32 pixels; want 32"
            )
        train_set, eval_set = open_datasets(config)
        names = train_set.class_names
        return cls(
            config=config,
            class_names=names,
            model=build_model(config, len(names)),
            criterion=ClassificationLoss(config.label_smoothing),
            train_set=train_set,
            train_samples=TrainImages(train_set, config, config.seed),
            train_collate=collate_images,
            eval_split=ClassificationSplit.of(config, eval_set),
            test_split=cls.open_split(config, names, None) if config.val_split else None,
        )

    @staticmethod
    def open_split(
        config: Config, class_names: Sequence[str], anchors: Tensor | None
    ) -> ClassificationSplit:
        """Open `config.split` for testing a trained model, with its classes."""
        return ClassificationSplit.of(config, open_dataset(config, config.split, class_names))

    @staticmethod
    def count(targets: Tensor) -> Tensor:
        """Return the number of images."""
        return torch.full((), float(len(targets)), device=targets.device)

    def score(self, results: Mapping[str, Any]) -> float:
        """Return the accuracy."""
        return results["accuracy"]


class ClassificationLoss(nn.Module):
    """Cross-entropy as `{"class": ...}`, divided by the size of the global batch."""

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, outputs: Tensor, labels: Tensor, counts: Tensor) -> dict[str, Tensor]:
        """Compare logits [B, C] with labels [B]; `counts` is the number of images."""
        total = functional.cross_entropy(
            outputs.float(), labels, reduction="sum", label_smoothing=self.label_smoothing
        )
        return {"class": total / counts.clamp(min=1)}
