"""Detections as the VOC devkit exchanges them: a folder of `comp4_det_<split>_<class>.txt` files.

A line is `image score xmin ymin xmax ymax`, in 1-based pixels, right and bottom edge inclusive.
"""

from pathlib import Path

import numpy as np

from yolo.errors import UserError
from yolo.files import read_text
from yolo.metrics.average_precision import AnnotatedImages, check_detections
from yolo.metrics.matching import Detections

_TO_ZERO_BASED = np.array(
    [-1, -1, 0, 0]
)  # the exclusive right edge of a 0-based box is the inclusive 1-based one


def read_detections(folder: Path, dataset: AnnotatedImages) -> Detections:
    """Read the devkit files of any detector, by falling score.

    A class without a file, or with an empty one, has no detections.

    Raises:
        UserError: if the folder has no such files, a class or an image is unknown, a line does not
            parse, or a box or score cannot be scored; names the file and the line.
    """
    files = sorted(folder.glob("comp*_det_*.txt"))
    if not files:
        raise UserError(f"{folder}: has no comp4_det_<split>_<class>.txt files")
    place = {image_id: index for index, image_id in enumerate(dataset.image_ids)}
    parts = [_read_class(path, dataset.class_names, place) for path in files]
    images, numbers, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
    detections = Detections(images, numbers[:, 1:] + _TO_ZERO_BASED, numbers[:, 0], labels)
    check_detections(detections, dataset)
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


def _read_class(
    path: Path, class_names: tuple[str, ...], place: dict[str, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the images [N], `score xmin ymin xmax ymax` [N, 5] and the labels [N] of one file."""
    matching = [name for name in class_names if path.stem.endswith(f"_{_in_file_name(name)}")]
    if not matching:
        known = ", ".join(class_names)
        raise UserError(f"{path}: is for a class that the data does not have (it has: {known})")
    label = class_names.index(max(matching, key=len))
    rows = [line.rsplit(maxsplit=5) for line in read_text(path).splitlines()]
    for number, row in enumerate(rows, start=1):
        if len(row) != 6:
            raise UserError(f"{path}, line {number}: want `image score xmin ymin xmax ymax`")
        if row[0] not in place:
            raise UserError(
                f"{path}, line {number}: image {row[0]} is not in the split; "
                "the detections must be those of the split that --split names"
            )
    try:
        numbers = np.array([row[1:] for row in rows], dtype=np.float64).reshape(-1, 5)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    images = np.array([place[row[0]] for row in rows], dtype=np.int64)
    return images, numbers, np.full(len(rows), label)
