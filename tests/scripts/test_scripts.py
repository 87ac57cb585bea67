"""The scripts as a person runs them, in process: what they write, print, and refuse."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

import evaluate
import train
from yolo.errors import UsageError, UserError

TINY = [
    "--width",
    "0.0625",
    "--img-sizes",
    "64,96",
    "--batch-size",
    "8",
    "--epochs",
    "2",
    "--log-every",
    "2",
    "--eval-every",
    "1",
]
TINY += ["--dataset", "digits", "--workers", "0", "--accelerator", "cpu", "--precision", "32-true"]


@pytest.fixture(scope="module")
def finished_run(tiny_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert train.main([*TINY, "--data-root", str(tiny_digits), "--out-dir", str(folder)]) == 0
    return folder


def lines_of(folder: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_a_run_leaves_everything_that_the_design_names(finished_run):
    names = {path.name for path in finished_run.iterdir()}
    assert {
        "config.yaml",
        "schedule.txt",
        "schedule.png",
        "metrics.jsonl",
        "results.json",
        "checkpoints",
    } <= names
    assert (finished_run / "plots" / "curves.png").stat().st_size > 1000
    assert any(name.startswith("events.out.tfevents") for name in names)
    checkpoints = sorted(path.name for path in (finished_run / "checkpoints").glob("*.ckpt"))
    assert [name.split("-lr")[0] for name in checkpoints] == [
        "epoch001-step000003",
        "epoch002-step000006",
    ]


def test_each_logged_step_has_its_losses_speed_and_size(finished_run):
    logged = lines_of(finished_run, "train")
    assert [line["step"] for line in logged] == [2, 4, 6]
    for line in logged:
        assert line["loss"] == pytest.approx(
            sum(line[name] for name in ("box", "object", "no_object", "class"))
        )
        assert line["img_size"] in (64, 96)
        assert line["images_per_second"] > 0


def test_results_carry_the_numbers_and_where_they_come_from(finished_run, tiny_digits):
    results = json.loads((finished_run / "results.json").read_text())
    for name in (
        "class_accuracy",
        "no_object_accuracy",
        "object_accuracy",
        "map_50",
        "map_50_11pt",
        "map_50_95",
    ):
        assert 0 <= results[name] <= 1
    assert results["image_count"] == 8
    assert results["epoch"] == 2 and results["step"] == 6
    assert str(tiny_digits) in results["data"]
    assert {"commit", "versions", "seed", "thresholds", "weights", "loader", "hardware"} <= set(
        results
    )


def test_map_is_computed_after_the_last_epoch_only(finished_run):
    assert [("map_50" in line) for line in lines_of(finished_run, "evaluation")] == [False, True]


def test_a_finished_run_exits_0_and_changes_nothing(finished_run):
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*") if path.is_file()}
    assert train.main(["--resume", str(finished_run)]) == 0
    assert {
        path: path.stat().st_mtime_ns for path in finished_run.rglob("*") if path.is_file()
    } == before


def test_a_folder_that_holds_a_run_is_refused_with_both_ways_out(finished_run, tiny_digits):
    with pytest.raises(UsageError, match=r"--resume auto.*another folder"):
        train.main(
            [
                *TINY,
                "--dataset",
                "digits",
                "--data-root",
                str(tiny_digits),
                "--out-dir",
                str(finished_run),
            ]
        )


def test_evaluating_the_last_checkpoint_gives_the_results_of_the_run(finished_run, tmp_path):
    checkpoint = sorted((finished_run / "checkpoints").glob("*.ckpt"))[-1]
    assert (
        evaluate.main(
            ["--checkpoint", str(checkpoint), "--out-dir", str(tmp_path), "--workers", "0"]
        )
        == 0
    )
    own = json.loads((finished_run / "results.json").read_text())
    again = json.loads((tmp_path / "results.json").read_text())
    for name in ("class_accuracy", "no_object_accuracy", "object_accuracy", "map_50"):
        assert again[name] == pytest.approx(own[name], abs=1e-9)
    for name in (
        "weights",
        "loader",
        "test_size",
        "thresholds",
        "hardware",
        "data",
        "skipped",
        "versions",
    ):
        assert again[name] == own[name]


def test_max_steps_ends_early_leaves_the_schedule_and_evaluates(tiny_digits, tmp_path):
    argv = [
        *TINY,
        "--data-root",
        str(tiny_digits),
        "--out-dir",
        str(tmp_path / "run"),
        "--max-steps",
        "1",
    ]
    assert train.main(argv) == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["step"] == 1
    rows = [
        line
        for line in (tmp_path / "run" / "schedule.txt").read_text().splitlines()
        if line[0] != "#"
    ]
    assert len(rows) == 6


def test_plan_only_writes_the_schedule_and_nothing_else(tiny_digits, tmp_path):
    assert (
        train.main(
            [
                *TINY,
                "--data-root",
                str(tiny_digits),
                "--out-dir",
                str(tmp_path / "r"),
                "--plan-only",
            ]
        )
        == 0
    )
    assert {path.name for path in (tmp_path / "r").iterdir()} == {"schedule.txt", "schedule.png"}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--batch-size", "6", "--grad-accum-steps", "4"], "--batch-size 6"),
        (["--dataset", "voc", "--data-root", "nowhere"], "nowhere"),
        (["--split", "val"], "val"),
        (["--accelerator", "abacus"], "abacus"),
        (["--init-weights", "nowhere.weights"], "nowhere.weights"),
        (["--resume", "nowhere"], "nowhere"),
    ],
)
def test_bad_flags_are_one_clear_line(tiny_digits, tmp_path, flags, expected):
    with pytest.raises(UserError) as error:
        argv = [
            *TINY,
            "--data-root",
            str(tiny_digits),
            "--out-dir",
            str(tmp_path / "r"),
            *flags,
        ]
        train.main(argv)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_a_configuration_of_another_task_runs_through_the_same_script(tmp_path):
    file = tmp_path / "classify.yaml"
    values = {
        "task": "classification",
        "dataset": "digits",
        "img_sizes": 32,
        "width": 0.125,
        "epochs": 1,
    }
    file.write_text(
        yaml.safe_dump({**values, "batch_size": 256, "workers": 0, "accelerator": "cpu"})
    )
    assert train.main(["--config", str(file), "--out-dir", str(tmp_path / "run")]) == 0
    assert 0 < json.loads((tmp_path / "run" / "results.json").read_text())["accuracy"] <= 1


@pytest.mark.slow
def test_one_batch_can_be_learned_by_heart(tiny_digits, tmp_path):
    root = tmp_path / "one_batch"
    shutil.copytree(tiny_digits, root)
    names = (root / "ImageSets" / "Main" / "train.txt").read_text().splitlines()[:8]
    for split in ("train", "test"):
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
    flags = "--width 0.25 --img-sizes 224 --batch-size 8 --epochs 300 --max-lr 2e-3 --ema-decay 0.9"
    flags += " --mosaic-prob 0 --aug-affine 0 --aug-color 0 --aug-blur 0 --aug-clahe 0 --aug-gray 0"
    flags += " --log-every 50 --eval-every 100"
    assert (
        train.main([*flags.split(), "--data-root", str(root), "--out-dir", str(tmp_path / "run")])
        == 0
    )
    assert json.loads((tmp_path / "run" / "results.json").read_text())["map_50"] == pytest.approx(
        1.0
    )
