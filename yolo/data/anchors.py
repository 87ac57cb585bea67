"""Anchors for the boxes of a data set: k-means with IoU as the similarity (YOLOv2, arXiv 1612.08242).

The boxes are those of training samples as they reach the network, so that the mosaic's scaling counts.
"""

import numpy as np
import torch
from torch import Tensor

from yolo.boxes import shape_iou
from yolo.config import ANCHOR_REFERENCE_SIZE, Config
from yolo.data.collate import TrainSamples
from yolo.data.dataset import DetectionDataset
from yolo.data.mosaic import place_boxes
from yolo.data.samplers import SampleKey
from yolo.data.transforms import cut_threshold
from yolo.errors import UserError

NUM_ANCHORS = 9
MAX_SAMPLES = 2000


def cluster_anchors(dataset: DetectionDataset, cfg: Config) -> tuple[float, ...]:
    """Return nine anchors as 18 numbers `w, h, w, h, ...`, small to large, in pixels of a 416 input.

    Raises:
        UserError: if the data set has fewer than nine boxes.
    """
    shapes = training_shapes(dataset, cfg)
    if len(shapes) < NUM_ANCHORS:
        raise UserError(f"{dataset.name}: nine anchors need at least nine boxes; use --anchors coco")
    anchors = kmeans(shapes, NUM_ANCHORS)
    return tuple(round(value, 1) for value in anchors.flatten().tolist())


def training_shapes(dataset: DetectionDataset, cfg: Config, size: int = ANCHOR_REFERENCE_SIZE) -> Tensor:
    """Return width and height [N, 2] of the boxes in an epoch of `size`-pixel samples, before augmentation.

    Samples are planned and not decoded; of a large data set, `MAX_SAMPLES` are taken.
    """
    samples = TrainSamples(dataset, cfg, cfg.seed)
    min_share = cut_threshold(cfg.min_visible)
    order = np.random.default_rng(cfg.seed).permutation(len(dataset))[:MAX_SAMPLES]
    boxes = [
        place_boxes(tile, dataset.annotation(tile.index), min_share)[0]
        for index in order
        for tile in samples.plan(SampleKey(0, int(index), size))
    ]
    corners = torch.from_numpy(np.concatenate(boxes))
    return corners[:, 2:] - corners[:, :2]


def kmeans(shapes: Tensor, count: int, max_rounds: int = 300) -> Tensor:
    """Cluster shapes [N, 2] into `count` mean shapes [count, 2], sorted by area; deterministic.

    It starts from the shapes at even quantiles of the area.
    """
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


def best_overlap(shapes: Tensor, anchors: Tensor) -> Tensor:
    """Return for each shape [N, 2] the IoU [N] with its best anchor [A, 2], both centred on one point."""
    return shape_iou(shapes[:, None], anchors).amax(dim=1)
