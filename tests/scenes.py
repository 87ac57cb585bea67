"""Detections and objects made up at random, for the tests of the metrics."""

from types import SimpleNamespace

import numpy as np

from yolo.metrics.matching import Detections, Objects


def random_scenes(seed: int) -> tuple[Detections, Objects, int, int]:
    """Return detections, objects, and how many images and classes: crowded, with ties and gaps."""
    rng = np.random.default_rng(seed)
    num_images, num_classes = int(rng.integers(1, 6)), int(rng.integers(1, 5))
    num_objects, num_detections = int(rng.integers(0, 40)), int(rng.integers(1, 80))
    side = int(
        rng.choice([12, 60, 300])
    )  # small sides crowd the boxes, and integers make equal overlaps

    def boxes(count: int) -> np.ndarray:
        corner, size = rng.integers(0, side, (count, 2)), rng.integers(1, side // 2 + 2, (count, 2))
        return np.concatenate([corner, corner + size], axis=1).astype(float)

    objects = Objects(
        rng.integers(0, num_images, num_objects),
        boxes(num_objects),
        rng.integers(0, num_classes, num_objects),
        rng.random(num_objects) < rng.choice([0, 0.3]),
    )
    found, images = boxes(num_detections), rng.integers(0, num_images, num_detections)
    labels = rng.integers(0, num_classes, num_detections)
    if num_objects:
        source = rng.integers(0, num_objects, num_detections)
        near = rng.random(num_detections) < 0.7
        shaken = objects.boxes[source] + rng.integers(
            -side // 12, side // 12 + 1, (num_detections, 4)
        )
        shaken[:, 2:] = np.maximum(shaken[:, 2:], shaken[:, :2] + 1)
        found[near], images[near] = shaken[near], objects.images[source][near]
        same = near & (rng.random(num_detections) < 0.85)
        labels[same] = objects.labels[source][same]
    scores = rng.integers(1, int(rng.choice([4, 1000])), num_detections) / 1000
    return Detections(images, found, scores, labels).by_score(), objects, num_images, num_classes


class Scenes:
    """An annotated data set of `random_scenes`."""

    def __init__(self, objects: Objects, num_images: int, num_classes: int) -> None:
        self.class_names = tuple(f"class{label}" for label in range(num_classes))
        self.image_ids = [f"{k:06d}" for k in range(num_images)]
        self.objects = objects

    def annotation(self, index: int) -> SimpleNamespace:
        rows = self.objects.at(self.objects.images == index)
        return SimpleNamespace(
            boxes=rows.boxes.astype(np.float32), labels=rows.labels, difficult=rows.ignored
        )
