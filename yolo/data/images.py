"""The pictures that `--images` names, and how a network sees them."""

import glob
from os.path import isdir, isfile  # of a name that no file can have they say no
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from yolo.data.archives import IMAGE_SUFFIXES
from yolo.data.dataset import JPEG_START, Annotation, header_size, read_rgb
from yolo.data.mosaic import letterboxed_canvas
from yolo.errors import UsageError, UserError
from yolo.files import check_regular, find


def list_pictures(pattern: str) -> list[Path]:
    """Return the images that a path, a folder (without subfolders) or a glob names, sorted.

    Raises:
        UsageError: if there are none.
    """
    path = find(Path(pattern))
    if isfile(path):
        return [path]
    found = path.iterdir() if isdir(path) else map(Path, glob.glob(pattern, recursive=True))
    pictures = sorted(
        file for file in found if file.suffix.lower() in IMAGE_SUFFIXES and isfile(file)
    )
    if not pictures:
        what = "holds no images" if isdir(path) else "names no images"
        raise UsageError(f"--images {pattern}: {what} ({', '.join(IMAGE_SUFFIXES)})")
    return pictures


class Letterboxed(NamedTuple):
    """A picture as a detector is shown it."""

    image: Tensor  # [3, S, S] uint8 RGB
    height: int  # of the original picture
    width: int


def letterboxed(source: str | Path | np.ndarray, size: int) -> Letterboxed:
    """Show a picture to a detector as a test does: the same decoding, scaling and frame.

    Args:
        source: an image file, or pixels [H, W, 3] uint8 RGB.
        size: side S of the network input.

    Raises:
        UserError: naming a file that cannot be read, or the shape and type of what is no picture.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
            raise UserError(
                f"an array {list(source.shape)} of {source.dtype} is no picture: want [H, W, 3] "
                "uint8 RGB"
            )
        image, (height, width) = source, source.shape[:2]
    else:
        stored = _jpeg_size(Path(source))
        image = read_rgb(Path(source), stored, size)
        height, width = stored or image.shape[:2]
    annotation = Annotation(np.zeros((0, 4)), np.zeros(0), np.zeros(0), height, width)
    canvas = letterboxed_canvas(image, annotation, size)
    return Letterboxed(torch.from_numpy(canvas.image).permute(2, 0, 1), height, width)


def _jpeg_size(path: Path) -> tuple[int, int] | None:
    """Return (height, width) of a JPEG, the only kind decoded at a reduced size; else None."""
    try:
        check_regular(path)
        with path.open("rb") as file:
            is_jpeg = file.read(2) == JPEG_START
    except OSError:
        return None  # the decoder says why
    return header_size(path, follow_exif=True) if is_jpeg else None
