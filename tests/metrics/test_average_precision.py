"""Average precision against a naive loop, faster-coco-eval, and the devkit's own figures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scenes import Scenes, random_scenes

from yolo.errors import UserError
from yolo.metrics import matching
from yolo.metrics.average_precision import (
    COCO_AREAS,
    DetectionMetrics,
    ap_by_size,
    area_ap,
    average_precision,
    coco_ap,
    eleven_point_ap,
    match_coco,
    precision_recall,
)
from yolo.metrics.matching import Detections, Objects, match_greedy, match_voc, overlapping_pairs


def naive_voc_ap(
    detections: Detections, objects: Objects, label: int
) -> tuple[float, float] | None:
    """Return area and 11-point AP of one class, written as in the devkit's VOCevaldet.m."""
    of_class = [k for k in range(len(objects)) if objects.labels[k] == label]
    num_objects = sum(not objects.ignored[k] for k in of_class)
    if not num_objects:
        return None
    taken, outcomes = set(), []
    for row in range(len(detections)):
        if detections.labels[row] != label:
            continue
        best, best_object = -1.0, -1
        for k in of_class:
            if objects.images[k] == detections.images[row]:
                overlap = naive_iou(detections.boxes[row], objects.boxes[k])
                if overlap > best:
                    best, best_object = overlap, k
        if best < 0.5:
            outcomes.append(0)
        elif not objects.ignored[best_object]:
            outcomes.append(int(best_object not in taken))
            taken.add(best_object)
    points = [
        (sum(outcomes[: k + 1]) / num_objects, np.mean(outcomes[: k + 1]))
        for k in range(len(outcomes))
    ]
    eleven = [max((p for r, p in points if r >= t), default=0) for t in np.arange(0, 1.1, 0.1)]
    area, reached = 0.0, 0.0
    for k, (recall, _) in enumerate(points):
        area += (recall - reached) * max(p for _, p in points[k:])
        reached = recall
    return area, float(np.mean(eleven))


def naive_iou(a: np.ndarray, b: np.ndarray) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


@pytest.mark.parametrize("seed", range(60))
def test_voc_ap_equals_the_devkit_loop(seed: int) -> None:
    detections, objects, _, num_classes = random_scenes(seed)
    names = [str(label) for label in range(num_classes)]
    result = average_precision(detections, objects, names)
    for label, name in enumerate(names):
        expected = naive_voc_ap(detections, objects, label)
        row = result["per_class"][name]
        if expected is None:
            assert row["ap_50"] is None and row["ap_50_11pt"] is None
        else:
            assert (row["ap_50"], row["ap_50_11pt"]) == pytest.approx(expected, abs=1e-12)


def coco_precision(
    detections: Detections, objects: Objects, num_images: int, num_classes: int
) -> np.ndarray:
    """Return faster-coco-eval's precision [T, R, C, areas]; -1 where undefined."""
    coco_eval = pytest.importorskip("faster_coco_eval")

    def xywh(box: np.ndarray) -> list[float]:
        return [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()]

    annotations = [
        {
            "id": k + 1,
            "image_id": int(objects.images[k]),
            "category_id": int(objects.labels[k]),
            "bbox": xywh(objects.boxes[k]),
            # beyond every area range, which is COCO's way to say `ignore`
            "area": 1e12 if objects.ignored[k] else float(np.prod(xywh(objects.boxes[k])[2:])),
            "iscrowd": 0,
        }
        for k in range(len(objects))
    ]
    truth = coco_eval.COCO(
        {
            "info": {},
            "images": [{"id": k, "width": 999, "height": 999} for k in range(num_images)],
            "categories": [{"id": k, "name": str(k)} for k in range(num_classes)],
            "annotations": annotations,
        }
    )
    found = truth.loadRes(
        [
            {
                "image_id": int(detections.images[k]),
                "category_id": int(detections.labels[k]),
                "bbox": xywh(detections.boxes[k]),
                "score": float(detections.scores[k]),
            }
            for k in range(len(detections))
        ]
    )
    evaluation = coco_eval.COCOeval_faster(truth, found, "bbox", print_function=lambda *_: None)
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation.eval["precision"][..., -1]


def assert_equal_to_coco(seed: int) -> None:
    detections, objects, num_images, num_classes = random_scenes(seed)
    expected = coco_precision(detections, objects, num_images, num_classes)
    area = (objects.boxes[:, 2:] - objects.boxes[:, :2]).prod(1)
    for a, (low, high) in enumerate([(0, 1e10), *COCO_AREAS.values()]):
        kept, matches = match_coco(detections, objects, (low, high))
        counted = ~objects.ignored & (area >= low) & (area <= high)
        for label in range(num_classes):
            total = int((counted & (objects.labels == label)).sum())
            ours = [
                coco_ap(*curve) for curve in precision_recall(matches, kept.labels == label, total)
            ]
            theirs = expected[:, :, label, a].mean(1)
            if total:
                np.testing.assert_allclose(
                    ours, theirs, atol=1e-6, err_msg=f"seed {seed}, class {label}"
                )
            else:
                assert ours == [None] * 10 and (theirs == -1).all()


