"""The accuracies of a detector's test: on the reference's cells, without difficult objects."""

from types import SimpleNamespace

import torch

from yolo.boxes import letterbox
from yolo.config import COCO_ANCHORS, Config
from yolo.losses import assign_targets
from yolo.metrics.cell_accuracy import CellAccuracy
from yolo.models.yolov3 import STRIDES, make_anchors
from yolo.tasks.detection import DetectionSplit

SIZE = 96
ANCHORS = make_anchors(COCO_ANCHORS, SIZE)
NAMES = ("a", "b", "c")


def _batch() -> tuple[list[torch.Tensor], list[dict]]:
    generator = torch.Generator().manual_seed(0)
    outputs = [torch.randn(1, 3, SIZE // s, SIZE // s, 8, generator=generator) for s in STRIDES]
    target = {
        "boxes": torch.tensor([[5.0, 5, 60, 70], [40, 40, 90, 80], [10, 50, 30, 90]]),
        "labels": torch.tensor([0, 1, 2]),
        "difficult": torch.tensor([False, True, False]),
        "letterbox": letterbox(SIZE, SIZE, SIZE),
    }
    return outputs, [target]


def _accuracies(config: Config, factors: torch.Tensor | None = None) -> dict:
    outputs, targets = _batch()
    if factors is not None:
        for output, (a, b) in zip(outputs, factors, strict=True):
            output[..., 4] = output[..., 4] * a + b
    images = SimpleNamespace(class_names=NAMES)
    split = DetectionSplit(config, images, None, None, "", ANCHORS, factors)
    evaluation = split.metrics(full=False)
    evaluation.update(outputs, targets)
    return evaluation.compute()


def _expected(use_difficult: bool) -> dict:
    outputs, targets = _batch()
    cells = CellAccuracy(len(NAMES))
    cells.update(outputs, assign_targets(targets, ANCHORS, SIZE, use_difficult=use_difficult))
    return cells.compute()


def test_difficult_objects_are_no_targets_and_stand_beside_it() -> None:
    results = _accuracies(Config())
    for use_difficult, found in ((False, results), (True, results["with_difficult"])):
        for name in ("class_accuracy", "no_object_accuracy", "object_accuracy_at_0.5"):
            assert found[name] == _expected(use_difficult)[name]
    positives = [row["positive_cells"] for row in results["per_scale"]]
    assert positives == [2, 2, 2]
    assert results["class_accuracy_by_class"]["b"] is None


def test_the_accuracies_do_not_depend_on_how_the_run_trains() -> None:
    other = Config(assignment="paper", ignore_iou=0.9, train_difficult=False)
    assert _accuracies(other) == _accuracies(Config())


def test_the_accuracies_are_of_the_objectness_as_trained_also_when_scores_are_calibrated() -> None:
    factors = torch.tensor([[2.0, -1.0], [2.5, -2.0], [3.0, -4.0]])
    assert _accuracies(Config(), factors) == _accuracies(Config())
