"""What the Classify tab computes: probabilities and heat maps of one picture."""

from dataclasses import dataclass

import cv2
import numpy as np

from yolo.app.detector import MapSettings
from yolo.app.samples import Mistake, SampleSet
from yolo.app.uploads import read_picture
from yolo.explain.cam import CLASSIFIER_METHOD, Explanation, classify, explain_classification, overlay
from yolo.models.resnet import ResNet
from yolo.runs.checkpoint import LoadedWeights

SHOWN_SIDE = 480
TILE_SIDE = 160


@dataclass(frozen=True, eq=False)
class Judgement:
    """A picture and what the classifier says about it."""

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

    def judge(self, pixels: np.ndarray) -> Judgement:
        """Classify a picture [H, W, 3] of any shape."""
        return Judgement(pixels, classify(self.model, pixels).numpy())

    def explain(
        self, pixels: np.ndarray, label: int, method: str = CLASSIFIER_METHOD, layer: str = "auto"
    ) -> Explanation:
        """Return the heat map of a class."""
        return explain_classification(self.model, pixels, label, method=method, layer=layer)

    def mistake_tile(self, samples: SampleSet, mistake: Mistake) -> np.ndarray:
        """Return a misclassified image beside what spoke for the wrong class."""
        pixels = read_picture(samples.folder / mistake.file).pixels
        explanation = self.explain(pixels, mistake.predicted)
        opacities = (0.0, MapSettings().opacity)
        return np.hstack([draw_map(pixels, explanation, opacity, TILE_SIDE) for opacity in opacities])


def draw_map(
    pixels: np.ndarray, explanation: Explanation, opacity: float, side: int = SHOWN_SIDE
) -> np.ndarray:
    """Paint a heat map over its picture, whose longest side becomes `side`."""
    zoom = side / max(pixels.shape[:2])
    size = tuple(max(1, round(edge * zoom)) for edge in pixels.shape[1::-1])
    shown = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if zoom < 1 else cv2.INTER_CUBIC)
    return overlay(shown, cv2.resize(explanation.heat, size), opacity)