def test_coco_ap_equals_faster_coco_eval_on_random_scenes() -> None:
    for seed in range(150):
        assert_equal_to_coco(seed)


@pytest.mark.slow
def test_coco_ap_equals_faster_coco_eval_on_thousands_of_random_scenes() -> None:
    for seed in range(1000, 6000):
        assert_equal_to_coco(seed)


def test_coco_counts_at_most_100_detections_per_image_and_class() -> None:
    rng = np.random.default_rng(0)
    corner = rng.integers(0, 200, (150, 2))
    boxes = np.concatenate([corner, corner + 20], axis=1).astype(float)
    zeros = np.zeros(150, np.int64)
    detections = Detections(zeros, boxes, np.linspace(0.9, 0.1, 150), zeros)
    objects = Objects(zeros, boxes, zeros, np.zeros(150, bool))
    expected = coco_precision(detections, objects, 1, 1)[..., 0, 0].mean()
    result = average_precision(detections, objects, ["thing"])
    assert result["map_50_95"] == pytest.approx(expected, abs=1e-6)
    assert result["map_50"] == pytest.approx(1)  # VOC has no such limit


def test_results_do_not_depend_on_how_many_pairs_are_compared_at_a_time() -> None:
    detections, objects, _, _ = random_scenes(3)
    groups = matching.class_groups(detections, objects)
    whole = list(overlapping_pairs(detections, objects, *groups))
    parts = list(overlapping_pairs(detections, objects, *groups, max_pairs=5))
    assert len(whole) == 1 < len(parts)
    for column in range(3):
        np.testing.assert_array_equal(
            np.concatenate([part[column] for part in parts]), whole[0][column]
        )


def test_greedy_matching_does_not_depend_on_how_many_pairs_are_compared_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    detections, objects, _, _ = random_scenes(7)
    whole = match_greedy(detections, objects, np.array([0.5, 0.75]))
    limited = overlapping_pairs.__defaults__
    monkeypatch.setattr(overlapping_pairs, "__defaults__", (limited[0], 4))
    for a, b in zip(match_greedy(detections, objects, np.array([0.5, 0.75])), whole, strict=True):
        np.testing.assert_array_equal(a, b)


def one_object(ignored: bool = False) -> Objects:
    return Objects(np.array([0]), np.array([[0.0, 0, 10, 10]]), np.array([0]), np.array([ignored]))


def detections_at(*boxes: list[float]) -> Detections:
    zeros = np.zeros(len(boxes), np.int64)
    return Detections(
        zeros, np.array(boxes, float).reshape(-1, 4), np.linspace(0.9, 0.1, len(boxes)), zeros
    )


def test_a_second_detection_of_an_object_is_wrong() -> None:
    matches = match_voc(detections_at([0, 0, 10, 10], [0, 0, 10, 9]), one_object())
    assert matches.right.tolist() == [[True, False]]
    assert matches.ignored.tolist() == [[False, False]]


def test_any_number_of_detections_of_a_difficult_object_are_ignored() -> None:
    matches = match_voc(detections_at([0, 0, 10, 10], [0, 0, 10, 9]), one_object(ignored=True))
    assert matches.right.tolist() == [[False, False]]
    assert matches.ignored.tolist() == [[True, True]]


def test_devkit_wants_more_than_half_an_overlap_and_plain_matching_at_least_half() -> None:
    half = detections_at([0, 0, 10, 5])
    assert average_precision(half, one_object(), ["thing"])["map_50"] == 1
    assert average_precision(half, one_object(), ["thing"], "devkit")["map_50"] == 0


def test_a_class_without_objects_is_named_and_left_out_of_the_mean() -> None:
    detections = Detections(
        np.zeros(2, np.int64),
        np.array([[0.0, 0, 10, 10]] * 2),
        np.array([0.9, 0.8]),
        np.array([0, 1]),
    )
    result = average_precision(detections, one_object(), ["seen", "absent"])
    assert result["map_50"] == result["map_50_11pt"] == result["map_50_95"] == 1
    assert result["per_class"]["absent"]["ap_50"] is None
    assert result["classes_without_objects"] == ["absent"]


def test_without_any_object_map_is_undefined_and_without_any_detection_it_is_zero() -> None:
    nothing = one_object().at(np.zeros(0, np.int64))
    undefined = average_precision(detections_at([0, 0, 1, 1]), nothing, ["thing"])
    assert undefined["map_50"] is None and undefined["map_50_95"] is None
    assert average_precision(detections_at(), nothing, ["thing"])["map_50"] is None
    zero = average_precision(detections_at(), one_object(), ["thing"])
    assert zero["map_50"] == zero["map_50_11pt"] == zero["map_50_95"] == 0


def test_difficult_objects_alone_leave_a_class_undefined() -> None:
    result = average_precision(detections_at([0, 0, 10, 10]), one_object(ignored=True), ["thing"])
    assert result["map_50"] is None
    assert result["per_class"]["thing"]["difficult"] == 1


