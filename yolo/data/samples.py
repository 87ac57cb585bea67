"""From sample keys to batches: `TrainSamples` and `EvalSamples` decode, the collates compose.

Both run in the worker processes. Batches are uint8 [B, 3, S, S] in channels-last memory: images
stay as decoded, and the network wants them so.
"""

import math
import os
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, get_worker_info

from yolo.boxes import letterbox
from yolo.config import Config
from yolo.data.dataset import CORRUPT, Annotation, DetectionDataset
from yolo.data.mosaic import Tile, compose, letterbox_tile, letterboxed_canvas, mosaic_tiles
from yolo.data.samplers import SampleKey
from yolo.data.transforms import Canvas, augment, build_transforms
from yolo.errors import UserError

Target = dict[str, Any]
MAX_REPLACEMENTS = 20  # of one sample; more broken files in a row are no accident
PLAN = 1  # tells the random stream of a sample's plan from that of its augmentation


@cache
def _caught(process: int) -> IO[bytes]:  # not shared with a process forked later
    return TemporaryFile()


_named: set[Path] = set()  # in this process


def decode_and_name(dataset: DetectionDataset, index: int, min_side: int) -> np.ndarray:
    """Decode an image; name it once on stderr if the decoder complains, which names no file.

    A JPEG that lost bytes in the middle decodes all the same, in part grey. For one thread at a
    time.
    """
    if dataset.cache is not None:
        return dataset.image(index)
    caught, terminal = _caught(os.getpid()), os.dup(2)
    os.dup2(caught.fileno(), 2)
    try:
        return dataset.image(index, min_side)
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        if os.lseek(caught.fileno(), 0, os.SEEK_CUR):
            caught.seek(0)
            text = caught.read().decode(errors="replace")
            caught.seek(0)
            caught.truncate()
            path = dataset.paths[index]
            if not CORRUPT.search(text):
                os.write(2, text.encode())
            elif path not in _named:
                _named.add(path)
                print(f"damaged: {path}: corrupt JPEG data", file=sys.stderr, flush=True)


class TrainSample(NamedTuple):
    """The decoded images of one training sample, and where they go."""

    key: SampleKey
    tiles: list[Tile]
    annotations: list[Annotation]
    images: list[np.ndarray]


class TrainSamples(Dataset[TrainSample]):
    """Plans each sample from (seed, epoch, index) alone and decodes its one or four images.

    Args:
        dataset: The training images.
        cfg: `mosaic_prob`, `mosaic_off_epochs`, `mosaic_off_share`, `epochs`, `skip_bad`.
        seed: Seed of the run.
    """

    def __init__(self, dataset: DetectionDataset, cfg: Config, seed: int) -> None:
        self.dataset = dataset
        self.mosaic_prob = cfg.mosaic_prob
        plain_epochs = max(cfg.mosaic_off_epochs, cfg.mosaic_off_share * cfg.epochs)
        self.mosaic_epochs = cfg.epochs - plain_epochs if plain_epochs else math.inf
        self.skip_bad = cfg.skip_bad
        self.seed = seed
        self._reported: set[str] = set()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey) -> TrainSample:
        """Return the decoded sample; with `skip_bad`, a broken image gives way to another plan.

        Raises:
            UserError: naming the file that cannot be decoded.
        """
        for attempt in range(MAX_REPLACEMENTS):
            try:
                return self._load(key, attempt)
            except UserError as error:
                if not self.skip_bad or attempt == MAX_REPLACEMENTS - 1:
                    raise
                self._report(str(error))
        raise AssertionError("unreachable")

    def __getitems__(self, keys: list[SampleKey]) -> "Subset[TrainSample]":
        """Return a batch whose samples are decoded when the collate asks for them, one at a time.

        Decoded at once, the images of 64 mosaics fill 100 MB, and leave every cache of the CPU.
        """
        return Subset(self, keys)  # type: ignore[arg-type]

    def plan(self, key: SampleKey, attempt: int = 0) -> list[Tile]:
        """Return where the sample's images go: one in a letterbox, or four tiles of a mosaic."""
        rng = np.random.default_rng([self.seed, key.epoch, key.index, attempt, PLAN])
        index = (key.index + attempt) % len(self.dataset)
        if key.epoch + key.passed >= self.mosaic_epochs or rng.random() >= self.mosaic_prob:
            return [letterbox_tile(index, self.dataset.annotation(index), key.img_size)]
        indices = [index, *(int(partner) for partner in rng.integers(len(self.dataset), size=3))]
        rng.shuffle(indices)
        return mosaic_tiles(
            indices, [self.dataset.annotation(i) for i in indices], key.img_size, rng
        )

    def _load(self, key: SampleKey, attempt: int) -> TrainSample:
        tiles = self.plan(key, attempt)
        annotations = [self.dataset.annotation(tile.index) for tile in tiles]
        images = [
            decode_and_name(
                self.dataset,
                tile.index,
                math.ceil(max(annotation.height, annotation.width) * tile.scale),
            )
            for tile, annotation in zip(tiles, annotations, strict=True)
        ]
        return TrainSample(key, tiles, annotations, images)

    def _report(self, message: str) -> None:
        if message not in self._reported:
            self._reported.add(message)
            print(f"skipped: {message}", file=sys.stderr, flush=True)


