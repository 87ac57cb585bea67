"""A classifier's most confident errors, with the Grad-CAM of the predicted and true classes."""

import cv2
import numpy as np

from yolo.data.classifier_images import ImageDataset
from yolo.explain.cam import explain_classification, overlay
from yolo.metrics.classification import ClassificationMetrics
from yolo.models.resnet import ResNet
from yolo.viz.figures import picture_grid

GRID_PICTURES = 12
TILE = 128  # pixels
GAP = 4


def misclassified_grid(
    model: ResNet, dataset: ImageDataset, metrics: ClassificationMetrics
) -> np.ndarray | None:
    """Draw the most confident wrong predictions.

    Args:
        model: the classifier that was tested.
        dataset: the images that it was tested on.
        metrics: its predictions, in the order of the images.

    Returns:
        An RGB image: per error the picture, the Grad-CAM of the predicted class, and that of the
        true class. None if there are no errors.
    """
    answers = metrics.state()
    tiles = []
    for index in metrics.worst_mistakes(GRID_PICTURES):
        predicted, true = int(answers["predicted"][index]), int(answers["labels"][index])
        names = dataset.class_names
        caption = (
            f"predicted {names[predicted]} ({answers['confidence'][index]:.0%}), is {names[true]}"
        )
        caption += f"\n{dataset.image_ids[index]}"
        tiles.append((_tile(model, dataset.image(index), (predicted, true)), caption))
    if not tiles:
        return None
    return picture_grid(
        tiles, "The most confident errors; Grad-CAM of the predicted class, and of the true one"
    )


def _tile(model: ResNet, image: np.ndarray, labels: tuple[int, int]) -> np.ndarray:
    large = cv2.resize(image, (TILE, TILE), interpolation=cv2.INTER_NEAREST)
    parts = [large]
    for label in labels:
        heat = explain_classification(model, image, label).heat
        parts += [
            np.full((TILE, GAP, 3), 255, np.uint8),
            overlay(large, cv2.resize(heat, (TILE, TILE))),
        ]
    return np.hstack(parts)
