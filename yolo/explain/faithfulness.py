"""How far a heat map can be trusted, measured instead of judged by eye.

Pointing game: Zhang et al. 2016 (https://arxiv.org/abs/1608.00507). Energy inside the box: Wang et
al. 2020 (https://arxiv.org/abs/1910.01279). Deletion and insertion: Petsiuk et al. 2018
(https://arxiv.org/abs/1806.07421), for detections with the similarity of D-RISE
(https://arxiv.org/abs/2006.03204). Re-initialised weights: Adebayo et al. 2018
(https://arxiv.org/abs/1810.03292).
"""

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from scipy.integrate import trapezoid
from scipy.stats import spearmanr
from torch import Tensor, nn
from torchvision.ops import box_iou

from yolo.data.classifier_images import ImageDataset, to_32
from yolo.data.dataset import Annotation, DetectionDataset
from yolo.data.images import letterboxed
from yolo.explain.cam import (
    CamSettings,
    Cell,
    Module,
    Trace,
    cell_of,
    explain_cells,
    explain_classification,
    trace_picture,
)
from yolo.models.resnet import ResNet
from yolo.models.yolov3 import STRIDES, YoloV3, decode, to_detections
from yolo.runs.checkpoint import LoadedWeights

SHARES = np.linspace(0, 1, 11) ** 2  # of the pixels; fine at the start, where the objects are
RANDOM = "random"
CORRECT_IOU = 0.5
BOXES_PER_IMAGE = 3
UNCHANGED = 0.9  # rank correlation from which a map counts as blind to the weights
BLUR = 0.06  # standard deviation, share of the longer side


