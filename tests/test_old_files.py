"""Runs, checkpoints and weight files of older versions load, go on, and give their old figures."""

import json
import lzma
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

import evaluate
import train

FIXTURES = Path(__file__).parent / "fixtures" / "63fdf3c"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())
SPLIT = {"detection": "train", "classification": "test"}
CPU = ["--accelerator", "cpu", "--precision", "32-true", "--workers", "0"]


@pytest.fixture
def old(tmp_path: Path, tiny_digits: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The files as they were, beside the data they were made with, in the working folder."""
    for source in (path for path in FIXTURES.rglob("*") if path.is_file()):
        target = tmp_path / source.relative_to(FIXTURES)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".xz":
            target.with_suffix("").write_bytes(lzma.decompress(source.read_bytes()))
        else:
            shutil.copyfile(source, target)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "digits").symlink_to(tiny_digits)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FigureCanvasAgg, "draw", leave_blank)  # takes seconds, is not tested here
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as they were made: two threads add up in another order
    yield tmp_path
    torch.set_num_threads(threads)


def leave_blank(canvas: FigureCanvasAgg) -> None:
    canvas.renderer = canvas.get_renderer()


def checkpoint_of(run: Path) -> Path:
    [path] = (run / "checkpoints").glob("*.ckpt")
    return path


def logged(run: Path) -> dict[str, dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {str(line["step"]): line for line in lines if line["kind"] == "train"}


@pytest.mark.parametrize(("task", "end"), [("detection", 149), ("classification", 52)])
def test_a_stopped_run_goes_on_with_the_losses_it_would_have_had(
    old: Path, task: str, end: int
) -> None:
    run = old / task
    before = logged(run)
    assert train.main(["--resume", str(run), "--max-steps", str(end)]) == 0
    after = logged(run)
    for step, values in EXPECTED[task]["resumed"].items():
        found = {name: after[step][name] for name in values}
        assert found == pytest.approx(values, rel=1e-5), f"step {step}"
    assert {step: after[step] for step in before} == before, "what was logged stays"


@pytest.mark.parametrize("task", ["detection", "classification"])
@pytest.mark.parametrize("kind", ["checkpoint", "weights"])
def test_a_file_is_evaluated_to_its_old_figures(old: Path, task: str, kind: str) -> None:
    weights = old / f"{task}.safetensors"
    path = checkpoint_of(old / task) if kind == "checkpoint" else weights
    # a weight file, as it may come from anywhere, does not say on what it is tested
    split = ["--split", SPLIT[task]] if kind == "weights" else []
    out = ["--out-dir", str(old / "out")]
    assert evaluate.main(["--checkpoint", str(path), *out, *split, *CPU]) == 0
    results = json.loads((old / "out" / "results.json").read_text())
    expected = EXPECTED[task]["evaluated"][kind]
    measure = "ap_50" if task == "detection" else "accuracy"
    found = {name: row[measure] for name, row in results["per_class"].items()}
    assert found == pytest.approx(expected["per_class"], abs=1e-4)
    for name in expected.keys() - {"per_class"}:
        assert results[name] == pytest.approx(expected[name], abs=1e-4), name
