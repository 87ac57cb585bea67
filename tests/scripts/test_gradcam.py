import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import gradcam
from yolo.config import COCO_ANCHORS, Config
from yolo.data.images import list_pictures
from yolo.errors import UsageError, UserError
from yolo.models.resnet import LOGIT_SCALE, ResNet
from yolo.models.yolov3 import YoloV3, make_anchors
from yolo.runs.checkpoint import save_weights

CLASSES = ("cat", "dog")


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("detector") / "detector.safetensors"
    config = Config(width=0.125, img_sizes=(96,))
    model = YoloV3(2, 0.125)
    for head in model.heads:
        head[-1].weight.data *= 0.01  # untrained as it is, it is certain of everything
    save_weights(path, model, config, CLASSES, make_anchors(COCO_ANCHORS, 96), {})
    return str(path)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("classifier") / "classifier.safetensors"
    save_weights(
        path, ResNet(2, 0.125), Config(width=0.125, task="classification"), CLASSES, None, {}
    )
    return str(path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for name, shape in (("a.jpg", (60, 90, 3)), ("b.png", (90, 60, 3)), ("a.png", (40, 40, 3))):
        cv2.imwrite(
            str(folder / name), np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        )
    (folder / "notes.txt").write_text("no picture")
    return folder


def explain(*argv: object) -> int:
    return gradcam.main([str(word) for word in argv])


def test_one_picture_becomes_one_png_of_panels_side_by_side(detector, pictures, tmp_path, capsys):
    output = tmp_path / "map.png"
    methods = "gradcam,layercam"
    assert (
        explain(
            "--checkpoint",
            detector,
            "--images",
            pictures / "a.jpg",
            "--output",
            output,
            "--method",
            methods,
            "--score-threshold",
            "0",
        )
        == 0
    )
    height, width = cv2.imread(str(output)).shape[:2]
    assert width > 2 * height
    said = capsys.readouterr().out
    assert "gradcam of class, box 0: " in said and "layercam of class, box 0: " in said


def test_a_folder_becomes_a_folder(detector, pictures, tmp_path):
    assert (
        explain("--checkpoint", detector, "--images", pictures, "--output", tmp_path / "all") == 0
    )
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == [
        "a.jpg.png",
        "a.png.png",
        "b.png.png",
    ]


def test_nothing_is_written_over_and_that_is_said(
    detector, pictures, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.jpg").write_bytes(next(pictures.glob("*.jpg")).read_bytes())
    found = gradcam.output_paths(None, [Path("a/1.jpg"), Path("b/1.jpg")])
    assert found == [Path("gradcam/1.jpg.png"), Path("gradcam/1.jpg-2.png")]
    assert "1.jpg.png is there already: written to gradcam/1.jpg-2.png" in capsys.readouterr().out
    for name in ("gradcam.png", "gradcam-2.png"):
        assert gradcam.output_paths(None, [Path("a/1.jpg")]) == [Path(name)]
        Path(name).write_bytes(b"somebody's")


def test_a_glob_names_its_pictures(pictures):
    assert [path.name for path in list_pictures(str(pictures / "a.*"))] == ["a.jpg", "a.png"]
    assert [path.name for path in list_pictures(str(pictures / "*"))] == ["a.jpg", "a.png", "b.png"]


def test_a_damaged_picture_costs_a_line_and_the_exit_code_but_not_the_others(
    detector, tmp_path, capsys
):
    cv2.imwrite(str(tmp_path / "good.png"), np.zeros((32, 32, 3), np.uint8))
    (tmp_path / "bad.png").write_bytes(b"\x89PNG but not really")
    assert (
        explain("--checkpoint", detector, "--images", tmp_path, "--output", tmp_path / "out") == 1
    )
    assert "bad.png: error: " in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["good.png.png"]


def test_without_a_detection_the_likeliest_class_is_explained_and_that_is_said(
    detector, pictures, tmp_path, capsys
):
    words = (
        "--checkpoint",
        detector,
        "--images",
        pictures / "a.jpg",
        "--output",
        tmp_path / "map.png",
    )
    assert explain(*words) == 0
    assert "nothing detected; whole picture" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--class-name", "dog"), "whole picture, dog"),
        (("--class-name", "dog", "--missed", "10,10,40,50"), "missed dog"),
        (
            ("--target", "object", "--score-threshold", "0", "--box", "2"),
            "hirescam of object, box 2:",
        ),
    ],
)
def test_other_questions_are_answered(flags, said, detector, pictures, tmp_path, capsys):
    words = (
        "--checkpoint",
        detector,
        "--images",
        pictures / "a.jpg",
        "--output",
        tmp_path / "map.png",
    )
    assert explain(*words, *flags) == 0
    assert said in capsys.readouterr().out


