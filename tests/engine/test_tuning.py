"""What `auto` finds: the largest batch that fits on all ranks, and a rate below divergence."""

from pathlib import Path
from typing import Any

import pytest
import torch

from yolo.cli import read_yaml
from yolo.config import Config, ResolvedConfig
from yolo.engine import fabric as processes
from yolo.engine import tuning
from yolo.errors import UserError
from yolo.runs.checkpoint import Checkpoint
from yolo.tasks.base import Task
from yolo.tasks.build import build_task


@pytest.fixture
def task(tiny_config: Path) -> Task:
    return build_task(
        Config.from_dict({**read_yaml(tiny_config), "batch_size": "auto", "max_lr": "auto"})
    )


@pytest.fixture
def fabric(task: Task) -> Any:
    return processes.make_fabric(task.config)[0]


def let_only_fit(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pretend that memory ends above a batch size; return the sizes that were tried."""
    tried = []

    def try_micro_batch(fabric: Any, cfg: Config, task: Task, size: int) -> None:
        tried.append(size)
        if size > batch_size:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(tuning, "_try_micro_batch", try_micro_batch)
    return tried


def test_the_largest_batch_that_fits_is_found_from_above(
    fabric: Any, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = let_only_fit(5, monkeypatch)
    assert tuning.find_batch_size(fabric, task.config, task, largest=64) == 4
    assert tried == [64, 32, 16, 8, 4]


def test_the_rank_with_the_least_memory_decides_and_accumulation_multiplies(
    fabric: Any, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_only_fit(8, monkeypatch)
    # what the other rank found
    monkeypatch.setattr(tuning, "gather", lambda fabric, found: [found, 2])
    cfg = Config.from_dict({**task.config.to_dict(), "grad_accum_steps": 3})
    assert tuning.find_batch_size(fabric, cfg, task) == 2 * fabric.world_size * 3


def test_nothing_fits_is_one_clear_line(
    fabric: Any, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_only_fit(0, monkeypatch)
    with pytest.raises(UserError, match="not even one image of --img-sizes 64"):
        tuning.find_batch_size(fabric, task.config, task)


def test_an_error_that_is_not_about_memory_is_not_hidden(
    fabric: Any, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(tuning, "_try_micro_batch", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        tuning.find_batch_size(fabric, task.config, task)


def test_resolving_auto_tries_on_a_copy_and_an_earlier_start_decides(
    fabric: Any, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    monkeypatch.setattr(tuning, "RANGE_STEPS", 3)
    monkeypatch.setattr(tuning, "CPU_BATCH", 2)
    settled = tuning.resolve(fabric, None, task, tmp_path, None)
    assert settled.batch_size == 2
    assert isinstance(settled.max_lr, float) and settled.max_lr > 0
    assert (tmp_path / "lr_range.png").read_bytes().startswith(b"\x89PNG")
    after = task.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    earlier = Checkpoint(Path("earlier.ckpt"), {"config": {"batch_size": 6, "max_lr": 0.5}})
    again = tuning.resolve(fabric, None, task, tmp_path, earlier)
    assert (again.batch_size, again.max_lr) == (6, 0.5)


def test_the_rates_rise_by_a_constant_factor() -> None:
    rates = torch.tensor(tuning.rising_rates(50), dtype=torch.float64)
    assert (rates[0], rates[-1]) == (tuning.LOWEST_LR, pytest.approx(tuning.HIGHEST_LR))
    torch.testing.assert_close(rates[1:] / rates[:-1], (rates[1] / rates[0]).expand(49))


def test_the_proposal_is_a_tenth_of_the_rate_with_the_lowest_smoothed_loss() -> None:
    losses = [10.0] * 5 + [5.0] * 20 + [50.0] * 5
    rates = tuple(tuning.rising_rates(len(losses)))
    smoothed = tuning.smooth(losses)
    curve = tuning.LrRange(rates, tuple(losses), tuple(smoothed))
    assert smoothed.index(min(smoothed)) == 24
    assert curve.proposal == pytest.approx(rates[24] / 10, rel=0.05)
    assert tuning.smooth([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])  # no bias towards zero


def test_train_time_plans_the_epochs_that_fit_with_their_tests(
    fabric: Any, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "_seconds_of_a_step", lambda *_: 10.0)
    monkeypatch.setattr(tuning, "_seconds_of_a_test", lambda *_: 40.0)
    changed = {"batch_size": 4, "max_lr": 1e-3, "eval_every": 2}
    cfg = ResolvedConfig.from_dict({**task.config.to_dict(), **changed})
    # 24 images are 6 steps: 60 s, and half a test; the last test is always made
    assert tuning.epochs_in_time(fabric, None, task, cfg, 1000.0) == pytest.approx(
        (1000 - 40) / 80, abs=0.3
    )


def test_train_time_measures_without_touching_the_run(fabric: Any, task: Task) -> None:
    changed = {"batch_size": 4, "max_lr": 1e-3, "train_time": "10m", "mosaic_off_share": 0.5}
    task = task.with_config(Config.from_dict({**task.config.to_dict(), **changed}))
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    cfg = tuning.resolve(fabric, None, task, Path("unused"), None)
    assert cfg.epochs > task.config.epochs  # these steps take milliseconds
    assert task.with_config(cfg).train_samples.mosaic_epochs == pytest.approx(cfg.epochs / 2)
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())
    earlier = Checkpoint(Path("earlier.ckpt"), {"config": {"epochs": 7}})
    assert tuning.resolve(fabric, None, task, Path("unused"), earlier).epochs == 7
