"""`--check-data`: a data set counted, checked and drawn before hours are spent on it."""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple, TextIO

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from yolo.boxes import shape_iou
from yolo.config import ANCHOR_REFERENCE_SIZE, COCO_ANCHORS, Config, anchor_sizes
from yolo.data.anchors import box_shapes, clustered_anchors, compare_anchors, training_boxes
from yolo.data.class_names import named_classes
from yolo.data.dataset import CORRUPT, DetectionDataset, NothingUsableError
from yolo.data.samplers import SampleKey
from yolo.data.samples import MosaicCollate, TrainSamples
from yolo.data.sources import open_dataset
from yolo.errors import UsageError, UserError
from yolo.files import free_path
from yolo.losses import assign_targets
from yolo.models.yolov3 import STRIDES, make_anchors
from yolo.viz.draw import draw_boxes

SHEET_COLUMNS, SHEET_ROWS = 4, 4
ASSIGN_BATCH = 64  # samples
BAR = 40  # characters of the longest bar of a histogram
# differing bits of 256: copies at another size or JPEG quality stay below, others far above
SAME_PICTURE = 12
SHOWN = 20  # duplicates listed; more are counted


class Look(NamedTuple):
    """What one image file holds, in short."""

    defect: str | None
    content: str  # digest of the file
    appearance: np.ndarray  # [32] uint8: 16 x 16 bits, whether brightness rises to the right


def check_data(cfg: Config, out_dir: Path, log: Callable[[str], None] = print) -> int:
    """Print what is in the training and the test set and what is wrong; draw augmented samples.

    Writes `data_samples.png` and the same picture for TensorBoard, at step 0, into `out_dir`.

    Returns:
        The number of defects.

    Raises:
        UserError: if a set cannot be opened at all.
    """
    if cfg.task != "detection":
        raise UsageError(
            "--check-data looks at boxes: there are none to check for --task classification"
        )
    open_all = replace(cfg, skip_bad=True, cache="none")
    try:
        train_set = open_dataset(open_all, cfg.train_split, named_classes(cfg))
        names = train_set.class_names
        held = {
            f"{name} ({split})": open_dataset(open_all, split, names)
            for name, split in (("validation", cfg.val_split), ("test", cfg.split))
            if split
        }
    except NothingUsableError as error:
        count = len(error.defects)
        log(_listing(f"{error}\n{count} defects", error.defects, shown=count))
        return count
    sets = {f"train ({cfg.train_split})": train_set, **held}
    looks = {name: _look_at_all(dataset, name) for name, dataset in sets.items()}
    defects = _defects(sets, looks)
    notices = [f"{name}: {line}" for name, dataset in sets.items() for line in dataset.notices]
    listed = _listing(f"{len(defects)} defects", defects, shown=len(defects))
    shapes = box_shapes(training_boxes(train_set, open_all))
    clustered = clustered_anchors(shapes)
    for part in (
        _counts(sets),
        _anchors(shapes, cfg, clustered),
        _collisions(train_set, open_all, anchor_sizes(cfg.anchors) or clustered or COCO_ANCHORS),
        _duplicates(sets, looks),
        _listing(f"{len(notices)} notices", notices) if notices else "",
        listed if defects else "no defects found\n",
    ):
        if part:
            log(part)
    if all(look.defect for look in looks[f"train ({cfg.train_split})"]):
        return len(defects)  # there is nothing to draw
    sheet = contact_sheet(train_set, open_all)
    log(f"augmented samples with their boxes: {write_sheet(sheet, out_dir)}")
    return len(defects)


def contact_sheet(dataset: DetectionDataset, cfg: Config) -> np.ndarray:
    """Return sixteen augmented training samples with their boxes: one picture [H, W, 3] RGB."""
    samples, collate = TrainSamples(dataset, cfg, cfg.seed), MosaicCollate(cfg, cfg.seed)
    order = np.random.default_rng(cfg.seed).permutation(len(dataset))
    pictures = []
    for number in range(SHEET_ROWS * SHEET_COLUMNS):
        key = SampleKey(
            number // len(order), int(order[number % len(order)]), cfg.resolved_test_size
        )
        canvas = collate.compose(samples[key])
        pictures.append(
            draw_boxes(canvas.image, canvas.boxes, canvas.labels.tolist(), dataset.class_names)
        )
    rows = [
        pictures[start : start + SHEET_COLUMNS] for start in range(0, len(pictures), SHEET_COLUMNS)
    ]
    return np.vstack([np.hstack(row) for row in rows])


