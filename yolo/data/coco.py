"""COCO JSON: boxes in absolute pixels `x, y, width, height`, 0-based, in one file for a split.

https://cocodataset.org/#format-data. What Roboflow, CVAT, Label Studio and many others export.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from os.path import isfile
from pathlib import Path, PurePosixPath
from typing import Any

from yolo.data.archives import is_image, walk
from yolo.data.dataset import DetectionDataset, RawAnnotation, RawBox, assemble, notice
from yolo.errors import UserError
from yolo.files import read_text


def read_coco(
    root: Path, split: str, class_names: Sequence[str] | None, skip_bad: bool = False
) -> DetectionDataset:
    """Read the images and boxes of one JSON file.

    Polygons without a box count as their box; regions of crowds are left out, as most trainers do.

    Args:
        root: Folder of the data set; the images lie anywhere below it.
        split: The JSON file, below `root`.
        class_names: In the order of their labels; None for the file's categories, by their ids.
        skip_bad: Leave out what is broken, and list it in `.skipped`.

    Raises:
        UserError: naming the file, if it is no COCO JSON; or the first defect.
    """
    path = root / split
    try:
        content = json.loads(read_text(path))
        images = {int(entry["id"]): entry for entry in content["images"]}
        names = {int(entry["id"]): str(entry["name"]) for entry in content["categories"]}
        boxes, crowds, polygons = _boxes(content["annotations"], names)
        parents = {entry.get("supercategory") for entry in content["categories"]}
    except OSError as error:
        raise UserError(f"split '{split}': {path} cannot be read ({error.strerror})") from None
    except (
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise UserError(f"{path}: is no COCO JSON ({type(error).__name__}: {error})") from None
    used = {thing.name for things in boxes.values() for thing in things}
    # Roboflow writes the name of the whole set as a category that is above the others
    kept = [name for _, name in sorted(names.items()) if name in used or name not in parents]
    places = _images_by_name(root)

    def read(image_id: str) -> RawAnnotation:
        entry = images.get(int(image_id), {})
        image = _find(places, path.parent, root, str(entry.get("file_name", "")))
        try:
            height, width = int(entry["height"]), int(entry["width"])
        except (KeyError, TypeError, ValueError, OverflowError):
            raise UserError(f"{path}: image {image_id} has no height and width") from None
        return RawAnnotation(image_id, image, path, height, width, boxes.get(int(image_id), []))

    dataset = assemble(
        f"COCO {path}",
        [str(image_id) for image_id in images],
        read,
        class_names or list(dict.fromkeys(kept)),
        skip_bad,
    )
    dataset.notices += [
        *notice("regions of crowds are left out: annotation", crowds),
        *notice("polygons have no box and are read as theirs: annotation", polygons),
    ]
    return dataset


def _boxes(
    annotations: Sequence[dict[str, Any]], names: dict[int, str]
) -> tuple[dict[int, list[RawBox]], list[Any], list[Any]]:
    """Return the boxes by image, and the ids of crowds and of polygons without a box."""
    boxes: dict[int, list[RawBox]] = defaultdict(list)
    crowds, polygons = [], []
    for entry in annotations:
        if entry.get("iscrowd"):
            crowds.append(entry.get("id"))
            continue
        if entry.get("bbox"):
            x, y, width, height = map(float, entry["bbox"])
        else:
            points = [float(value) for part in entry["segmentation"] for value in part]
            x, y = min(points[::2]), min(points[1::2])
            width, height = max(points[::2]) - x, max(points[1::2]) - y
            polygons.append(entry.get("id"))
        number = int(entry["category_id"])
        name = names.get(number, f"category {number}")
        boxes[int(entry["image_id"])].append(RawBox(name, (x, y, x + width, y + height)))
    return boxes, crowds, polygons


def _images_by_name(root: Path) -> dict[str, list[Path]]:
    places: dict[str, list[Path]] = defaultdict(list)
    for file in walk(root):
        if is_image(file):
            places[file.name].append(file)
    return places


def _find(places: dict[str, list[Path]], beside: Path, root: Path, file_name: str) -> Path:
    """Return an image by name: beside the JSON, else where the longest end of its path agrees."""
    name = PurePosixPath(file_name.replace("\\", "/"))
    if isfile(beside / name):
        return beside / name
    found = places.get(name.name, [])

    def agreeing(path: Path) -> int:
        pairs = zip(reversed(path.parts), reversed(name.parts), strict=False)
        return next((i for i, (one, other) in enumerate(pairs) if one != other), len(name.parts))

    return max(found, key=agreeing, default=root / name)