def test_area_and_eleven_points_of_a_curve_worked_by_hand() -> None:
    precision, recall = np.array([1, 1 / 2, 2 / 3]), np.array([0.5, 0.5, 1.0])
    assert area_ap(precision, recall) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert eleven_point_ap(precision, recall) == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)


def test_sizes_are_parted_at_32_and_96_pixels() -> None:
    sides = np.array([10.0, 50.0, 200.0])
    boxes = np.stack([np.zeros(3), np.zeros(3), sides, sides], axis=1)
    images, labels = np.arange(3), np.zeros(3, np.int64)
    objects = Objects(images, boxes, labels, np.zeros(3, bool))
    detections = Detections(images[1:], boxes[1:], np.array([0.9, 0.8]), labels[1:])
    report = ap_by_size(detections, objects, ["thing"])
    assert [row["ap_50"] for row in report.values()] == [0, 1, 1]
    assert [row["objects"] for row in report.values()] == [1, 1, 1]


def as_detection(rows: Detections) -> dict[str, torch.Tensor]:
    return {
        "boxes": torch.from_numpy(rows.boxes).float(),
        "scores": torch.from_numpy(rows.scores).float(),
        "labels": torch.from_numpy(rows.labels),
    }


def test_merged_ranks_give_the_result_of_one_rank() -> None:
    detections, objects, num_images, num_classes = random_scenes(12)
    assert num_images > 1
    scenes = Scenes(objects, num_images, num_classes)
    alone, ranks = DetectionMetrics(scenes), [DetectionMetrics(scenes) for _ in range(2)]
    for image in range(num_images):
        detection = as_detection(detections.at(detections.images == image))
        alone.update(image, detection)
        ranks[image % 2].update(image, detection)
    ranks[0].merge([rank.state() for rank in reversed(ranks)])
    assert ranks[0].compute() == alone.compute()
    by_hand = average_precision(detections, objects, scenes.class_names)
    assert alone.compute()["map_50"] == pytest.approx(by_hand["map_50"])


def test_an_image_without_detections_still_counts_its_objects() -> None:
    metrics = DetectionMetrics(Scenes(one_object(), num_images=1, num_classes=1))
    metrics.update(0, as_detection(detections_at()))
    assert metrics.compute()["map_50"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": torch.tensor([[0, 0, float("nan"), 1]])}, "not finite"),
        ({"scores": torch.tensor([float("nan")])}, "a score that is no number"),
        ({"labels": torch.tensor([7])}, "unknown class"),
    ],
)
def test_detections_that_cannot_be_scored_are_refused_naming_the_image(
    change: dict[str, torch.Tensor], message: str
) -> None:
    metrics = DetectionMetrics(Scenes(one_object(), num_images=1, num_classes=1))
    metrics.update(0, as_detection(detections_at([0, 0, 1, 1])) | change)
    with pytest.raises(UserError, match=f"{message}.*image 000000"):
        metrics.compute()


DEVKIT_FIGURES = {  # 11-point and area AP of the detections beside VOCdevkit, from their README
    "aeroplane": (0.6897, 0.7130),
    "bicycle": (0.7529, 0.7851),
    "bird": (0.4380, 0.4301),
    "boat": (0.3755, 0.3592),
    "bottle": (0.1821, 0.1383),
    "bus": (0.6229, 0.6325),
    "car": (0.6700, 0.6864),
    "cat": (0.7697, 0.7856),
    "chair": (0.2953, 0.2790),
    "cow": (0.5270, 0.5451),
    "diningtable": (0.5017, 0.4957),
    "dog": (0.5550, 0.5547),
    "horse": (0.5939, 0.6093),
    "motorbike": (0.7474, 0.7571),
    "person": (0.5852, 0.5952),
    "pottedplant": (0.2662, 0.2333),
    "sheep": (0.5213, 0.5179),
    "sofa": (0.5253, 0.5247),
    "train": (0.7394, 0.7635),
    "tvmonitor": (0.5437, 0.5418),
}


def test_a_real_detector_scores_exactly_as_by_the_devkit(voc_root: Path) -> None:
    sources = pytest.importorskip("yolo.data.sources")
    from yolo.config import DataConfig
    from yolo.metrics.average_precision import load_objects
    from yolo.metrics.devkit import read_detections

    folder = voc_root.parent / "voc2007_test_detections"
    if not folder.exists():
        pytest.skip(f"{folder} does not exist")
    config = DataConfig(dataset="voc", data_root=str(voc_root), split="2007:test")
    dataset = sources.open_dataset(config, "2007:test", tuple(DEVKIT_FIGURES))
    detections = read_detections(folder, dataset)
    objects = load_objects(dataset, range(len(dataset)))
    result = average_precision(detections, objects, dataset.class_names, "devkit")
    assert len(detections) == 50628
    assert result["map_50_11pt"] == pytest.approx(0.545113, abs=1e-6)
    assert result["map_50"] == pytest.approx(0.547369, abs=1e-6)
    for name, figures in DEVKIT_FIGURES.items():
        row = result["per_class"][name]
        assert (row["ap_50_11pt"], row["ap_50"]) == pytest.approx(figures, abs=1e-4), name