def write_sheet(sheet: np.ndarray, out_dir: Path) -> Path:
    """Write a contact sheet as PNG and for TensorBoard (step 0), and return the path of the PNG."""
    out_dir.mkdir(parents=True, exist_ok=True)
    path = free_path(out_dir / "data_samples.png")
    cv2.imwrite(str(path), cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))
    with SummaryWriter(str(out_dir)) as events:
        events.add_image("data/augmented samples", sheet, 0, dataformats="HWC")
    return path


def _look_at_all(dataset: DetectionDataset, name: str) -> list[Look]:
    looks: list[Look] = []

    def look_at_each(terminal: TextIO) -> None:
        with ThreadPoolExecutor() as pool:
            every = pool.map(lambda index: _look(dataset, index), range(len(dataset)))
            bar = tqdm(
                every, f"reading {name}", len(dataset), disable=None, leave=False, file=terminal
            )
            looks.extend(bar)

    if CORRUPT.search(_complaints(look_at_each)):
        for index in _corrupt(dataset, list(range(len(dataset)))):
            looks[index] = looks[index]._replace(
                defect=f"{dataset.paths[index]}: is damaged: corrupt JPEG data"
            )
    return looks


def _corrupt(dataset: DetectionDataset, indices: list[int]) -> list[int]:
    """Return the images that the JPEG decoder, which names no file, complains about: by halves."""

    def decode(terminal: TextIO) -> None:
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda index: _look(dataset, index), indices))

    if not CORRUPT.search(_complaints(decode)):
        return []
    if len(indices) == 1:
        return indices
    middle = len(indices) // 2
    return [*_corrupt(dataset, indices[:middle]), *_corrupt(dataset, indices[middle:])]


def _complaints(work: Callable[[TextIO], None]) -> str:
    """Do work that gets the real stderr; return what C libraries wrote to theirs meanwhile."""
    with TemporaryFile("w+", errors="replace") as caught, os.fdopen(os.dup(2), "w") as terminal:
        os.dup2(caught.fileno(), 2)
        try:
            work(terminal)
        finally:
            os.dup2(terminal.fileno(), 2)
        caught.seek(0)
        return caught.read()


