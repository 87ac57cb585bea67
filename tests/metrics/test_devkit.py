"""Detections survive the devkit's files, and files that cannot be scored are refused."""

from pathlib import Path

import numpy as np
import pytest
from scenes import Scenes, random_scenes

from yolo.errors import UserError
from yolo.metrics.average_precision import average_precision
from yolo.metrics.devkit import read_detections, write_detections
from yolo.metrics.matching import Detections, Objects
from yolo.metrics.report import detection_report


def scenes_of(seed: int) -> tuple[Detections, Scenes]:
    detections, objects, num_images, num_classes = random_scenes(seed)
    return detections, Scenes(objects, num_images, num_classes)


@pytest.mark.parametrize("seed", range(5))
def test_detections_written_and_read_again_score_the_same(tmp_path: Path, seed: int) -> None:
    detections, scenes = scenes_of(seed)
    write_detections(tmp_path, detections, scenes)
    again = read_detections(tmp_path, scenes)
    assert len(again) == len(detections)
    before = average_precision(detections, scenes.objects, scenes.class_names)
    assert average_precision(again, scenes.objects, scenes.class_names) == before


def test_pixels_are_one_based_and_inclusive_in_the_files(tmp_path: Path) -> None:
    _, scenes = scenes_of(0)
    one = np.zeros(1, np.int64)
    detection = Detections(one, np.array([[0.0, 10, 20, 30]]), np.array([0.5]), one)
    write_detections(tmp_path, detection, scenes, split="val")
    text = (tmp_path / "comp4_det_val_class0.txt").read_text()
    assert text == "000000 0.5 1.000000 11.000000 20.000000 30.000000\n"
    assert read_detections(tmp_path, scenes).boxes.tolist() == [[0, 10, 20, 30]]


def test_a_class_with_a_slash_in_its_name_is_written_and_read_again(tmp_path: Path) -> None:
    _, scenes = scenes_of(0)
    scenes.class_names = ("mask", "w/o mask")
    one = np.zeros(1, np.int64)
    write_detections(
        tmp_path, Detections(one, np.array([[0.0, 0, 9, 9]]), np.array([0.5]), one + 1), scenes
    )
    assert read_detections(tmp_path, scenes).labels.tolist() == [1]


def test_an_empty_or_absent_file_means_no_detections_of_that_class(tmp_path: Path) -> None:
    _, scenes = scenes_of(0)
    (tmp_path / "comp4_det_test_class0.txt").write_text("")
    assert len(read_detections(tmp_path, scenes)) == 0


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "class0",
            "000000 0.5 1 1 9\n",
            "class0.txt, line 1: want `image score xmin ymin xmax ymax`",
        ),
        (
            "class0",
            "000000 0.5 1 1 9 9\n999999 0.5 1 1 9 9\n",
            "line 2: image 999999 is not in the split",
        ),
        ("class0", "000000 0.5 1 1 9 nine\n", "class0.txt: could not convert"),
        ("class0", "000000 0.5 1 1 nan 9\n", "not finite"),
        ("class0", "000000 nan 1 1 9 9\n", "score that is no number"),
        ("zebra", "000000 0.5 1 1 9 9\n", "has no file of a class that the data has"),
    ],
)
def test_files_that_cannot_be_scored_are_refused_in_one_line(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    _, scenes = scenes_of(0)
    (tmp_path / f"comp4_det_test_{name}.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        read_detections(tmp_path, scenes)


def one_object(tmp_path: Path, **files: str) -> Scenes:
    """A single object [0, 0, 20, 20] of the class `light`, and what a detector says of it."""
    for name, text in files.items():
        (tmp_path / f"comp4_det_{name}.txt").write_text(text)
    one = np.zeros(1, np.int64)
    scenes = Scenes(Objects(one, np.array([[0.0, 0, 20, 20]]), one, one == 1), 1, 1)
    scenes.class_names = ("light",)
    return scenes


def test_boxes_that_end_before_they_begin_are_wrong_and_counted_as_in_the_devkit(tmp_path: Path):
    text = "000000 0.9 20 1 1 20\n\n000000 0.8 1 1 20 20\n"
    scenes, told = one_object(tmp_path, test_light=text), list[str]()
    detections = read_detections(tmp_path, scenes, log=told.append)
    assert told == [
        "1 boxes end before they begin (the first in image 000000): they find nothing and count as "
        "wrong, as in the devkit"
    ]
    scores = average_precision(detections, scenes.objects, scenes.class_names)
    assert (scores["map_50"], scores["map_50_95"]) == (0.5, 0.5)


def test_scores_of_any_size_and_sign_are_ordered_but_not_taken_for_probabilities(tmp_path: Path):
    text = "000000 -3.5 1 1 9 9\n000000 812 1 1 20 20\n000000 -inf 1 1 9 9\n"
    scenes, told = one_object(tmp_path, test_light=text), list[str]()
    detections = read_detections(tmp_path, scenes, log=told.append)
    assert detections.scores.tolist() == [812, -3.5, -np.inf]
    assert told[0].startswith("scores go from -inf to 812, so they are no probabilities")
    report = detection_report(detections, scenes.objects, scenes.class_names)
    assert (report["map_50"], report["calibration"]) == (1, None)


def test_files_of_other_classes_are_named_and_not_mistaken_for_one_that_ends_alike(tmp_path: Path):
    other, own = "000000 0.9 1 1 20 20\n", "000000 0.5 1 1 20 20\n"
    scenes = one_object(tmp_path, test_light=own, test_traffic_light=other, test_zebra=other)
    told = list[str]()
    assert read_detections(tmp_path, scenes, log=told.append).scores.tolist() == [0.5]
    assert told == [
        "2 files of classes that the data does not have, not read; the first: "
        "comp4_det_test_traffic_light.txt"
    ]


def test_a_folder_without_detections_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no comp4_det_"):
        read_detections(tmp_path, scenes_of(0)[1])
