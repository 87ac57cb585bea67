"""Label files of lines `class cx cy width height` in shares of the image: YOLO folders, VOC as CSV.

The CSV layout (as on Kaggle) has `images/`, `labels/` and one `<split>.csv` of lines `image,label`.
A YOLO split is `images/<split>` beside `labels/<split>`, `<split>/images` beside
`<split>/labels`, a list `<split>.txt` of images (CVAT, Darknet), or any folder or list that it
names by its path; labels may also lie beside their images, as labelImg writes them. Its class names
stand in `data.yaml`, `classes.txt` or `obj.names`: they say what the numbers mean, whatever order
of classes the network has. An image without a label file has no objects. As viewers and annotation
tools show images turned by their EXIF tag, boxes are read so, too.
"""

import csv
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from os.path import isdir, isfile  # of a name that no file can have it says no, where `Path` raises
from pathlib import Path

from yolo.data.archives import is_image, swap_last, walk
from yolo.data.class_names import CLASS_FILES, has_names, read_class_names
from yolo.data.dataset import (
    DetectionDataset,
    RawAnnotation,
    RawBox,
    Remarks,
    assemble,
    header_size,
    notice,
)
from yolo.errors import UserError
from yolo.files import read_text

NO_LABELS = ("classes.txt", "train.txt", "val.txt", "test.txt")  # beside the labels
ANNOTATIONS = (".txt", ".json", ".xml")  # of any program, beside images
MAX_LABELS = 1 << 25  # bytes of one label file
MAX_LINES = 100_000
Pairs = dict[str, tuple[Path, Path]]  # image and label file by image id


def read_csv_layout(
    root: Path, split: str, class_names: Sequence[str] | None, skip_bad: bool = False
) -> DetectionDataset:
    """Read `<split>.csv` and the images and labels that it lists.

    Raises:
        UserError: naming what is missing, or the first defect.
    """
    path = root / f"{split}.csv"
    if not isfile(path):
        raise UserError(f"split '{split}': no file {path}; there are: {_listed(root, '*.csv')}")
    try:
        rows = [[cell.strip() for cell in row] for row in csv.reader(read_text(path).splitlines())]
    except csv.Error as error:
        raise UserError(f"{path}: is no readable CSV ({error})") from None
    if rows and not is_image(Path((rows[0] or [""])[0])):  # a header
        rows[0] = []
    pairs: Pairs = {}
    for number, row in enumerate(rows, start=1):
        if any(row) and len(row) < 2:
            raise UserError(f"{path}, line {number}: '{row[0]}' is not `image,label`")
        if any(row):
            pairs[row[0]] = root / "images" / row[0], root / "labels" / row[1]
    return _assemble(f"CSV {path}", root, pairs, class_names, skip_bad, needs_labels=True)


def read_yolo_folder(
    root: Path, split: str, class_names: Sequence[str] | None, skip_bad: bool = False
) -> DetectionDataset:
    """Read the images of one split, sub-folders too, and the label files that belong to them.

    Args:
        root: Folder of the data set.
        split: Its name, or the path of its images or its list below `root`; several joined by +.
        class_names: In the order of their labels; None for those that the data set brings along.
        skip_bad: Leave out what is broken, and list it in `.skipped`.

    Raises:
        UserError: naming what is missing, or the first defect.
    """
    where, pairs, notices = _pairs_of_split(root, split)
    if not where and "+" in split:
        parts = {part: _pairs_of_split(root, part) for part in split.split("+")}
        missing = next((part for part, (found, *_) in parts.items() if not found), None)
        where, split = ("" if missing else f"YOLO {split} in {root}"), missing or split
        pairs = {f"{part}/{name}": pair for part in parts for name, pair in parts[part][1].items()}
        notices = [line for part in parts.values() for line in part[2]]
    if not where:
        raise UserError(
            f"split '{split}': no folder {root / 'images' / split} or {root / split / 'images'}, "
            f"and no list {root / split}.txt; {root} holds: {_listed(root, '*')}"
        )
    if pairs and not any(isfile(labels) for _, labels in pairs.values()):
        image, labels = next(iter(pairs.values()))
        raise UserError(
            f"{where}: none of the {len(pairs)} images has a label file (looked for {labels} and "
            f"{_beside(image)}); lay the labels out as the images are"
        )
    dataset = _assemble(where, root, pairs, class_names, skip_bad)
    dataset.notices += notices
    return dataset


def _pairs_of_split(root: Path, split: str) -> tuple[str, Pairs, list[str]]:
    """Return what a split is (nothing if it is not there), its pairs, and notices."""
    folders = [root / "images" / split, root / split / "images", root / split]
    for images in folders:
        if isdir(images):
            labels = Path(*swap_last(images.parts, "images", "labels"))
            return f"YOLO folder {images}", *_pairs_of_folder(images, labels)
    for listing in (root / f"{split}.txt", root / split):
        if isfile(listing):
            return f"YOLO list {listing}", _pairs_of_list(root, listing), []
    return "", {}, []


def _pairs_of_folder(images: Path, labels: Path) -> tuple[Pairs, list[str]]:
    """Return the pairs of a folder, and what lies there that belongs to none.

    A file of any other suffix (`.heic`) that has labels, and no image beside it, is their image.
    """
    files = sorted(walk(images))
    label_files = [path for path in (*files, *walk(labels)) if path.suffix.lower() == ".txt"]
    named = {path.with_suffix("") for path in files if is_image(path)}
    pairs: Pairs = {}
    for path in files:
        inside = path.relative_to(images)
        label_file = _label_file(labels / inside.with_suffix(".txt"), path)
        is_other = path.with_suffix("") not in named and path.suffix.lower() not in ANNOTATIONS
        if is_image(path) or (is_other and isfile(label_file)):
            pairs[inside.as_posix()] = path, label_file
    used = {label_file for _, label_file in pairs.values()}
    spare = [path for path in label_files if path not in used and path.name not in NO_LABELS]
    taken = {image for image, _ in pairs.values()}
    unread = [path for path in files if path not in taken and path not in label_files]
    return pairs, [
        *notice("label files are of no image and left out", spare),
        *notice("files are no images of a kind that can be read and left out", unread),
    ]