def _look(dataset: DetectionDataset, index: int) -> Look:
    try:
        image = dataset.image(index)
    except UserError as error:
        return Look(str(error), "", np.zeros(32, np.uint8))
    content = hashlib.sha256(dataset.paths[index].read_bytes()).hexdigest()
    grey = cv2.cvtColor(
        cv2.resize(image, (17, 16), interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY
    )
    return Look(None, content, np.packbits(grey[:, 1:] > grey[:, :-1]))


def _defects(sets: dict[str, DetectionDataset], looks: dict[str, list[Look]]) -> list[str]:
    listed = [defect for dataset in sets.values() for defect in dataset.skipped]
    broken = [look.defect for split in looks.values() for look in split if look.defect]
    return list(dict.fromkeys(listed + broken))


def _counts(sets: dict[str, DetectionDataset]) -> str:
    """Return a table of images and boxes per split and class."""
    lines = []
    for name, dataset in sets.items():
        boxes = [len(annotation.labels) for annotation in dataset.annotations]
        difficult = sum(int(annotation.difficult.sum()) for annotation in dataset.annotations)
        lines.append(
            f"{name}: {dataset.name}: {len(dataset)} images ({boxes.count(0)} without boxes), "
            f"{sum(boxes)} boxes ({difficult} difficult)"
        )
    names = next(iter(sets.values())).class_names
    title = "boxes / images"
    first, other = max(len(title), *map(len, names)), max(16, *map(len, sets)) + 2
    lines.append(f"{title:>{first}}" + "".join(f"{name:>{other}}" for name in sets))
    for label, class_name in enumerate(names):
        cells = [_boxes_and_images(dataset, label) for dataset in sets.values()]
        lines.append(f"{class_name:>{first}}" + "".join(f"{cell:>{other}}" for cell in cells))
    return "\n".join(lines) + "\n"


def _boxes_and_images(dataset: DetectionDataset, label: int) -> str:
    found = [int((annotation.labels == label).sum()) for annotation in dataset.annotations]
    return f"{sum(found)} / {sum(count > 0 for count in found)}"


def _anchors(shapes: Tensor, cfg: Config, clustered: Sequence[float] | None) -> str:
    """Return a histogram of boxes [N, 2] by anchor, and what clustered anchors would gain."""
    anchors = anchor_sizes(cfg.anchors) or COCO_ANCHORS
    pairs = torch.tensor(anchors).reshape(-1, 2)
    counts = shape_iou(shapes[:, None], pairs).argmax(dim=1).bincount(minlength=len(pairs)).tolist()
    lines = [
        f"{len(shapes)} boxes of training samples by best anchor, pixels of "
        f"{ANCHOR_REFERENCE_SIZE}:"
    ]
    longest = max(1, *counts)
    for (width, height), count in zip(pairs.tolist(), counts, strict=True):
        lines.append(
            f"{width:>7.1f} x {height:<6.1f} {count:>7} {'#' * round(BAR * count / longest)}"
        )
    configured = {} if cfg.anchors in ("coco", "auto") else {"as configured": anchors}
    candidates = {"coco": COCO_ANCHORS, **configured, "auto": clustered}
    return "\n".join([*lines, *compare_anchors(shapes, candidates)]) + "\n"


def _collisions(dataset: DetectionDataset, cfg: Config, anchors: Sequence[float]) -> str:
    """Say how many boxes find no free cell on each grid, because others took it."""
    scaled = make_anchors(anchors, cfg.resolved_test_size)
    lines = []
    for size in sorted(cfg.img_sizes):
        boxes = [torch.from_numpy(sample) for sample in training_boxes(dataset, cfg, size)]
        targets = [
            {"boxes": sample, "labels": sample.new_zeros(len(sample)).long()} for sample in boxes
        ]
        total = sum(len(sample) for sample in boxes)
        taught, loss = np.zeros(len(STRIDES), int), cfg.loss_settings
        for start in range(0, len(targets), ASSIGN_BATCH):
            batch = targets[start : start + ASSIGN_BATCH]
            assigned = assign_targets(
                batch, scaled, size, rule=loss.assignment, ignore_iou=loss.ignore_iou
            )
            taught += [len(scale.labels) for scale in assigned]
        if loss.assignment == "paper":
            lines.append(f"{size} px: {total - taught.sum()} of {total} boxes lost")
        else:
            grids = [
                f"{size // stride}x{size // stride}: {total - count} "
                f"({(total - count) / max(1, total):.1%})"
                for stride, count in zip(STRIDES, taught, strict=True)
            ]
            lines.append(
                f"{size} px, boxes without a free anchor of {total}, by grid: {', '.join(grids)}"
            )
    return "\n".join(lines) + "\n"


def _duplicates(sets: dict[str, DetectionDataset], looks: dict[str, list[Look]]) -> str:
    """List pictures of training that stand in another split, byte for byte or by their looks."""
    (train_name, train_set), *others = sets.items()
    by_content = {
        look.content: index for index, look in enumerate(looks[train_name]) if not look.defect
    }
    appearances = np.stack([look.appearance for look in looks[train_name]])
    lines = []
    held = [pair for name, data in others for pair in zip(data.paths, looks[name], strict=True)]
    for path, look in held:
        if look.defect:
            continue
        distances = np.bitwise_count(appearances ^ look.appearance).sum(axis=1)
        if look.content in by_content:
            lines.append(f"{path}: the same file as {train_set.paths[by_content[look.content]]}")
        elif distances.min() <= SAME_PICTURE:
            lines.append(f"{path}: the same picture as {train_set.paths[distances.argmin()]}")
    return (
        _listing(f"{len(lines)} pictures in both splits", lines)
        if lines
        else "no picture in both splits\n"
    )


def _listing(title: str, lines: list[str], shown: int = SHOWN) -> str:
    rest = [f"  ... and {len(lines) - shown} more"] if len(lines) > shown else []
    return "\n".join([f"{title}:", *(f"  {line}" for line in lines[:shown]), *rest]) + "\n"
