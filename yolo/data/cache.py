"""Decoded images in memory that all worker processes share, however these are started.

Images are kept at the largest size that a batch shows them whole; a mosaic then reads them instead
of their files, and enlarges those that are much longer than wide.
"""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from yolo.data.dataset import Annotation, DetectionDataset
from yolo.errors import UserError

CONTROL_GROUP = Path("/sys/fs/cgroup")
MEMORY_SHARE = 0.8  # of the free memory; the network and the batches need some, too


class ImageCache:
    """RGB images of various shapes in one block of shared memory; picklable without a copy.

    Args:
        shapes: (height, width) of each image [N, 2].
    """

    def __init__(self, shapes: np.ndarray) -> None:
        import torch  # here, since scoring somebody's detections does without it

        self.shapes = shapes
        self.ends = np.cumsum(shapes.prod(axis=1) * 3)
        self.pixels = torch.empty(int(self.ends[-1]), dtype=torch.uint8).share_memory_()

    def __getitem__(self, index: int) -> np.ndarray:
        """Return image `index` [H, W, 3], a view that must not be written to."""
        image = self._view(index)
        image.flags.writeable = False
        return image

    def __setitem__(self, index: int, image: np.ndarray) -> None:
        self._view(index)[:] = image

    def _view(self, index: int) -> np.ndarray:
        height, width = self.shapes[index]
        end = self.ends[index]
        return self.pixels.numpy()[end - height * width * 3 : end].reshape(height, width, 3)


def cache_images(
    dataset: DetectionDataset, max_side: int, copies: int = 1, progress: bool = True
) -> None:
    """Decode all images of `dataset` into memory; from now on it reads them from there.

    Args:
        dataset: Is changed in place.
        max_side: Longest side that is ever shown, in pixels; larger images are kept at this size.
        copies: Processes on this machine that each do the same.
        progress: Show a progress bar.

    Raises:
        UserError: before anything is decoded, when the images will not fit; or for an image that is
            broken.
    """
    shapes = np.array([_cached_shape(dataset.annotation(i), max_side) for i in range(len(dataset))])
    _refuse_if_too_large(dataset, int(shapes.prod(axis=1).sum()) * 3, max_side, copies)
    cache = ImageCache(shapes)

    def fill(index: int) -> None:
        height, width = shapes[index]
        image = dataset.image(index, max_side)
        if image.shape[:2] != (height, width):
            image = cv2.resize(image, (int(width), int(height)), interpolation=cv2.INTER_AREA)
        cache[index] = image

    with ThreadPoolExecutor() as pool:  # OpenCV decodes without holding Python's lock
        every = tqdm(
            pool.map(fill, range(len(dataset))),
            f"cache {dataset.name}",
            len(dataset),
            disable=None if progress else True,
        )
        for _ in every:
            pass
    dataset.cache = cache


def free_memory() -> int:
    """Return the bytes that the machine, its container and /dev/shm can still fill and share."""
    limits = [_machine_memory(), *_container_memory()]
    if Path(
        "/dev/shm"
    ).is_dir():  # where Linux keeps memory that processes share; small in many containers
        limits.append(shutil.disk_usage("/dev/shm").free)
    return min(limits)


def _cached_shape(annotation: Annotation, max_side: int) -> tuple[int, int]:
    scale = min(1.0, max_side / max(annotation.height, annotation.width))
    return max(1, round(annotation.height * scale)), max(1, round(annotation.width * scale))


def _refuse_if_too_large(dataset: DetectionDataset, need: int, max_side: int, copies: int) -> None:
    free = free_memory()
    if need * copies <= free * MEMORY_SHARE:
        return
    each = f" in each of {copies} processes" if copies > 1 else ""
    raise UserError(
        f"--cache ram: the {len(dataset)} images of {dataset.name} need {need / 1e9:.1f} GB at "
        f"{max_side} pixels{each}, but {free * MEMORY_SHARE / 1e9:.1f} GB are to spare (memory, "
        "container, /dev/shm): use --cache none"
    )


def _machine_memory() -> int:
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf(
            "SC_PAGE_SIZE"
        )  # macOS: all of it, the best there is


def _container_memory() -> list[int]:
    """Return what the control group leaves, if it sets a limit (version 2, then version 1).

    Cached files count as used there, but make room when memory is asked for.
    """
    for folder, limit, used in (
        (CONTROL_GROUP, "memory.max", "memory.current"),
        (CONTROL_GROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            free = int((folder / limit).read_text()) - int((folder / used).read_text())
            return [max(0, free + _cached_files(folder / "memory.stat"))]
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return []


def _cached_files(statistics: Path) -> int:
    values = dict(line.split() for line in statistics.read_text().splitlines())
    return sum(int(values.get(key, 0)) for key in ("inactive_file", "active_file"))
