"""Label files of lines `class cx cy width height` in shares of the image: YOLO folders, the CSV copy of VOC.

The CSV layout (as on Kaggle) has `images/`, `labels/` and one `<split>.csv` of lines `image,label`. A YOLO
folder has `images/<split>` beside `labels/<split>`, or `<split>/images` beside `<split>/labels`; its class
names stand in `data.yaml` or `classes.txt`: they say what the numbers mean, whatever order of classes the
network has. An image without a label file has no objects. As viewers and
annotation tools show images turned by their EXIF tag, boxes are read so, too.
"""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml

from yolo.data.dataset import (
    IMAGE_SUFFIXES,
    DetectionDataset,
    RawImage,
    RawObject,
    assemble,
    header_size,
)
from yolo.errors import UserError
from yolo.files import read_text


def read_csv_layout(
    root: Path, split: str, class_names: Sequence[str] | None, skip_bad: bool = False
) -> DetectionDataset:
    """Read `<split>.csv` and the images and labels that it lists.

    Raises:
        UserError: naming what is missing, or the first defect.
    """
    path = root / f"{split}.csv"
    if not path.is_file():
        raise UserError(
            f"split '{split}': no file {path}; there are: {_listed(root.glob('*.csv'))}"
        )
    rows = [[cell.strip() for cell in row] for row in csv.reader(read_text(path).splitlines())]
    if rows and Path((rows[0] or [""])[0]).suffix.lower() not in IMAGE_SUFFIXES:  # a header
        rows[0] = []
    files = {}
    for number, row in enumerate(rows, start=1):
        if any(row) and len(row) < 2:
            raise UserError(f"{path}, line {number}: '{row[0]}' is not `image,label`")
        if any(row):
            files[row[0]] = root / "images" / row[0], root / "labels" / row[1]
    return _assemble(f"CSV {path}", root, files, class_names, skip_bad)


def read_yolo_folder(
    root: Path, split: str, class_names: Sequence[str] | None, skip_bad: bool = False
) -> DetectionDataset:
    """Read the images of one split and the label files beside them.

    Raises:
        UserError: naming what is missing, or the first defect.
    """
    images, labels = root / "images" / split, root / "labels" / split
    if not images.is_dir():
        images, labels = root / split / "images", root / split / "labels"
    if not images.is_dir():
        raise UserError(
            f"split '{split}': no folder {root / 'images' / split} or {images}; "
            f"{root} holds: {_listed(root.glob('*'))}"
        )
    found = sorted(path for path in images.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    files = {path.name: (path, labels / f"{path.stem}.txt") for path in found}
    return _assemble(f"YOLO folder {images}", root, files, class_names, skip_bad)


def _assemble(
    name: str,
    root: Path,
    files: dict[str, tuple[Path, Path]],
    class_names: Sequence[str] | None,
    skip_bad: bool,
) -> DetectionDataset:
    numbered = _names(root) or class_names
    if not numbered:
        raise UserError(
            f"{root}: label files hold class numbers, and no data.yaml or classes.txt says their names: "
            "add one, or name them with --classes (`--classes voc` for the Kaggle copy of VOC)"
        )
    return assemble(
        name,
        list(files),
        lambda image_id: _read_labels(image_id, *files[image_id], numbered),
        class_names or numbered,
        skip_bad,
        follow_exif=True,
    )


def _read_labels(image_id: str, image: Path, labels: Path, class_names: Sequence[str]) -> RawImage:
    height, width = header_size(image, follow_exif=True)
    lines = read_text(labels).splitlines() if labels.is_file() else []
    objects = [
        _object(line, f"{labels}, line {number}", height, width, class_names)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    return RawImage(image_id, image, labels, height, width, objects)


def _object(
    line: str, where: str, height: int, width: int, class_names: Sequence[str]
) -> RawObject:
    try:
        number, *shares = (float(word) for word in line.split())
        x, y, box_width, box_height = shares
        label = int(number)
    except (ValueError, OverflowError):
        raise UserError(f"{where}: '{line.strip()}' is not `class cx cy width height`") from None
    name = class_names[label] if 0 <= label < len(class_names) else f"class {label}"
    box = (
        (x - box_width / 2) * width,
        (y - box_height / 2) * height,
        (x + box_width / 2) * width,
        (y + box_height / 2) * height,
    )
    return RawObject(name, box)


def _names(root: Path) -> list[str] | None:
    """Return the class names that a data set brings along, in the order of their numbers; None without."""
    for path in (root / "data.yaml", root / "data.yml"):
        if path.is_file():
            return _yaml_names(path)
    for path in (root / "classes.txt", root / "labels" / "classes.txt"):
        if path.is_file():
            return [line.strip() for line in read_text(path).splitlines() if line.strip()]
    return None


def _yaml_names(path: Path) -> list[str]:
    try:
        names = yaml.safe_load(read_text(path))["names"]
        return [
            str(names[key])
            for key in (sorted(names) if isinstance(names, dict) else range(len(names)))
        ]
    except (yaml.YAMLError, KeyError, TypeError):
        raise UserError(f"{path}: has no readable `names:`") from None


def _listed(paths: Iterable[Path]) -> str:
    return ", ".join(sorted(path.name for path in paths)) or "nothing"
