"""Augments a detector's training canvas by albumentations, with the sample's random stream."""

import math
import os
import random
from typing import Any, NamedTuple

os.environ.setdefault(
    "NO_ALBUMENTATIONS_UPDATE", "1"
)  # or the import asks the network for a newer version

import albumentations as A
import cv2
import numpy as np

from yolo.config import AugmentConfig

FILL = 114  # grey level of what no image covers, in training and in testing
MIN_SIDE = 2.0  # pixels; what is left of a box must not be thinner


class Canvas(NamedTuple):
    """A square network input under construction."""

    image: np.ndarray  # [S, S, 3] uint8 RGB
    boxes: np.ndarray  # [M, 4] float32 xyxy, inside the image
    labels: np.ndarray  # [M] int64
    difficult: np.ndarray  # [M] bool


class Affine(A.Affine):
    """Warps four channels: OpenCV takes half the time of three, to the same bits."""

    def apply(self, img: np.ndarray, *args: Any, **params: Any) -> np.ndarray:
        """Warp an RGB image [H, W, 3]."""
        warped = super().apply(cv2.cvtColor(img, cv2.COLOR_RGB2RGBA), *args, **params)
        return cv2.cvtColor(warped, cv2.COLOR_RGBA2RGB)


def cut_threshold(min_visible: float) -> float:
    """Return the share of a box that each of two cuts must leave, so that both leave `min_visible`.

    In a mosaic a box is cut at most twice: at the edge of its tile, and at the edge of the canvas
    by the affine transform.
    """
    return math.sqrt(min_visible)


def build_transforms(cfg: AugmentConfig, mosaic: bool) -> A.Compose:
    """Return the augmentations of a canvas that holds one letterboxed image, or a mosaic.

    A mosaic is only enlarged: its tiles are already smaller than the images will be in a test, and
    shrinking it would leave a grey frame.
    """
    scale, shift = ((1.05, 1.3), 0.05) if mosaic else ((0.75, 1.3), 0.1)
    return A.Compose(
        [
            A.HorizontalFlip(p=cfg.aug_flip),
            Affine(
                scale=scale,
                translate_percent=(-shift, shift),
                rotate=(-3, 3),
                shear=(-2, 2),
                keep_ratio=True,
                interpolation=cv2.INTER_LINEAR,
                fill=FILL,
                p=cfg.aug_affine,
            ),
            A.ColorJitter(
                brightness=(0.7, 1.2),
                contrast=(0.7, 1.3),
                saturation=(0.5, 1.5),
                hue=(-0.04, 0.04),
                p=cfg.aug_color,
            ),
            A.GaussianBlur(blur_limit=(3, 5), p=cfg.aug_blur),
            A.CLAHE(clip_limit=(1.0, 3.0), p=cfg.aug_clahe),
            A.ToGray(p=cfg.aug_gray),
            # a transform draws a number even at 0: without this one, runs stay as they were
            *([A.RandomRotate90(p=cfg.aug_rotate90)] if cfg.aug_rotate90 else []),
        ],
        bbox_params=A.BboxParams(
            format="pascal_voc",
            min_visibility=cut_threshold(cfg.min_visible) if mosaic else cfg.min_visible,
            min_width=MIN_SIDE,
            min_height=MIN_SIDE,
            check_each_transform=False,  # once at the end: only one transform cuts boxes
        ),
    )


def augment(canvas: Canvas, transforms: A.Compose, seed: tuple[int, ...]) -> Canvas:
    """Apply `transforms` with a random stream of `seed` alone; boxes cut too far are dropped.

    `set_random_state` shares one stream among the transforms. `set_random_seed` would give each the
    same one, so that all transforms of one probability would fire together.
    """
    rng = np.random.default_rng(seed)
    transforms.set_random_state(rng, random.Random(int(rng.integers(2**63))))
    rows = np.column_stack([canvas.boxes, np.arange(len(canvas.labels))]).astype(np.float32)
    result = transforms(image=canvas.image, bboxes=rows)
    rows = result["bboxes"].reshape(-1, 5)  # without any box it comes back [0, 4]
    kept = rows[:, 4].astype(np.int64)
    boxes = rows[:, :4].astype(np.float32)
    return Canvas(result["image"], boxes, canvas.labels[kept], canvas.difficult[kept])
