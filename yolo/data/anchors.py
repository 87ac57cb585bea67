"""Anchors for the boxes of a data set: k-means by IoU, as in YOLOv2 (arXiv 1612.08242).

The boxes are those of training samples as they reach the network, so that the mosaic's scaling
counts.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from yolo.boxes import shape_iou
from yolo.config import ANCHOR_REFERENCE_SIZE, COCO_ANCHORS, Config
from yolo.data.dataset import DetectionDataset
from yolo.data.mosaic import place_boxes
from yolo.data.samplers import SampleKey
from yolo.data.samples import TrainSamples
from yolo.data.transforms import cut_threshold
from yolo.errors import UserError

NUM_ANCHORS = 9
MAX_SAMPLES = 2000
MAX_SHAPES = 8000  # enough for nine means, and clustered in a second
GOOD_OVERLAP = 0.5  # IoU with its best anchor from which a box counts as recalled


def cluster_anchors(dataset: DetectionDataset, cfg: Config) -> tuple[float, ...]:
    """Return nine anchors, `w, h, w, h, ...`, small to large, in pixels of a 416 input.

    Raises:
        UserError: if the data set has fewer than nine boxes.
    """
    anchors = clustered_anchors(box_shapes(training_boxes(dataset, cfg)))
    if anchors is None:
        raise UserError(
            f"{dataset.name}: nine anchors need at least nine boxes; use --anchors coco"
        )
    return anchors


def clustered_anchors(shapes: Tensor) -> tuple[float, ...] | None:
    """Return the anchors of boxes of shapes [N, 2]; None with fewer than nine of them."""
    if len(shapes) < NUM_ANCHORS:
        return None
    return tuple(round(value, 1) for value in kmeans(shapes, NUM_ANCHORS).flatten().tolist())


def training_boxes(
    dataset: DetectionDataset, cfg: Config, size: int = ANCHOR_REFERENCE_SIZE
) -> list[np.ndarray]:
    """Return the boxes [M, 4] of each of an epoch's `size`-pixel samples, before augmentation.

    Samples are planned and not decoded; of a large data set, `MAX_SAMPLES` are taken.
    """
    samples = TrainSamples(dataset, cfg, cfg.seed)
    min_share = cut_threshold(cfg.min_visible)
    order = np.random.default_rng(cfg.seed).permutation(len(dataset))[:MAX_SAMPLES]
    plans = [samples.plan(SampleKey(0, int(index), size)) for index in order]
    return [
        np.concatenate(
            [place_boxes(tile, dataset.annotation(tile.index), min_share)[0] for tile in tiles]
        )
        for tiles in plans
    ]


def box_shapes(boxes: list[np.ndarray]) -> Tensor:
    """Return width and height [N, 2] of the boxes of all samples."""
    corners = torch.from_numpy(np.concatenate(boxes))
    return corners[:, 2:] - corners[:, :2]


def kmeans(shapes: Tensor, count: int, max_rounds: int = 100) -> Tensor:
    """Cluster shapes [N, 2] into `count` mean shapes [count, 2], sorted by area; deterministic.

    It starts from the shapes at even quantiles of the area.
    """
    shapes = shapes[:: max(1, len(shapes) // MAX_SHAPES)]
    by_area = shapes[shapes.prod(dim=1).argsort()]
    centres = by_area[((torch.arange(count) + 0.5) / count * len(shapes)).long()]
    nearest = torch.full((len(shapes),), -1)
    for _ in range(max_rounds):
        previous, nearest = nearest, shape_iou(shapes[:, None], centres).argmax(dim=1)
        if torch.equal(previous, nearest):
            break
        members = [shapes[nearest == cluster] for cluster in range(count)]
        centres = torch.stack(
            [
                mine.log().mean(dim=0).exp() if len(mine) else old
                for mine, old in zip(members, centres, strict=True)
            ]
        )
    return centres[centres.prod(dim=1).argsort()]


def describe_anchors(shapes: Tensor, anchors: Sequence[float]) -> str:
    """Say how well anchors (`w, h, w, h, ...`) fit boxes of shapes [N, 2], in the same pixels."""
    overlap = shape_iou(shapes[:, None], torch.tensor(anchors).reshape(-1, 2)).amax(dim=1)
    recall = (overlap > GOOD_OVERLAP).float().mean()
    mean = overlap.mean()
    return f"best possible recall {recall:.1%} at IoU {GOOD_OVERLAP}, mean best IoU {mean:.3f}"


def anchors_gained(dataset: DetectionDataset, cfg: Config) -> list[str]:
    """Return two lines: how well the usual and the clustered anchors fit the training boxes."""
    shapes = box_shapes(training_boxes(dataset, cfg))
    return compare_anchors(shapes, {"coco": COCO_ANCHORS, "auto": clustered_anchors(shapes)})


def compare_anchors(shapes: Tensor, anchors: Mapping[str, Sequence[float] | None]) -> list[str]:
    """Return a line for each set of anchors: how well it fits boxes [N, 2], and its numbers."""
    return [
        f"--anchors {name}: {describe_anchors(shapes, sizes)} "
        f"({','.join(f'{size:g}' for size in sizes)})"
        for name, sizes in anchors.items()
        if sizes
    ]
