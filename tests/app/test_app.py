import csv
import io
import json
import os
import re
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import torch
from lively import DIGITS, lively_detector
from PIL import ExifTags, Image

import app
from yolo.app import runs_tab
from yolo.app.about import classes_html, literal, model_card, model_name, results_markdown
from yolo.app.classify_tab import errors_text
from yolo.app.detect_tab import DetectTab
from yolo.app.detector import (
    MAX_DETECTIONS,
    Detection,
    DetectionExplainer,
    Thresholds,
    View,
    at_point,
    draw_detections,
    draw_map,
    to_csv,
    to_json,
)
from yolo.app.models import Model, load_models
from yolo.app.runs_tab import RunsTab, run_choices
from yolo.app.samples import SampleSet, _draw, rank_samples, read_samples, write_samples
from yolo.app.uploads import LONGEST_SIDE, Picture, read_picture
from yolo.config import Config
from yolo.data.class_names import VOC_CLASSES
from yolo.data.dataset import Annotation
from yolo.data.digits import write_digits
from yolo.errors import UsageError, UserError
from yolo.explain.cam import METHODS, CamSettings
from yolo.models.resnet import ResNet
from yolo.models.yolov3 import YoloV3
from yolo.runs.checkpoint import LoadedWeights, save_weights

LOW, HIGH = Thresholds(0.3, 0.45), Thresholds(0.999, 0.45)


def random_classifier() -> LoadedWeights:
    torch.manual_seed(0)
    config = Config(task="classification", dataset="digits", width=0.125, img_sizes=(32,))
    model = ResNet(len(DIGITS), config.width).eval()
    return LoadedWeights(model, config, DIGITS, None, {}, "0" * 16, Path("classifier.safetensors"))


def save(loaded: LoadedWeights, folder: Path) -> Path:
    path = folder / loaded.path
    save_weights(
        path, loaded.model, loaded.config, loaded.class_names, loaded.anchors, loaded.results
    )
    return path


