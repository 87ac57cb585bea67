"""Samples of the test data in a small folder: pictures, annotations, misclassified images.

The app always shows such a folder: a Space brings one along, elsewhere it is made at the start.
"""

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree.ElementTree import ParseError

import cv2
import numpy as np
import torch
from defusedxml import DefusedXmlException
from defusedxml.ElementTree import parse
from PIL import Image
from tqdm import tqdm

from yolo.app.detector import DetectionExplainer, Thresholds
from yolo.app.uploads import read_picture
from yolo.config import Config
from yolo.data.classifier_images import ImageDataset
from yolo.data.classifier_images import open_dataset as open_images
from yolo.data.dataset import Annotation, DetectionDataset
from yolo.data.digits import write_digits
from yolo.data.sources import open_dataset
from yolo.data.voc import read_voc
from yolo.files import free_path, write_json
from yolo.metrics.classification import ClassificationMetrics
from yolo.metrics.report import SHOWN_SCORE
from yolo.runs.checkpoint import LoadedWeights

INDEX_FILE = "index.json"
THUMBNAIL_SIDE = 160
MAX_MISCLASSIFIED = 24
BATCH_SIZE = 256


@dataclass(frozen=True)
class Sample:
    """One picture of the test data."""

    file: str  # inside the folder
    thumbnail: str
    name: str
    boxes: list[list[float]]  # [M][4] xyxy, 0-based pixels, right and bottom exclusive
    labels: list[int]  # [M]; of a classifier's sample one
    difficult: list[bool]
    height: int
    width: int
    credit: str = ""  # who made it, where the data set says so

    @property
    def annotation(self) -> Annotation:
        """The objects on it."""
        return Annotation(
            np.array(self.boxes, np.float32).reshape(-1, 4),
            np.array(self.labels, np.int64),
            np.array(self.difficult, bool),
            self.height,
            self.width,
        )


@dataclass(frozen=True)
class Misclassified:
    """A test image that the classifier got wrong."""

    file: str
    label: int
    predicted: int
    confidence: float


@dataclass(frozen=True)
class SampleSet:
    """What lies in a folder of samples."""

    folder: Path
    class_names: tuple[str, ...]
    data: str  # the name of the data set
    tested: int  # images that were searched for misclassified ones
    samples: tuple[Sample, ...] = ()
    misclassified: tuple[Misclassified, ...] = ()
    choice: str = "from the test split, drawn at random"  # what they are
    missed: int | None = None  # a sample on which the detector misses something
    ranked: bool = False  # the best comes first, and `missed` is known


def read_samples(folder: Path) -> SampleSet | None:
    """Read a folder that `write_samples` wrote; None if there is none."""
    index = folder / INDEX_FILE
    if not index.exists():
        return None
    content = json.loads(index.read_text())
    content |= {
        "class_names": tuple(content["class_names"]),
        "samples": tuple(Sample(**values) for values in content["samples"]),
        "misclassified": tuple(Misclassified(**values) for values in content["misclassified"]),
    }
    return SampleSet(folder=folder, **content)


def write_samples(folder: Path, loaded: LoadedWeights, config: Config, count: int) -> SampleSet:
    """Draw `count` pictures from the test data into the new folder `folder`, always the same.

    A detector's are ranked, see `rank_samples`.

    Raises:
        UserError: if the test data that `config` names cannot be opened.
    """
    folder.mkdir(parents=True)
    name = f"{config.dataset} {config.split}"  # without its folder: it may stand in public
    if config.task == "classification":
        images = open_images(config, config.split, loaded.class_names)
        samples = [_write_image(folder, images, i) for i in _draw(len(images), count)]
        wrong = tuple(
            _write_misclassified(folder, images, *one) for one in find_misclassified(loaded, images)
        )
        content = SampleSet(folder, loaded.class_names, name, len(images), tuple(samples), wrong)
    else:
        with TemporaryDirectory() as scratch:
            scenes = _open_scenes(Path(scratch), config, loaded.class_names, count)
            samples = [_write_scene(folder, scenes, i) for i in _draw(len(scenes), count)]
        if config.dataset == "digits":
            name = "handwritten digits on photographs"
        content = SampleSet(folder, loaded.class_names, name, 0, tuple(samples))
    return rank_samples(content, loaded)


def rank_samples(samples: SampleSet, loaded: LoadedWeights) -> SampleSet:
    """Put the sample first on which a detector does best, choose one that shows a miss; store it.

    The best: everything found and nothing else, with the highest confidence. The miss: the largest
    object, as a share of its picture, that was not found.
    """
    if loaded.task == "detection" and samples.samples:
        explainer = DetectionExplainer(loaded)
        grades = [_grade(explainer, samples.folder, sample) for sample in samples.samples]
        best = max(range(len(grades)), key=lambda k: grades[k][0])
        order = [best, *(k for k in range(len(grades)) if k != best)]
        worst = max(range(len(order)), key=lambda place: grades[order[place]][1])
        samples = replace(
            samples,
            samples=tuple(samples.samples[k] for k in order),
            missed=worst if grades[order[worst]][1] > 0 else None,
        )
    samples = replace(samples, ranked=True)
    record = {key: value for key, value in asdict(samples).items() if key != "folder"}
    write_json(samples.folder / INDEX_FILE, record)
    return samples