@dataclass(frozen=True)
class DetectedObject:
    """A correct detection, whose maps are measured."""

    image: np.ndarray  # [H, W, 3] uint8 RGB
    box: np.ndarray  # [4] xyxy pixels of the true object
    trace: Trace
    reset_trace: Trace  # the same image, seen by re-initialised heads
    anchors: Tensor
    found_box: Tensor  # [4] pixels of the network input
    cell: Cell
    label: int
    settings: CamSettings

    @property
    def cells(self) -> tuple[int, int]:
        """Rows and columns of its scale over the image."""
        stride = STRIDES[self.cell.scale]
        return max(1, self.trace.place.height // stride), max(1, self.trace.place.width // stride)

    def heat(self, method: str, *, reset: bool = False) -> np.ndarray:
        """Return its map [H, W]; with `reset` that of the model with re-initialised heads."""
        trace = self.reset_trace if reset else self.trace
        settings = dataclasses.replace(self.settings, method=method)
        return explain_cells(trace, [self.cell], [self.label], settings)[0].heat

    @torch.no_grad()
    def scores(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return what is left of it in changed images: the best score x overlap."""
        canvases = torch.stack(
            [letterboxed(image, self.trace.place.size).image for image in images]
        )
        outputs = self.trace.model(canvases.to(self.anchors.device))
        boxes, objectness, class_probs = decode(outputs, self.anchors)
        overlap = box_iou(self.found_box[None], boxes.flatten(0, 1)).view(objectness.shape)
        return (overlap * objectness * class_probs[..., self.label]).amax(1).cpu().numpy()


@dataclass(frozen=True)
class ClassifiedImage:
    """A correct classification, whose maps are measured."""

    image: np.ndarray  # [H, W, 3] uint8 RGB
    model: ResNet
    reset_model: ResNet
    label: int
    settings: CamSettings
    box: None = None

    @property
    def cells(self) -> tuple[int, int]:
        """Rows and columns of the last map."""
        return 4, 4

    def heat(self, method: str, *, reset: bool = False) -> np.ndarray:
        """Return its map [H, W]; with `reset` that of the model with a new last layer."""
        model = self.reset_model if reset else self.model
        settings = dataclasses.replace(self.settings, method=method)
        return explain_classification(model, self.image, self.label, settings).heat

    @torch.no_grad()
    def scores(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return the probability of the class in changed images."""
        pixels = torch.from_numpy(np.stack([to_32(image) for image in images])).permute(0, 3, 1, 2)
        logits = self.model(pixels.to(next(self.model.parameters()).device))
        return logits.softmax(1)[:, self.label].cpu().numpy()


Subject = DetectedObject | ClassifiedImage


def draw_images(total: int, count: int, seed: int) -> list[int]:
    """Return `count` different positions in a data set (all, if it has no more), sorted."""
    return sorted(np.random.default_rng(seed).permutation(total)[:count].tolist())


def measure(
    subjects: Iterable[Subject], methods: Sequence[str], seed: int = 0
) -> tuple[int, dict[str, dict[str, Any]]]:
    """Measure the maps of each method, and random ones, on the same predictions.

    Returns:
        The number of subjects, and per method as means over them:
        `deletion`: area under the score, relative to the untouched image's, while the hottest
            pixels are painted over (low is good); `deletion_curve` over `SHARES`.
        `insertion`: the same while they are put into a blurred image (high is good);
            `insertion_curve`.
        `pointing`: share of maps that peak inside the true box.
        `energy`: share of the heat inside it; `area`: the box's share of the image, what a flat map
            reaches.
        `zero`: share of empty maps.
        `similarity_after_reset`: `similarity` to the map of the re-initialised head; `blind` flags
            a method whose map hardly changes.
    """
    rng = np.random.default_rng(seed)
    records: dict[str, list[dict[str, Any]]] = {method: [] for method in (*methods, RANDOM)}
    for subject in subjects:
        for method in methods:
            heat = subject.heat(method)
            unchanged = similarity(heat, subject.heat(method, reset=True))
            records[method].append(
                {**measure_map(subject, heat, rng), "similarity_after_reset": unchanged}
            )
        noise = rng.random(subject.cells, dtype=np.float32)  # as coarse as the maps
        records[RANDOM].append(
            measure_map(subject, cv2.resize(noise, subject.image.shape[1::-1]), rng)
        )
    return len(records[RANDOM]), {method: _mean(of_method) for method, of_method in records.items()}


def measure_map(subject: Subject, heat: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    """Return the measures of a single map; see `measure`."""
    image = subject.image
    grey = np.broadcast_to(image.mean((0, 1)), image.shape).astype(np.uint8)
    blurred = cv2.GaussianBlur(image, (0, 0), BLUR * max(image.shape[:2]))
    whole = max(float(subject.scores([image])[0]), 1e-9)
    deletion = subject.scores(perturbed(image, grey, heat, rng)) / whole
    insertion = subject.scores(perturbed(blurred, image, heat, rng)) / whole
    measures = {
        "deletion": float(trapezoid(deletion, SHARES)),
        "insertion": float(trapezoid(insertion, SHARES)),
        "deletion_curve": deletion,
        "insertion_curve": insertion,
        "zero": float(not heat.any()),
    }
    if subject.box is not None:
        measures["pointing"] = float(peaks_inside(heat, subject.box))
        measures["energy"] = energy_inside(heat, subject.box)
        measures["area"] = energy_inside(np.ones_like(heat), subject.box)
    return measures


def peaks_inside(heat: np.ndarray, box: np.ndarray) -> bool:
    """Return whether the hottest pixel of [H, W] lies in the box; an empty map points nowhere."""
    row, column = np.unravel_index(heat.argmax(), heat.shape)
    inside = box[0] <= column + 0.5 <= box[2] and box[1] <= row + 0.5 <= box[3]
    return bool(inside and heat.max() > 0)


def energy_inside(heat: np.ndarray, box: np.ndarray) -> float:
    """Return the share of the heat [H, W] that lies in the box; 0 for an empty map."""
    left, top, right, bottom = box.round().astype(int)
    return float(heat[top:bottom, left:right].sum() / max(heat.sum(), 1e-9))


def perturbed(
    image: np.ndarray, background: np.ndarray, heat: np.ndarray, rng: np.random.Generator
) -> list[np.ndarray]:
    """Return copies of `image`, the hottest `SHARES` of pixels from `background`."""
    order = np.lexsort((rng.random(heat.size), -heat.ravel()))
    rank = np.empty(heat.size)
    rank[order] = np.arange(heat.size) / heat.size
    rank = rank.reshape(*heat.shape, 1)
    return [np.where(rank < share, background, image) for share in SHARES]


def similarity(heat: np.ndarray, other: np.ndarray) -> float:
    """Return the rank correlation of two maps where either is lit; 0 if one is flat there.

    Dark pixels are left out: two maps confined to the same few cells agree on all others, whatever
    they show.
    """
    lit = (heat > 0) | (other > 0)
    heat, other = heat[lit], other[lit]
    if not lit.any() or np.ptp(heat) == 0 or np.ptp(other) == 0:
        return 0.0
    return float(spearmanr(heat, other).statistic)


def detected_objects(
    loaded: LoadedWeights,
    dataset: DetectionDataset,
    images: Iterable[int],
    settings: CamSettings,
    score_threshold: float,
) -> Iterator[DetectedObject]:
    """Yield the most confident correct detections of each image, three at most.

    A detection is correct if it overlaps an object of its class by half; its true box is the best.
    """
    assert loaded.anchors is not None and isinstance(loaded.model, YoloV3)
    reset = _with_new_layers(loaded.model, "heads")
    anchors = loaded.anchors.to(next(loaded.model.parameters()).device)
    for index in images:
        image, annotation = dataset.image(index), dataset.annotation(index)
        trace = trace_picture(loaded, image)
        reset_trace = dataclasses.replace(trace, model=reset)
        [found] = to_detections(
            trace.outputs,
            anchors,
            loaded.config,
            [(trace.height, trace.width)],
            score_threshold=score_threshold,
        )
        correct = _correct(found["boxes"].cpu(), found["labels"].cpu(), annotation)
        for k, true_box in correct[:BOXES_PER_IMAGE]:
            cell, label = cell_of(int(found["index"][k]), trace.outputs), int(found["labels"][k])
            box = found["input_boxes"][k]
            yield DetectedObject(
                image, true_box, trace, reset_trace, anchors, box, cell, label, settings
            )


def classified_images(
    model: ResNet, dataset: ImageDataset, images: Iterable[int], settings: CamSettings
) -> Iterator[ClassifiedImage]:
    """Yield the images whose likeliest class is the right one."""
    reset = _with_new_layers(model, "classifier")
    for index in images:
        subject = ClassifiedImage(
            dataset.image(index), model, reset, int(dataset.labels[index]), settings
        )
        if subject.scores([subject.image])[0] > 0.5:
            yield subject


def _correct(boxes: Tensor, labels: Tensor, annotation: Annotation) -> list[tuple[int, np.ndarray]]:
    """Return the correct detections' positions, most confident first, each with its true box."""
    true = annotation.boxes
    if not len(true):
        return []
    overlap = box_iou(boxes, torch.from_numpy(true))
    overlap[labels[:, None] != torch.from_numpy(annotation.labels)[None]] = 0
    return [
        (k, true[int(row.argmax())]) for k, row in enumerate(overlap) if row.max() >= CORRECT_IOU
    ]


def _with_new_layers(model: Module, name: str) -> Module:
    """Return a copy of the model, one child of it drawn anew."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in model.get_submodule(name).modules():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
                module.reset_parameters()
    return model


def _mean(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    means = {
        name: np.mean([record[name] for record in records], axis=0).tolist()
        for name in (records[0] if records else ())
    }
    if "similarity_after_reset" in means:
        means["blind"] = means["similarity_after_reset"] > UNCHANGED
    return means
