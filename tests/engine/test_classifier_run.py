"""The classifier from the first step to the exported file, by the detector's commands."""

import json
import re
from pathlib import Path

import pytest

import evaluate
import train
from yolo.errors import UserError

CPU = ["--accelerator", "cpu", "--workers", "0", "--threads", "1"]
CONFIG = ["--config", "configs/digits_classify.yaml"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder after eight steps of a very narrow network."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    words = [
        *CONFIG,
        *CPU,
        "--width",
        "0.125",
        "--epochs",
        "1",
        "--batch-size",
        "64",
        "--max-steps",
        "8",
    ]
    assert train.main([*words, "--out-dir", str(folder)]) == 0
    return folder


def _checkpoint(run: Path) -> str:
    return str(max((run / "checkpoints").glob("*.ckpt")))


def _results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_training_tests_the_whole_split(run: Path) -> None:
    results = _results(run)
    assert results["image_count"] == 360
    assert sum(map(sum, results["confusion_matrix"])) == 360
    hits = sum(results["confusion_matrix"][i][i] for i in range(10))
    assert results["accuracy"] == pytest.approx(hits / 360)


def test_evaluate_repeats_the_result_and_draws_the_misclassified_images(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--checkpoint", _checkpoint(run), "--out-dir", str(tmp_path), *CPU]
    assert evaluate.main(words) == 0
    assert _results(tmp_path)["confusion_matrix"] == _results(run)["confusion_matrix"]
    seven = _results(run)["per_class"]["7"]
    assert re.search(
        rf"^  7 +{seven['images']} +{seven['accuracy']:.4f}$", capsys.readouterr().out, re.M
    )
    assert {path.stem for path in (tmp_path / "plots").glob("*.png")} == {
        "confusion_matrix",
        "misclassified",
        "reliability",
    }


def test_the_fast_form_answers_nearly_the_same(run: Path, tmp_path: Path) -> None:
    words = ["--checkpoint", _checkpoint(run), "--out-dir", str(tmp_path), *CPU]
    assert evaluate.main([*words, "--fast"]) == 0
    assert _results(tmp_path)["fast"]
    assert abs(_results(tmp_path)["accuracy"] - _results(run)["accuracy"]) < 0.03


def test_the_exported_file_takes_the_place_of_the_checkpoint(run: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.safetensors"
    assert evaluate.main(["--checkpoint", _checkpoint(run), "--export", str(small)]) == 0
    assert (
        evaluate.main(["--checkpoint", str(small), "--out-dir", str(tmp_path / "again"), *CPU]) == 0
    )
    assert abs(_results(tmp_path / "again")["accuracy"] - _results(run)["accuracy"]) < 0.02


def test_a_resumed_run_ends_in_the_same_results(run: Path, tmp_path: Path) -> None:
    words = [
        *CONFIG,
        *CPU,
        "--width",
        "0.125",
        "--epochs",
        "1",
        "--batch-size",
        "64",
        "--save-every",
        "5",
    ]
    assert train.main([*words, "--max-steps", "5", "--out-dir", str(tmp_path / "cut")]) == 0
    assert train.main(["--resume", str(tmp_path / "cut"), "--max-steps", "8"]) == 0
    assert _results(tmp_path / "cut")["confusion_matrix"] == _results(run)["confusion_matrix"]


def test_training_starts_from_given_weights_and_says_what_was_taken(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*CONFIG, *CPU, "--epochs", "1", "--max-steps", "1", "--init-weights", _checkpoint(run)]
    assert train.main([*words, "--width", "0.125", "--out-dir", str(tmp_path / "warm")]) == 0
    assert "42 of 42 weights loaded" in capsys.readouterr().out
    with pytest.raises(UserError, match="use the --width"):
        train.main([*words, "--width", "0.25", "--out-dir", str(tmp_path / "wide")])


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the classifier works on 32 x 32"):
        train.main([*CONFIG, *CPU, "--img-sizes", "64", "--out-dir", str(tmp_path / "run")])


@pytest.mark.slow
def test_the_digits_are_learned_in_a_minute(tmp_path: Path) -> None:
    assert train.main([*CONFIG, "--accelerator", "cpu", "--out-dir", str(tmp_path / "run")]) == 0
    assert _results(tmp_path / "run")["accuracy"] > 0.97