def _grade(
    explainer: DetectionExplainer, folder: Path, sample: Sample
) -> tuple[tuple[float, float], float]:
    """Return how good a detector is on a sample (F1, mean score), and the share that it misses."""
    view = explainer.trace(read_picture(folder / sample.file), sample.annotation)
    things = explainer.detections(view, Thresholds(SHOWN_SCORE, explainer.default_iou))
    scores = [one.score for one in things if one.score is not None]
    missed = [one.area for one in things if one.kind == "missed"]
    wanted = sample.difficult.count(False)
    f1 = 2 * (wanted - len(missed)) / max(1, len(scores) + wanted)
    height, width = view.picture.pixels.shape[:2]
    return (f1, float(np.mean(scores or [0.0]))), max(missed, default=0.0) / (height * width)


def find_misclassified(loaded: LoadedWeights, images: ImageDataset) -> list[tuple[int, int, float]]:
    """Return (index, predicted class, confidence) of misclassified images, most confident first."""
    metrics = ClassificationMetrics(images.class_names)
    starts = range(0, len(images), BATCH_SIZE)
    with torch.inference_mode():
        for start in tqdm(starts, "looking for misclassified images", leave=False, disable=None):
            rows = slice(start, start + BATCH_SIZE)
            batch = torch.from_numpy(images.images[rows]).permute(0, 3, 1, 2)
            metrics.update(loaded.model(batch), torch.from_numpy(images.labels[rows]))
    state = metrics.state()
    worst = metrics.worst_mistakes(MAX_MISCLASSIFIED)
    return [(int(i), int(state["predicted"][i]), float(state["confidence"][i])) for i in worst]


def _draw(total: int, count: int) -> list[int]:
    """Return `count` places out of `total`, drawn by chance but always the same."""
    return sorted(random.Random(0).sample(range(total), min(count, total)))


def _open_scenes(
    scratch: Path, config: Config, class_names: Sequence[str], count: int
) -> DetectionDataset:
    """Open the test split; of the embedded digits make only its first scenes."""
    if config.dataset != "digits":
        return open_dataset(config, config.split, class_names)
    write_digits(scratch / "digits", num_scenes={"test": max(count, 1)})
    return read_voc(scratch / "digits", "test", class_names)


def _write_scene(folder: Path, scenes: DetectionDataset, index: int) -> Sample:
    annotation, path = scenes.annotation(index), scenes.paths[index]
    target = free_path(folder / path.name, lambda _: None)  # two folders may hold the same name
    _write_picture(path, scenes.image(index), target)
    return Sample(
        file=target.name,
        thumbnail=_write_thumbnail(folder, target.name, scenes.image(index)),
        name=scenes.image_ids[index],
        boxes=annotation.boxes.tolist(),
        labels=annotation.labels.tolist(),
        difficult=annotation.difficult.tolist(),
        height=annotation.height,
        width=annotation.width,
        credit=_photographer(path),
    )


def _write_picture(path: Path, pixels: np.ndarray, target: Path) -> None:
    """Copy a picture; one with EXIF is written anew, as its boxes lie, without place and camera."""
    with Image.open(path) as picture:
        if not picture.getexif():
            shutil.copyfile(path, target)
        else:
            Image.fromarray(pixels).save(target, quality=95)


def _write_image(folder: Path, images: ImageDataset, index: int) -> Sample:
    name = f"{index:05d}"
    Image.fromarray(images.image(index)).save(folder / f"{name}.png")
    height, width = images.image(index).shape[:2]
    thumbnail = _write_thumbnail(folder, name, images.image(index))
    return Sample(
        f"{name}.png",
        thumbnail,
        images.image_ids[index],
        [],
        [int(images.labels[index])],
        [],
        height,
        width,
    )


def _write_misclassified(
    folder: Path, images: ImageDataset, index: int, predicted: int, confidence: float
) -> Misclassified:
    file = f"misclassified-{index:05d}.png"
    Image.fromarray(images.image(index)).save(folder / file)
    return Misclassified(file, int(images.labels[index]), predicted, round(confidence, 4))


def _write_thumbnail(folder: Path, name: str, image: np.ndarray) -> str:
    """Write the middle square of a picture, small."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[top : top + side, left : left + side]
    mode = cv2.INTER_AREA if side > THUMBNAIL_SIDE else cv2.INTER_CUBIC
    path = folder / "thumbnails" / f"{name}.jpg"
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(cv2.resize(square, (THUMBNAIL_SIDE, THUMBNAIL_SIDE), interpolation=mode)).save(
        path
    )
    return path.relative_to(folder).as_posix()


def _photographer(path: Path) -> str:
    """Return whom a VOC annotation names as the owner of its Flickr photograph, if anybody."""
    xml = path.parent.parent / "Annotations" / f"{path.stem}.xml"
    try:
        root = parse(xml).getroot()
    except (OSError, ParseError, DefusedXmlException):
        return ""
    owner = root.findtext("owner/name") or root.findtext("owner/flickrid") or ""
    photo = root.findtext("source/flickrid") or ""
    return f"{owner} (Flickr photo {photo})" if owner and photo else owner
