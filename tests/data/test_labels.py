"""Written label files come back as the same boxes, by our own readers and by COCO's fields."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from yolo.data.labels import write_labels
from yolo.data.voc import read_voc
from yolo.data.yolo import read_yolo_folder

NAMES = ("cat", "dog <&>")
ANSWER = {
    "image": "somewhere/a.jpg",
    "height": 60,
    "width": 80,
    "detections": [
        {"class": "dog <&>", "score": 0.9, "box": [10.0, 20.0, 30.0, 50.0]},
        {"class": "cat", "score": 0.5, "box": [0.0, 0.0, 80.0, 60.0]},
    ],
}
BOXES = [thing["box"] for thing in ANSWER["detections"]]  # type: ignore[index, union-attr]


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True)
    cv2.imwrite(str(path), np.zeros((60, 80, 3), np.uint8))


def test_yolo_files_come_back_as_the_same_boxes(tmp_path: Path) -> None:
    picture(tmp_path / "images/train/a.jpg")
    written = write_labels(tmp_path, "yolo", {"a": ANSWER}, NAMES)
    assert (written / "classes.txt").read_text().splitlines() == list(NAMES)
    (tmp_path / "labels/train").mkdir()
    (written / "a.txt").rename(tmp_path / "labels/train/a.txt")
    annotation = read_yolo_folder(tmp_path, "train", NAMES).annotation(0)
    assert annotation.boxes == pytest.approx(np.array(BOXES), abs=0.001)
    assert annotation.labels.tolist() == [1, 0]


def test_voc_files_come_back_as_the_same_boxes(tmp_path: Path) -> None:
    picture(tmp_path / "JPEGImages/a.jpg")
    write_labels(tmp_path, "voc", {"a": ANSWER}, NAMES)
    (tmp_path / "ImageSets/Main").mkdir(parents=True)
    (tmp_path / "ImageSets/Main/train.txt").write_text("a\n")
    annotation = read_voc(tmp_path, "train", NAMES).annotation(0)
    assert annotation.boxes.tolist() == BOXES
    assert annotation.labels.tolist() == [1, 0] and not annotation.difficult.any()


def test_coco_json_has_corners_and_sizes_and_keeps_the_scores(tmp_path: Path) -> None:
    empty = {**ANSWER, "image": "b.jpg", "detections": []}
    path = write_labels(tmp_path, "coco", {"a": ANSWER, "b": empty}, NAMES)
    content = json.loads(path.read_text())
    assert [image["file_name"] for image in content["images"]] == ["a.jpg", "b.jpg"]
    first = content["annotations"][0]
    assert (first["image_id"], first["category_id"], first["score"]) == (1, 2, 0.9)
    assert first["bbox"] == [10, 20, 20, 30] and first["area"] == 600
    assert [category["name"] for category in content["categories"]] == list(NAMES)


def test_a_box_thinner_than_a_pixel_stays_one_in_whole_pixels(tmp_path: Path) -> None:
    thin = {**ANSWER, "detections": [{"class": "cat", "score": 0.5, "box": [5.2, 5.2, 5.4, 9.0]}]}
    text = (write_labels(tmp_path, "voc", {"a": thin}, NAMES) / "a.xml").read_text()
    assert "<xmin>6</xmin>" in text and "<xmax>6</xmax>" in text
