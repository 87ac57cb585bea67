"""`--check-data`: what it counts, what it finds, what it draws."""

import shutil
from pathlib import Path
from typing import Any

import cv2
import pytest

from yolo.check_data import check_data
from yolo.config import Config
from yolo.errors import UsageError


@pytest.fixture
def root(tiny_digits: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_digits, tmp_path / "digits"))


def report(root: Path, tmp_path: Path, **settings: object) -> tuple[str, int]:
    lines: list[str] = []
    given: dict[str, Any] = {"dataset": "digits", "img_sizes": (64, 96), **settings}
    cfg = Config(data_root=str(root), **given)
    defects = check_data(cfg, tmp_path / "run", lines.append)
    return "\n".join(lines), defects


def test_a_clean_data_set_is_counted_and_drawn(root: Path, tmp_path: Path):
    text, defects = report(root, tmp_path)
    assert defects == 0 and "no defects found" in text and "no picture in both splits" in text
    assert "24 images" in text and "8 images" in text
    assert "64 px, boxes without a free anchor" in text and "96 px, boxes" in text
    assert text.count("best possible recall") == 2 and "as configured" not in text
    sheet = cv2.imread(str(tmp_path / "run" / "data_samples.png"))
    assert sheet.shape == (4 * 96, 4 * 96, 3) and sheet.std() > 20
    assert list((tmp_path / "run").glob("events.out.tfevents*"))


def test_every_defect_is_listed_with_its_file_and_nothing_stops(root: Path, tmp_path: Path):
    truncated = root / "JPEGImages" / "train_0003.jpg"
    truncated.write_bytes(truncated.read_bytes()[:-100])
    (root / "Annotations" / "test_0002.xml").write_text("<annotation>")
    (root / "JPEGImages" / "train_0005.jpg").unlink()
    text, defects = report(root, tmp_path)
    assert defects == 3
    for words in (
        "train_0003.jpg: is truncated",
        "test_0002.xml: is no valid XML",
        "train_0005.jpg: no such",
    ):
        assert words in text


def test_all_defects_are_listed_when_nothing_can_be_used(root: Path, tmp_path: Path):
    for path in (root / "Annotations").glob("*.xml"):
        path.write_text(path.read_text().replace("xmin", "left"))
    text, defects = report(root, tmp_path)
    assert defects == 24 and "24 defects" in text and text.count("lacks a name or a box") == 25


def test_bytes_lost_in_the_middle_of_a_jpeg_are_a_defect(root: Path, tmp_path: Path):
    path = root / "JPEGImages" / "train_0003.jpg"
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 40] = bytes(40)
    path.write_bytes(content)
    text, defects = report(root, tmp_path)
    assert defects == 1 and "train_0003.jpg: is damaged: corrupt JPEG data" in text


def test_a_few_boxes_are_enough_for_a_report(root: Path, tmp_path: Path):
    (root / "ImageSets" / "Main" / "train.txt").write_text("train_0001\n")
    annotation = root / "Annotations" / "train_0001.xml"
    text = annotation.read_text()
    annotation.write_text(text[: text.index("<object>")] + "</annotation>")
    text, defects = report(root, tmp_path, mosaic_prob=0.0)
    assert defects == 0 and "1 images (1 without boxes)" in text and "--anchors auto" not in text


def test_a_classifier_has_no_boxes_to_check(tmp_path: Path):
    with pytest.raises(UsageError, match="--task classification"):
        check_data(Config(task="classification"), tmp_path)


def test_pictures_in_both_splits_are_found_even_when_encoded_anew(root: Path, tmp_path: Path):
    shutil.copy(root / "JPEGImages" / "train_0001.jpg", root / "JPEGImages" / "test_0001.jpg")
    other = cv2.imread(str(root / "JPEGImages" / "train_0002.jpg"))
    cv2.imwrite(str(root / "JPEGImages" / "test_0002.jpg"), other, [cv2.IMWRITE_JPEG_QUALITY, 97])
    for number in (1, 2):  # with annotations of the right size
        shutil.copy(
            root / "Annotations" / f"train_000{number}.xml",
            root / "Annotations" / f"test_000{number}.xml",
        )
    text, _ = report(root, tmp_path)
    assert "2 pictures in both splits" in text
    assert (
        "test_0001.jpg: the same file as" in text and "test_0002.jpg: the same picture as" in text
    )


def test_automatic_anchors_are_compared_with_the_usual_ones(root: Path, tmp_path: Path):
    text, _ = report(root, tmp_path, anchors="auto")
    assert (
        "--anchors coco: best possible recall" in text
        and "--anchors auto: best possible recall" in text
    )