@pytest.fixture(scope="module")
def detector() -> DetectionExplainer:
    return DetectionExplainer(lively_detector())


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (96, 160, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def view(detector: DetectionExplainer, pixels: np.ndarray) -> View:
    return detector.trace(Picture(pixels, 96, 160))


def quarters(mode: str = "RGB") -> Image.Image:
    """Red, green, blue and white quarters: 60 wide, 40 high."""
    image = np.zeros((40, 60, 3), np.uint8)
    image[:20, :30, 0] = image[:20, 30:, 1] = image[20:, :30, 2] = 255
    image[20:, 30:] = 255
    return Image.fromarray(image).convert(mode)


def bomb() -> bytes:
    """A valid PNG header of 50,000 x 50,000 pixels, and next to nothing behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data))
            + kind
            + data
            + struct.pack(">I", zlib.crc32(kind + data) & 0xFFFFFFFF)
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("RGB", "png"),
        ("CMYK", "jpg"),
        ("P", "png"),
        ("P", "gif"),
        ("RGBA", "webp"),
        ("RGB", "bmp"),
        ("CMYK", "tif"),
    ],
)
def test_pictures_of_every_kind_become_rgb(tmp_path: Path, mode: str, suffix: str):
    path = tmp_path / f"picture.{suffix}"
    quarters(mode).save(path)
    picture = read_picture(path)
    assert picture.pixels.shape == (40, 60, 3) and picture.pixels.dtype == np.uint8
    assert (picture.height, picture.width, picture.scale) == (40, 60, 1)
    corners = picture.pixels[[5, 5, 35, 35], [5, 55, 5, 55]].astype(int)
    expected = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    assert np.abs(corners - expected).max() < 30  # JPEG and WebP lose a little


def test_16_bits_keep_their_shades(tmp_path: Path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, axis=0)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    shades = read_picture(tmp_path / "ramp.png").pixels[0, :, 0].astype(int)
    assert np.abs(shades - np.arange(256)).max() <= 1


def test_the_first_frame_of_an_animation_counts(tmp_path: Path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert tuple(read_picture(tmp_path / "a.gif").pixels[0, 0]) == (255, 0, 0)


def test_the_exif_tag_turns_the_picture(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned to the right by a quarter
    quarters().save(tmp_path / "turned.jpg", exif=exif, quality=95)
    picture = read_picture(tmp_path / "turned.jpg")
    assert picture.pixels.shape[:2] == (picture.height, picture.width) == (60, 40)
    assert picture.pixels[5, 5, 2] > 200  # blue: what was at the lower left


def test_transparency_becomes_white(tmp_path: Path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "glass.png")
    assert (read_picture(tmp_path / "glass.png").pixels == 255).all()


@pytest.mark.parametrize("size", [(1, 1), (3000, 1), (1, 3000)])
def test_odd_shapes_go_through_the_whole_app(
    tmp_path: Path, detector: DetectionExplainer, size: tuple[int, int]
):
    Image.new("RGB", size).save(tmp_path / "odd.png")
    view = detector.trace(read_picture(tmp_path / "odd.png"))
    detections = detector.detections(view, HIGH)
    explanation = detector.explain(view, detections[0], CamSettings())
    assert draw_map(view, detections[0], explanation, 0.5).shape == view.shown.shape


def test_large_pictures_are_kept_small_and_boxes_refer_to_the_original(
    tmp_path: Path, detector: DetectionExplainer
):
    quarters().resize((6000, 4000)).save(tmp_path / "large.jpg")
    picture = read_picture(tmp_path / "large.jpg")
    assert max(picture.pixels.shape) <= LONGEST_SIDE
    assert (picture.height, picture.width) == (4000, 6000)
    view = detector.trace(picture)
    detections = detector.detections(view, LOW)
    boxes = [
        found["box"] for found in json.loads(to_json(view, detections, DIGITS, LOW))["detections"]
    ]
    expected = [detection.box * 6000 / picture.pixels.shape[1] for detection in detections]
    assert boxes and np.abs(np.array(boxes) - expected).max() < 0.1


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"my secret diary",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",  # Pillow would start Ghostscript
        b"\x89PNG\r\n\x1a\n" + b"\0" * 64,
        bomb(),
    ],
)
def test_what_is_no_picture_is_refused_without_repeating_it(tmp_path: Path, content: bytes):
    path = tmp_path / "secret name.png"
    path.write_bytes(content)
    with pytest.raises(UserError) as refused:
        read_picture(path)
    assert "secret" not in str(refused.value) and "\n" not in str(refused.value)


def test_a_truncated_photo_is_refused(tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:9000])
    with pytest.raises(UserError, match="damaged"):
        read_picture(tmp_path / "half.jpg")


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path: Path):
    (tmp_path / "bomb.png").write_bytes(bomb())
    with pytest.raises(UserError, match="million pixels"):
        read_picture(tmp_path / "bomb.png")


def test_the_network_runs_once_per_picture(
    detector: DetectionExplainer, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
):
    calls = []
    forward = YoloV3.trace
    monkeypatch.setattr(YoloV3, "trace", lambda *args: calls.append(1) or forward(*args))
    view = detector.trace(Picture(pixels, 96, 160))
    for thresholds in (LOW, HIGH, Thresholds(0.5, 0.2)):
        detections = detector.detections(view, thresholds)
        detector.explain(view, detections[0], CamSettings())
    assert len(calls) == 1


def test_a_higher_threshold_leaves_the_more_confident_ones(
    detector: DetectionExplainer, view: View
):
    low, high = (detector.detections(view, Thresholds(score, 0.45)) for score in (0.3, 0.5))
    assert 0 < len(high) < len(low)
    assert [f.score for f in low] == sorted((f.score for f in low), reverse=True)
    assert [f.key for f in high] == [f.key for f in low if f.score >= 0.5]


def test_nothing_found_leaves_the_whole_picture(detector: DetectionExplainer, view: View):
    [detection] = detector.detections(view, HIGH)
    assert detection.kind == "picture" and detection.box is None
    assert detector.explain(view, detection, CamSettings()).heat.shape == (96, 160)


def test_annotated_objects_that_nothing_found_are_missed(
    detector: DetectionExplainer, pixels: np.ndarray, view: View
):
    found = detector.detections(view, LOW)[0]
    boxes = np.array([found.box, [1, 1, 4, 4], [5, 5, 9, 9]], np.float32)
    labels = np.array([found.label, 3, 4])
    note = Annotation(boxes, labels, np.array([False, False, True]), 96, 160)
    detections = detector.detections(detector.trace(Picture(pixels, 96, 160), note), LOW)
    missed = [(one.label, one.index) for one in detections if one.kind == "missed"]
    assert missed == [(3, 1)]  # the difficult one is not


@pytest.mark.parametrize("method", METHODS)
def test_every_detection_can_be_explained_at_all_its_layers(
    detector: DetectionExplainer, view: View, method: str
):
    missed = Detection("missed", 0, 2, None, np.array([3, 5, 60, 70], np.float32))
    for detection in (
        detector.detections(view, LOW)[0],
        missed,
        detector.detections(view, HIGH)[0],
    ):
        for layer in detector.layers(view, detection):
            explanation = detector.explain(view, detection, CamSettings(method, "score", layer))
            assert explanation.heat.shape == (96, 160)


def test_a_click_chooses_the_smallest_box_around_it():
    large, small = (
        Detection("found", i, 0, 0.5, np.array(box, np.float32))
        for i, box in enumerate([[0, 0, 90, 90], [40, 40, 60, 60]])
    )
    assert at_point([large, small], 50, 50) is small
    assert at_point([large, small], 10, 10) is large
    assert at_point([large, small], 95, 10) is None


def test_drawings_leave_the_picture_as_it_was(detector: DetectionExplainer, view: View):
    before = view.shown.copy()
    detections = detector.detections(view, LOW)
    drawn = draw_detections(view, detections, DIGITS, detections[0])
    draw_map(view, detections[0], detector.explain(view, detections[0], CamSettings()), 0.6)
    assert drawn.shape == before.shape and (drawn != before).any()
    assert (view.shown == before).all()


def test_csv_and_json_agree(detector: DetectionExplainer, view: View):
    detections = detector.detections(view, LOW)
    rows = list(csv.DictReader(io.StringIO(to_csv(view, detections, ("a,b", *DIGITS[1:])))))
    records = json.loads(to_json(view, detections, ("a,b", *DIGITS[1:]), LOW))["detections"]
    assert len(rows) == len(records) == len(detections)
    for row, record in zip(rows, records, strict=True):
        assert (row["status"], row["class"], float(row["score"])) == (
            "found",
            record["class"],
            record["score"],
        )
        assert [float(row[side]) for side in ("left", "top", "right", "bottom")] == record["box"]


def test_samples_carry_their_annotations(tmp_path: Path):
    loaded = lively_detector()
    samples = write_samples(tmp_path / "samples", loaded, loaded.config, 3)
    assert read_samples(tmp_path / "samples") == samples
    assert len(samples.samples) == 3
    for sample in samples.samples:
        picture = read_picture(samples.folder / sample.file)
        assert (picture.height, picture.width) == (sample.height, sample.width)
        assert len(sample.annotation.boxes) == len(sample.annotation.labels) > 0
        assert (samples.folder / sample.thumbnail).exists()


def test_samples_stand_as_their_boxes_and_do_not_tell_where_they_were_taken(tmp_path: Path):
    write_digits(tmp_path / "data", num_scenes={"test": 1})
    (path,) = (tmp_path / "data" / "JPEGImages").iterdir()
    with Image.open(path) as picture:
        exif = picture.getexif()
        exif[ExifTags.Base.Orientation] = 6
        picture.save(path, exif=exif)
    loaded = lively_detector()
    config = replace(loaded.config, dataset="voc", data_root=str(tmp_path / "data"), split="test")
    samples = write_samples(tmp_path / "samples", loaded, config, 1)
    (sample,) = samples.samples
    with Image.open(samples.folder / sample.file) as picture:
        assert not picture.getexif() and picture.size == (sample.width, sample.height)


def test_misclassified_images_are_wrong_and_the_most_confident_first(tmp_path: Path):
    loaded = random_classifier()
    samples = write_samples(tmp_path / "samples", loaded, loaded.config, 2)
    confidence = [image.confidence for image in samples.misclassified]
    assert confidence == sorted(confidence, reverse=True) and confidence
    assert all(image.label != image.predicted for image in samples.misclassified)
    assert samples.data == "digits test", "it may stand in public: no path of this machine"


def test_results_stand_beside_what_they_belong_to():
    results = {
        "map_50": 0.81234,
        "data": "digits test",
        "loader": "single images",
        "weights": "ema",
    }
    text = results_markdown(
        replace(lively_detector(), results=results | {"thresholds": {"score_threshold": 0.01}})
    )
    for expected in ("0.812", "digits test", "single images", "score threshold: 0.01", "EMA"):
        assert expected in text
    assert "No results" in results_markdown(lively_detector())


def test_class_names_cannot_inject_markup():
    assert "<script>" not in classes_html(["<script>alert(1)</script>"])


def test_what_a_strange_file_says_of_itself_is_shown_as_it_is():
    hostile = "[x](https://evil.example) <img src=x> **b** `c`"
    loaded = replace(
        lively_detector(),
        class_names=(hostile, *DIGITS[1:]),
        results={"map_50": "0.9", "data": hostile, "images_seen": "many", "thresholds": [1]},
    )
    loaded = replace(loaded, config=replace(loaded.config, train_split=hostile))
    measured = replace(loaded, results=loaded.results | {"map_50": 0.5})
    texts = [model_card(loaded, None, None), results_markdown(loaded), results_markdown(measured)]
    for text in texts:
        plain = re.sub("`[^`]*`", "", text)  # in a span of code nothing is markup
        assert "https://evil" not in plain and "<img" not in plain and "](" not in plain
    assert "No results" in texts[1] and "evil.example" in texts[2]
    assert literal("a_b & c") == "a&#95;b &#38; c"


def test_the_card_names_the_origin_of_the_photographs_and_the_model_page():
    card = model_card(lively_detector(), None, "https://huggingface.co/owner/name")
    assert "CC BY" in card and "https://huggingface.co/owner/name" in card


def test_the_card_tells_how_the_model_was_trained():
    loaded = replace(lively_detector(), results={"images_seen": 12345})
    card = model_card(loaded, None, None)
    assert "YOLOv3 (Darknet-53)" in card and "epochs of `train`" in card
    assert "12,345 images seen" in card
    lite = replace(loaded, config=replace(loaded.config, backbone="timm/tf_efficientnet_lite2"))
    assert "timm's tf_efficientnet_lite2" in model_card(lite, None, None)


def test_without_test_images_the_classify_tab_names_the_flag_that_opens_them():
    assert "--data-root" in errors_text(None)


def test_other_data_in_the_layout_of_voc_is_not_called_pascal_voc():
    loaded = lively_detector()
    cells = replace(loaded, config=replace(loaded.config, dataset="voc"))
    assert "own" in model_name(cells) and "Flickr" not in model_card(cells, None, None)
    voc = replace(cells, class_names=VOC_CLASSES)
    assert "PASCAL VOC" in model_name(voc) and "Flickr" in model_card(voc, None, None)


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--push", "owner/name"], "--build-space"),
        (["--checkpoint", "hf://owner"], "hf://owner/name"),
    ],
)
def test_wrong_flags_are_explained(argv: list[str], problem: str):
    with pytest.raises(UsageError, match=problem):
        app.main(argv)


def test_two_models_of_one_task_are_refused(tmp_path: Path):
    path = str(save(lively_detector(), tmp_path))
    with pytest.raises(UsageError, match="one of each task"):
        load_models([path, path], None)


def test_shown_detections_are_bounded(detector: DetectionExplainer, view: View):
    assert len(detector.detections(view, Thresholds(0.0001, 1.0))) == MAX_DETECTIONS


def test_samples_are_drawn_at_random_but_always_the_same(tmp_path: Path):
    assert _draw(1000, 5) == _draw(1000, 5) and len(_draw(3, 12)) == 3
    steps = np.diff(_draw(1000, 50))
    assert len(set(steps)) > 5  # not spread evenly


def test_the_best_sample_comes_first_and_the_largest_miss_is_known(tmp_path: Path):
    loaded = lively_detector()
    written = write_samples(tmp_path / "samples", loaded, loaded.config, 4)
    assert written.ranked
    explainer = DetectionExplainer(loaded)
    found = explainer.detections(
        explainer.trace(read_picture(written.folder / written.samples[2].file)), LOW
    )
    right = [one for one in found if one.kind == "found"]
    perfect = replace(
        written.samples[2],
        boxes=[one.box.tolist() for one in right],
        labels=[one.label for one in right],
        difficult=[False] * len(right),
    )
    blind = replace(written.samples[0], boxes=[[0, 0, 150, 150.0]], labels=[3], difficult=[False])
    others = [replace(one, boxes=[], labels=[], difficult=[]) for one in written.samples[1:2]]
    ranked = rank_samples(replace(written, samples=(blind, *others, perfect)), loaded)
    assert ranked.samples[0] == perfect
    assert ranked.missed is not None and ranked.samples[ranked.missed] == blind
    assert read_samples(written.folder) == ranked


def test_your_runs_lists_the_newest_first_and_shows_the_one_that_is_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    loaded = lively_detector()
    for number, name in enumerate(("first", "second")):
        checkpoints = tmp_path / "runs" / name / "checkpoints"
        checkpoints.mkdir(parents=True)
        file = checkpoints / "epoch001-step000010-lr1.000e-03.ckpt"
        file.write_bytes(b"")
        os.utime(file, (number, number))
    (tmp_path / "runs/first/results.json").write_text('{"map_50": 0.5}')
    assert run_choices() == [
        ("second, 1 checkpoints", "runs/second"),
        ("first, mAP 0.500", "runs/first"),
    ]
    opened = []
    monkeypatch.setattr(runs_tab, "resolve_checkpoint", Path)
    monkeypatch.setattr(runs_tab, "load_weights", lambda path: replace(loaded, path=path))
    samples = write_samples(tmp_path / "samples", loaded, loaded.config, 1)
    with gr.Blocks():
        tab = DetectTab(DetectionExplainer(loaded), samples)

        def show(model: Model) -> tuple[DetectTab, SampleSet | None]:
            opened.append(model.loaded.path)
            tab.use(DetectionExplainer(model.loaded), None)
            return tab, None

        runs = RunsTab({"detection": tab}, show)
        updates = runs.on_show("runs/first")
    assert opened == [Path("runs/first")]
    assert not updates[tab.gallery]["visible"] and not updates[tab.missed]["visible"]
    assert set(updates) - {runs.card} <= {*tab.switched}  # Gradio takes no others


def test_what_listens_to_others_shows_no_runs(monkeypatch: pytest.MonkeyPatch):
    shown: list[bool] = []
    monkeypatch.setattr("yolo.app.page.build_page", lambda *given: shown.append(bool(given[2])))
    monkeypatch.setattr("yolo.app.page.serve", lambda *_: None)
    monkeypatch.setattr("yolo.app.models.load_models", lambda *_, **__: {})
    for flags in ([], ["--public"], ["--host", "0.0.0.0"]):
        assert app.main([*flags, "--samples", "0"]) == 0
    monkeypatch.setenv("SPACE_ID", "owner/name")
    assert app.main(["--samples", "0"]) == 0
    assert shown == [True, False, False, False]
