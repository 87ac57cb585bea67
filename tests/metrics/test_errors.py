"""The error budget, the confusion matrix and calibration on scenes small enough to reason about."""

import numpy as np
import pytest
from scenes import random_scenes

from yolo.metrics.average_precision import average_precision
from yolo.metrics.calibration import calibration
from yolo.metrics.errors import KINDS, confusion_matrix, error_budget, find_errors, largest_misses
from yolo.metrics.matching import Detections, Objects, match_voc
from yolo.metrics.report import SHOWN_SCORE, detection_report

HOME, AWAY = [0.0, 0, 10, 10], [50.0, 50, 60, 60]
LOOSE = [0.0, 4, 10, 14]  # IoU 0.43 with HOME
NAMES = ("cat", "dog")


def scene(*detections: tuple[list[float], int]) -> tuple[Detections, Objects]:
    """Return detections (box, label), most confident first, and a cat at HOME, a dog at AWAY."""
    zeros = np.zeros(len(detections), np.int64)
    boxes = np.array([box for box, _ in detections], float).reshape(-1, 4)
    labels = np.array([label for _, label in detections], np.int64)
    objects = Objects(
        np.zeros(2, np.int64), np.array([HOME, AWAY]), np.array([0, 1]), np.zeros(2, bool)
    )
    return Detections(zeros, boxes, np.linspace(0.9, 0.5, len(detections)), labels), objects


def budget_of(detections: Detections, objects: Objects, num_classes: int = 2) -> dict:
    matches = match_voc(detections, objects)
    errors = find_errors(detections, objects, matches)
    return error_budget(detections, objects, matches, errors, num_classes)


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        ((LOOSE, 0), "localisation"),
        ((AWAY, 0), "classification"),
        ((LOOSE, 1), "both"),
        ((HOME, 0), "duplicate"),
        (([200.0, 0, 210, 10], 0), "background"),
    ],
)
def test_each_wrong_detection_is_of_the_kind_that_tide_names(
    wrong: tuple[list[float], int], kind: str
) -> None:
    detections, objects = scene((HOME, 0), wrong)
    errors = find_errors(detections, objects, match_voc(detections, objects))
    assert errors.kinds.tolist() == [-1, KINDS.index(kind)]


def test_an_object_nobody_came_near_is_missed_and_one_boxed_badly_is_not() -> None:
    detections, objects = scene((LOOSE, 0))
    errors = find_errors(detections, objects, match_voc(detections, objects))
    assert errors.missed.tolist() == [False, True]


def test_mending_the_only_error_gives_a_perfect_score() -> None:
    for wrong, kind in (((AWAY, 0), "classification"), (([50.0, 54, 60, 64], 1), "localisation")):
        budget = budget_of(*scene((HOME, 0), wrong))
        assert budget[kind] == {"count": 1, "map_cost": pytest.approx(0.5)}
    budget = budget_of(*scene((HOME, 0)))
    assert budget["missed"] == {"count": 1, "map_cost": pytest.approx(0.5)}
    assert budget["false_negative"]["map_cost"] == pytest.approx(0.5)


def test_removing_a_confident_false_positive_is_worth_what_it_cost() -> None:
    detections, objects = scene(([200.0, 0, 210, 10], 0), (HOME, 0), (AWAY, 1))
    budget = budget_of(detections, objects)
    assert average_precision(detections, objects, NAMES)["map_50"] == pytest.approx(0.75)
    assert budget["background"]["map_cost"] == pytest.approx(0.25)
    assert budget["false_positive"]["map_cost"] == pytest.approx(0.25)


def test_only_the_most_confident_of_several_loose_boxes_is_mended() -> None:
    budget = budget_of(*scene((LOOSE, 0), (LOOSE, 0), (AWAY, 1)))
    assert budget["localisation"] == {"count": 2, "map_cost": pytest.approx(0.5)}


@pytest.mark.parametrize("seed", range(40))
def test_counts_partition_the_detections_and_no_repair_lowers_the_score(seed: int) -> None:
    detections, objects, _, num_classes = random_scenes(seed)
    matches = match_voc(detections, objects)
    errors = find_errors(detections, objects, matches)
    budget = error_budget(detections, objects, matches, errors, num_classes)
    wrong = int((~matches.right[0] & ~matches.ignored[0]).sum())
    assert (
        sum(budget[kind]["count"] for kind in KINDS[:-1])
        == budget["false_positive"]["count"]
        == wrong
    )
    costs = [row["map_cost"] for row in budget.values()]
    assert all(cost is None for cost in costs) or min(costs) >= -1e-12


@pytest.mark.parametrize("seed", range(40))
def test_the_confusion_matrix_counts_every_object_once_and_every_detection_once(seed: int) -> None:
    detections, objects, _, num_classes = random_scenes(seed)
    matrix = confusion_matrix(detections, objects, num_classes)
    per_class = np.bincount(objects.labels[~objects.ignored], minlength=num_classes)
    assert matrix[:-1].sum(1).tolist() == per_class.tolist()
    assert matrix[:, :-1].sum() <= len(detections)
    if not objects.ignored.any():
        found = np.bincount(detections.labels, minlength=num_classes)
        assert matrix[:, :-1].sum(0).tolist() == found.tolist()
    assert matrix[-1, -1] == 0


def test_the_confusion_matrix_tells_a_mix_up_from_a_false_alarm_and_a_miss() -> None:
    matrix = confusion_matrix(*scene((HOME, 0), (AWAY, 0), ([200.0, 0, 210, 10], 1)), num_classes=2)
    assert matrix.tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 0]]
    assert confusion_matrix(*scene(), num_classes=2).tolist() == [[0, 0, 1], [0, 0, 1], [0, 0, 0]]


def test_the_largest_object_not_found_comes_first() -> None:
    _, objects = scene()
    bigger = Objects(objects.images, objects.boxes * [[1], [2]], objects.labels, objects.ignored)
    assert largest_misses(bigger, np.array([-1]), 5).tolist() == [1, 0]
    assert largest_misses(bigger, np.array([1]), 5).tolist() == [0]


def test_scores_that_say_how_often_they_are_right_have_no_calibration_error() -> None:
    correct = np.arange(1000) % 10 < 7
    assert calibration(np.full(1000, 0.7), correct)["expected_error"] == pytest.approx(0)
    assert calibration(np.full(1000, 0.9), correct)["expected_error"] == pytest.approx(0.2)
    assert calibration(np.zeros(0), np.zeros(0, bool))["expected_error"] is None


def test_the_report_of_shown_detections_counts_only_confident_ones() -> None:
    detections, objects = scene((HOME, 0), (AWAY, 0))
    unsure = Detections(
        detections.images, detections.boxes, np.array([0.9, SHOWN_SCORE / 2]), detections.labels
    )
    report = detection_report(unsure, objects, NAMES)
    assert report["shown"] == {
        "score_threshold": SHOWN_SCORE,
        "detections": 1,
        "precision": 1.0,
        "recall": 0.5,
    }
    assert report["confusion_matrix"] == [[1, 0, 0], [0, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize("seed", range(20))
def test_a_report_is_made_of_any_scene(seed: int) -> None:
    detections, objects, _, num_classes = random_scenes(seed)
    for some in (detections, detections.at(np.zeros(0, np.int64))):
        for truth in (objects, objects.at(np.zeros(0, np.int64))):
            report = detection_report(some, truth, [str(k) for k in range(num_classes)])
            assert set(report["precision_recall"]) == {
                name for name, row in report["per_class"].items() if row["objects"]
            }
