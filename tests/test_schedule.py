"""The schedule file: torch's one-cycle, exact in text, guarded against edits and other runs."""

import dataclasses
import time
from pathlib import Path

import pytest
import torch

from yolo.config import OptimizerConfig
from yolo.errors import UserError
from yolo.schedule import (
    Schedule,
    check_resume,
    plan_schedule,
    plot_schedule,
    read_schedule,
    replan,
    write_schedule,
)


def planned(
    steps_per_epoch: int = 25, ranks: int = 1, digest: str = "abc", **settings: object
) -> Schedule:
    cfg = OptimizerConfig(**{"epochs": 4, "batch_size": 8, **settings})  # type: ignore[arg-type]
    return plan_schedule(
        cfg, ranks=ranks, dataset_size=200, dataset_digest=digest, steps_per_epoch=steps_per_epoch
    )


@pytest.mark.parametrize("anneal", ["cos", "linear"])
@pytest.mark.parametrize("pct_start", [0.0, 0.2, 0.37, 1.0])
@pytest.mark.parametrize("steps_per_epoch", [1, 3, 25])
def test_rows_equal_what_torch_one_cycle_gives_in_a_training_loop(
    anneal: str, pct_start: float, steps_per_epoch: int
) -> None:
    schedule = planned(
        steps_per_epoch,
        anneal=anneal,
        pct_start=pct_start,
        max_lr=3e-3,
        div_factor=10,
        final_div_factor=50,
    )
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=1.0)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=3e-3,
        epochs=4,
        steps_per_epoch=steps_per_epoch,
        pct_start=pct_start,
        anneal_strategy=anneal,  # type: ignore[arg-type]
        div_factor=10,
        final_div_factor=50,
    )
    for step in range(len(schedule)):
        group = optimizer.param_groups[0]
        assert (schedule.lr[step], schedule.beta1[step]) == (group["lr"], group["betas"][0])
        optimizer.step()
        if step + 1 < len(schedule):
            cycle.step()
    assert len(schedule) == 4 * steps_per_epoch


def test_a_warm_up_of_exactly_one_step_starts_at_the_peak() -> None:
    # torch divides by zero here
    schedule = planned(steps_per_epoch=1, epochs=5, pct_start=0.2, max_lr=1e-3)
    assert schedule.lr[0] == pytest.approx(1e-3, rel=1e-6)
    assert len(schedule) == 5


def test_the_text_file_gives_back_the_same_floats(tmp_path: Path) -> None:
    schedule = planned()
    write_schedule(schedule, tmp_path / "schedule.txt")
    again = read_schedule(tmp_path / "schedule.txt")
    assert again == schedule
    assert again.digest == schedule.digest
    assert [path.name for path in tmp_path.iterdir()] == ["schedule.txt"]  # no temporary file stays


def test_the_file_is_for_people_too(tmp_path: Path) -> None:
    write_schedule(planned(max_lr=0.004), tmp_path / "schedule.txt")
    text = (tmp_path / "schedule.txt").read_text()
    for line in ("# optimizer adam", "# global_batch 8", "# max_lr 0.004", "# steps_per_epoch 25"):
        assert line in text.splitlines()
    assert text.splitlines()[-100].split()[0] == "0"
    assert text.splitlines()[-1].split()[0] == "99"


