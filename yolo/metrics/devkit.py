"""Detections as the VOC devkit exchanges them: a folder of `comp4_det_<split>_<class>.txt` files.

A line is `image score xmin ymin xmax ymax`, in 1-based pixels, right and bottom edge inclusive.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from yolo.errors import UserError
from yolo.files import read_text
from yolo.metrics.average_precision import AnnotatedImages, check_detections
from yolo.metrics.matching import Detections

_TO_ZERO_BASED = np.array(
    [-1, -1, 0, 0]
)  # the exclusive right edge of a 0-based box is the inclusive 1-based one


def read_detections(
    folder: Path,
    dataset: AnnotatedImages,
    split: str = "test",
    log: Callable[[str], None] = print,
) -> Detections:
    """Read the devkit files of any detector, by falling score.

    A class without a file, or with an empty one, has no detections.

    Args:
        folder: holds the files.
        dataset: says which classes and images there are; files of other classes are not read.
        split: as the names of the files have it; where they have another, their end says the class.
        log: is told of what is left out or scored in another way than its author may expect.

    Raises:
        UserError: if the folder has no files of these classes, an image is unknown, a line does not
            parse, or a box or score is no number; names the file and the line.
    """
    files = sorted(folder.glob("comp*_det_*.txt"))
    if not files:
        raise UserError(f"{folder}: has no comp4_det_<split>_<class>.txt files")
    place = {image_id: index for index, image_id in enumerate(dataset.image_ids)}
    labels_of = {path: _label_of(path, dataset.class_names, split) for path in files}
    known = ", ".join(dataset.class_names)
    if other := [path.name for path, label in labels_of.items() if label is None]:
        what = "files of classes that the data does not have, not read"
        log(f"{len(other)} {what}; the first: {other[0]}")
    parts = [
        _read_class(path, label, place) for path, label in labels_of.items() if label is not None
    ]
    if not parts:
        raise UserError(f"{folder}: has no file of a class that the data has ({known})")
    images, numbers, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
    detections = Detections(images, numbers[:, 1:] + _TO_ZERO_BASED, numbers[:, 0], labels)
    check_detections(detections, dataset)
    _mention_oddities(detections, dataset, log)
    return detections.by_score()


def write_detections(
    folder: Path, detections: Detections, dataset: AnnotatedImages, split: str = "test"
) -> None:
    """Write one devkit file per class, sorted by image and then by falling score."""
    folder.mkdir(parents=True, exist_ok=True)
    for label, name in enumerate(dataset.class_names):
        rows = np.flatnonzero(detections.labels == label)
        rows = rows[np.lexsort((-detections.scores[rows], detections.images[rows]))]
        images, scores = detections.images[rows], detections.scores[rows]
        boxes = detections.boxes[rows] - _TO_ZERO_BASED
        lines = (
            f"{dataset.image_ids[image]} {score:.9g} " + " ".join(f"{edge:.6f}" for edge in box)
            for image, score, box in zip(images, scores, boxes, strict=True)
        )
        path = folder / f"comp4_det_{split}_{_in_file_name(name)}.txt"
        path.write_text("".join(f"{line}\n" for line in lines))


def _in_file_name(class_name: str) -> str:
    """Return a class name as no folder can be read into it: `w/o mask` becomes `w%2Fo mask`."""
    return class_name.replace("/", "%2F")


def _label_of(path: Path, class_names: tuple[str, ...], split: str) -> int | None:
    # `traffic_light` is not `light`: only an unknown split leaves open where the class begins
    named = path.stem.partition("_det_")[2]
    ending = named.removeprefix(split) if named.startswith(f"{split}_") else None
    in_files = {name: f"_{_in_file_name(name)}" for name in class_names}
    matching = [
        name
        for name, end in in_files.items()
        if (ending == end if ending is not None else named.endswith(end))
    ]
    return class_names.index(max(matching, key=len)) if matching else None


def _read_class(
    path: Path, label: int, place: dict[str, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the images [N], `score xmin ymin xmax ymax` [N, 5] and the labels [N] of one file."""
    lines = enumerate(read_text(path).splitlines(), start=1)
    rows = {number: line.rsplit(maxsplit=5) for number, line in lines if line.strip()}
    for number, row in rows.items():
        if len(row) != 6:
            raise UserError(f"{path}, line {number}: want `image score xmin ymin xmax ymax`")
        if row[0] not in place:
            raise UserError(
                f"{path}, line {number}: image {row[0]} is not in the split; "
                "the detections must be those of the split that --split names"
            )
    try:
        numbers = np.array([float(word) for row in rows.values() for word in row[1:]]).reshape(
            -1, 5
        )
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    images = np.array([place[row[0]] for row in rows.values()], dtype=np.int64)
    return images, numbers, np.full(len(rows), label)


def _mention_oddities(
    detections: Detections, dataset: AnnotatedImages, log: Callable[[str], None]
) -> None:
    inverted = (detections.boxes[:, 2:] < detections.boxes[:, :2]).any(1)
    if inverted.any():
        first = dataset.image_ids[detections.images[inverted.argmax()]]
        log(
            f"{inverted.sum()} boxes end before they begin (the first in image {first}): they "
            "find nothing and count as wrong, as in the devkit"
        )
    low, high = detections.scores.min(initial=0), detections.scores.max(initial=1)
    if low < 0 or high > 1:
        log(
            f"scores go from {low:g} to {high:g}, so they are no probabilities: their order alone "
            "counts, and calibration is left out"
        )
