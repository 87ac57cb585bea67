"""Where images go on a square canvas: alone in a letterbox, or as a tile of a mosaic.

The mosaic follows the idea of YOLOv4 (https://arxiv.org/abs/2004.10934, section 3.3): four images
around a random centre. Here each image fills its tile, at a scale between the smallest that does
and that of its letterbox, so that objects keep about the size they have in a test; a window is
chosen that cuts few objects.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from yolo.boxes import letterbox
from yolo.data.dataset import Annotation
from yolo.data.transforms import FILL, MIN_SIDE, Canvas, cut_threshold

CENTRE_RANGE = (
    0.3,
    0.7,
)  # of the canvas; nearer to a corner, tiles become too small for any object
WINDOW_TRIES = 8


@dataclass(frozen=True, slots=True)
class Tile:
    """A window of one image, and the region of the canvas that it is scaled to."""

    index: int  # of the image in the data set
    window: tuple[int, int, int, int]  # xyxy, pixels of the original image
    region: tuple[int, int, int, int]  # xyxy, pixels of the canvas

    @property
    def scale(self) -> float:
        """Canvas pixels per original pixel."""
        return (self.region[2] - self.region[0]) / (self.window[2] - self.window[0])


def letterbox_tile(index: int, annotation: Annotation, size: int) -> Tile:
    """Return the tile that shows a whole image in the middle of the canvas."""
    place = letterbox(annotation.height, annotation.width, size)
    region = (place.left, place.top, place.left + place.width, place.top + place.height)
    return Tile(index, (0, 0, annotation.width, annotation.height), region)


def mosaic_tiles(
    indices: Sequence[int], annotations: Sequence[Annotation], size: int, rng: np.random.Generator
) -> list[Tile]:
    """Place four images around a random centre so that they fill a `size` x `size` canvas."""
    x, y = (round(float(share) * size) for share in rng.uniform(*CENTRE_RANGE, size=2))
    regions = [(0, 0, x, y), (x, 0, size, y), (0, y, x, size), (x, y, size, size)]
    return [
        Tile(index, _window(annotation, region, size, rng), region)
        for index, annotation, region in zip(indices, annotations, regions, strict=True)
    ]


def place_boxes(
    tile: Tile, annotation: Annotation, min_share: float
) -> tuple[np.ndarray, np.ndarray]:
    """Move an image's boxes to the canvas, clip them to the tile, drop what is cut too far.

    Returns:
        boxes [K, 4] float32 in canvas pixels, and their positions [K] in the annotation.
    """
    x, y, right, bottom = tile.region
    left, top, window_right, window_bottom = tile.window
    scale = np.array(
        [(right - x) / (window_right - left), (bottom - y) / (window_bottom - top)] * 2
    )
    moved = (annotation.boxes - [left, top] * 2) * scale + [x, y] * 2
    clipped = np.clip(moved, [x, y] * 2, [right, bottom] * 2)
    sides = clipped[:, 2:] - clipped[:, :2]
    share = sides.prod(axis=1) / (moved[:, 2:] - moved[:, :2]).prod(axis=1)
    kept = np.flatnonzero((share >= min_share) & (sides >= MIN_SIDE).all(axis=1))
    return clipped[kept].astype(np.float32), kept


def compose(
    tiles: Sequence[Tile],
    images: Sequence[np.ndarray],
    annotations: Sequence[Annotation],
    size: int,
    min_visible: float = 0.0,
) -> Canvas:
    """Paint the tiles on one canvas, with the boxes that stay visible.

    Args:
        tiles: One, or the four of a mosaic.
        images: [H, W, 3] uint8 RGB for each tile, possibly decoded at a reduced size.
        annotations: The annotation of each image.
        size: Side of the canvas in pixels.
        min_visible: See `yolo.data.transforms.cut_threshold`.
    """
    canvas = np.full((size, size, 3), FILL, np.uint8)
    boxes, labels, difficult = [], [], []
    for tile, image, annotation in zip(tiles, images, annotations, strict=True):
        _paint(canvas, tile, image, annotation)
        placed, kept = place_boxes(tile, annotation, cut_threshold(min_visible))
        boxes.append(placed)
        labels.append(annotation.labels[kept])
        difficult.append(annotation.difficult[kept])
    return Canvas(canvas, np.concatenate(boxes), np.concatenate(labels), np.concatenate(difficult))


def letterboxed_canvas(image: np.ndarray, annotation: Annotation, size: int) -> Canvas:
    """Return a whole image, possibly decoded at a reduced size, on its canvas, as in every test."""
    return compose([letterbox_tile(0, annotation, size)], [image], [annotation], size)


def _window(
    annotation: Annotation, region: tuple[int, int, int, int], size: int, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Choose what part of an image to show: of random windows, the one that cuts least."""
    tile_width, tile_height = region[2] - region[0], region[3] - region[1]
    cover = max(tile_width / annotation.width, tile_height / annotation.height)
    scale = rng.uniform(cover, max(cover, size / max(annotation.height, annotation.width)))
    width = min(annotation.width, max(1, round(tile_width / scale)))
    height = min(annotation.height, max(1, round(tile_height / scale)))
    free = (annotation.width - width + 1, annotation.height - height + 1)
    corners = rng.integers(free, size=(WINDOW_TRIES, 2))
    windows = np.hstack([corners, corners + np.array([width, height])])
    left, top, right, bottom = windows[_integrity(windows, annotation.boxes).argmax()]
    return int(left), int(top), int(right), int(bottom)


def _integrity(windows: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Score windows [N, 4] by boxes [M, 4]: +1 for each whole one down to -1 for a sliver."""
    sides = np.minimum(windows[:, None, 2:], boxes[:, 2:]) - np.maximum(
        windows[:, None, :2], boxes[:, :2]
    )
    share = sides.clip(min=0).prod(axis=2) / (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return np.where(share > 0, 2 * share - 1, 0).sum(axis=1)


def _paint(canvas: np.ndarray, tile: Tile, image: np.ndarray, annotation: Annotation) -> None:
    """Scale the tile's window of `image` into its region of the canvas."""
    x, y, right, bottom = tile.region
    height, width = image.shape[:2]
    left, window_right = _pixels(tile.window[0], tile.window[2], width / annotation.width, width)
    top, window_bottom = _pixels(tile.window[1], tile.window[3], height / annotation.height, height)
    ratio = (right - x) / (window_right - left)
    cv2.resize(
        image[top:window_bottom, left:window_right],
        (right - x, bottom - y),
        dst=canvas[y:bottom, x:right],
        interpolation=cv2.INTER_AREA if ratio < 0.5 else cv2.INTER_LINEAR,
    )


def _pixels(start: int, stop: int, factor: float, length: int) -> tuple[int, int]:
    """Convert a range of pixels to one of at least a pixel in an image scaled by `factor`."""
    first = min(round(start * factor), length - 1)
    return first, min(max(first + 1, round(stop * factor)), length)
