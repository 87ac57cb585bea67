"""Stop anywhere, go on anywhere: interrupted runs end bit-identical to one never stopped."""

import random
import shutil
import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faults
import pytest
import torch
from checkpoints import whole_content
from filelock import FileLock
from launching import train

import train as script
from yolo.engine.stopping import SAME_SIGNAL
from yolo.errors import UserError
from yolo.runs import checkpoint, resume
from yolo.runs.checkpoint import (
    content_digest,
    load_checkpoint,
    load_resumable,
    resolve_checkpoint,
    save_checkpoint,
)
from yolo.runs.folder import RunFolder, RunPlan, list_checkpoints
from yolo.runs.logbook import TIMINGS, read_metrics
from yolo.schedule import read_schedule
from yolo.tasks.detection import DetectionTask

STEPS = 12  # 24 images in batches of 4, two epochs
EXACT = (
    "model", "ema", "optimizer", "scaler", "step", "epoch", "batch", "best_score", "best",
    "loss_sums", "rng",
)  # fmt: skip

Hook = Callable[[], None] | None


class Trainer:
    """Starts training processes that all write to one run folder."""

    def __init__(self, config: Path, run_dir: Path) -> None:
        self.config, self.run_dir = config, run_dir
        self.log = run_dir.with_suffix(".log")

    def __call__(self, *flags: str, hook: Hook = None) -> int:
        self.log.unlink(missing_ok=True)
        return train(
            ["--config", str(self.config), "--out-dir", str(self.run_dir), *flags],
            self.log,
            hook=hook,
        )

    @property
    def output(self) -> str:
        return self.log.read_text()

    @property
    def steps(self) -> list[int]:
        return [int(path.name.split("step")[1][:6]) for path in self.checkpoints]

    @property
    def checkpoints(self) -> list[Path]:
        return list_checkpoints(self.run_dir / "checkpoints")

    def final_digest(self, without: str = "") -> str:
        content = load_checkpoint(self.checkpoints[-1])
        return content_digest({key: content[key] for key in EXACT if key != without})

    def metrics(self) -> list[dict[str, Any]]:
        lines = read_metrics(self.run_dir / "metrics.jsonl")
        return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]

    def error(self) -> str:
        (line,) = [line for line in self.output.splitlines() if line.startswith("error:")]
        assert "Traceback" not in self.output
        return line


@pytest.fixture
def trainer(tiny_config: Path, tmp_path: Path) -> Trainer:
    return Trainer(tiny_config, tmp_path / "run")


