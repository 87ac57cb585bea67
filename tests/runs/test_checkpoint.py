"""Checkpoints are whole or absent, checked when read, never overwritten, pruned only if asked."""

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import whole_content

from yolo import files
from yolo.errors import UserError
from yolo.runs.checkpoint import (
    CheckpointWriter,
    find_newest,
    load_checkpoint,
    load_weights,
    prune_checkpoints,
    resolve_checkpoint,
    save_checkpoint,
    set_aside,
)
from yolo.runs.folder import checkpoint_name, list_checkpoints, step_of


def content(step: int, value: float = 0.0) -> dict[str, Any]:
    return whole_content(step, value, 1000)


def save(folder: Path, step: int) -> Path:
    path = folder / checkpoint_name(step // 10, step, 1e-3)
    save_checkpoint(path, content(step))
    return path


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    saved = {
        "model": {"weight": torch.randn(3, 4).to(torch.bfloat16), "steps": torch.tensor(3)},
        "scaler": None,
        "config": {"img_sizes": [320, 416], "name": "voc", "cache": True},
        "loss_sums": [{"box": 0.1}],
    }
    save_checkpoint(tmp_path / "a.ckpt", saved)
    loaded = load_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(loaded["model"].pop("weight"), saved["model"].pop("weight"))
    assert {key: loaded[key] for key in saved} == saved


def test_the_name_carries_epoch_step_and_the_value_of_the_schedule() -> None:
    name = checkpoint_name(12, 4321, 3.412e-04)
    assert name == "epoch012-step004321-lr3.412e-04.ckpt"
    assert step_of(Path(name)) == 4321


def test_a_full_disk_leaves_the_older_file_and_no_fragment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    older = save(tmp_path, 1)
    monkeypatch.setattr(files, "flush_to_disk", no_space)
    with pytest.raises(UserError, match=r"No space left.*earlier checkpoints are untouched"):
        save(tmp_path, 2)
    assert list(tmp_path.iterdir()) == [older]
    load_checkpoint(older)


class Stranger:
    def __reduce__(self) -> Any:
        return os.system, ("echo this must not run",)


def rewrite(path: Path, **changes: Any) -> None:
    torch.save({**torch.load(path, weights_only=True), **changes}, path)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-200]), "damaged"),
        (lambda path: path.write_bytes(b"not a checkpoint"), "damaged"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: path.unlink(), "no such checkpoint"),
        (lambda path: rewrite(path, step=8), "digest"),
        (
            lambda path: rewrite(path, format_version=99),
            "checkpoint format 99, this version reads 1",
        ),
        (lambda path: rewrite(path, format_version=torch.ones(2)), "format of type Tensor"),
        (lambda path: torch.save({"weight": torch.ones(1)}, path), "--init-weights"),
        (lambda path: torch.save([1, 2], path), "no checkpoint of this project"),
        (lambda path: torch.save({"model": Stranger()}, path), "damaged or no checkpoint"),
    ],
)
def test_what_is_no_intact_checkpoint_is_one_clear_line(
    tmp_path: Path, harm: Any, message: str
) -> None:
    path = save(tmp_path, 7)
    harm(path)
    with pytest.raises(UserError, match=message) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_single_changed_weight_is_noticed(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    loaded = torch.load(path, weights_only=True)
    loaded["model"]["weight"][500] += 1e-3
    torch.save(loaded, path)
    with pytest.raises(UserError, match="digest"):
        load_checkpoint(path)


def test_a_damaged_newest_is_reported_and_the_one_before_taken(tmp_path: Path) -> None:
    intact, damaged = save(tmp_path, 9), save(tmp_path, 10)
    damaged.write_bytes(damaged.read_bytes()[:100])
    warnings: list[str] = []
    newest = find_newest(tmp_path, warnings.append)
    assert newest and newest.path == intact and newest.content["step"] == 9
    assert len(warnings) == 1 and damaged.name in warnings[0]
    intact.write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint can be read"):
        find_newest(tmp_path, warnings.append)


def test_newest_means_the_highest_step_and_fragments_do_not_count(tmp_path: Path) -> None:
    assert find_newest(tmp_path / "nothing", print) is None
    paths = [save(tmp_path, step) for step in (5, 1_000_000, 999_999)]
    (tmp_path / "epoch200-step2000000-lr1.000e-03.ckpt.part").write_bytes(b"half")
    newest = find_newest(tmp_path, print)
    assert newest and newest.path == paths[1]


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    paths = [save(tmp_path, step) for step in range(1, 7)]
    CheckpointWriter(tmp_path, "10m").mark_best(paths[1])
    assert prune_checkpoints(tmp_path, keep=2) == [paths[0], paths[2], paths[3]]
    assert list_checkpoints(tmp_path) == [paths[1], paths[4], paths[5]]


def test_later_checkpoints_are_set_aside_not_deleted(tmp_path: Path) -> None:
    paths = [save(tmp_path, step) for step in (1, 2, 3)]
    assert set_aside(tmp_path, step=1) == paths[1:]
    assert list_checkpoints(tmp_path) == paths[:1]
    assert len(list(tmp_path.glob("*.aside"))) == 2


def test_a_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, "500")
    first = writer.save(content(3, value=1.0))
    assert writer.save(content(3, value=2.0)) == first
    assert load_checkpoint(first)["model"]["weight"][0] == 1.0


def test_saving_is_due_by_steps_or_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_steps = CheckpointWriter(tmp_path, "500")
    assert [step for step in range(1, 1501) if by_steps.is_due(step)] == [500, 1000, 1500]
    by_time = CheckpointWriter(tmp_path, "10m")
    now = time.monotonic()
    assert not by_time.is_due(1)
    monkeypatch.setattr(time, "monotonic", lambda: now + 601)
    assert by_time.is_due(1)
    by_time.save(content(1))
    assert not by_time.is_due(2)


def test_a_run_folder_stands_for_its_best_checkpoint_and_else_for_the_newest(
    tmp_path: Path,
) -> None:
    writer = CheckpointWriter(tmp_path / "checkpoints", "1")
    first, second = (
        writer.save({"epoch": 0, "step": step, "lr": 0.1, "model": {}}) for step in (1, 2)
    )
    assert resolve_checkpoint(tmp_path) == second
    writer.mark_best(first)
    assert resolve_checkpoint(str(tmp_path)) == first
    first.unlink()
    assert resolve_checkpoint(tmp_path) == second
    assert resolve_checkpoint("any/file.ckpt") == Path("any/file.ckpt")


def test_a_folder_without_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        resolve_checkpoint(tmp_path)


def test_bundled_weights_of_earlier_versions_are_those_that_took_their_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = "weights/voc_small_yolov3.safetensors", Path("weights/voc.safetensors")
    assert resolve_checkpoint(old) == new
    assert "not bundled any more; voc.safetensors took its place" in capsys.readouterr().out
    mine = tmp_path / old
    mine.parent.mkdir()
    mine.touch()
    elsewhere = Path("runs/voc_small_yolov3.safetensors")
    assert [resolve_checkpoint(mine), resolve_checkpoint(elsewhere)] == [mine, elsewhere]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("step", [torch.ones(2), "7", None])
def test_a_step_that_is_no_number_has_no_results(tmp_path: Path, step: Any) -> None:
    (tmp_path / "results.json").write_text('{"step": 7}')
    path = tmp_path / "checkpoints" / "a.ckpt"
    save_checkpoint(path, {**content(7), "step": step})
    with pytest.raises(UserError, match="its anchors contradict"):
        load_weights(path)
