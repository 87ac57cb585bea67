"""The classifier's images, in memory: CIFAR-10 (binary), a folder per class, scikit-learn's digits.

All three end as one uint8 array [N, 32, 32, 3]: 50,000 images are 154 MB, which forked workers
share. Binary format: https://www.cs.toronto.edu/~kriz/cifar.html (Krizhevsky 2009).
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os.path import exists, isfile  # of a name that no file can have they say no
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import cv2
import numpy as np

from yolo.config import DataConfig
from yolo.data.archives import is_image, read_members
from yolo.data.class_names import named_classes
from yolo.data.dataset import check_pixels, decode_rgb, notice
from yolo.data.splits import drawn, parse_split
from yolo.errors import UsageError, UserError

IMAGE_SIZE = 32
CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
BATCH_FILES = {
    "train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    "test": ("test_batch.bin",),
}
IMAGES_PER_BATCH_FILE = 10_000
RECORD_BYTES = 1 + 3 * IMAGE_SIZE * IMAGE_SIZE  # the label, then the red, green and blue planes


@dataclass(frozen=True)
class ImageDataset:
    """Labelled images of one split.

    Attributes:
        images: uint8 RGB [N, 32, 32, 3].
        labels: int64 [N], indices into `class_names`.
        image_ids: where each image came from.
        skipped: one line for each unreadable image that `--skip-bad` left out.
        name: source, split and root, for reports.
        notices: what was given and is not used.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    image_ids: list[str]
    skipped: list[str]
    name: str
    notices: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> np.ndarray:
        """Return one image, uint8 RGB [32, 32, 3]."""
        return self.images[index]

    def digest(self) -> str:
        """Return the SHA-256 of pixels, labels and class names."""
        digest = hashlib.sha256(",".join(self.class_names).encode())
        digest.update(self.labels.tobytes())
        digest.update(np.ascontiguousarray(self.images).data)
        return digest.hexdigest()


class _Split(NamedTuple):
    images: np.ndarray  # uint8 [N, 32, 32, 3]
    classes: list[str]  # of each image
    image_ids: list[str]
    skipped: list[str]
    notices: list[str]


def open_datasets(cfg: DataConfig) -> tuple[ImageDataset, ImageDataset]:
    """Open the training and the test split in one pass; both have the training split's classes.

    Raises:
        UserError: for missing, damaged or empty data.
        UsageError: for a split or a class list that the data does not have.
    """
    chosen = cfg.val_split or cfg.split
    splits = _read(cfg, (cfg.train_split, chosen))
    train = splits[cfg.train_split]
    class_names = named_classes(cfg) or tuple(sorted(set(train.classes)))
    return _label(cfg, cfg.train_split, train, class_names), _label(
        cfg, chosen, splits[chosen], class_names
    )


def open_dataset(cfg: DataConfig, split: str, class_names: Sequence[str]) -> ImageDataset:
    """Open one split with the classes of a trained model; raises as `open_datasets`."""
    return _label(cfg, split, _read(cfg, (split,))[split], tuple(class_names))


def _root(cfg: DataConfig) -> Path:
    return Path(cfg.data_root or f"data/{cfg.dataset}")


def _read(cfg: DataConfig, splits: Sequence[str]) -> dict[str, _Split]:
    """Read some splits in one pass; of those that are drawn, the whole split that they are of."""
    parts = {split: parse_split(split) for split in splits}
    whole = _read_whole(cfg, list(dict.fromkeys(base for base, _ in parts.values())))
    chosen = {}
    for split, (base, share) in parts.items():
        raw = whole[base]
        rows = drawn(raw.image_ids, share)
        chosen[split] = raw._replace(
            images=raw.images if share is None else raw.images[rows],
            classes=[raw.classes[row] for row in rows],
            image_ids=[raw.image_ids[row] for row in rows],
        )
    return chosen


