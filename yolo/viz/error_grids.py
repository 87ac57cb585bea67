"""A detector's worst errors as pictures: confident false positives, and large objects missed."""

from functools import partial

import cv2
import numpy as np

from yolo.data.dataset import DetectionDataset
from yolo.metrics.average_precision import Matching
from yolo.metrics.errors import (
    BACKGROUND_IOU,
    CLASSIFICATION,
    KINDS,
    find_errors,
    largest_misses,
    worst_false_positives,
)
from yolo.metrics.matching import Detections, Objects, match_voc, paired_iou
from yolo.metrics.report import SHOWN_SCORE
from yolo.viz.figures import Drawing, picture_grid

GRID_PICTURES = 12
TILE = 240  # pixels
# RGB of detections, objects, nothing
FOUND, TRUE, PAPER = (230, 60, 50), (60, 200, 90), (255, 255, 255)


def error_grids(
    dataset: DetectionDataset, detections: Detections, objects: Objects, matching: Matching
) -> dict[str, Drawing]:
    """Show the most confident false positives and the largest objects that nobody would be shown.

    Args:
        dataset: the images.
        detections: by falling score.
        objects: annotated in the same images.
        matching: as for the mAP.

    Returns:
        Drawings of RGB images by name; None where there is no such error.
    """
    given = dataset, detections, objects, matching == "devkit"
    return {
        "false_positives": partial(_false_positives, *given),
        "misses": partial(_misses, *given),
    }


def _false_positives(
    dataset: DetectionDataset, detections: Detections, objects: Objects, strict: bool
) -> np.ndarray | None:
    errors = find_errors(detections, objects, match_voc(detections, objects, strict=strict))
    tiles = []
    for row in worst_false_positives(errors, GRID_PICTURES):
        one = detections.at(np.array([row]))
        name, image = dataset.class_names[one.labels[0]], int(one.images[0])
        caption = f"{name} ({_score(one.scores[0])}): {KINDS[errors.kinds[row]]}"
        if errors.kinds[row] == CLASSIFICATION:
            caption += f", is {dataset.class_names[objects.labels[errors.targets[row]]]}"
        caption += f"\nimage {dataset.image_ids[image]}"
        tiles.append((_tile(dataset, image, one.boxes[0], one, objects), caption))
    title = "The most confident false positives (red), and what is there (green)"
    return picture_grid(tiles, title) if tiles else None


def _misses(
    dataset: DetectionDataset, detections: Detections, objects: Objects, strict: bool
) -> np.ndarray | None:
    shown = detections.at(detections.scores >= SHOWN_SCORE)
    found = match_voc(shown, objects, strict=strict).objects[0]
    tiles = []
    for row in largest_misses(objects, found, GRID_PICTURES):
        image = int(objects.images[row])
        in_image = shown.at(shown.images == image)
        name = dataset.class_names[objects.labels[row]]
        nearest = _nearest(in_image, objects.boxes[row], dataset)
        caption = f"{name}; found: {nearest}\nimage {dataset.image_ids[image]}"
        tiles.append((_tile(dataset, image, objects.boxes[row], in_image, objects), caption))
    title = f"The largest objects (green) not found at a score of {SHOWN_SCORE}, and what was (red)"
    return picture_grid(tiles, title) if tiles else None


def _nearest(detections: Detections, box: np.ndarray, dataset: DetectionDataset) -> str:
    """Say which detection of an image overlaps a box most."""
    iou = paired_iou(detections.boxes, np.broadcast_to(box, detections.boxes.shape))
    if iou.max(initial=0) < BACKGROUND_IOU:
        return "nothing"
    best = int(iou.argmax())
    name = dataset.class_names[detections.labels[best]]
    return f"{name} ({_score(detections.scores[best])}, IoU {iou[best]:.2f})"


def _score(score: float) -> str:
    return f"{score:.0%}" if 0 <= score <= 1 else f"score {score:.3g}"


def _tile(
    dataset: DetectionDataset,
    image_index: int,
    focus: np.ndarray,
    detections: Detections,
    objects: Objects,
) -> np.ndarray:
    """Cut the surroundings of a box out of its image, with the objects and detections in it."""
    image = dataset.image(image_index)
    scale = image.shape[1] / dataset.annotation(image_index).width  # a cached image may be smaller
    left, top, right, bottom = _surroundings(focus * scale, image.shape[1], image.shape[0])
    zoom = TILE / max(right - left, bottom - top)
    size = [max(1, round(side * zoom)) for side in (right - left, bottom - top)]
    smooth = cv2.INTER_CUBIC if zoom > 1 else cv2.INTER_AREA
    tile = cv2.resize(image[top:bottom, left:right], size, interpolation=smooth)
    for items, color in ((objects, TRUE), (detections, FOUND)):
        for box in items.boxes[items.images == image_index]:
            corners = ((box * scale - [left, top] * 2) * zoom).round()
            corners = (
                corners.clip(-TILE, 2 * TILE).astype(int).tolist()
            )  # OpenCV wants small numbers
            thickness = 2 if np.array_equal(box, focus) else 1
            cv2.rectangle(tile, corners[:2], corners[2:], color, thickness, cv2.LINE_AA)
    right_of_image, below_image = TILE - size[0], TILE - size[1]
    border = (0, below_image, 0, right_of_image)
    return cv2.copyMakeBorder(tile, *border, cv2.BORDER_CONSTANT, value=PAPER)


def _surroundings(box: np.ndarray, width: int, height: int) -> tuple[int, int, int, int]:
    """Return a square window around a box, 1.6 times its longer side, clipped to the image."""
    half = max(24.0, 0.8 * float((box[2:] - box[:2]).max()))
    centre, sides = (box[:2] + box[2:]) / 2, np.array([width, height])
    left, top = np.clip(centre - half, 0, sides - 1).astype(int).tolist()
    right, bottom = np.clip(centre + half, 1, sides).astype(int).tolist()
    return left, top, max(right, left + 1), max(bottom, top + 1)
