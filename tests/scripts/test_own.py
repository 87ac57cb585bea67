"""Own pictures: `train.py --data-root FOLDER` and what it leaves, on tiny sets of every layout."""

import json
from pathlib import Path

import layouts
import pytest

import evaluate
import train
from yolo.config import Config
from yolo.engine import memory
from yolo.errors import UserError
from yolo.runs.checkpoint import load_weights, resolve_checkpoint

SMALL = [
    "--backbone",
    "darknet53",
    "--width",
    "0.05",
    "--img-sizes",
    "64,96",
    "--test-size",
    "96",
    "--batch-size",
    "4",
]
SMALL += ["--workers", "0", "--accelerator", "cpu", "--precision", "32-true", "--log-every", "2"]
PLAN = ["--train-steps", "6", "--tests", "3"]


@pytest.mark.parametrize(
    ("text", "flags", "expected"),
    [
        ("val_fraction: [1]", [], "'val_fraction: [1]' has a value of the wrong type"),
        ("val_fraction: null", [], "'val_fraction: None' has a value of the wrong type"),
        ("val_fraction: .nan", [], "--val-fraction nan: must lie between 0 and 1"),
        ("", ["--val-fraction", "x"], "--val-fraction x: want a number between 0 and 1"),
        ("", ["--val-fraction", "1.5"], "--val-fraction 1.5: must lie between 0 and 1"),
        ("data_root: 5", None, "--data-root 5: does not exist"),
        ("data_root: true", None, "'data_root: True' has a value of the wrong type"),
    ],
)
def test_what_is_read_ahead_of_a_configuration_is_checked_too(
    tmp_path: Path, text: str, flags: list[str] | None, expected: str
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(f"dataset: auto\n{text}\n")
    if flags is not None:
        flags = [*flags, "--data-root", str(layouts.make("labelImg", tmp_path / "cups"))]
    with pytest.raises(UserError) as caught:
        train.main(["--config", str(config), *(flags or [])])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def own_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finished run, and what it printed."""
    folder = tmp_path_factory.mktemp("own")
    data = layouts.make("labelImg", folder / "cups")
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        argv = [*SMALL, *PLAN, "--data-root", str(data), "--out-dir", str(folder / "run")]
        assert train.main(argv) == 0
    return folder / "run", "\n".join(lines)


def evaluations(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "evaluation"]


def test_nothing_but_the_folder_is_named_and_what_is_done_is_printed(own_run):
    _, printed = own_run
    assert "pictures and YOLO labels side by side in" in printed and "configs/own.yaml" in printed
    assert "20% of the pictures, drawn by their names" in printed
    assert (
        "is of --backbone timm/tf_efficientnet_lite2 --width 0.5: this run starts from random"
        in printed
    )
    assert "mosaic       68% of the samples" in printed
    assert "6 steps: the same again by --epochs 3" in printed
    assert "these pictures chose the best weights" in printed


def test_each_test_prints_the_accuracies_map_and_the_best_so_far(own_run):
    run, printed = own_run
    tests = evaluations(run)
    assert [line["step"] for line in tests] == [2, 4, 6]
    best = -1.0
    for line in tests:
        best = max(best, line["map_50"])
        assert f"test at step {line['step']}: class " in printed
        assert f"mAP {line['map_50']:.3f}; best mAP so far {best:.3f}" in printed


def test_the_best_by_map_is_kept_as_weights_and_gives_the_headline(own_run):
    run, _ = own_run
    tests = evaluations(run)
    results = json.loads((run / "results.json").read_text())
    best = max(tests, key=lambda line: line["map_50"])
    assert results["map_50"] == pytest.approx(best["map_50"]) and results["step"] == best["step"]
    assert results["checkpoint"] == "best.safetensors" and "[:20%]" in results["chosen_on"]
    assert resolve_checkpoint(run) == run / "best.safetensors"
    last = resolve_checkpoint(run, last=True)
    assert [last] == [*(run / "checkpoints").glob("*.ckpt")] and "step000006" in last.name
    assert load_weights(run / "best.safetensors").results["map_50"] == results["map_50"]


def test_the_drawn_pictures_are_listed_in_the_run_folder(own_run):
    run, _ = own_run
    lists = [(run / "splits" / f"{name}.txt").read_text().split() for name in ("train", "val")]
    assert sorted(Path(path).name for part in lists for path in part) == sorted(
        f"train{i}.jpg" for i in range(12)
    )


def test_a_test_split_is_looked_at_once_and_gives_the_headline(tmp_path: Path):
    data = layouts.make("yolo images/train", tmp_path / "cups")
    run = tmp_path / "run"
    assert train.main([*SMALL, *PLAN, "--data-root", str(data), "--out-dir", str(run)]) == 0
    results = json.loads((run / "results.json").read_text())
    assert results["data"].endswith("images/test") and results["image_count"] == 3
    assert results["chosen_on"].endswith("images/val")
    assert evaluate.main(["--checkpoint", str(run), "--workers", "0"]) == 0
    (again,) = run.glob("evaluations/*/results.json")
    assert json.loads(again.read_text())["map_50"] == pytest.approx(results["map_50"])


def test_max_time_ends_with_numbers_and_the_run_goes_on(tmp_path: Path, capsys):
    data = layouts.make("voc xml and images", tmp_path / "cups")
    argv = [*SMALL, "--data-root", str(data), "--out-dir", str(tmp_path / "run")]
    assert train.main([*argv, "--train-steps", "4000", "--max-time", "8s"]) == 0
    printed = capsys.readouterr().out
    assert "stopped by --max-time" in printed and "mAP@0.5 (area)" in printed
    assert "map_50" in json.loads((tmp_path / "run" / "stopped.json").read_text())
    assert not (tmp_path / "run" / "results.json").exists()


def test_memory_that_is_short_takes_smaller_batches_then_smaller_images():
    cfg = Config(batch_size=16, img_sizes=(320, 352, 384, 416), fit_memory=True)
    options = memory.smaller(cfg, shares=1)
    assert [option.batch_size for option in options[:4]] == [16, 8, 4, 16]
    assert options[3].img_sizes == (256, 288, 320) and options[3].resolved_test_size == 320
    assert [option.batch_size for option in memory.smaller(cfg, shares=8)[:2]] == [16, 8]


def test_what_a_step_needs_is_reckoned_and_fitted(monkeypatch, capsys):
    from yolo.engine.fabric import make_fabric

    cfg = Config(
        width=0.25, batch_size=16, img_sizes=(416,), accelerator="cpu", precision="32-true"
    )
    fabric, _ = make_fabric(cfg)
    for free, expected in ((32e9, (16, 416)), (3e9, (8, 416)), (0.5e9, (4, 192))):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        fitted = memory.fit_memory(fabric, cfg)
        assert (fitted.batch_size, max(fitted.img_sizes)) == expected
    assert "memory       32.0 GB free" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", layouts.LAYOUTS)
def test_every_layout_is_checked_trained_resumed_measured_and_predicted_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data = layouts.make(name, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    if "class folders" in name:
        words = ["--width", "0.125", "--batch-size", "4", "--epochs", "2", *SMALL[-8:]]
    else:
        words = [*SMALL, "--epochs", "2"]
        assert train.main(["--data-root", str(data), "--check-data", "--out-dir", "check"]) == 0
    argv = [*words, "--data-root", str(data), "--out-dir", str(run)]
    assert train.main([*argv, "--max-steps", "2"]) == 0
    (run / "results.json").unlink()
    assert train.main(["--data-root", str(data), "--resume", "auto"]) == 0
    assert (run / "results.json").exists()
    assert evaluate.main(["--checkpoint", str(run), "--workers", "0"]) == 0
    assert evaluate.main(["--checkpoint", str(run), "--images", "samples/detection/cat.jpg"]) == 0
