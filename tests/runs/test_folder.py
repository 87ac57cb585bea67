"""Where a run writes, and what it continues."""

import os
from pathlib import Path

import pytest

from yolo.config import Config
from yolo.engine.launch import torchrun_launch
from yolo.errors import UsageError
from yolo.runs.folder import (
    Launch,
    RunFolder,
    list_checkpoints,
    list_runs,
    note_run,
    plan_run,
    step_of,
)
from yolo.runs.logbook import Progress, duration, summary_lines


def make_run(path, steps=(), results=False):
    folder = RunFolder(path)
    folder.checkpoints.mkdir(parents=True)
    folder.metrics.write_text("")
    for step in steps:
        (folder.checkpoints / f"epoch{step // 10:03d}-step{step:06d}-lr1.000e-03.ckpt").write_text(
            ""
        )
    if results:
        folder.results.write_text("{}")
    return folder


def test_checkpoints_are_listed_by_step_and_strangers_are_left_out(tmp_path):
    folder = make_run(tmp_path, steps=(30, 5, 1000000))
    (folder.checkpoints / "notes.ckpt").write_text("")
    assert [path.name.split("-")[1] for path in list_checkpoints(folder.checkpoints)] == [
        "step000005",
        "step000030",
        "step1000000",
    ]


def test_resume_auto_takes_the_newest_unfinished_run_of_that_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs" / "voc-20260101-000000", steps=(1,))
    make_run(tmp_path / "runs" / "voc-20260102-000000", steps=(1,))
    make_run(tmp_path / "runs" / "voc-20260103-000000", steps=(1,), results=True)
    make_run(tmp_path / "runs" / "digits-20260104-000000", steps=(1,))
    plan = plan_run("voc", None, "auto")
    assert plan.folder.path.name == "voc-20260102-000000"
    assert plan.checkpoint is None
    assert plan.resuming


def test_resume_auto_finds_a_run_in_any_folder_by_configuration_and_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, data in enumerate(("cups", "spoons")):
        run = make_run(tmp_path / "elsewhere" / f"run{number}", steps=(3,))
        run.write_config(Config(data_root=str(tmp_path / data)))
        note_run("own", run.path)
    assert plan_run("own", None, "auto", data_root="cups").folder.path.name == "run0"
    assert plan_run("own", None, "auto", data_root="spoons").folder.path.name == "run1"
    assert plan_run("own", None, "auto", data_root="forks").folder.path.parent.name == "runs"
    assert plan_run("voc", None, "auto").folder.path.parent.name == "runs"
    (tmp_path / "elsewhere" / "run0" / "results.json").write_text("{}")  # it has ended
    assert plan_run("own", None, "auto", data_root="cups").folder.path.parent.name == "runs"
    note_run("own", tmp_path / "elsewhere" / "run1")  # once more: still one line
    assert len((tmp_path / "runs" / "index.tsv").read_text().splitlines()) == 2


def test_a_new_run_is_named_after_its_configuration_and_the_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = plan_run("voc", None, None)
    assert plan.folder.path.parent.name == "runs"
    assert plan.folder.path.name.startswith("voc-")
    assert (plan.checkpoint, plan.resuming) == (None, False)


def test_resuming_a_checkpoint_writes_into_its_own_run(tmp_path):
    run = make_run(tmp_path / "run", steps=(7,))
    [checkpoint] = list_checkpoints(run.checkpoints)
    plan = plan_run("voc", None, str(checkpoint))
    assert plan.folder.path == run.path
    assert plan.checkpoint == checkpoint


def test_a_folder_with_a_run_is_refused_unless_it_is_resumed(tmp_path):
    make_run(tmp_path / "run", steps=(7,))
    with pytest.raises(UsageError, match="--resume auto"):
        plan_run("voc", str(tmp_path / "run"), None)
    assert plan_run("voc", str(tmp_path / "run"), "auto").folder.path == tmp_path / "run"


