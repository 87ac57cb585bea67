"""What a trained model says about pictures of any size: boxes or classes, drawn and as JSON and CSV."""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from yolo.boxes import boxes_from_letterbox, letterbox
from yolo.data.dataset import read_rgb
from yolo.data.images import letterboxed
from yolo.data.labelled import to_32
from yolo.errors import UserError
from yolo.files import replacing
from yolo.models.build import by_task
from yolo.runs.checkpoint import LoadedWeights
from yolo.tasks.detection import detect
from yolo.viz.draw import draw_boxes
from yolo.viz.figures import save_figures

BATCH = 8
TOP_CLASSES = 5

Predict = Callable[[Tensor], Any]  # images uint8 [B, 3, S, S] -> the network's raw output


class Predictor:
    """Turns pictures of any size into plain answers."""

    def __init__(self, loaded: LoadedWeights, predict: Predict, score_threshold: float) -> None:
        self.loaded = loaded
        self.predict = predict
        self.score_threshold = score_threshold

    def __call__(self, pictures: Sequence[np.ndarray]) -> list[dict[str, Any]]:
        """Answer for RGB uint8 pictures [H, W, 3] of any size, together.

        Returns:
            Per picture its `height` and `width`, and `detections` (each `class`, `score` and `box`, xyxy
            pixels of the picture) or, of a classifier, `classes` (each `class` and `probability`); the
            likeliest first.
        """
        answer = by_task(self.loaded.task, detection=self._detect, classification=self._classify)
        sizes = [{"height": picture.shape[0], "width": picture.shape[1]} for picture in pictures]
        return [size | found for size, found in zip(sizes, answer(pictures), strict=True)]

    def _detect(self, pictures: Sequence[np.ndarray]) -> Iterator[dict[str, Any]]:
        loaded = self.loaded
        assert loaded.anchors is not None
        size = loaded.test_size
        outputs = self.predict(torch.stack([letterboxed(picture, size) for picture in pictures]))
        found = detect(loaded.config, outputs, loaded.anchors, self.score_threshold)
        for picture, one in zip(pictures, found, strict=True):
            height, width = picture.shape[:2]
            boxes = boxes_from_letterbox(one["boxes"], letterbox(height, width, size), height, width)
            names = [loaded.class_names[label] for label in one["labels"].tolist()]
            rows = zip(names, one["scores"].tolist(), boxes.tolist(), strict=True)
            yield {"detections": [{"class": name, "score": score, "box": box} for name, score, box in rows]}

    def _classify(self, pictures: Sequence[np.ndarray]) -> Iterator[dict[str, Any]]:
        images = np.stack([to_32(picture) for picture in pictures])
        logits = self.predict(torch.from_numpy(images).permute(0, 3, 1, 2))
        for probabilities in logits.float().softmax(-1).cpu():
            best = probabilities.topk(min(TOP_CLASSES, len(probabilities)))
            rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            yield {"classes": [{"class": self.loaded.class_names[k], "probability": p} for k, p in rows]}


def predict_files(
    predictor: Predictor, paths: Sequence[Path], folder: Path, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Answer for picture files and, of a detector, write each with its boxes to `pictures/`.

    A file that cannot be read costs a line, not the others.

    Returns:
        The answers, each with the path as `image`; fewer than `paths` if some could not be read.
    """
    answers: list[dict[str, Any]] = []
    outputs = dict(zip(paths, _picture_names(paths), strict=True))
    for start in range(0, len(paths), BATCH):
        read = {path: _read(path, say) for path in paths[start : start + BATCH]}
        pictures = {path: picture for path, picture in read.items() if picture is not None}
        found = predictor(list(pictures.values())) if pictures else []
        for (path, picture), answer in zip(pictures.items(), found, strict=True):
            answers.append({"image": str(path), **answer})
            if "detections" in answer:
                drawn = _draw(picture, answer["detections"], predictor.loaded.class_names)
                save_figures({outputs[path]: drawn}, folder / "pictures")
    return answers


def write_predictions(answers: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write `predictions.json` and, one line per detection or class, `predictions.csv`."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "predictions.json") as temporary:
        temporary.write_text(json.dumps(answers, indent=1))
    with replacing(folder / "predictions.csv") as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["image", "class", "probability"]
            if answers and "classes" in answers[0]
            else ["image", "class", "score", "xmin", "ymin", "xmax", "ymax"]
        )
        for answer in answers:
            for row in answer.get("classes", ()):
                writer.writerow([answer["image"], row["class"], f"{row['probability']:.6f}"])
            for row in answer.get("detections", ()):
                edges = [f"{edge:.2f}" for edge in row["box"]]
                writer.writerow([answer["image"], row["class"], f"{row['score']:.6f}", *edges])


def _read(path: Path, say: Callable[[str], None]) -> np.ndarray | None:
    try:
        return read_rgb(path)
    except UserError as error:
        say(f"error: {error}")
        return None


def _picture_names(paths: Sequence[Path]) -> list[str]:
    """Return the files' names without suffix, numbered where several are the same."""
    seen: Counter[str] = Counter()
    names = []
    for path in paths:
        seen[path.stem] += 1
        names.append(path.stem if seen[path.stem] == 1 else f"{path.stem}-{seen[path.stem]}")
    return names


def _draw(picture: np.ndarray, rows: Sequence[dict[str, Any]], class_names: Sequence[str]) -> np.ndarray:
    boxes = np.array([row["box"] for row in rows]).reshape(-1, 4)
    labels = [class_names.index(row["class"]) for row in rows]
    return draw_boxes(picture, boxes, labels, class_names, [row["score"] for row in rows])
