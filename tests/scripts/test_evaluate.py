"""evaluate.py as a person runs it, in process, on eight scenes and an untrained network."""

import contextlib
import csv
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
from yolo.config import Config
from yolo.data.dataset import read_rgb
from yolo.data.digits import CLASS_NAMES
from yolo.data.sources import open_dataset
from yolo.errors import UsageError, UserError
from yolo.metrics.average_precision import load_objects
from yolo.metrics.matching import Detections
from yolo.models.yolov3 import YoloV3, make_anchors
from yolo.runs.checkpoint import load_weights, save_weights
from yolo.runs.folder import RunFolder, list_runs
from yolo.viz.draw import class_color, draw_boxes
from yolo.viz.error_grids import error_grids
from yolo.viz.figures import plot_curves

PLOTS = {
    "threshold_sweep",
    "precision_recall",
    "ap_per_class",
    "ap_by_size",
    "error_budget",
    "confusion_matrix",
    "reliability",
    "false_positives",
    "misses",
}


CPU = ["--workers", "0", "--accelerator", "cpu", "--precision", "32-true"]


@pytest.fixture(scope="module")
def weights(tiny_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained detector in a run folder says 0 everywhere, each anchor by its own strength."""
    torch.manual_seed(0)
    cfg = Config(
        data_root=str(tiny_digits),
        width=0.0625,
        img_sizes=(64,),
        batch_size=8,
        score_threshold=0.001,
    )
    model = YoloV3(len(CLASS_NAMES), cfg.width)
    with torch.no_grad():
        model.train()(torch.rand(8, 3, 64, 64))
        for head in model.heads:
            head[-1].weight.zero_()
            head[-1].bias.view(3, -1)[:, 4] = torch.tensor([-1.0, 0.0, 1.0])
            head[-1].bias.view(3, -1)[:, 5] = 4.0
    run = RunFolder(tmp_path_factory.mktemp("run"))
    run.write_config(cfg)
    path = run.checkpoints / "tiny.safetensors"
    save_weights(
        path,
        model,
        cfg,
        tuple(CLASS_NAMES),
        make_anchors([20, 24] * 3 + [40, 48] * 3 + [70, 80] * 3, 64),
        {},
    )
    return path


@pytest.fixture(scope="module")
def evaluation(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one evaluation; what it printed is in `printed.txt`."""
    folder = tmp_path_factory.mktemp("evaluation")
    words = [
        "--checkpoint",
        str(weights),
        "--out-dir",
        str(folder),
        "--write-detections",
        str(folder / "files"),
    ]
    with (folder / "printed.txt").open("w") as file, contextlib.redirect_stdout(file):
        assert evaluate.main([*words, "--max-detections", "200", *CPU]) == 0
    return folder


def results_in(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_one_command_writes_numbers_plots_and_tensorboard_events(evaluation: Path) -> None:
    results = results_in(evaluation)
    assert {
        "class_accuracy",
        "map_50",
        "by_size",
        "errors",
        "confusion_matrix",
        "calibration",
    } <= set(results)
    assert {"checkpoint_digest", "data", "loader", "test_size", "thresholds", "commit"} <= set(
        results
    )
    assert results["thresholds"]["max_detections"] == 200
    assert {path.stem for path in (evaluation / "plots").iterdir()} == PLOTS
    assert all(read_rgb(path).std() > 5 for path in (evaluation / "plots").iterdir())
    assert list(evaluation.glob("events.out.tfevents*"))


def test_the_printed_table_has_classes_sizes_and_errors(evaluation: Path) -> None:
    printed = (evaluation / "printed.txt").read_text()
    for text in (
        "class accuracy",
        "mAP@0.5 (area)",
        "medium",
        "localisation",
        "ECE",
        str(evaluation),
    ):
        assert text in printed


def test_written_detections_score_the_same_when_read_again(
    evaluation: Path, tiny_digits: Path, tmp_path: Path
) -> None:
    words = [
        "--detections",
        str(evaluation / "files"),
        "--data-root",
        str(tiny_digits),
        "--split",
        "test",
    ]
    assert (
        evaluate.main([*words, "--classes", ",".join(CLASS_NAMES), "--out-dir", str(tmp_path)]) == 0
    )
    again, before = results_in(tmp_path), results_in(evaluation)
    assert again["confusion_matrix"] == before["confusion_matrix"]
    assert np.sum(again["confusion_matrix"]) > 100
    for kind, row in before["errors"].items():
        assert again["errors"][kind] == pytest.approx(row, abs=1e-6)
    for name in ("map_50", "map_50_11pt", "map_50_95"):
        assert again[name] == pytest.approx(before[name], abs=1e-6)


def test_pictures_are_the_same_whether_this_or_other_processes_draw_them(
    evaluation: Path, tiny_digits: Path, tmp_path: Path
) -> None:
    words = ["--detections", str(evaluation / "files"), "--data-root", str(tiny_digits)]
    words += ["--split", "test", "--classes", ",".join(CLASS_NAMES), "--out-dir"]
    assert evaluate.main([*words, str(tmp_path / "here")]) == 0  # torch is loaded: no fork
    assert gc.isenabled()
    code = "import os, sys, evaluate\nos.sched_getaffinity = lambda _: {0, 1}\n"
    code += f"sys.exit(evaluate.main({[*words, str(tmp_path / 'forked')]!r}))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    here, forked = (sorted((tmp_path / name / "plots").iterdir()) for name in ("here", "forked"))
    assert [path.name for path in here] == [path.name for path in forked]
    assert {"false_positives.png", "precision_recall.png"} <= {path.name for path in here}
    for one, other in zip(here, forked, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_mosaics_measure_the_cells_and_say_so(weights: Path, tmp_path: Path) -> None:
    words = ["--checkpoint", str(weights), "--out-dir", str(tmp_path), *CPU, "--mosaic"]
    assert evaluate.main(words) == 0
    results = results_in(tmp_path)
    assert results["loader"] == "mosaics of four test images"
    assert "map_50" not in results
    assert 0 <= results["object_accuracy"] <= 1


def test_pictures_are_answered_as_json_csv_and_pictures(
    weights: Path, tiny_digits: Path, tmp_path: Path
) -> None:
    images = str(tiny_digits / "JPEGImages" / "test_000[0-4]*")
    words = ["--checkpoint", str(weights), "--images", images, "--out-dir", str(tmp_path), *CPU]
    assert evaluate.main(words) == 0
    answers = json.loads((tmp_path / "predictions.json").read_text())
    assert len(answers) == 5 == len(list((tmp_path / "pictures").iterdir()))
    with (tmp_path / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(len(answer["detections"]) for answer in answers)
    for answer in answers:
        for detection in answer["detections"]:
            left, top, right, bottom = detection["box"]
            assert 0 <= left <= right <= answer["width"] and 0 <= top <= bottom <= answer["height"]
            assert detection["class"] in CLASS_NAMES and 0.3 <= detection["score"] <= 1


def test_a_picture_that_cannot_be_read_costs_a_line_and_not_the_others(
    weights: Path, tiny_digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    good = next((tiny_digits / "JPEGImages").iterdir())
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.jpg").write_bytes(good.read_bytes())
    (tmp_path / "in" / "bad.jpg").write_bytes(good.read_bytes()[:100])
    words = [
        "--checkpoint",
        str(weights),
        "--images",
        str(tmp_path / "in"),
        "--out-dir",
        str(tmp_path),
    ]
    assert evaluate.main([*words, *CPU]) == 1
    assert "bad.jpg" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "predictions.json").read_text())) == 1


def test_pictures_are_answered_by_the_newest_run_and_become_labels(
    weights: Path,
    tiny_digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert list_runs() == []  # and so the bundled weights are used
    for number, name in enumerate(("old", "new")):
        file = tmp_path / "runs" / name / "checkpoints" / "epoch001-step000001-lr1.000e-03.ckpt"
        file.parent.mkdir(parents=True)
        file.write_bytes(b"")
        os.utime(file, (number, number))
    assert list_runs() == [Path("runs/new"), Path("runs/old")]
    monkeypatch.setattr(
        "yolo.runs.checkpoint.resolve_checkpoint",
        lambda path, last: {Path("runs/new"): weights}[path],
    )
    images = str(tiny_digits / "JPEGImages" / "test_0000*")
    words = ["--images", images, "--out-dir", str(tmp_path / "out"), "--write-labels", "yolo"]
    assert evaluate.main([*words, *CPU]) == 0
    answers = json.loads((tmp_path / "out/predictions.json").read_text())
    for answer in answers:
        lines = (tmp_path / "out/labels" / f"{Path(answer['image']).stem}.txt").read_text()
        assert len(lines.splitlines()) == len(answer["detections"])
    printed = capsys.readouterr().out
    assert str(weights) in printed and "a second" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --checkpoint FILE to measure it, --images SOURCE to predict"),
        (["--checkpoint", "a", "--detections", "b"], "give --checkpoint FILE"),
        (["--checkpoint", "a", "--write-labels", "yolo"], "give --images"),
        (["--detections", "a", "--images", "b"], "scored as it is"),
        (["--checkpoint", "a", "--mosaic", "--write-detections", "b"], "needs whole images"),
        (["--checkpoint", "a", "--calibrate"], "needs --split"),
        (["--checkpoint", "a", "--calibrate", "--split", "x", "--images", "b"], "goes without"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate.main(words)


def test_data_with_other_classes_than_the_checkpoint_is_refused_by_name(
    weights: Path, tiny_digits: Path, tmp_path: Path
) -> None:
    for folder in ("Annotations", "ImageSets", "JPEGImages"):
        (tmp_path / folder).symlink_to(tiny_digits / folder)
    (tmp_path / "Annotations").unlink()
    (tmp_path / "Annotations").mkdir()
    for path in (tiny_digits / "Annotations").iterdir():
        text = path.read_text()
        for name in CLASS_NAMES:
            text = text.replace(f"<name>{name}</name>", "<name>zebra</name>")
        (tmp_path / "Annotations" / path.name).write_text(text)
    words = ["--checkpoint", str(weights), "--data-root", str(tmp_path), "--dataset", "voc", *CPU]
    with pytest.raises(UserError, match="zebra"):
        evaluate.main(words)


def test_errors_far_outside_of_their_images_are_pictured_all_the_same(tiny_digits: Path) -> None:
    dataset = open_dataset(Config(data_root=str(tiny_digits)), "test", None)
    boxes = np.array([[-900.0, -900, -800, -800], [5000, 10, 5003, 900], [0, 0, 1, 3000]])
    detections = Detections(
        np.zeros(3, np.int64), boxes, np.array([0.9, 0.8, 0.7]), np.zeros(3, np.int64)
    )
    grids = error_grids(dataset, detections, load_objects(dataset, [0]), "plain")
    assert set(grids) == {"false_positives", "misses"}
    assert all(draw().shape[2] == 3 for draw in grids.values())


def test_boxes_are_drawn_where_they_are_and_the_picture_is_not_changed() -> None:
    image = np.zeros((100, 120, 3), np.uint8)
    drawn = draw_boxes(image, np.array([[20.0, 40, 80, 90]]), [3], ["a", "b", "c", "d"], [0.9])
    assert image.sum() == 0
    assert tuple(drawn[65, 20]) == class_color(3)
    assert drawn[65, 50].sum() == 0
    assert draw_boxes(image, np.zeros((0, 4)), [], ["a"]).sum() == 0


def test_boxes_beyond_the_picture_are_drawn_on_its_edge() -> None:
    image = np.zeros((50, 50, 3), np.uint8)
    drawn = draw_boxes(image, np.array([[-30.0, -30, 90, 90]]), [0], ["a"])
    assert drawn[25, 0].sum() > 0 and drawn[25, 49].sum() > 0


def test_curves_are_drawn_from_any_lines(tmp_path: Path) -> None:
    train = [
        {"kind": "train", "step": k, "loss": 1 / k, "box": 1 / k, "lr": 0.1} for k in (1, 2, 3)
    ]
    tests = [{"kind": "evaluation", "step": 3, "map_50": 0.5}]
    for name, lines in {"both": [*train, *tests], "train": train, "nothing": []}.items():
        plot_curves(lines, tmp_path / f"{name}.png")
        assert read_rgb(tmp_path / f"{name}.png").shape[2] == 3


def test_calibrating_writes_a_new_weight_file_that_is_used_like_any_other(
    weights: Path,
    evaluation: Path,
    tiny_digits: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    trained = tmp_path / "weights.safetensors"
    trained.write_bytes(weights.read_bytes())
    data = ["--data-root", str(tiny_digits), "--split", "test"]
    words = ["--checkpoint", str(trained), *data, *CPU, "--out-dir"]
    assert evaluate.main([*words, str(tmp_path / "fit"), "--calibrate", "--nms", "merge"]) == 0
    calibrated = tmp_path / "weights-calibrated.safetensors"
    assert trained.read_bytes() == weights.read_bytes()
    results = results_in(tmp_path / "fit")
    before, after = (
        results["calibrated"]["expected_error_before"],
        results["calibration"]["expected_error"],
    )
    assert after < before / 2
    for name in ("class_accuracy", "object_accuracy", "no_object_accuracy"):
        assert results[name] == pytest.approx(results_in(evaluation)[name])
    assert f"{before:.4f}" in capsys.readouterr().out
    stored = load_weights(calibrated)
    assert stored.calibration["expected_error_after"] == after
    assert stored.calibration["images"] == results["image_count"]
    assert stored.config.nms == "merge"  # as it was when the scores were fitted
    assert np.shape(stored.calibration["factors"]) == (3, 2)
    words[1] = str(calibrated)
    assert evaluate.main([*words, str(tmp_path / "again")]) == 0
    again = results_in(tmp_path / "again")
    assert again["calibration"]["expected_error"] == pytest.approx(after, abs=1e-3)
    chosen = again["at_chosen_threshold"]
    assert chosen["threshold"] == stored.calibration["object_threshold"]
    with pytest.raises(UserError, match="calibrated already"):
        evaluate.main([*words, str(tmp_path / "third"), "--calibrate"])
    words[1] = str(trained)
    with pytest.raises(UserError, match="is there already"):
        evaluate.main([*words, str(tmp_path / "third"), "--calibrate"])


def test_results_predictions_and_detections_are_never_written_over(
    weights: Path, tiny_digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        picture = next((tiny_digits / "JPEGImages").iterdir())
        (tmp_path / folder / f"1{picture.suffix}").write_bytes(picture.read_bytes())
    images, out = str(tmp_path / "*" / "1.*"), tmp_path / "out"
    words = ["--checkpoint", str(weights), "--images", images, "--out-dir", str(out), *CPU]
    assert evaluate.main(words) == 0
    printed = capsys.readouterr().out
    assert "another picture has this name: written as 1-2" in printed
    assert len(list((out / "pictures").iterdir())) == 2
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert evaluate.main(words) == 0
    assert f"{out} is there already: written to {out}-2" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert (tmp_path / "out-2" / "predictions.json").exists()
    files = tmp_path / "files"
    files.mkdir()
    (files / "comp4_det_test_0.txt").write_text("somebody's\n")
    words = ["--checkpoint", str(weights), "--out-dir", str(tmp_path / "r"), *CPU]
    assert evaluate.main([*words, "--write-detections", str(files)]) == 0
    assert (files / "comp4_det_test_0.txt").read_text() == "somebody's\n"
    assert (tmp_path / "files-2" / "comp4_det_test_0.txt").exists()


def test_flip_averages_a_picture_and_its_mirror_image_and_says_so(
    weights: Path, tmp_path: Path
) -> None:
    words = ["--checkpoint", str(weights), "--out-dir", str(tmp_path), *CPU, "--tta", "flip"]
    assert evaluate.main(words) == 0
    results = results_in(tmp_path)
    assert results["tta"] == "flip"
    assert results["map_50"] is not None


def test_scoring_files_does_without_torch_which_takes_seconds_to_import() -> None:
    code = (
        "import sys, yolo.data.sources, yolo.metrics.devkit, yolo.metrics.report\n"
        "import yolo.runs.results, yolo.viz.error_grids\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