def test_a_run_that_goes_on_in_another_folder_starts_from_its_newest_checkpoint(tmp_path):
    run = make_run(tmp_path / "run", steps=(7, 9))
    plan = plan_run("voc", str(tmp_path / "new"), str(run.path))
    newest = list_checkpoints(run.checkpoints)[-1]
    assert (plan.folder.path, plan.checkpoint, plan.resuming) == (tmp_path / "new", newest, True)
    assert plan_run("voc", str(run.path), str(run.path)).checkpoint is None
    make_run(tmp_path / "other", steps=(3,))
    for resume in (run.path, newest):
        with pytest.raises(UsageError, match="holds another run"):
            plan_run("voc", str(tmp_path / "other"), str(resume))


def test_resuming_what_holds_no_run_is_refused(tmp_path):
    run = make_run(tmp_path / "run", steps=(7,))
    make_run(tmp_path / "empty")
    for folder in (run.checkpoints, tmp_path / "empty", tmp_path):
        with pytest.raises(UsageError, match="holds no checkpoints"):
            plan_run("voc", None, str(folder))
    assert plan_run("voc", None, str(run.path)).folder.path == run.path


def test_a_checkpoint_outside_of_a_run_needs_a_folder_to_write_to(tmp_path):
    stray = tmp_path / "epoch000-step000007-lr1.000e-03.ckpt"
    stray.write_text("")
    with pytest.raises(UsageError, match="--out-dir"):
        plan_run("voc", None, str(stray))
    plan = plan_run("voc", str(tmp_path / "mine"), str(stray))
    assert (plan.folder.path, plan.checkpoint) == (tmp_path / "mine", stray)


def test_a_resumed_run_keeps_its_settings_and_a_fresh_one_has_none(tmp_path):
    run = make_run(tmp_path / "run", steps=(7,))
    run.config.write_text("epochs: 3\n")
    [checkpoint] = list_checkpoints(run.checkpoints)
    assert plan_run("voc", None, str(run.path)).stored_config == run.config
    assert plan_run("voc", str(tmp_path / "new"), str(checkpoint)).stored_config == run.config
    assert plan_run("voc", str(tmp_path / "new"), None).stored_config is None


def launch(restarts, run_id="none", first_node=True):
    return Launch(run_id, os.getppid(), first_node, restarts)


@pytest.mark.parametrize("out_dir", [None, "mine"])
def test_a_restart_by_torchrun_goes_on_in_the_folder_of_this_launch(tmp_path, monkeypatch, out_dir):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs" / "voc-20260101-000000", steps=(1,))  # somebody else's, unfinished
    first = plan_run("voc", out_dir, None, launch(restarts=0))
    assert not first.resuming
    make_run(first.folder.path)
    first.launch.mark(first.folder)
    make_run(tmp_path / "runs" / "voc-20990101-000000", steps=(1,))
    again = plan_run("voc", out_dir, None, launch(restarts=1))
    assert again.folder.path == first.folder.path
    assert (again.checkpoint, again.resuming) == (None, True)


def test_after_a_restart_other_nodes_find_the_folder_by_the_run_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "runs" / "voc-20260101-000000", steps=(1,))
    run.launch.write_text("none 999999999")  # by the agent of the first node
    assert not plan_run("voc", None, None, launch(1)).resuming
    plan = plan_run("voc", None, None, launch(1, first_node=False))
    assert (plan.folder.path.name, plan.resuming) == (run.path.name, True)
    assert not plan_run("voc", None, None, launch(1, "another", first_node=False)).resuming


def test_a_restart_before_anything_was_written_starts_as_the_flags_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs" / "voc-20260101-000000", steps=(1,))
    plan = plan_run("voc", None, None, launch(restarts=1))
    assert plan.folder.path.name != "voc-20260101-000000"
    assert not plan.resuming