def _pairs_of_list(root: Path, listing: Path) -> Pairs:
    """Return the pairs of a list of image paths, which may start above `root` or be absolute."""
    pairs: Pairs = {}
    for line in read_text(listing).splitlines():
        parts = Path(line.strip()).parts
        tails = [root.joinpath(*parts[start:]) for start in range(len(parts))]
        if tails:
            image = next((path for path in tails if isfile(path)), tails[0])
            swapped = Path(*swap_last(image.parts, "images", "labels"))
            pairs[line.strip()] = image, _label_file(_beside(swapped), image)
    return pairs


def _label_file(usual: Path, image: Path) -> Path:
    """Return the label file of an image: at its usual place, or else beside the image."""
    beside = _beside(image)
    return beside if isfile(beside) and not isfile(usual) else usual


def _beside(image: Path) -> Path:
    """Return the path of an image with the suffix of labels; the root folder, `/`, has no name."""
    return image.with_suffix(".txt") if image.name else image


def _assemble(
    name: str,
    root: Path,
    pairs: Pairs,
    class_names: Sequence[str] | None,
    skip_bad: bool,
    needs_labels: bool = False,
) -> DetectionDataset:
    """Read all pairs; `needs_labels`: a missing label file is a defect, and no background."""
    numbered, notices = _names(root, [labels.parent for _, labels in pairs.values()])
    numbered = numbered or dict(enumerate(class_names or ()))
    if not numbered:
        raise UserError(
            f"{root}: label files hold class numbers, and no data.yaml, classes.txt or obj.names "
            "says their names: add one, or name them with --classes (`--classes voc` for the "
            "Kaggle copy of VOC)"
        )
    remarks: Remarks = defaultdict(list)

    def read(image_id: str) -> RawAnnotation:
        image, labels = pairs[image_id]
        if needs_labels and isfile(image) and not isfile(labels):
            raise UserError(f"{labels}: no such label file, but the CSV names it")
        return _read_labels(image_id, image, labels, numbered, remarks)

    dataset = assemble(
        name, list(pairs), read, class_names or tuple(numbered.values()), skip_bad, follow_exif=True
    )
    dataset.notices += notices
    dataset.notices += [line for what, places in remarks.items() for line in notice(what, places)]
    return dataset


def _read_labels(
    image_id: str, image: Path, labels: Path, numbered: Mapping[int, str], remarks: Remarks
) -> RawAnnotation:
    height, width = header_size(image, follow_exif=True)
    lines = read_text(labels, MAX_LABELS).splitlines() if isfile(labels) else []
    if len(lines) > MAX_LINES:
        raise UserError(
            f"{labels}: has {len(lines)} lines; no image has more than {MAX_LINES} objects"
        )
    if not isfile(labels):
        remarks["images have no label file and count as background"].append(str(image))
    objects: dict[RawBox, None] = {}  # in their order
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{labels}, line {number}"
        thing = _object(line, where, height, width, numbered)
        if len(line.split()) > 5:
            remarks["lines are polygons and read as their boxes"].append(where)
        if thing in objects:
            remarks["label lines stand twice and count once"].append(where)
        objects[thing] = None
    return RawAnnotation(image_id, image, labels, height, width, list(objects))


def _object(line: str, where: str, height: int, width: int, numbered: Mapping[int, str]) -> RawBox:
    """Read `class cx cy width height`, or the corners of a polygon: `class x y x y x y ...`."""
    try:
        number, *shares = (float(word) for word in line.split())
        label = int(number)
    except (ValueError, OverflowError):
        label, number, shares = 0, 0.5, []
    is_polygon = len(shares) >= 6 and len(shares) % 2 == 0
    if label != number or not (len(shares) == 4 or is_polygon):
        raise UserError(f"{where}: '{line.strip()}' is not `class cx cy width height`")
    if is_polygon:
        xs, ys = shares[::2], shares[1::2]
        left, top, right, bottom = min(xs), min(ys), max(xs), max(ys)
    else:
        x, y, w, h = shares
        left, top, right, bottom = x - w / 2, y - h / 2, x + w / 2, y + h / 2
    box = (left * width, top * height, right * width, bottom * height)
    return RawBox(numbered.get(label, f"class {label}"), box)


def _names(root: Path, label_folders: Iterable[Path]) -> tuple[dict[int, str] | None, list[str]]:
    """Return the class names that a data set brings along, by number, and which others it has."""
    folders = dict.fromkeys(label_folders)
    beside = (folder / name for folder in folders for name in ("classes.txt", "_darknet.labels"))
    usual = (root / name for name in CLASS_FILES)
    others = (path for path in sorted(_glob(root, "*.y*ml")) if has_names(path))
    paths = dict.fromkeys(path for path in (*usual, *beside) if isfile(path)) or dict.fromkeys(
        [*others][:1]
    )
    if not paths:
        return None, []
    first, *rest = paths
    names = read_class_names(first)
    unlike = [path for path in rest if read_class_names(path) != names]
    return names, notice(f"files name other classes than {first}, which counts", unlike)


def _listed(root: Path, pattern: str) -> str:
    return ", ".join(sorted(path.name for path in _glob(root, pattern))) or "nothing"


def _glob(root: Path, pattern: str) -> Iterable[Path]:
    return root.glob(pattern) if isdir(root) else ()
