"""Opens the data set that a configuration names, whatever its layout."""

from collections.abc import Sequence
from os.path import isfile
from pathlib import Path

from yolo.config import Config
from yolo.data.cache import cache_images
from yolo.data.class_names import named_classes
from yolo.data.dataset import DetectionDataset, drop_unreadable
from yolo.data.digits import CLASS_NAMES, ensure_digits
from yolo.data.download import ensure_voc
from yolo.data.layouts import LAYOUTS
from yolo.data.splits import drawn, parse_split
from yolo.data.voc import read_voc
from yolo.errors import UsageError, UserError


def open_datasets(cfg: Config, processes: int = 1) -> tuple[DetectionDataset, DetectionDataset]:
    """Open the training set, and the one that is tested on while training, with the same classes.

    With `--cache ram` both are decoded into shared memory here.

    Args:
        cfg: Layout, folder, splits, and what to do with what is broken.
        processes: How many of this machine open them, each with a cache of its own.

    Raises:
        UserError: for missing data, the first defect, or too little memory.
    """
    train_set = open_dataset(cfg, cfg.train_split, named_classes(cfg))
    test_set = open_test_set(cfg, cfg.val_split or cfg.split, train_set.class_names)
    if cfg.cache == "ram":
        if cfg.skip_bad:  # a cache cannot hold a broken image
            drop_unreadable(train_set)
        for dataset in (train_set, test_set):
            cache_images(dataset, max(*cfg.img_sizes, cfg.resolved_test_size), copies=processes)
    return train_set, test_set


def open_test_set(cfg: Config, split: str, class_names: Sequence[str]) -> DetectionDataset:
    """Open a split for tests, with the classes of a model; raises as `open_dataset`."""
    dataset = open_dataset(cfg, split, class_names)
    if cfg.skip_bad:  # a test cannot replace a broken image by another
        drop_unreadable(dataset)
    return dataset


def open_dataset(cfg: Config, split: str, class_names: Sequence[str] | None) -> DetectionDataset:
    """Open one split.

    Args:
        cfg: Layout, folder, and what to do with what is broken.
        split: As in `2007:test`; `[:20%]` after it is a share of it, `[20%:]` the rest.
        class_names: In the order of their labels; None for those that the data set brings along.

    Raises:
        UserError: for missing data or the first defect.
    """
    root = Path(cfg.data_root or f"data/{cfg.dataset}")
    if isfile(root):
        raise UserError(f"--data-root {root}: is a file; name the folder that it lies in")
    whole, share = parse_split(split)
    if cfg.dataset == "digits":
        dataset = read_voc(ensure_digits(root), whole, class_names or CLASS_NAMES, cfg.skip_bad)
    elif not (layout := LAYOUTS.get(cfg.dataset)) or not layout.reader:
        raise UsageError(
            f"--dataset {cfg.dataset}: has no boxes to detect; want digits, voc, csv, yolo or coco"
        )
    else:
        if cfg.dataset == "voc" and cfg.download:
            ensure_voc(root, whole)
        dataset = layout.read(root, whole, class_names, cfg.skip_bad)
    if share is None:
        return dataset
    dataset.name = f"{dataset.name} {split.removeprefix(whole)}"
    dataset.keep(drawn([path.name for path in dataset.paths], share))
    return dataset