def edit(old: str, new: str) -> object:
    return lambda text: text.replace(old, new, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit("\n7 ", "\n7 1"), "line 26"),  # another learning rate at step 7
        (edit("# max_lr 0.001", "# max_lr 0.01"), "digest"),
        (lambda text: text[: len(text) // 2].rsplit("\n", 1)[0], "missing"),  # cut short at a line
        (edit("\n50 ", "\n50 x"), "line 69"),  # no number
        (edit("# epochs 4\n", ""), "epochs"),
        (lambda text: "", "no schedule"),
    ],
)
def test_a_changed_file_is_refused_with_the_place_and_a_way_out(
    tmp_path: Path, change: object, message: str
) -> None:
    path = tmp_path / "schedule.txt"
    write_schedule(planned(), path)
    path.write_text(change(path.read_text()))  # type: ignore[operator]
    with pytest.raises(UserError, match=message) as caught:
        read_schedule(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("epochs", ["900000000", "1.e999", "9" * 400, "1.5e300"])
def test_a_changed_file_of_endless_epochs_is_not_planned_again(tmp_path: Path, epochs: str) -> None:
    path = tmp_path / "schedule.txt"
    write_schedule(planned(), path)
    path.write_text(path.read_text().replace("# epochs 4\n", f"# epochs {epochs}\n"))
    start = time.process_time()
    with pytest.raises(UserError, match=r"schedule\.txt: the file was changed") as caught:
        read_schedule(path)
    assert "\n" not in str(caught.value)
    assert time.process_time() - start < 5


def test_a_missing_file_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_schedule(tmp_path / "schedule.txt")


@pytest.mark.parametrize(
    ("other", "shown"),
    [
        (planned(batch_size=16), "global_batch 8 -> 16"),
        (planned(digest="other"), "dataset_digest abc -> other"),
        (planned(epochs=8), "epochs 4 -> 8"),
        (planned(max_lr=0.01), "max_lr 0.001 -> 0.01"),
    ],
)
def test_a_resume_with_another_cycle_stops_and_shows_both_values(
    other: Schedule, shown: str
) -> None:
    with pytest.raises(UserError, match=shown) as caught:
        check_resume(planned(), other, Path("schedule.txt"))
    assert "--replan" in str(caught.value)


def test_the_same_batch_on_other_ranks_goes_on_with_a_notice() -> None:
    assert check_resume(planned(), planned(), Path("schedule.txt")) == []
    (notice,) = check_resume(planned(), planned(ranks=2), Path("schedule.txt"))
    assert "last bits" in notice


@pytest.mark.parametrize("step", [0, 1, 30, 99, 100])
def test_replan_keeps_the_past_and_the_position_in_the_cycle(tmp_path: Path, step: int) -> None:
    old, new = planned(), planned(steps_per_epoch=50, batch_size=4)
    mixed = replan(old, new, step)
    assert mixed.lr[:step] == old.lr[:step]
    assert mixed.lr[step:] == new.lr[2 * step :]
    assert len(mixed) == step + 200 - 2 * step
    assert mixed.position(step) == (step // 25, 2 * (step % 25))
    write_schedule(mixed, tmp_path / "schedule-2.txt")
    assert read_schedule(tmp_path / "schedule-2.txt") == mixed


def test_replan_twice_still_knows_the_position() -> None:
    half_batch = replan(planned(), planned(steps_per_epoch=50, batch_size=4), 30)
    back = replan(half_batch, planned(), 50)  # 20 half steps later: position 40 of 100
    assert back.position(50) == (1, 15)
    assert back.lr[50:] == planned().lr[40:]


def test_a_finished_run_trains_on_when_replanned_with_more_epochs() -> None:
    old, new = planned(), planned(epochs=2 * planned().epochs)
    longer = replan(old, new, len(old))
    assert longer.lr == old.lr + new.lr[len(old) :]
    assert longer.position(len(old)) == (old.epochs, 0)


def test_replanned_with_fewer_epochs_than_are_done_it_is_at_its_end() -> None:
    old = planned()
    assert len(replan(old, planned(epochs=1), len(old))) == len(old)


def test_an_edit_after_a_replan_is_found(tmp_path: Path) -> None:
    path = tmp_path / "schedule-2.txt"
    write_schedule(replan(planned(), planned(steps_per_epoch=50), 30), path)
    path.write_text(path.read_text().replace("\n40 ", "\n40 9", 1))
    with pytest.raises(UserError, match="line 59"):
        read_schedule(path)


def test_the_digest_depends_on_every_field() -> None:
    schedule = planned()
    for field in dataclasses.fields(Schedule):
        value = getattr(schedule, field.name)
        other = (0.5, *value[1:]) if isinstance(value, tuple) else value * 2 or 1
        assert dataclasses.replace(schedule, **{field.name: other}).digest != schedule.digest


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    plot_schedule(planned(), tmp_path / "schedule.png")
    assert (tmp_path / "schedule.png").read_bytes().startswith(b"\x89PNG")


def test_a_part_of_an_epoch_counts_and_the_text_keeps_it(tmp_path: Path) -> None:
    schedule = planned(25, epochs=2.5)
    assert len(schedule) == 62
    write_schedule(schedule, tmp_path / "schedule.txt")
    assert read_schedule(tmp_path / "schedule.txt") == schedule
    assert len(planned(25, epochs=0.001)) == 1