class MosaicCollate:
    """Composes and augments the samples of a batch.

    Args:
        cfg: The probabilities `aug_*` and `min_visible`.
        seed: Seed of the run.
    """

    def __init__(self, cfg: Config, seed: int) -> None:
        self.single = build_transforms(cfg, mosaic=False)
        self.mosaic = build_transforms(cfg, mosaic=True)
        self.min_visible = cfg.min_visible
        self.seed = seed

    def __call__(
        self, samples: Sequence[TrainSample] | Subset[TrainSample]
    ) -> tuple[Tensor, list[Target]]:
        """Return images uint8 [B, 3, S, S] and targets, boxes in pixels of the network input."""
        canvases = (self.compose(samples[place]) for place in range(len(samples)))
        return _batch(len(samples), ((canvas.image, _target(canvas)) for canvas in canvases))

    def compose(self, sample: TrainSample) -> Canvas:
        """Return one finished sample."""
        canvas = compose(
            sample.tiles, sample.images, sample.annotations, sample.key.img_size, self.min_visible
        )
        transforms = self.single if len(sample.tiles) == 1 else self.mosaic
        return augment(canvas, transforms, (self.seed, sample.key.epoch, sample.key.index))


class EvalSamples(Dataset[tuple[np.ndarray, Target]]):
    """Each image of a data set alone, whole and letterboxed.

    Its targets also say `image_index`, `letterbox` and the original `height` and `width`.
    """

    def __init__(self, dataset: DetectionDataset, img_size: int) -> None:
        self.dataset = dataset
        self.img_size = img_size

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[np.ndarray, Target]:
        """Return the canvas [S, S, 3] and its target.

        Raises:
            UserError: naming the file that cannot be decoded.
        """
        annotation = self.dataset.annotation(index)
        canvas = letterboxed_canvas(
            decode_and_name(self.dataset, index, self.img_size), annotation, self.img_size
        )
        place = letterbox(annotation.height, annotation.width, self.img_size)
        return canvas.image, {
            **_target(canvas),
            "image_index": index,
            "letterbox": place,
            "height": annotation.height,
            "width": annotation.width,
        }


def plain_collate(samples: Sequence[tuple[np.ndarray, Target]]) -> tuple[Tensor, list[Target]]:
    """Return images uint8 [B, 3, S, S] and their targets."""
    return _batch(len(samples), samples)


class Targets(list[Target]):
    """A batch's targets. From a worker they come as arrays: a tensor needs a file descriptor."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Tell pickle how to rebuild them."""
        arrays = [
            {
                name: value.numpy() if isinstance(value, Tensor) else value
                for name, value in target.items()
            }
            for target in self
        ]
        return _from_arrays, (arrays,)

    def pin_memory(self) -> "Targets":
        """Return themselves, when the loader asks: they are assigned to cells on the CPU."""
        return self


def init_worker(worker_id: int) -> None:
    """Keep OpenCV to one thread in a worker process, and the signals that stop a run away from it.

    Ctrl-C and torchrun signal the whole process group. The step that is running still needs its
    workers, so they leave the group; they end with the process that they serve.

    Batches are handed over by the name of their shared memory. Handed over as a file descriptor,
    each waits until a thread of this busy process has answered four messages.
    """
    cv2.setNumThreads(0)
    torch.multiprocessing.set_sharing_strategy("file_system")
    if hasattr(os, "setpgid"):  # not on Windows
        os.setpgid(0, 0)


def _batch(count: int, samples: Iterable[tuple[np.ndarray, Target]]) -> tuple[Tensor, list[Target]]:
    """Collect images [S, S, 3] and targets; a worker writes straight into what it shares."""
    batch, targets = torch.empty(0, dtype=torch.uint8), Targets()
    for place, (image, target) in enumerate(samples):
        if place == 0:
            if get_worker_info() is not None:  # as torch's own collate does
                batch.set_(batch.untyped_storage()._new_shared(count * image.size))
            batch.resize_(count, *image.shape)
        batch.numpy()[place] = image
        targets.append(target)
    return batch.permute(0, 3, 1, 2), targets


def _from_arrays(arrays: list[Target]) -> Targets:
    return Targets(
        {
            name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
            for name, value in each.items()
        }
        for each in arrays
    )


def _target(canvas: Canvas) -> Target:
    return {
        "boxes": torch.from_numpy(canvas.boxes),
        "labels": torch.from_numpy(canvas.labels),
        "difficult": torch.from_numpy(canvas.difficult),
    }
