"""The benchmark of a borrowed card: it goes on whatever a row does, and ends in time."""

import json
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu

    return gpu


def test_the_rows_of_this_machine_are_printed_and_written(gpu, tmp_path):
    out = tmp_path / "card.json"
    table = gpu.Table(gpu.Settings.tiny(), 600, out)
    lines = list(table.measure(("peak", "step", "inference")))
    assert "by the step alone" in lines[-1]
    peak, step, *inference = json.loads(out.read_text())["rows"]
    assert "TFLOP/s" in peak["note"]
    for row in (step, *inference):
        assert row["error"] is None
        assert row["images_per_second"] > 0 and row["share_of_peak"] > 0


def test_a_row_that_fails_costs_no_other(gpu, tmp_path, monkeypatch):
    def broken(*_):
        raise MemoryError("not enough\nof it")

    monkeypatch.setattr(gpu.Table, "_step", broken)
    table = gpu.Table(gpu.Settings.tiny(), 600, tmp_path / "card.json")
    lines = list(table.measure(("peak", "step")))
    assert "failed: MemoryError: not enough |" in lines[2]
    assert [row.error is None for row in table.rows] == [True, False]
    assert "no row tells" in lines[-1]


def test_no_row_goes_on_beyond_the_given_time(gpu, monkeypatch):
    monkeypatch.setattr(gpu.Table, "_peak", lambda _: time.sleep(60))
    start = time.monotonic()
    rows = list(gpu.Table(gpu.Settings.tiny(), 1.5, None).measure())
    assert time.monotonic() - start < 30
    assert all("no time left" in row for row in rows[1:-1])


def test_the_made_up_photographs_are_a_voc_data_set(gpu, tmp_path):
    from yolo.config import Config
    from yolo.data.sources import open_dataset

    gpu.write_voc(tmp_path, 3)
    config = Config(dataset="voc", data_root=str(tmp_path), classes="voc")
    dataset = open_dataset(config, "2007:trainval", None)
    assert len(dataset) == 3 and not dataset.skipped
    assert all(len(dataset.annotation(i).labels) for i in range(3))
    assert dataset.image(0).shape == (375, 500, 3)


def test_a_real_training_is_timed_by_what_it_prints(gpu, tmp_path):
    words = [
        sys.executable,
        "-c",
        "import time; print('step 10 a (wait 5%)'); time.sleep(0.1); print('b')",
    ]
    (first, one), (second, two) = gpu._lines_with_times(words)
    assert (one, two) == ("step 10 a (wait 5%)", "b")
    assert gpu.STEP_LINE.search(one).groups() == ("10", "5")
    assert second >= first
