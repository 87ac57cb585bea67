"""The records of a run: every step once, however often the run was interrupted."""

import os
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from yolo.runs.logbook import Logbook, read_metrics


def write(logbook: Logbook, *steps: int) -> None:
    for step in steps:
        logbook.record("train", step, {"loss": float(step)})
    logbook.close()


def steps_of(run_dir: Path, kind: str) -> list[int]:
    return [
        line["step"] for line in read_metrics(run_dir / "metrics.jsonl") if line["kind"] == kind
    ]


def test_what_was_written_after_the_checkpoint_is_cut_here_and_in_tensorboard(
    tmp_path: Path,
) -> None:
    write(Logbook(tmp_path), 1, 2, 3, 4, 5)
    write(Logbook(tmp_path, step=3), 4, 5, 6)
    assert steps_of(tmp_path, "train") == [1, 2, 3, 4, 5, 6]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_starts_again_from_nothing_keeps_nothing(tmp_path: Path) -> None:
    write(Logbook(tmp_path), 1, 2)
    write(Logbook(tmp_path), 1)
    assert steps_of(tmp_path, "train") == [1]


@pytest.mark.parametrize(("evaluation_due", "kept"), [(False, [2, 4]), (True, [2])])
def test_a_test_that_will_be_repeated_is_cut_too(
    tmp_path: Path, evaluation_due: bool, kept: list[int]
) -> None:
    logbook = Logbook(tmp_path)
    for step in (2, 4):
        logbook.record("train", step, {})
        logbook.record("evaluation", step, {})
    logbook.close()
    Logbook(tmp_path, step=4, evaluation_due=evaluation_due).close()
    assert steps_of(tmp_path, "train") == [2, 4]
    assert steps_of(tmp_path, "evaluation") == kept


def test_a_broken_line_costs_itself_only(tmp_path: Path) -> None:
    write(Logbook(tmp_path), 1, 2, 3, 4)
    file = tmp_path / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    lines[1] = b'{"kind": "train", "st\xff\0\n'
    lines.insert(3, b"[1]\n\n{}\n" + b"\0" * 20 + b"\n")
    file.write_bytes(b"".join(lines))
    assert steps_of(tmp_path, "train") == [1, 3, 4]
    write(Logbook(tmp_path, step=4), 5)
    assert steps_of(tmp_path, "train") == [1, 3, 4, 5]


def test_the_records_are_on_the_disk_before_a_checkpoint_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logbook, synced = Logbook(tmp_path), []
    monkeypatch.setattr("os.fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    logbook.record("train", 1, {})
    logbook.flush()
    assert logbook.path.stat().st_ino in synced
    logbook.close()


def test_a_line_that_a_crash_cut_short_is_left_out(tmp_path: Path) -> None:
    write(Logbook(tmp_path), 1, 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    assert steps_of(tmp_path, "train") == [1, 2]
    write(Logbook(tmp_path, step=2), 3)
    assert steps_of(tmp_path, "train") == [1, 2, 3]
