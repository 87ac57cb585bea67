"""Samples of the classifier: augmented for training, plain for testing, and the collate of both."""

import random
from collections.abc import Sequence

import albumentations as A
import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from yolo.config import AugmentConfig
from yolo.data.classifier_images import IMAGE_SIZE, ImageDataset
from yolo.data.samplers import SampleKey

CROP_PADDING = 4
HOLE_SIZE = 8

Sample = tuple[np.ndarray, int]


class TrainImages(Dataset[Sample]):
    """Augmented images; every random choice follows from (seed, epoch, index) alone."""

    def __init__(self, dataset: ImageDataset, cfg: AugmentConfig, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self.augment = make_augment(cfg, dataset.images.mean(axis=(0, 1, 2)))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey) -> Sample:
        rng = np.random.default_rng((self.seed, key.epoch, key.index))
        self.augment.set_random_state(rng, random.Random(int(rng.integers(2**63))))
        index = key.index % len(self.dataset)
        return self.augment(image=self.dataset.image(index))["image"], int(
            self.dataset.labels[index]
        )


class EvalImages(Dataset[Sample]):
    """The images as they are."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        return self.dataset.image(index), int(self.dataset.labels[index])


def make_augment(cfg: AugmentConfig, mean_color: np.ndarray) -> A.Compose:
    """Build crop after padding, mirror image, and a hole of `mean_color` [3] (RGB, 0-255)."""
    side = IMAGE_SIZE + 2 * CROP_PADDING
    crop = A.Sequential(
        [
            A.PadIfNeeded(side, side, border_mode=cv2.BORDER_REFLECT_101, p=1.0),
            A.RandomCrop(IMAGE_SIZE, IMAGE_SIZE, p=1.0),
        ],
        p=cfg.aug_crop,
    )
    hole = A.CoarseDropout(
        num_holes_range=(1, 1),
        hole_height_range=(HOLE_SIZE, HOLE_SIZE),
        hole_width_range=(HOLE_SIZE, HOLE_SIZE),
        fill=tuple(float(value) for value in np.round(mean_color)),
        p=cfg.aug_cutout,
    )
    return A.Compose([crop, A.HorizontalFlip(p=cfg.aug_flip), hole])


def collate_images(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Stack samples: uint8 images [B, 3, 32, 32], channels last in memory; int64 labels [B]."""
    images = torch.from_numpy(np.stack([image for image, _ in samples])).permute(0, 3, 1, 2)
    return images, torch.tensor([label for _, label in samples])