def _read_whole(cfg: DataConfig, splits: Sequence[str]) -> dict[str, _Split]:
    if cfg.dataset == "digits":
        return _read_digits(splits)
    if cfg.dataset == "cifar10":
        return _read_binary(cfg, splits)
    if cfg.dataset == "images":
        return _read_class_folders(_root(cfg), splits, cfg.skip_bad)
    raise UsageError(f"--dataset {cfg.dataset}: classification takes digits, cifar10 or images")


def _label(cfg: DataConfig, split: str, raw: _Split, class_names: tuple[str, ...]) -> ImageDataset:
    where = "scikit-learn's digits" if cfg.dataset == "digits" else str(_root(cfg))
    if not len(raw.images):
        raise UserError(f"{where}: split '{split}' holds no images")
    unknown = sorted(set(raw.classes) - set(class_names))
    if unknown:
        raise UsageError(
            f"{where}: split '{split}' has the class '{unknown[0]}', which is not among "
            f"{','.join(class_names)}; name every class in --classes"
        )
    index = {name: i for i, name in enumerate(class_names)}
    labels = np.array([index[name] for name in raw.classes], dtype=np.int64)
    name = f"{cfg.dataset} {split} ({where})"
    return ImageDataset(
        raw.images, labels, class_names, raw.image_ids, raw.skipped, name, raw.notices
    )


