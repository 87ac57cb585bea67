"""Box geometry in plain torch: overlap of paired boxes, and the letterbox with its inverse.

A box is float32 `xyxy` in absolute pixels, 0-based, right and bottom exclusive. Conversions,
pairwise IoU and NMS are torchvision's (`torchvision.ops`).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Letterbox(NamedTuple):
    """Where an image is in the square input: scaled by `scale`, then moved by `(left, top)`."""

    scale: float
    left: int
    top: int
    height: int  # of the scaled image, inside the square
    width: int
    size: int  # of the square


def letterbox(height: int, width: int, size: int) -> Letterbox:
    """Return the largest centred placement of an image in a square, its shape kept."""
    scale = size / max(height, width)
    scaled_height = max(1, round(height * scale))
    scaled_width = max(1, round(width * scale))
    left, top = (size - scaled_width) // 2, (size - scaled_height) // 2
    return Letterbox(scale, left, top, scaled_height, scaled_width, size)


def boxes_to_letterbox(boxes: Tensor, place: Letterbox) -> Tensor:
    """Move boxes [N, 4] from the pixels of the original image to those of the letterboxed one."""
    return boxes * place.scale + boxes.new_tensor([place.left, place.top] * 2)


def boxes_from_letterbox(boxes: Tensor, place: Letterbox, height: int, width: int) -> Tensor:
    """Move boxes [N, 4] from the letterboxed image back to the original, and clip them to it."""
    original = (boxes - boxes.new_tensor([place.left, place.top] * 2)) / place.scale
    limit = original.new_tensor([width, height] * 2)
    return torch.minimum(original.clamp(min=0), limit)


def paired_iou(boxes_a: Tensor, boxes_b: Tensor) -> Tensor:
    """Return the IoU of each box with its partner.

    Args:
        boxes_a: [..., 4] xyxy, any unit.
        boxes_b: [..., 4] xyxy, the same unit and shape.

    Returns:
        [...] values in [0, 1]; 0 where both boxes are empty.
    """
    top_left = torch.maximum(boxes_a[..., :2], boxes_b[..., :2])
    bottom_right = torch.minimum(boxes_a[..., 2:], boxes_b[..., 2:])
    intersection = (bottom_right - top_left).clamp(min=0).prod(-1)
    sizes_a, sizes_b = boxes_a[..., 2:] - boxes_a[..., :2], boxes_b[..., 2:] - boxes_b[..., :2]
    union = sizes_a.clamp(min=0).prod(-1) + sizes_b.clamp(min=0).prod(-1) - intersection
    return intersection / union.clamp(min=1e-9)


def shape_iou(sizes_a: Tensor, sizes_b: Tensor) -> Tensor:
    """Return the IoU of boxes that share a centre, from their sizes alone.

    Args:
        sizes_a: [..., 2] width and height.
        sizes_b: [..., 2] likewise, broadcast against `sizes_a`.

    Returns:
        [...] values in [0, 1].
    """
    intersection = torch.minimum(sizes_a, sizes_b).clamp(min=0).prod(-1)
    union = sizes_a.prod(-1) + sizes_b.prod(-1) - intersection
    return intersection / union.clamp(min=1e-9)
