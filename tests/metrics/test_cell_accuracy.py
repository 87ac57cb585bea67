"""Cell accuracies against counting cell by cell."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from yolo.metrics.cell_accuracy import THRESHOLDS, CellAccuracy


def _batch(seed: int, batch: int = 2, num_classes: int = 4) -> tuple[list, list]:
    rng = torch.Generator().manual_seed(seed)
    outputs, assigned = [], []
    for side in (2, 4, 8):
        output = torch.randn(batch, 3, side, side, 5 + num_classes, generator=rng) * 3
        # 0 positive, 1 ignored, else empty
        kind = torch.randint(0, 10, output.shape[:4], generator=rng)
        cells = (kind == 0).nonzero()
        labels = torch.randint(0, num_classes, (len(cells),), generator=rng)
        outputs.append(output)
        assigned.append(SimpleNamespace(cells=cells, labels=labels, empty=kind > 1))
    return outputs, assigned


def _by_hand(batches: list, threshold: float) -> tuple[float, float, float]:
    right, found, silent = [], [], []
    for outputs, assigned in batches:
        for output, targets in zip(outputs, assigned, strict=True):
            for cell, label in zip(targets.cells.tolist(), targets.labels.tolist(), strict=True):
                prediction = output[tuple(cell)]
                right.append(prediction[5:].argmax().item() == label)
                found.append(prediction[4].sigmoid().item() > threshold)
            for cell in targets.empty.nonzero().tolist():
                silent.append(output[tuple(cell)][4].sigmoid().item() <= threshold)
    return float(np.mean(right)), float(np.mean(silent)), float(np.mean(found))


def test_the_three_accuracies_equal_counting_cell_by_cell() -> None:
    batches = [_batch(seed) for seed in range(3)]
    metric = CellAccuracy(num_classes=4)
    for batch in batches:
        metric.update(*batch)
    result = metric.compute()
    expected = _by_hand(batches, 0.05)
    names = ("class_accuracy", "no_object_accuracy", "object_accuracy")
    assert [result[name] for name in names] == pytest.approx(expected)
    assert result["object_accuracy_at_0.5"] == pytest.approx(_by_hand(batches, 0.5)[2])
    assert result["no_object_accuracy_at_0.5"] == pytest.approx(_by_hand(batches, 0.5)[1])
    for k in (0, 60, len(THRESHOLDS) - 1):
        _, silent, found = _by_hand(batches, float(THRESHOLDS[k]))
        assert result["threshold_sweep"]["object_accuracy"][k] == pytest.approx(found)
        assert result["threshold_sweep"]["no_object_accuracy"][k] == pytest.approx(silent)


def test_states_of_several_ranks_add_up() -> None:
    batches = [_batch(seed) for seed in range(4)]
    alone = CellAccuracy(num_classes=4)
    ranks = [CellAccuracy(num_classes=4) for _ in range(2)]
    for k, batch in enumerate(batches):
        alone.update(*batch)
        ranks[k % 2].update(*batch)
    ranks[0].merge([rank.state() for rank in ranks])
    assert ranks[0].compute() == alone.compute()


def test_the_reference_thresholds_are_in_the_sweep() -> None:
    assert {0.05, 0.5} <= set(THRESHOLDS.tolist())
    assert (np.diff(THRESHOLDS) > 0).all()


def test_an_objectness_on_the_threshold_does_not_exceed_it() -> None:
    output = torch.zeros(1, 1, 1, 1, 6)  # sigmoid(0) = 0.5
    targets = SimpleNamespace(
        cells=torch.zeros(1, 4, dtype=torch.int64),
        labels=torch.zeros(1, dtype=torch.int64),
        empty=torch.zeros(1, 1, 1, 1, dtype=torch.bool),
    )
    metric = CellAccuracy(num_classes=1, num_scales=1)
    metric.update([output], [targets])
    assert metric.compute()["object_accuracy_at_0.5"] == 0
    assert metric.compute()["object_accuracy"] == 1


def test_without_cells_an_accuracy_is_undefined_not_zero() -> None:
    result = CellAccuracy(num_classes=2).compute()
    assert result["class_accuracy"] is None
    assert result["object_accuracy"] is None
    assert result["no_object_accuracy"] is None


def test_false_cells_per_image_follow_from_the_no_object_accuracy() -> None:
    outputs, assigned = _batch(0)
    metric = CellAccuracy(num_classes=4)
    metric.update(outputs, assigned)
    sweep = metric.compute()["threshold_sweep"]
    empty_per_image = sum(int(targets.empty.sum()) for targets in assigned) / 2
    expected = (1 - np.array(sweep["no_object_accuracy"])) * empty_per_image
    assert sweep["false_cells_per_image"] == pytest.approx(expected.tolist())


def test_the_threshold_where_no_object_is_98_percent_is_the_lowest_such() -> None:
    outputs = [torch.zeros(1, 1, 10, 10, 6)]
    outputs[0][..., 4] = (torch.arange(100).view(1, 1, 10, 10) / 100 + 0.0005).logit()
    empty = torch.ones(1, 1, 10, 10, dtype=torch.bool)
    empty[0, 0, 9, 5:] = False  # objectness 0.95 and more: five positive cells
    cells = torch.tensor([[0, 0, 9, column] for column in range(5, 10)])
    metric = CellAccuracy(num_classes=1, num_scales=1)
    targets = SimpleNamespace(cells=cells, labels=torch.zeros(5, dtype=torch.int64), empty=empty)
    metric.update(outputs, [targets])
    result = metric.compute()["at_no_object_98"]
    assert result["threshold"] == 0.931  # 94 of 95 empty cells are silent there, at 0.93 only 93
    assert result["no_object_accuracy"] == pytest.approx(94 / 95)
    assert result["object_accuracy"] == 1.0
    assert metric.at(0.972)["object_accuracy"] == pytest.approx(2 / 5)


def test_without_cells_there_is_no_threshold() -> None:
    result = CellAccuracy(num_classes=2).compute()["at_no_object_98"]
    assert result == {"threshold": None, "no_object_accuracy": None, "object_accuracy": None}


def test_class_accuracy_by_class_and_by_size_in_pixels_of_the_image() -> None:
    output = torch.zeros(2, 1, 2, 2, 5 + 3)
    output[0, 0, 0, 0, 5] = 1  # says class 0
    output[0, 0, 1, 1, 6] = 1  # says class 1
    output[1, 0, 0, 0, 6] = 1
    cells = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1], [1, 0, 0, 0]])
    targets = SimpleNamespace(
        cells=cells,
        labels=torch.tensor([0, 2, 1]),
        boxes=torch.tensor([[0.0, 0, 16, 16], [0, 0, 100, 100], [0, 0, 16, 16]]),
        empty=torch.zeros(2, 1, 2, 2, dtype=torch.bool),
    )
    metric = CellAccuracy(num_classes=3, num_scales=1)
    metric.update([output], [targets], torch.tensor([0.4, 0.6]))  # 40 and 27 pixels in their images
    result = metric.compute()
    assert result["class_accuracy_by_class"] == [1.0, 1.0, 0.0]
    assert result["class_accuracy_by_size"] == {"small": 1.0, "medium": 1.0, "large": 0.0}