def _read_digits(splits: Sequence[str]) -> dict[str, _Split]:
    """Enlarge scikit-learn's 1,797 digits of 8 x 8; the last fifth, by others, is the test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
    images = np.stack([to_32(cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)) for image in grey])
    first_test = len(images) * 4 // 5
    ranges = {"train": range(first_test), "test": range(first_test, len(images))}
    result = {}
    for split in splits:
        rows = ranges[_known_split(split, ranges)]
        classes = [str(digits.target[i]) for i in rows]
        result[split] = _Split(
            images[rows.start : rows.stop], classes, [str(i) for i in rows], [], []
        )
    return result


def _known_split(split: str, known: Mapping[str, object]) -> str:
    if split not in known:
        raise UsageError(f"split '{split}': this data set has {' and '.join(known)}")
    return split


def _read_binary(cfg: DataConfig, splits: Sequence[str]) -> dict[str, _Split]:
    files = {split: BATCH_FILES[_known_split(split, BATCH_FILES)] for split in splits}
    wanted = {name for names in files.values() for name in names}
    source = _binary_source(_root(cfg), cfg.download)
    batches = {
        path.name: read() for path, read in read_members(source, lambda path: path.name in wanted)
    }
    missing = sorted(wanted - set(batches))
    if missing:
        raise UserError(
            f"{source}: holds no {missing[0]}; --download fetches the official binary version"
        )
    return {split: _parse_batches(source, names, batches) for split, names in files.items()}


def _binary_source(root: Path, download: bool) -> Path:
    """Return the folder or archive of the batches; one of the official name must have its MD5."""
    from torchvision.datasets.utils import check_integrity, download_url

    archive = root if isfile(root) else root / Path(CIFAR10_URL).name
    if download and (exists(archive) or not any(root.rglob("*.bin"))):
        try:
            download_url(
                CIFAR10_URL, archive.parent, archive.name, CIFAR10_MD5
            )  # keeps an intact file
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{CIFAR10_URL}: the download failed ({error}); put it at {archive}"
            ) from None
    if archive.name == Path(CIFAR10_URL).name and exists(archive):
        if not check_integrity(archive, CIFAR10_MD5):
            raise UserError(
                f"{archive}: is not the official file (MD5 differs); --download fetches it anew"
            )
        return archive
    if not exists(root):
        raise UserError(f"--data-root {root}: does not exist; --download fetches CIFAR-10 into it")
    return root


def _parse_batches(source: Path, names: Sequence[str], batches: dict[str, bytes]) -> _Split:
    for name in names:
        if len(batches[name]) != IMAGES_PER_BATCH_FILE * RECORD_BYTES:
            raise UserError(
                f"{source}: {name} has {len(batches[name]):,} bytes, not "
                f"{IMAGES_PER_BATCH_FILE * RECORD_BYTES:,}; it is truncated or no CIFAR-10 batch"
            )
    records = np.frombuffer(b"".join(batches[name] for name in names), np.uint8).reshape(
        -1, RECORD_BYTES
    )
    labels = records[:, 0]
    if labels.max() >= len(CIFAR10_CLASSES):
        raise UserError(f"{source}: a label is {labels.max()}, beyond CIFAR-10's ten classes")
    planes = records[:, 1:].reshape(-1, 3, IMAGE_SIZE, IMAGE_SIZE)
    images = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
    ids = [f"{name}:{i}" for name in names for i in range(IMAGES_PER_BATCH_FILE)]
    return _Split(images, [CIFAR10_CLASSES[label] for label in labels], ids, [], [])


def _read_class_folders(root: Path, splits: Sequence[str], skip_bad: bool) -> dict[str, _Split]:
    """Read `<split>/<class>/<image>`, below any leading folder and with sub-folders of classes."""
    entries: dict[str, list[tuple[str, np.ndarray]]] = {split: [] for split in splits}
    skipped: dict[str, list[str]] = {split: [] for split in splits}
    unread: dict[str, list[str]] = {split: [] for split in splits}

    def is_wanted(path: PurePosixPath) -> bool:
        split, inside = _below_split(path, splits)
        usable = is_image(path) and len(inside) > 1
        if split and not usable:
            unread[split].append(str(path))
        return split is not None and usable

    for path, read in read_members(root, is_wanted):
        split, inside = _below_split(path, splits)
        assert split  # it is wanted
        try:
            data = read()
            check_pixels(path, data)
            image = to_32(decode_rgb(path, np.frombuffer(data, np.uint8)))
        except UserError as error:
            if not skip_bad:
                raise UserError(f"{root}: {error}; remove it or use --skip-bad") from None
            skipped[split].append(str(error))
        else:
            entries[split].append(("/".join(inside), image))
    return {
        split: _class_split(root, split, entries[split], skipped[split], unread[split])
        for split in splits
    }


def _below_split(path: PurePosixPath, splits: Sequence[str]) -> tuple[str | None, tuple[str, ...]]:
    """Return the split that a file belongs to, and its path below that folder; `.` is all files."""
    if "." in splits:
        return ".", path.parts
    for place, part in enumerate(path.parts[:-1]):
        if part in splits:
            return part, path.parts[place + 1 :]
    return None, ()


def _class_split(
    root: Path,
    split: str,
    entries: list[tuple[str, np.ndarray]],
    skipped: list[str],
    unread: list[str],
) -> _Split:
    """Return the images of a split in the order of their paths."""
    if skipped and not entries:
        raise UserError(
            f"{root}: none of the images under {split}/ can be used; the first: {skipped[0]}"
        )
    if not entries:
        raise UserError(
            f"{root}: no images under {split}/<class>/; is the split spelled as its folder?"
        )
    entries.sort(key=lambda entry: entry[0])
    image_ids = [image_id for image_id, _ in entries]
    return _Split(
        np.stack([image for _, image in entries]),
        [image_id.split("/")[0] for image_id in image_ids],
        image_ids,
        skipped,
        notice(
            "files are no images of a kind that can be read, in a class folder, and left out",
            sorted(unread),
        ),
    )


def to_32(image: np.ndarray) -> np.ndarray:
    """Resize an image [H, W, 3] of any shape to the classifier's 32 x 32; its shape is not kept."""
    if image.shape[:2] == (IMAGE_SIZE, IMAGE_SIZE):
        return image
    shrinks = min(image.shape[:2]) > IMAGE_SIZE
    return cv2.resize(
        image,
        (IMAGE_SIZE, IMAGE_SIZE),
        interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR,
    )
