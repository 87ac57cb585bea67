"""A classifier's most confident mistakes, each beside what spoke for the wrong class and for the true one."""

import cv2
import numpy as np

from yolo.data.labelled import ImageDataset
from yolo.explain.cam import explain_classification, overlay
from yolo.metrics.classification import ClassificationMetrics
from yolo.models.resnet import ResNet
from yolo.viz.figures import picture_grid

GRID_PICTURES = 12
TILE = 128  # pixels
GAP = 4


def mistake_grid(model: ResNet, dataset: ImageDataset, metrics: ClassificationMetrics) -> np.ndarray | None:
    """Draw the wrong answers of which the model was surest.

    Args:
        model: the classifier that was tested.
        dataset: the images that it was tested on.
        metrics: what it answered, in the order of the images.

    Returns:
        An RGB image: per mistake the picture, the Grad-CAM map of the class that was said, and that of the
        true class. None if there are no mistakes.
    """
    answers = metrics.state()
    tiles = []
    for index in metrics.worst_mistakes(GRID_PICTURES):
        said, true = int(answers["predicted"][index]), int(answers["labels"][index])
        names = dataset.class_names
        caption = f"said {names[said]} ({answers['confidence'][index]:.0%}), is {names[true]}"
        caption += f"\n{dataset.image_ids[index]}"
        tiles.append((_tile(model, dataset.image(index), (said, true)), caption))
    if not tiles:
        return None
    return picture_grid(tiles, "The most confident mistakes; what spoke for the answer, and for the truth")


def _tile(model: ResNet, image: np.ndarray, labels: tuple[int, int]) -> np.ndarray:
    large = cv2.resize(image, (TILE, TILE), interpolation=cv2.INTER_NEAREST)
    parts = [large]
    for label in labels:
        heat = explain_classification(model, image, label).heat
        parts += [np.full((TILE, GAP, 3), 255, np.uint8), overlay(large, cv2.resize(heat, (TILE, TILE)))]
    return np.hstack(parts)
