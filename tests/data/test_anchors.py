"""Anchors clustered from boxes: planted clusters are found, and the mosaic's scaling counts."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from yolo.config import Config, anchor_sizes
from yolo.data.anchors import (
    anchors_gained,
    box_shapes,
    cluster_anchors,
    describe_anchors,
    kmeans,
    training_boxes,
)
from yolo.data.voc import read_voc
from yolo.errors import UserError


def test_planted_clusters_are_found_and_sorted_by_area():
    centres = torch.tensor([[10.0, 20.0], [40.0, 30.0], [100.0, 200.0]])
    noise = torch.empty(300, 3, 2).uniform_(0.9, 1.1, generator=torch.Generator().manual_seed(0))
    found = kmeans((centres * noise).reshape(-1, 2), 3)
    torch.testing.assert_close(found, centres, rtol=0.03, atol=0)


def test_anchors_fit_their_own_data_better_than_the_usual_ones(tiny_digits: Path):
    cfg = Config(dataset="digits", data_root=str(tiny_digits))
    dataset = read_voc(tiny_digits, "train", None)
    found = cluster_anchors(dataset, cfg)
    assert found == cluster_anchors(dataset, cfg)
    assert anchor_sizes(",".join(map(str, found))) == found
    shapes = box_shapes(training_boxes(dataset, cfg))

    def mean_overlap(anchors: tuple[float, ...]) -> float:
        return float(describe_anchors(shapes, anchors).rsplit(" ", 1)[-1])

    assert mean_overlap(found) > mean_overlap(anchor_sizes("coco") or ()) + 0.05


def test_the_boxes_are_those_that_training_shows(tiny_digits: Path):
    dataset = read_voc(tiny_digits, "train", None)
    cfg = Config(mosaic_prob=0.0)
    whole = box_shapes(training_boxes(dataset, cfg))
    in_mosaics = box_shapes(training_boxes(dataset, replace(cfg, mosaic_prob=1.0)))
    assert len(whole) == sum(len(annotation.labels) for annotation in dataset.annotations)
    assert in_mosaics.log().mean() < whole.log().mean() - 0.05


def test_too_few_boxes_are_refused(tiny_digits: Path):
    dataset = read_voc(tiny_digits, "train", None)
    dataset.image_ids, dataset.annotations = dataset.image_ids[:1], dataset.annotations[:1]
    with pytest.raises(UserError, match="--anchors coco"):
        cluster_anchors(dataset, Config(mosaic_prob=0.0))


def test_with_too_few_boxes_only_the_usual_anchors_are_described(tiny_digits: Path):
    dataset = read_voc(tiny_digits, "train", None)
    dataset.image_ids, dataset.annotations = dataset.image_ids[:1], dataset.annotations[:1]
    (line,) = anchors_gained(dataset, Config(mosaic_prob=0.0))
    assert line.startswith("--anchors coco: best possible recall")