def test_a_classifier_is_explained_too(classifier, pictures, tmp_path, capsys):
    words = (
        "--checkpoint",
        classifier,
        "--images",
        pictures / "a.jpg",
        "--output",
        tmp_path / "map.png",
    )
    assert explain(*words, "--class-name", "dog", "--layer", "layer2") == 0
    said = capsys.readouterr().out
    assert "classified as, " in said and "gradcam of class, dog, " in said and "layer2" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--images", "nowhere"), "--images nowhere: names no images"),
        (
            ("--images", "{pictures}", "--output", "x.png"),
            "--output x.png: must be a folder, there are 3",
        ),
        (("--images", "{pictures}/a.jpg", "--output", "x.gif"), "--output x.gif: must end in .png"),
        (
            ("--images", "{pictures}/a.jpg", "--method", "camgrad"),
            "method camgrad: choose from gradcam",
        ),
        (
            ("--images", "{pictures}/a.jpg", "--class-name", "cow"),
            "--class-name cow: .* it knows cat, dog",
        ),
        (
            ("--images", "{pictures}/a.jpg", "--missed", "1,2,3,4"),
            "--missed: want .* and --class-name",
        ),
        (
            ("--images", "{pictures}/a.jpg", "--class-name", "dog", "--missed", "90,90,95,95"),
            "--missed 90,90,95,95: is no left,top,right,bottom in this picture of 90x60",
        ),
        (
            ("--images", "{pictures}/a.jpg", "--box", "-1"),
            "--box -1: detections are counted from 0",
        ),
        ((), "nothing to explain: give --images"),
    ],
)
def test_bad_flags_are_refused_in_one_clear_line(flags, message, detector, pictures):
    words = [flag.replace("{pictures}", str(pictures)) for flag in flags]
    with pytest.raises(UsageError, match=message) as refused:
        explain("--checkpoint", detector, *words)
    assert "\n" not in str(refused.value)


def test_a_box_that_is_not_there_is_refused_with_their_number(detector, pictures, tmp_path):
    words = (
        "--checkpoint",
        detector,
        "--images",
        pictures / "a.jpg",
        "--output",
        tmp_path / "map.png",
    )
    with pytest.raises(UserError, match="--box 999: there are 300 detections"):
        explain(*words, "--score-threshold", "0", "--box", "999")


def test_evaluating_writes_the_measures_with_what_they_were_measured_on(tmp_path, capsys):
    model = ResNet(10, 0.125)
    model.classifier.weight.data *= 0.01
    model.classifier.bias.data[3] = 9 / LOGIT_SCALE  # right about every 3, and sure of it
    names = tuple("0123456789")
    checkpoint = tmp_path / "classifier.safetensors"
    save_weights(checkpoint, model, Config(width=0.125, task="classification"), names, None, {})
    words = ("--checkpoint", checkpoint, "--evaluate", "--num-images", "30", "--output", tmp_path)
    assert explain(*words, "--method", "hirescam") == 0
    content = json.loads((tmp_path / "explanations.json").read_text())
    assert set(content["methods"]) == {"hirescam", "eigencam", "random"}
    assert 0 < content["explained"] < content["images"] == 30
    assert "digits" in content["data"] and content["checkpoint_digest"]
    assert "BLIND" in capsys.readouterr().out  # EigenCAM's line

    model.classifier.bias.data[3] = 0
    save_weights(checkpoint, model, Config(width=0.125, task="classification"), names, None, {})
    with pytest.raises(UserError, match="the model is right on none of 30 images"):
        explain(*words)


def test_a_text_file_is_no_picture(detector, pictures, tmp_path):
    with pytest.raises(UserError, match=r"notes.txt: is truncated or no image"):
        explain(
            "--checkpoint",
            detector,
            "--images",
            pictures / "notes.txt",
            "--output",
            tmp_path / "map.png",
        )
