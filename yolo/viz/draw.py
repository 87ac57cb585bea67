"""Boxes and class names drawn on images."""

import colorsys
from collections.abc import Sequence

import cv2
import numpy as np

_GOLDEN_RATIO = 0.618034  # steps of the hue that stay far apart for any number of classes


def class_color(label: int) -> tuple[int, int, int]:
    """Return an RGB colour for a class, far from those of its neighbours."""
    hue = (0.58 + label * _GOLDEN_RATIO) % 1
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85 - 0.25 * (label // 5 % 2), 0.95)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[int],
    class_names: Sequence[str],
    scores: Sequence[float] | None = None,
) -> np.ndarray:
    """Return a copy of an RGB uint8 image [H, W, 3] with named boxes on it.

    Args:
        image: the picture, not changed.
        boxes: [N, 4] xyxy pixels of the picture.
        labels: [N] classes.
        class_names: their names.
        scores: [N] shown in per cent, if given. The most confident box is drawn last, on top.
    """
    canvas = np.ascontiguousarray(image).copy()
    order = range(len(boxes)) if scores is None else np.argsort(np.asarray(scores), kind="stable")
    for k in order:
        label = int(labels[k])
        text = class_names[label]
        if scores is not None:
            text += f" {float(scores[k]):.0%}"
        _draw_box(canvas, np.asarray(boxes[k], float), text, class_color(label))
    return canvas


def _draw_box(canvas: np.ndarray, box: np.ndarray, text: str, color: tuple[int, int, int]) -> None:
    height, width = canvas.shape[:2]
    thickness = max(1, round(min(height, width) / 250))
    font_scale = float(np.clip(min(height, width) / 900, 0.35, 1.2))
    limit = [width - 1, height - 1] * 2
    left, top, right, bottom = (int(v) for v in np.clip(box.round() - [0, 0, 1, 1], 0, limit))
    cv2.rectangle(canvas, (left, top), (right, bottom), color, thickness)
    font = cv2.FONT_HERSHEY_SIMPLEX
    (text_width, text_height), descent = cv2.getTextSize(text, font, font_scale, 1)
    tag_width, tag_height = text_width + 4, text_height + descent + 2
    left = max(0, min(left, width - tag_width))
    # inside the box when there is no room above
    tag_top = top - tag_height if top >= tag_height else top
    end = (left + tag_width, tag_top + tag_height)
    cv2.rectangle(canvas, (left, tag_top), end, color, cv2.FILLED)
    ink = (0, 0, 0) if np.dot(color, (0.299, 0.587, 0.114)) > 140 else (255, 255, 255)
    baseline = (left + 2, tag_top + text_height + 1)
    cv2.putText(canvas, text, baseline, font, font_scale, ink, 1, cv2.LINE_AA)
