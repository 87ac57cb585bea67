"""The detector on pictures of any size, and what `evaluate.py --images` writes about them.

from yolo import Detector
detections = Detector.load().detect("photo.jpg")
"""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from yolo.data.classifier_images import to_32
from yolo.data.dataset import read_rgb
from yolo.data.images import letterboxed
from yolo.errors import UsageError, UserError
from yolo.files import replacing, write_json
from yolo.inference.fast import prepare
from yolo.models.yolov3 import to_detections
from yolo.runs.checkpoint import LoadedWeights, load_weights, resolve_checkpoint
from yolo.viz.draw import draw_boxes
from yolo.viz.figures import save_figures

BATCH = 8
TOP_CLASSES = 5

Picture = str | Path | np.ndarray  # a file, or pixels [H, W, 3] uint8 RGB
Predict = Callable[[Tensor], Any]  # images uint8 [B, 3, S, S] -> the network's raw output


@dataclass(frozen=True, eq=False)
class Detections:
    """What was found in one picture, the most confident first."""

    boxes: np.ndarray  # [N, 4] float32 xyxy, pixels of the original picture
    scores: np.ndarray  # [N] float32
    labels: np.ndarray  # [N] int64
    names: tuple[str, ...]  # [N] the classes of `labels`
    height: int  # of the picture
    width: int
    index: np.ndarray  # [N] int64, places among all predictions: what explanations need

    def __len__(self) -> int:
        return len(self.scores)

    def record(self) -> dict[str, Any]:
        """Return plain types: `height`, `width`, and `detections`: `class`, `score` and `box`."""
        rows = zip(self.names, self.scores.tolist(), self.boxes.tolist(), strict=True)
        detections = [{"class": name, "score": score, "box": box} for name, score, box in rows]
        return {"height": self.height, "width": self.width, "detections": detections}

    def to_supervision(self) -> Any:
        """Return them as `supervision.Detections`, with `class_name` among its data.

        Raises:
            UserError: if that package is not installed.
        """
        try:
            import supervision
        except ImportError:
            raise UserError("to_supervision() needs: pip install supervision") from None
        return supervision.Detections(
            xyxy=self.boxes,
            confidence=self.scores,
            class_id=self.labels,
            data={"class_name": np.array(self.names, dtype=str)},
        )


class Detector:
    """A trained detector: pictures in, detections out."""

    def __init__(self, loaded: LoadedWeights, predict: Predict | None = None) -> None:
        """Use a loaded network where it is, or `predict` in its place.

        Raises:
            UsageError: if it is a classifier.
        """
        if loaded.anchors is None:
            raise UsageError(f"{loaded.path}: is a classifier; want a detector")
        self.loaded = loaded
        self.anchors = loaded.anchors
        self.predict = predict or self._predict

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        *,
        device: str | torch.device = "auto",
        fast: bool = False,
        compiled: bool = False,
    ) -> "Detector":
        """Load a detector.

        Args:
            path: a weight file, a checkpoint or a run folder; by default the bundled weights.
            device: as torch names it; `auto` is the GPU where there is one.
            fast: see `yolo.inference.fast.prepare`.
            compiled: likewise.

        Raises:
            UserError: if the file cannot be read, or is no detector.
        """
        loaded = load_weights(resolve_checkpoint(path))
        detector = cls(loaded)
        name = "cuda" if torch.cuda.is_available() else "cpu"
        where = torch.device(name if device == "auto" else device)
        loaded.model = prepare(loaded.model, where, fast=fast, compiled=compiled)
        return detector

    @overload
    def detect(  # type: ignore[overload-overlap]  # a `str` is a sequence of `str`
        self,
        images: Picture,
        score_threshold: float | None = ...,
        iou_threshold: float | None = ...,
    ) -> Detections: ...

    @overload
    def detect(
        self,
        images: Sequence[Picture],
        score_threshold: float | None = ...,
        iou_threshold: float | None = ...,
    ) -> list[Detections]: ...

    def detect(
        self,
        images: Picture | Sequence[Picture],
        score_threshold: float | None = None,
        iou_threshold: float | None = None,
    ) -> Detections | list[Detections]:
        """Detect on one picture, or on several in batches.

        Args:
            images: paths, or pixels [H, W, 3] uint8 RGB of any size; one, or a list of either.
            score_threshold: lowest score, in [0, 1]; by default the one at the model's best F1
                where the weights carry it, else 0.3.
            iou_threshold: overlap above which non-maximum suppression drops the weaker box of a
                class; by default that of the training's configuration.

        Returns:
            The detections of one picture, or a list with those of each.

        Raises:
            UserError: for a file that cannot be read, or an array that is no picture.
        """
        if isinstance(images, str | Path | np.ndarray):
            return self.detect([images], score_threshold, iou_threshold)[0]
        lowest = self.loaded.confidence if score_threshold is None else score_threshold
        found: list[Detections] = []
        for start in range(0, len(images), BATCH):
            batch = [
                letterboxed(image, self.loaded.test_size) for image in images[start : start + BATCH]
            ]
            outputs = self.predict(torch.stack([one.image for one in batch]))
            sizes = [(one.height, one.width) for one in batch]
            found += self.read_outputs(outputs, sizes, lowest, iou_threshold)
        return found

    def read_outputs(
        self,
        outputs: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        score_threshold: float,
        iou_threshold: float | None = None,
        max_detections: int | None = None,
    ) -> list[Detections]:
        """Return the detections in raw outputs for pictures of these (height, width)."""
        found = to_detections(
            outputs,
            self.anchors,
            self.loaded.config,
            sizes,
            score_threshold=score_threshold,
            iou_threshold=iou_threshold,
            max_detections=max_detections,
        )
        results = []
        for tensors, (height, width) in zip(found, sizes, strict=True):
            arrays = {
                key: tensors[key].cpu().numpy() for key in ("boxes", "scores", "labels", "index")
            }
            names = tuple(self.loaded.class_names[label] for label in arrays["labels"])
            results.append(Detections(**arrays, names=names, height=height, width=width))
        return results

    @torch.inference_mode()
    def _predict(self, images: Tensor) -> Any:
        model = self.loaded.model
        return model(images.to(next(model.parameters()).device))


