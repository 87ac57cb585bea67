"""The one Detector: what goes in, what comes out, and that it sees a picture as the test does."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from lively import DIGITS, lively_detector

import yolo
from yolo.config import Config
from yolo.data.images import letterboxed
from yolo.data.sources import open_dataset
from yolo.errors import UsageError, UserError
from yolo.inference.predict import Detector, picture_names, predict_files
from yolo.models.resnet import ResNet
from yolo.runs.checkpoint import LoadedWeights, resolve_checkpoint
from yolo.tasks.detection import DetectionSplit

SIZE = 64


@pytest.fixture(scope="module")
def loaded() -> LoadedWeights:
    """Its boxes follow the pixels: another decoding gives other boxes."""
    loaded = lively_detector(0.05, SIZE)
    return replace(loaded, config=replace(loaded.config, score_threshold=0.2))


@pytest.fixture(scope="module")
def detector(loaded: LoadedWeights) -> Detector:
    return Detector(loaded)


def test_pictures_of_one_name_are_written_side_by_side():
    paths = [Path("a-2.png"), Path("a.jpg"), Path("a.png"), Path("b/a.png")]
    assert picture_names(paths) == ["a-2", "a", "a-3", "a-4"]


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_one_picture_gives_one_result_and_a_list_a_list(detector: Detector, tmp_path: Path):
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), noise(50, 90)[..., ::-1])
    one = detector.detect(path, 0.2)
    assert len(one) > 1 and (one.height, one.width) == (50, 90)
    assert one.boxes.dtype == np.float32 and one.boxes.shape == (len(one), 4)
    assert one.names == tuple(DIGITS[label] for label in one.labels)
    assert (np.diff(one.scores) <= 0).all() and one.scores.min() >= 0.2
    assert (one.boxes >= 0).all() and (one.boxes <= [90, 50, 90, 50]).all()

    more_than_a_batch = [str(path), noise(50, 90), noise(30, 30)] * 4
    several = detector.detect(more_than_a_batch, 0.2)
    assert len(several) == 12 and (several[2].height, several[2].width) == (30, 30)
    for same in (several[0], several[1], several[-3]):
        np.testing.assert_allclose(same.boxes, one.boxes, atol=1e-3)
    assert detector.detect([]) == []


def test_thresholds_are_those_that_are_given(detector: Detector):
    image = noise(80, 80)
    assert len(detector.detect(image, 0.2)) > len(detector.detect(image, 0.5))
    assert len(detector.detect(image, 0, iou_threshold=0.1)) < len(detector.detect(image, 0, 1.0))


@pytest.mark.parametrize(
    "image", [np.zeros((8, 8)), np.zeros((8, 8, 3)), np.zeros((2, 8, 8, 3), np.uint8)]
)
def test_an_array_that_is_no_picture_is_refused_with_its_shape_and_type(
    detector: Detector, image: np.ndarray
):
    with pytest.raises(UserError, match=r"want \[H, W, 3\] uint8 RGB"):
        detector.detect(image)


def test_a_missing_picture_is_named(detector: Detector):
    with pytest.raises(UserError, match=r"nowhere\.jpg: cannot be read"):
        detector.detect("nowhere.jpg")


def test_a_classifier_is_no_detector():
    config = Config(task="classification", width=0.125, img_sizes=(32,))
    classifier = LoadedWeights(ResNet(2, 0.125), config, ("a", "b"), None, {}, "", Path("c.ckpt"))
    with pytest.raises(UsageError, match=r"c\.ckpt: is a classifier"):
        Detector(classifier)


@pytest.mark.parametrize("shape", [(375, 500), (130, 97), (64, 64), (40, 20)])
def test_images_are_decoded_and_detected_exactly_as_in_a_test(
    loaded: LoadedWeights, tmp_path: Path, shape: tuple[int, int]
):
    """A JPEG of twice the network's size or more is decoded at a half, a quarter or an eighth."""
    height, width = shape
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / name).mkdir(parents=True)
    cv2.imwrite(str(tmp_path / "JPEGImages" / "a.jpg"), noise(height, width))
    (tmp_path / "ImageSets" / "Main" / "test.txt").write_text("a\n")
    (tmp_path / "Annotations" / "a.xml").write_text(
        f"<annotation><size><width>{width}</width><height>{height}</height></size></annotation>"
    )
    config = Config(dataset="voc", data_root=str(tmp_path), split="test")
    dataset = open_dataset(config, "test", DIGITS)
    assert loaded.anchors is not None
    split = DetectionSplit.of(loaded.config, dataset, loaded.anchors)
    images, targets = split.first_batch()
    assert torch.equal(letterboxed(dataset.paths[0], SIZE).image, images[0])

    evaluation = split.metrics(full=True)
    with torch.inference_mode():
        evaluation.update(loaded.model(images), targets)
    assert evaluation.detections is not None
    tested = evaluation.detections.detections()
    found = predict_files(
        loaded, Detector(loaded).predict, dataset.paths, tmp_path / "out", print, 0.2
    )
    rows = found[0]["detections"]
    best = {(round(row["score"], 5), *np.round(row["box"], 2)) for row in rows}
    every = {
        (round(float(score), 5), *np.round(box, 2))
        for score, box in zip(tested.scores, tested.boxes, strict=True)
    }
    assert rows and best <= every  # a test also counts the less likely classes of a box


def test_without_a_path_the_bundled_detector_is_loaded_and_finds_the_cat():
    detector = yolo.Detector.load(device="cpu")
    assert detector.loaded.path == resolve_checkpoint()
    found = detector.detect(Path(yolo.__file__).parents[1] / "samples" / "detection" / "cat.jpg")
    assert found.names[0] == "cat" and found.scores[0] > 0.5


def test_the_package_names_its_detector_without_importing_torch():
    code = "import sys, yolo; assert 'Detector' in yolo.__all__ and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(yolo.__file__).parents[1])


def test_detections_become_those_of_supervision(detector: Detector) -> None:
    supervision = pytest.importorskip("supervision")
    found = detector.detect(noise(50, 90), 0.2)
    same = found.to_supervision()
    assert isinstance(same, supervision.Detections) and len(same) == len(found)
    assert (same.xyxy == found.boxes).all() and (same.confidence == found.scores).all()
    assert tuple(same.data["class_name"]) == found.names
    assert len(detector.detect(noise(50, 90), 1.0).to_supervision()) == 0


def test_without_supervision_one_line_says_what_to_install(
    detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(UserError, match="pip install supervision"):
        detector.detect(noise(50, 90), 0.2).to_supervision()