@pytest.fixture(scope="module")
def uninterrupted(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    reference = Trainer(tiny_config, tmp_path_factory.mktemp("reference") / "run")
    assert reference() == 0, reference.output
    assert reference.steps[-1] == STEPS
    return reference


def assert_same_end(trainer: Trainer, uninterrupted: Trainer) -> None:
    assert trainer.final_digest() == uninterrupted.final_digest()
    assert trainer.metrics() == uninterrupted.metrics()


def seeded_steps(count: int, seed: int) -> list[int]:
    return sorted(random.Random(seed).sample(range(1, STEPS), count))


def test_kill_9_at_seeded_steps_changes_nothing(trainer: Trainer, uninterrupted: Trainer) -> None:
    for step, workers in zip(seeded_steps(3, seed=0), ("0", "2", "1"), strict=True):
        kill = partial(faults.kill_after_step, step)
        assert trainer("--resume", "auto", "--workers", workers, hook=kill) == -signal.SIGKILL
    assert trainer("--resume", "auto") == 0, trainer.output
    assert_same_end(trainer, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_kill_9_at_any_step_changes_nothing(
    trainer: Trainer, uninterrupted: Trainer, seed: int
) -> None:
    (step,) = seeded_steps(1, seed=100 + seed)
    assert (
        trainer("--save-every", str(1 + seed % 5), hook=partial(faults.kill_after_step, step)) < 0
    )
    assert trainer("--resume", "auto", "--workers", str(seed % 3)) == 0, trainer.output
    assert_same_end(trainer, uninterrupted)


def test_kill_9_inside_a_save_loses_nothing(trainer: Trainer, uninterrupted: Trainer) -> None:
    for moment, step, newest in (
        ("write", 3, 0),
        ("fsync", 6, 3),
        ("rename", 9, 6),
        ("done", 12, 12),
    ):
        kill = partial(faults.kill_in_save, moment, step)
        assert trainer("--resume", "auto", hook=kill) == -signal.SIGKILL
        assert max(trainer.steps, default=0) == newest
    assert trainer("--resume", "auto") == 0, trainer.output
    assert_same_end(trainer, uninterrupted)
    assert not list(trainer.run_dir.rglob("*.aside"))


def test_kill_9_while_a_thread_saves_changes_nothing(
    trainer: Trainer, uninterrupted: Trainer
) -> None:
    assert trainer("--max-steps", "2") == 0, trainer.output
    kill = partial(faults.kill_after_step, 4)
    hook = partial(faults.save_slowly, 60.0, kill)  # that of step 3
    assert trainer("--resume", "auto", hook=hook) == -signal.SIGKILL
    assert trainer.steps == [2]
    assert trainer("--resume", "auto") == 0, trainer.output
    # the test at the end of --max-steps 2 was the best
    assert trainer.final_digest("best") == uninterrupted.final_digest("best")


def test_a_signal_waits_for_the_checkpoint_that_a_thread_is_writing(
    trainer: Trainer, uninterrupted: Trainer
) -> None:
    stop = partial(faults.signal_after_step, 4, signal.SIGTERM)
    assert trainer(hook=partial(faults.save_slowly, 0.5, stop)) == 143, trainer.output
    assert trainer.steps == [3, 4]
    assert trainer("--resume", "auto") == 0, trainer.output
    assert_same_end(trainer, uninterrupted)


def test_signals_in_mid_epoch_save_and_exit(trainer: Trainer, uninterrupted: Trainer) -> None:
    flags = ("--save-every", "10m", "--resume", "auto")
    for number, code, step in ((signal.SIGTERM, 143, 4), (signal.SIGINT, 130, 8)):
        assert trainer(*flags, hook=partial(faults.signal_after_step, step, number)) == code, (
            trainer.output
        )
        assert trainer.steps[-1] == step
        assert f"stopped by {number.name} at step {step} of 12" in trainer.output
    assert trainer(*flags) == 0, trainer.output
    assert_same_end(trainer, uninterrupted)


def test_signals_at_the_end_of_an_epoch_and_of_the_run_leave_the_test_for_later(
    trainer: Trainer, uninterrupted: Trainer
) -> None:
    for step in (6, STEPS):
        stop = partial(faults.signal_after_step, step, signal.SIGTERM)
        assert trainer("--resume", "auto", hook=stop) == 143, trainer.output
    assert not (trainer.run_dir / "results.json").exists()
    assert trainer("--resume", "auto") == 0, trainer.output
    assert (trainer.run_dir / "results.json").exists()
    assert trainer.metrics() == uninterrupted.metrics()
    assert trainer("--resume", "auto") == 0
    assert "is at its end" in trainer.output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_leaves_the_loaders_workers_at_work(
    trainer: Trainer, number: signal.Signals
) -> None:
    stop = partial(faults.signal_group_after_step, 4, number)
    assert trainer("--workers", "2", hook=stop) == 128 + number, trainer.output
    assert trainer.steps[-1] == 4
    assert trainer.output.count("finishing this step and saving") == 1


def test_a_signal_that_arrives_twice_is_one(trainer: Trainer) -> None:
    stop = partial(faults.signal_after_step, 4, signal.SIGTERM, signal.SIGTERM)
    assert trainer(hook=stop) == 143
    assert trainer.steps[-1] == 4


def test_a_second_signal_exits_at_once(trainer: Trainer) -> None:
    stop = partial(
        faults.signal_after_step, 4, signal.SIGTERM, signal.SIGTERM, pause=SAME_SIGNAL + 0.1
    )
    assert trainer(hook=stop) == 143
    assert trainer.steps == [3]


def test_an_epoch_is_saved_only_if_that_is_due_or_its_test_was_the_best(trainer: Trainer) -> None:
    assert trainer("--save-every", "10m", "--epochs", "4", "--eval-every", "100") == 0, (
        trainer.output
    )
    assert trainer.steps == [24]
    assert [line["step"] for line in trainer.metrics() if line["kind"] == "evaluation"] == [24]


def test_the_best_test_so_far_is_saved_and_named(trainer: Trainer) -> None:
    assert trainer("--save-every", "10m", "--epochs", "4", hook=faults.best_in_the_second_test) == 0
    assert trainer.steps == [6, 12, 24]  # the first is the best so far, the second better
    folder = trainer.run_dir / "checkpoints"
    assert "step000012" in (folder / "best.txt").read_text()


def test_max_time_saves_and_exits_0(trainer: Trainer) -> None:
    assert trainer("--max-time", "1s", hook=partial(faults.slow_steps, 0.3)) == 0
    assert "stopped by --max-time" in trainer.output
    assert 0 < trainer.steps[-1] < STEPS
    assert not (trainer.run_dir / "results.json").exists()


def test_max_steps_ends_early_and_a_later_start_goes_further(
    trainer: Trainer, uninterrupted: Trainer
) -> None:
    assert trainer("--max-steps", "5") == 0
    assert (trainer.run_dir / "results.json").exists()
    assert trainer.steps[-1] == 5
    assert trainer("--resume", "auto", "--max-steps", "5") == 0
    assert "is at its end" in trainer.output
    assert trainer("--resume", "auto") == 0
    weights = [load_checkpoint(run.checkpoints[-1])["model"] for run in (trainer, uninterrupted)]
    assert content_digest(weights[0]) == content_digest(weights[1])
    lines = {(line["kind"], line["step"]): line for line in trainer.metrics()}
    assert len(lines) == len(uninterrupted.metrics()) + 2  # a line and a test at step 5
    for line in uninterrupted.metrics():
        assert lines[line["kind"], line["step"]] == line


def test_half_precision_resumes_with_its_scaler(trainer: Trainer, tmp_path: Path) -> None:
    flags = ("--precision", "16-mixed", "--epochs", "1")
    whole = Trainer(trainer.config, tmp_path / "whole")
    assert whole(*flags) == 0, whole.output
    assert load_checkpoint(whole.checkpoints[-1])["scaler"]["scale"] > 0
    assert trainer(*flags, hook=partial(faults.kill_after_step, 3)) < 0
    assert trainer("--resume", "auto") == 0, trainer.output
    assert_same_end(trainer, whole)


def test_a_loss_that_stays_nan_stops_and_names_the_last_good_checkpoint(trainer: Trainer) -> None:
    assert trainer(hook=partial(faults.poison_after_step, 4)) == 1
    assert "not been finite" in trainer.error()
    assert trainer.checkpoints[-1].name in trainer.error()
    assert trainer.steps == [3]
    assert all(
        value.isfinite().all()
        for value in load_checkpoint(trainer.checkpoints[-1])["model"].values()
    )


def test_a_full_disk_keeps_the_previous_checkpoint_and_says_so(trainer: Trainer) -> None:
    assert trainer("--max-steps", "3") == 0
    before = {path: path.read_bytes() for path in trainer.checkpoints}
    limit = min(len(content) for content in before.values()) // 2
    assert trainer("--resume", "auto", hook=partial(faults.limit_file_size, limit)) == 1
    assert "cannot write" in trainer.error() and "free some space" in trainer.error()
    assert {path: path.read_bytes() for path in trainer.checkpoints} == before
    assert trainer("--resume", "auto") == 0
    assert trainer.steps[-1] == STEPS


@pytest.mark.parametrize("limit", [100, 5000])  # config.yaml, schedule.txt
def test_a_disk_that_is_full_from_the_start_is_one_line(trainer: Trainer, limit: int) -> None:
    assert trainer(hook=partial(faults.limit_file_size, limit)) == 1
    assert "File too large" in trainer.error()


def test_an_unwritable_folder_is_one_line(tiny_config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    trainer = Trainer(tiny_config, tmp_path / "file" / "run")
    trainer.log = tmp_path / "log"
    assert trainer() == 1
    assert "Not a directory" in trainer.error() and str(tmp_path / "file") in trainer.error()


def test_a_time_without_a_unit_is_refused(trainer: Trainer) -> None:
    assert trainer("--max-time", "90") == 2
    assert "90s" in trainer.error()


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_reads_the_checkpoint_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool, rank: int
) -> None:
    folder = RunFolder(tmp_path)
    newest = folder.checkpoints / "epoch001-step000009-lr1.000e-03.ckpt"
    save_checkpoint(newest, whole_content(9))
    read: list[Path] = []

    def count(path: Path) -> dict[str, Any]:
        read.append(path)
        return load_resumable(path)

    for module in (checkpoint, resume):
        monkeypatch.setattr(module, "load_resumable", count)
    fabric = SimpleNamespace(is_global_zero=rank == 0, print=print, broadcast=lambda path: newest)
    found = resume.open_checkpoint(RunPlan(folder, True, newest if named else None), fabric)
    assert found and (found.path, found.content["step"]) == (newest, 9)
    assert read == [newest]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def rewrite(path: Path, **changes: Any) -> None:
    content = torch.load(path, weights_only=True)
    torch.save({**content, **changes}, path)


def sign_anew(path: Path, **changes: Any) -> None:
    save_checkpoint(path, {**load_checkpoint(path), **changes})


def edit_schedule(path: Path) -> None:
    file = path.parent.parent / "schedule.txt"
    file.write_text(file.read_text().replace("\n5 ", "\n5 1", 1))


@pytest.fixture(scope="module")
def half_way(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    run = Trainer(tiny_config, tmp_path_factory.mktemp("half") / "run")
    assert run(hook=partial(faults.signal_after_step, 5, signal.SIGTERM)) == 143
    return run


@pytest.fixture
def stopped(half_way: Trainer, trainer: Trainer) -> Trainer:
    """A copy of a run that was stopped after step 5."""
    shutil.copytree(half_way.run_dir, trainer.run_dir)
    return trainer


def test_a_truncated_newest_checkpoint_is_reported_and_the_one_before_taken(
    stopped: Trainer, uninterrupted: Trainer
) -> None:
    truncate(stopped.checkpoints[-1])
    assert stopped("--resume", "auto") == 0, stopped.output
    assert "warning:" in stopped.output and "damaged" in stopped.output
    assert "step 3 of 12" in stopped.output
    assert_same_end(stopped, uninterrupted)


@pytest.mark.parametrize(
    ("flags", "harm", "message"),
    [
        (["--width", "0.5"], None, "trained with --width 0.05"),
        (["--batch-size", "8"], None, "global_batch 4 -> 8"),
        (["--epochs", "3"], None, "epochs 2 -> 3"),
        (["--classes", "0,1,2,3,4,5,6,7,9,8"], None, "knows the classes"),
        ([], edit_schedule, "schedule.txt line"),
        ([], partial(rewrite, format_version=99), "checkpoint format 99"),
        ([], partial(sign_anew, threads=torch.ones(2)), "(threads is not as training writes it)"),
        ([], partial(sign_anew, ema={"a": torch.ones(2)}), "(ema holds other tensors than this"),
        ([], partial(sign_anew, anchors=None), "trained with other anchors"),
    ],
)
def test_what_does_not_fit_is_one_clear_line_and_nothing_is_lost(
    stopped: Trainer, flags: Sequence[str], harm: Callable[[Path], None] | None, message: str
) -> None:
    newest = stopped.checkpoints[-1]
    if harm:
        harm(newest)
    before = {path: path.read_bytes() for path in stopped.run_dir.rglob("*") if path.is_file()}
    assert stopped("--resume", str(newest), *flags) in (1, 2)
    assert message in stopped.error()
    assert {
        path: path.read_bytes() for path in stopped.run_dir.rglob("*") if path.is_file()
    } == before


def test_replan_keeps_the_position_in_the_cycle_and_the_old_file(stopped: Trainer) -> None:
    assert stopped("--resume", "auto", "--batch-size", "8", "--replan") == 0, stopped.output
    assert "global_batch 4 -> 8" in stopped.output
    old, new = (
        read_schedule(stopped.run_dir / name) for name in ("schedule.txt", "schedule-2.txt")
    )
    assert new.lr[:5] == old.lr[:5]
    assert new.replanned_position == 2  # 5 of 12 steps become 2 of 6
    assert stopped.steps[-1] == len(new) == 5 + 4
    assert stopped("--resume", "auto") == 0  # the new batch is part of the run now
    assert "is at its end" in stopped.output


def test_a_run_folder_is_not_overwritten_by_accident(stopped: Trainer) -> None:
    assert stopped() == 2
    assert "--resume auto" in stopped.error()


def edit_config(path: Path, old: str, new: str) -> None:
    file = path / "config.yaml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def test_an_edited_configuration_names_its_keys_and_both_ways_out(
    stopped: Trainer, uninterrupted: Trainer
) -> None:
    edit_config(stopped.run_dir, "aug_blur: 0.05", "aug_blur: 0.25")
    assert stopped("--resume", "auto") == 1
    assert (
        "config.yaml: was changed after it was written (aug_blur 0.05 -> 0.25)" in stopped.error()
    )
    assert "--replan" in stopped.error()
    assert stopped("--resume", "auto", "--max-steps", "6", "--replan") == 0, stopped.output
    assert load_checkpoint(stopped.checkpoints[-1])["config"]["aug_blur"] == 0.25
    assert stopped("--resume", "auto", "--aug-blur", "0.05") == 0, "it is the run's own again"


def test_an_edited_configuration_goes_on_where_flags_or_the_checkpoint_agree(
    stopped: Trainer, uninterrupted: Trainer
) -> None:
    edit_config(stopped.run_dir, "aug_blur: 0.05", "aug_blur: 0.25\n# a remark")
    assert stopped("--resume", "auto", "--aug-blur", "0.05") == 0, stopped.output
    assert_same_end(stopped, uninterrupted)


def test_a_flipped_bit_of_the_configuration_is_seen_or_without_effect(stopped: Trainer) -> None:
    folder, rng = RunFolder(stopped.run_dir), random.Random(0)
    newest = checkpoint.Checkpoint(
        stopped.checkpoints[-1], load_checkpoint(stopped.checkpoints[-1])
    )
    whole = folder.config.read_bytes()
    argv = ["--resume", str(stopped.run_dir)]
    before = script.parse_args(argv, folder.config, "", None)
    for _ in range(100):
        content = bytearray(whole)
        content[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        folder.config.write_bytes(content)
        try:
            plan = script.locate_run(argv, "tiny", None)
            args = script.parse_args(argv, plan.stored_config, "", None)
            resume.check_settings(plan, newest, args)
        except UserError:
            continue
        assert args == before


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Trains here, without pictures."""
    monkeypatch.setattr("yolo.runs.run.plot_schedule", lambda *arguments: None)
    monkeypatch.setattr("yolo.runs.results.plot_curves", lambda *arguments: None)
    return lambda *flags: script.main([str(flag) for flag in flags])


def test_a_training_that_found_the_folder_in_use_looks_again(
    in_process: Callable[..., int],
    tiny_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both start afresh; the second gets the lock when the first has ended."""
    flags = ("--config", tiny_config, "--out-dir", tmp_path / "run")
    lock = RunFolder.lock

    def let_another_train(self: RunFolder) -> Any:
        monkeypatch.setattr(RunFolder, "lock", lock)
        assert in_process(*flags, "--max-steps", "3") == 0
        return lock(self)

    monkeypatch.setattr(RunFolder, "lock", let_another_train)
    with pytest.raises(UserError, match="another training wrote here while this one started"):
        in_process(*flags)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "train"] == [2, 3]
    [saved] = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert "step000003" in saved.name


def test_two_trainings_in_one_folder_are_refused(stopped: Trainer) -> None:
    with FileLock(stopped.run_dir / ".lock"):
        before = {path: path.read_bytes() for path in stopped.run_dir.rglob("*") if path.is_file()}
        assert stopped("--resume", "auto", hook=faults.impatient) == 1
        assert "another training is at work" in stopped.error()
        assert {
            path: path.read_bytes() for path in stopped.run_dir.rglob("*") if path.is_file()
        } == before
    assert stopped("--resume", "auto") == 0, stopped.output


def test_a_disk_without_locks_is_trained_on(trainer: Trainer) -> None:
    assert trainer(hook=faults.no_locks) == 0, trainer.output
    assert (
        trainer("--resume", "auto", hook=faults.no_locks) == 0 and "is at its end" in trainer.output
    )


def test_an_earlier_checkpoint_can_be_chosen(stopped: Trainer, uninterrupted: Trainer) -> None:
    assert stopped("--resume", str(stopped.checkpoints[0])) == 0, stopped.output
    assert "set aside" in stopped.output
    assert_same_end(stopped, uninterrupted)


def test_the_run_goes_on_in_another_folder(
    stopped: Trainer, uninterrupted: Trainer, tmp_path: Path
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("width: 0.1\n")  # the run's own configuration wins
    moved = Trainer(other, tmp_path / "moved")
    assert moved("--resume", str(stopped.checkpoints[-1])) == 0, moved.output
    assert moved.final_digest() == uninterrupted.final_digest()
    assert (moved.run_dir / "schedule.txt").exists()


def test_the_optimizer_follows_the_flags_of_the_later_start(stopped: Trainer) -> None:
    assert stopped("--resume", "auto", "--weight-decay", "0.1") == 0, stopped.output
    decayed, plain = load_checkpoint(stopped.checkpoints[-1])["optimizer"]["param_groups"]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert "weight_decay: 0.1" in (stopped.run_dir / "config.yaml").read_text(), (
        "and of all starts after it"
    )


@pytest.mark.parametrize("content", [None, b"\xff\n"])
def test_the_best_is_kept_whatever_best_txt_says(
    in_process: Callable[..., int],
    tiny_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: bytes | None,
) -> None:
    scores = iter([0.5, 0.9, 0.4, 0.3, 0.2])  # of the third test a second time: it ended the start
    monkeypatch.setattr(DetectionTask, "score", staticmethod(lambda results: next(scores)))
    run = RunFolder(tmp_path / "run")
    flags = ("--config", tiny_config, "--out-dir", run.path, "--epochs", "4", "--keep", "1")
    assert in_process(*flags, "--max-steps", "14") == 0
    file = run.checkpoints / "best.txt"
    name = file.read_text().strip()
    file.unlink() if content is None else file.write_bytes(content)
    assert in_process(*flags, "--resume", "auto") == 0
    assert [path.name.split("-")[1] for path in list_checkpoints(run.checkpoints)] == [
        "step000012",
        "step000024",
    ]
    assert "step000012" in name and resolve_checkpoint(run.path).name == name


def test_a_test_that_makes_a_saved_step_the_best_is_written_down(trainer: Trainer) -> None:
    stop = partial(faults.signal_after_step, STEPS, signal.SIGTERM)
    assert trainer("--save-every", "10m", hook=stop) == 143
    assert load_checkpoint(trainer.checkpoints[-1])["evaluation_due"]
    assert trainer("--resume", "auto") == 0, trainer.output
    assert load_checkpoint(trainer.checkpoints[-1])["best"] in [
        path.name for path in trainer.checkpoints
    ]


def test_keep_prunes_all_but_the_newest_and_the_best(trainer: Trainer) -> None:
    assert trainer("--keep", "2") == 0
    folder = trainer.run_dir / "checkpoints"
    best = folder / (folder / "best.txt").read_text().strip()
    assert set(trainer.checkpoints) == {best, *trainer.checkpoints[-2:]}
    assert trainer.steps[-2:] == [9, 12]
    assert 3 not in trainer.steps


def test_a_run_goes_on_from_its_mirror_on_a_fresh_machine(
    trainer: Trainer, uninterrupted: Trainer, tmp_path: Path
) -> None:
    mirror = ("--mirror", str(tmp_path / "drive"))
    assert trainer(*mirror, hook=partial(faults.signal_after_step, 5, signal.SIGTERM)) == 143
    fresh = Trainer(trainer.config, tmp_path / "fresh" / "run")
    fresh.run_dir.parent.mkdir()
    assert fresh(*mirror, "--resume", "auto") == 0, fresh.output
    assert "fetched epoch000-step000005" in fresh.output
    assert_same_end(fresh, uninterrupted)


def test_a_dead_mirror_is_one_line_and_training_goes_on(
    trainer: Trainer, uninterrupted: Trainer
) -> None:
    trainer.config.with_name("a_file").write_text("")
    dead = trainer.config.with_name("a_file") / "folder"
    assert (
        trainer("--mirror", str(dead), hook=partial(faults.signal_after_step, 5, signal.SIGTERM))
        == 143
    )
    assert trainer.output.count("does not take files") == 1
    assert trainer("--mirror", str(dead), "--resume", "auto") == 0
    assert_same_end(trainer, uninterrupted)


def test_plan_only_writes_the_schedule_and_stops(trainer: Trainer) -> None:
    assert trainer("--plan-only") == 0
    assert {path.name for path in trainer.run_dir.iterdir()} == {"schedule.txt", "schedule.png"}
    assert len(read_schedule(trainer.run_dir / "schedule.txt")) == STEPS


def test_plan_only_leaves_the_schedule_of_a_run_alone(trainer: Trainer) -> None:
    assert trainer("--max-steps", "1") == 0
    before = (trainer.run_dir / "schedule.txt").read_bytes()
    assert trainer("--resume", "auto", "--epochs", "3", "--plan-only") == 2
    assert "--out-dir" in trainer.error()
    assert (trainer.run_dir / "schedule.txt").read_bytes() == before


def test_find_lr_writes_its_curve_and_max_lr_auto_takes_the_proposal(trainer: Trainer) -> None:
    few_steps = partial(faults.shorten_range_test, 20)
    assert trainer("--find-lr", hook=few_steps) == 0, trainer.output
    first_line = (trainer.run_dir / "lr_range.txt").read_text().splitlines()[0]
    proposal = float(first_line.split()[-1])
    assert f"--max-lr {proposal}" in trainer.output
    assert trainer("--max-lr", "auto", "--max-steps", "1", hook=few_steps) == 0, trainer.output
    assert read_schedule(trainer.run_dir / "schedule.txt").max_lr == proposal
    assert trainer("--max-lr", "auto", "--resume", "auto", "--max-steps", "2") == 0, trainer.output
    assert trainer.output.count("range test") == 0
