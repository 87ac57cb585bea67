"""What the Classify tab computes: probabilities and heat maps of one picture."""

from dataclasses import dataclass

import cv2
import numpy as np

from yolo.app.detector import resized
from yolo.app.samples import Misclassified, SampleSet
from yolo.app.uploads import read_picture
from yolo.explain.cam import (
    CLASSIFIER_CAM,
    OPACITY,
    CamSettings,
    Explanation,
    classify,
    explain_classification,
    overlay,
)
from yolo.models.resnet import ResNet
from yolo.runs.checkpoint import LoadedWeights

SHOWN_SIDE = 480
TILE_SIDE = 160


@dataclass(frozen=True, eq=False)
class Classification:
    """A picture and the probabilities of its classes."""

    pixels: np.ndarray  # [H, W, 3] uint8 RGB
    probabilities: np.ndarray  # [C]

    @property
    def label(self) -> int:
        """The likeliest class."""
        return int(self.probabilities.argmax())


class Classifier:
    """A trained classifier; all methods may run in several threads at once."""

    def __init__(self, loaded: LoadedWeights) -> None:
        assert isinstance(loaded.model, ResNet)
        self.model = loaded.model
        self.class_names = loaded.class_names

    def classify(self, pixels: np.ndarray) -> Classification:
        """Classify a picture [H, W, 3] of any shape."""
        return Classification(pixels, classify(self.model, pixels).numpy())

    def explain(
        self, pixels: np.ndarray, label: int, settings: CamSettings = CLASSIFIER_CAM
    ) -> Explanation:
        """Return the heat map of a class."""
        return explain_classification(self.model, pixels, label, settings)

    def misclassified_tile(self, samples: SampleSet, image: Misclassified) -> np.ndarray:
        """Return a misclassified image beside the Grad-CAM of the predicted class."""
        pixels = read_picture(samples.folder / image.file).pixels
        explanation = self.explain(pixels, image.predicted)
        return np.hstack(
            [draw_map(pixels, explanation, opacity, TILE_SIDE) for opacity in (0.0, OPACITY)]
        )


def draw_map(
    pixels: np.ndarray, explanation: Explanation, opacity: float, side: int = SHOWN_SIDE
) -> np.ndarray:
    """Paint a heat map over its picture, whose longest side becomes `side`."""
    shown = resized(pixels, side)
    return overlay(shown, cv2.resize(explanation.heat, shown.shape[1::-1]), opacity)
