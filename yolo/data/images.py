"""The pictures that `--images` names, and how a network sees them."""

import glob
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from yolo.data.dataset import IMAGE_SUFFIXES, Annotation
from yolo.data.mosaic import compose, letterbox_tile
from yolo.errors import UsageError
from yolo.files import find


def list_pictures(pattern: str) -> list[Path]:
    """Return the image files that a path, a folder (without its subfolders) or a glob names, sorted.

    Raises:
        UsageError: if there are none.
    """
    path = find(Path(pattern))
    if path.is_file():
        return [path]
    found = path.iterdir() if path.is_dir() else map(Path, glob.glob(pattern, recursive=True))
    pictures = sorted(file for file in found if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    if not pictures:
        what = "holds no images" if path.is_dir() else "names no images"
        raise UsageError(f"--images {pattern}: {what} ({', '.join(IMAGE_SUFFIXES)})")
    return pictures


def letterboxed(image: np.ndarray, size: int) -> Tensor:
    """Return an image [H, W, 3] uint8 of any shape as a test shows it to a detector: [3, S, S] uint8."""
    note = Annotation(np.zeros((0, 4)), np.zeros(0), np.zeros(0), *image.shape[:2])
    canvas = compose([letterbox_tile(0, note, size)], [image], [note], size).image
    return torch.from_numpy(canvas).permute(2, 0, 1)