def test_what_torchrun_says_is_read_from_its_variables(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert torchrun_launch() is None
    for name, value in (("RUN_ID", "a 1"), ("RESTART_COUNT", "2")):
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    assert torchrun_launch() == Launch("a 1", os.getppid(), first_node=True, restarts=2)
    monkeypatch.setenv("GROUP_RANK", "1")
    assert torchrun_launch() == Launch("a 1", os.getppid(), first_node=False, restarts=2)


def test_replanned_schedules_stand_beside_the_first(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.schedules() == []
    for name in ("schedule.txt", *(f"schedule-{number}.txt" for number in range(2, 12))):
        assert folder.next_schedule() == tmp_path / name
        folder.next_schedule().write_text("")
    (tmp_path / "schedule-backup.txt").write_text("somebody's")
    assert folder.schedules()[0].name == "schedule-11.txt"
    assert folder.schedules()[-1].name == "schedule.txt"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.6, "1m00s"), (61, "1m01s"), (3599, "59m59s"), (11225, "3h07m")],
)
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text


def test_the_closing_table_leaves_out_what_was_not_measured():
    lines = summary_lines({"map_50": 0.5, "object_accuracy": None}, [("run folder", "runs/x")])
    assert [line.split() for line in lines] == [
        ["mAP@0.5", "(area)", "0.5000"],
        ["run", "folder", "runs/x"],
    ]


def test_progress_prints_plain_lines_where_there_is_no_terminal(capsys):
    progress = Progress(3, "epoch 1/2", enabled=True)
    progress.update()
    progress.note("loss 1.0")
    Progress(3, "epoch 1/2", enabled=False).note("silent")
    assert capsys.readouterr().out == "epoch 1/2: loss 1.0\n"


def test_names_that_only_look_like_ours_are_passed_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = make_run(tmp_path / "runs" / "voc-20260101-000000", steps=(3,))
    for name in ("epoch1-stepx-lr1.ckpt", "epoch1-step²-lr1.ckpt", "epoch-step1-lr1.ckpt"):
        (folder.checkpoints / name).write_text("")
    for name in ("schedule-².txt", "schedule-x.txt", "schedule-10.txt", "schedule-2.txt"):
        (folder.path / name).write_text("")
    (only,) = list_checkpoints(folder.checkpoints)
    assert step_of(only) == 3
    assert [path.name for path in folder.schedules()] == ["schedule-10.txt", "schedule-2.txt"]
    assert list_runs() == [Path("runs/voc-20260101-000000")]


@pytest.mark.parametrize(
    "config",
    [b'data_root: "a\\0cups"\n', b"data_root: [\n", b"- cups\n", b"\xff\n", b"[" * 5000],
)
def test_a_run_whose_configuration_is_damaged_is_of_no_data(tmp_path, monkeypatch, config):
    monkeypatch.chdir(tmp_path)
    older, newer = (
        make_run(tmp_path / "runs" / f"own-2026010{day}-000000", steps=(3,)) for day in (1, 2)
    )
    older.write_config(Config(data_root="cups"))
    newer.config.write_bytes(config)
    assert plan_run("own", None, "auto", data_root="cups").folder.path.name == older.path.name


def test_lines_of_the_index_that_name_no_folder_are_passed_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "elsewhere" / "run", steps=(3,))
    note_run("own", run.path)
    with (tmp_path / "runs" / "index.tsv").open("ab") as file:
        file.write(b"20990101-000000\town\ta\0b\n20990101-000000\town\t\xff\n\xff\n")
    assert list_runs() == [run.path]
    assert plan_run("own", None, "auto").folder.path == run.path
    note_run("own", run.path)
    assert "\0" not in (tmp_path / "runs" / "index.tsv").read_text()


@pytest.mark.parametrize("text", [b"[" * 200_000, b"[1]", b"{", b"\xff"])
def test_damaged_results_are_none(tmp_path, text):
    folder = RunFolder(tmp_path)
    folder.results.write_bytes(text)
    assert folder.read_results() == {}