def classify(
    loaded: LoadedWeights, predict: Predict, pictures: Sequence[np.ndarray]
) -> list[list[tuple[str, float]]]:
    """Return the likeliest classes of pictures [H, W, 3] of any size, each with its probability."""
    images = np.stack([to_32(picture) for picture in pictures])
    logits = predict(torch.from_numpy(images).permute(0, 3, 1, 2))
    best = logits.float().softmax(-1).cpu().topk(min(TOP_CLASSES, logits.shape[-1]))
    return [
        [(loaded.class_names[label], probability) for label, probability in zip(*rows, strict=True)]
        for rows in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def predict_files(
    loaded: LoadedWeights,
    predict: Predict,
    paths: Sequence[Path],
    folder: Path,
    log: Callable[[str], None],
    score_threshold: float,
) -> list[dict[str, Any]]:
    """Detect on or classify picture files; write each with its boxes to `pictures/`.

    A file that cannot be read costs a line, not the others.

    Returns:
        For each picture that could be read its path as `image`, `height`, `width`, and `detections`
        (each `class`, `score` and `box`, xyxy pixels) or `classes` (each `class` and
        `probability`).
    """
    answers: list[dict[str, Any]] = []
    names = dict(zip(paths, picture_names(paths), strict=True))
    for path, name in names.items():
        if name != path.stem:
            log(f"note: {path}: another picture has this name: written as {name}")
    starts = range(0, len(paths), BATCH)
    for start in tqdm(starts, "predict", unit="batch", leave=False, disable=None):
        pictures = _read_pictures(paths[start : start + BATCH], log)
        if not pictures:
            continue
        if loaded.anchors is None:
            likeliest = classify(loaded, predict, list(pictures.values()))
            keys = ("class", "probability")
            rows = [
                {"classes": [dict(zip(keys, row, strict=True)) for row in one]} for one in likeliest
            ]
        else:
            # from the files, as a test decodes them: large JPEGs at a reduced size
            detections = Detector(loaded, predict).detect(list(pictures), score_threshold)
            rows = [found.record() for found in detections]
            for (path, picture), found in zip(pictures.items(), detections, strict=True):
                drawn = draw_boxes(
                    picture,
                    found.boxes,
                    found.labels.tolist(),
                    loaded.class_names,
                    found.scores.tolist(),
                )
                save_figures({names[path]: drawn}, folder / "pictures")
        for (path, picture), row in zip(pictures.items(), rows, strict=True):
            height, width = picture.shape[:2]
            answers.append({"image": str(path), "height": height, "width": width, **row})
    return answers


def write_predictions(answers: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write `predictions.json` and, one line per detection or class, `predictions.csv`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "predictions.json", answers)
    with (
        replacing(folder / "predictions.csv") as temporary,
        temporary.open("w", newline="") as file,
    ):
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


def _read_pictures(paths: Sequence[Path], log: Callable[[str], None]) -> dict[Path, np.ndarray]:
    pictures = {}
    for path in paths:
        try:
            pictures[path] = read_rgb(path)
        except UserError as error:
            log(f"error: {error}")
    return pictures


def picture_names(paths: Sequence[Path]) -> list[str]:
    """Return the files' names without suffix, numbered where one is taken already."""
    names: dict[str, None] = {}  # in their order
    for path in paths:
        numbered = (f"{path.stem}-{number}" for number in count(2))
        names[next(name for name in chain([path.stem], numbered) if name not in names)] = None
    return list(names)
