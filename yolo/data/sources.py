"""Opens the data set that a configuration names, whatever its layout."""

from collections.abc import Sequence
from pathlib import Path

from yolo.config import DataConfig
from yolo.data.dataset import DetectionDataset, drop_unreadable
from yolo.data.digits import CLASS_NAMES, ensure_digits
from yolo.data.voc import VOC_CLASSES, read_voc
from yolo.errors import UsageError


def open_datasets(cfg: DataConfig) -> tuple[DetectionDataset, DetectionDataset]:
    """Open the training and the test set; the test set takes over the classes of the training set.

    Raises:
        UserError: for missing data or the first defect.
    """
    train_set = open_dataset(cfg, cfg.train_split, _named_classes(cfg))
    test_set = open_dataset(cfg, cfg.split, train_set.class_names)
    return train_set, drop_unreadable(test_set) if cfg.skip_bad else test_set


def open_dataset(cfg: DataConfig, split: str, class_names: Sequence[str] | None) -> DetectionDataset:
    """Open one split.

    Args:
        cfg: Layout, folder, and what to do with what is broken.
        split: As in `2007:test`.
        class_names: In the order of their labels; None for those that occur in this split, sorted.

    Raises:
        UserError: for missing data or the first defect.
    """
    root = Path(cfg.data_root or f"data/{cfg.dataset}")
    if cfg.dataset == "digits":
        return read_voc(ensure_digits(root), split, class_names or CLASS_NAMES, cfg.skip_bad)
    if cfg.dataset == "voc":
        return read_voc(root, split, class_names, cfg.skip_bad)
    raise UsageError(f"--dataset {cfg.dataset}: has no boxes to detect; want digits, voc, csv or yolo")


def _named_classes(cfg: DataConfig) -> Sequence[str] | None:
    if cfg.classes == "auto":
        return None
    if cfg.classes == "voc":
        return VOC_CLASSES
    return [name.strip() for name in cfg.classes.split(",") if name.strip()]
