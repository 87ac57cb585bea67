"""The picture of what a classifier got wrong."""

import numpy as np
import pytest
import torch

from yolo.config import DataConfig
from yolo.data.classifier_images import open_datasets
from yolo.explain import misclassified
from yolo.explain.misclassified import GAP, TILE, misclassified_grid
from yolo.metrics.classification import ClassificationMetrics
from yolo.models.resnet import ResNet


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> list[tuple[np.ndarray, str]]:
    """What is handed to the grid."""
    handed: list[tuple[np.ndarray, str]] = []
    draw = misclassified.picture_grid
    monkeypatch.setattr(
        misclassified,
        "picture_grid",
        lambda tiles, title: handed.extend(tiles) or draw(tiles, title),
    )
    return handed


def test_each_error_stands_beside_two_maps_the_surest_first(
    tiles: list[tuple[np.ndarray, str]],
) -> None:
    _, test = open_datasets(DataConfig(task="classification", dataset="digits"))
    metrics = ClassificationMetrics(test.class_names)
    logits = torch.nn.functional.one_hot(torch.from_numpy(test.labels), 10) * 9.0
    for index, wrong, sureness in ((7, 3, 2.0), (2, 0, 5.0)):
        assert test.labels[index] != wrong
        logits[index] = 0
        logits[index, wrong] = sureness
    metrics.update(logits, torch.from_numpy(test.labels))
    torch.manual_seed(0)
    grid = misclassified_grid(ResNet(10, width=0.125).eval(), test, metrics)
    assert grid is not None and grid.dtype == np.uint8 and grid.ndim == 3
    captions = [caption for _, caption in tiles]
    assert [caption.split("\n")[1] for caption in captions] == [
        test.image_ids[2],
        test.image_ids[7],
    ]
    assert captions[0].startswith(f"predicted 0 (94%), is {test.labels[2]}")
    assert tiles[0][0].shape == (TILE, 3 * TILE + 2 * GAP, 3)
    assert (tiles[0][0][2::4, 2:TILE:4] == test.image(2)).all()


def test_without_errors_there_is_no_picture() -> None:
    _, test = open_datasets(DataConfig(task="classification", dataset="digits"))
    metrics = ClassificationMetrics(test.class_names)
    labels = torch.from_numpy(test.labels)
    metrics.update(torch.nn.functional.one_hot(labels, 10) * 9.0, labels)
    assert misclassified_grid(ResNet(10, width=0.125).eval(), test, metrics) is None
