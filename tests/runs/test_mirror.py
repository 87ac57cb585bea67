"""The mirror: every finished file arrives whole, whatever the far side does; runs come back."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from checkpoints import whole_content
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from yolo.errors import UsageError, UserError
from yolo.runs import mirror as mirrors
from yolo.runs.checkpoint import save_checkpoint
from yolo.runs.mirror import Mirror, bring_back, fetch_run, find_run


class FlakyFileSystem(MemoryFileSystem):
    """Object storage whose first `failures` uploads fail; `gate` can hold uploads up."""

    protocol = "flaky"
    failures = 0
    gate = threading.Event()
    names: list[str] = []  # noqa: RUF012 (of the uploads, in order)

    def put_file(self, lpath: str, rpath: str, **settings: Any) -> None:
        type(self).gate.wait(10)
        if type(self).failures > 0:
            type(self).failures -= 1
            raise ConnectionError("no route\nto host")
        type(self).names.append(rpath.rpartition("/")[2])
        super().put_file(lpath, rpath, **settings)


fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)


@pytest.fixture(autouse=True)
def clean_storage() -> Iterator[None]:
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    FlakyFileSystem.failures, FlakyFileSystem.names = 0, []
    FlakyFileSystem.gate.set()
    yield
    FlakyFileSystem.gate.set()


@pytest.fixture(params=["file", "path", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return {
        "file": f"file://{tmp_path}/drive",
        "path": f"{tmp_path}/drive",
        "memory": "memory://bucket/runs",
    }[request.param]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "waited ten seconds in vain"
        time.sleep(0.002)


def content_at(url: str, name: str) -> bytes:
    with fsspec.open(f"{url}/{name}", "rb") as file:
        return file.read()


def save_step(folder: Path, step: int) -> Path:
    path = folder / "checkpoints" / f"epoch000-step{step:06d}-lr1.000e-03.ckpt"
    save_checkpoint(path, whole_content(step, float(step)))
    return path


def test_files_arrive_whole_and_without_leftovers(tmp_path: Path, url: str) -> None:
    warnings: list[str] = []
    mirror = Mirror(url, "voc-1", warnings.append)
    file = tmp_path / "schedule.txt"
    file.write_text("planned")
    mirror.copy(file, "schedule.txt")
    mirror.copy(save_step(tmp_path, 7), "checkpoints/seven.ckpt")
    mirror.close(10)
    assert content_at(url, "voc-1/schedule.txt") == b"planned"
    assert content_at(url, "voc-1/checkpoints/seven.ckpt") == save_step(tmp_path, 7).read_bytes()
    fs, root = fsspec.core.url_to_fs(url)
    assert not [name for name in fs.find(root) if name.endswith(".part")]
    assert warnings == []


def test_a_newer_copy_replaces_the_older_one(tmp_path: Path, url: str) -> None:
    file = tmp_path / "metrics.jsonl"
    for text in ("1", "12"):
        file.write_text(text)
        mirror = Mirror(url, "voc-1")
        mirror.copy(file, "metrics.jsonl")
        mirror.close(10)
    assert content_at(url, "voc-1/metrics.jsonl") == b"12"


def test_removing_follows_copying(tmp_path: Path, url: str) -> None:
    mirror = Mirror(url, "voc-1")
    for step in (1, 2):
        mirror.copy(save_step(tmp_path, step), f"checkpoints/{step}.ckpt")
    mirror.remove("checkpoints/1.ckpt")
    mirror.remove("checkpoints/never-there.ckpt")
    mirror.close(10)
    fs, root = fsspec.core.url_to_fs(f"{url}/voc-1/checkpoints")
    assert [name.rpartition("/")[2] for name in fs.ls(root, detail=False)] == ["2.ckpt"]


def test_a_dead_mirror_is_one_warning_and_retried_until_it_lives(tmp_path: Path) -> None:
    FlakyFileSystem.failures = 5
    warnings: list[str] = []
    mirror = Mirror("flaky://bucket", "voc-1", warnings.append, first_wait=0.001)
    file = tmp_path / "schedule.txt"
    file.write_text("planned")
    mirror.copy(file, "schedule.txt")
    mirror.copy(file, "copy.txt")
    wait_for(lambda: len(warnings) == 2)
    mirror.close(10)
    assert content_at("flaky://bucket", "voc-1/schedule.txt") == b"planned"
    assert content_at("flaky://bucket", "voc-1/copy.txt") == b"planned"
    assert "no route to host" in warnings[0] and "training goes on" in warnings[0]
    assert "again" in warnings[1]


def test_closing_a_dead_mirror_is_quick_and_names_what_is_missing(tmp_path: Path) -> None:
    FlakyFileSystem.failures = 1000
    warnings: list[str] = []
    mirror = Mirror("flaky://bucket", "voc-1", warnings.append)
    file = tmp_path / "schedule.txt"
    file.write_text("planned")
    mirror.copy(file, "schedule.txt")
    wait_for(lambda: bool(warnings))
    start = time.monotonic()
    mirror.close(timeout=30)
    assert time.monotonic() - start < 5
    assert "not copied" in warnings[-1] and "schedule.txt" in warnings[-1]


def test_a_slow_mirror_holds_nothing_up_and_copies_each_name_once(tmp_path: Path) -> None:
    FlakyFileSystem.gate.clear()
    mirror = Mirror("flaky://bucket", "voc-1")
    file = tmp_path / "metrics.jsonl"
    file.write_text("lines")
    start = time.monotonic()
    mirror.copy(file, "first.ckpt")
    wait_for(lambda: mirror._busy == "first.ckpt")
    for _ in range(1000):
        mirror.copy(file, "metrics.jsonl")
    assert time.monotonic() - start < 2
    FlakyFileSystem.gate.set()
    mirror.close(10)
    assert FlakyFileSystem.names == ["first.ckpt", "metrics.jsonl"]


def test_closing_a_hung_mirror_gives_up_after_its_timeout(tmp_path: Path) -> None:
    FlakyFileSystem.gate.clear()
    warnings: list[str] = []
    mirror = Mirror("flaky://bucket", "voc-1", warnings.append)
    mirror.copy(save_step(tmp_path, 1), "checkpoints/1.ckpt")
    start = time.monotonic()
    mirror.close(timeout=0.2)
    assert time.monotonic() - start < 2
    assert "checkpoints/1.ckpt" in warnings[-1]


def test_a_file_that_makes_no_progress_is_given_up_and_the_next_one_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirrors, "STALLED", 0.2)
    put_file, stuck = MemoryFileSystem.put_file, threading.Event()

    def put_or_hang(self: Any, lpath: str, rpath: str, **settings: Any) -> None:
        if "stuck" in rpath:
            stuck.wait(20)
        put_file(self, lpath, rpath, **settings)

    monkeypatch.setattr(FlakyFileSystem, "put_file", put_or_hang)
    warnings: list[str] = []
    mirror = Mirror("flaky://bucket", "voc-1", warnings.append, first_wait=0.001)
    for name in ("stuck.txt", "next.txt"):
        (tmp_path / name).write_text(name)
        mirror.copy(tmp_path / name, name)
    wait_for(lambda: bool(warnings))
    assert "no answer for 0.2 s" in warnings[0]
    wait_for(lambda: any(name.endswith("next.txt") for name in MemoryFileSystem.store))
    mirror.close(0.1)
    stuck.set()


def test_a_mirror_that_does_not_answer_holds_no_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirrors, "_open", lambda url: time.sleep(20))
    start = time.monotonic()
    Mirror("memory://bucket", "voc-1").copy(tmp_path / "x", "x")
    assert time.monotonic() - start < 2


def test_a_hung_mirror_is_an_error_of_a_fetch_and_no_endless_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirrors, "STALLED", 0.1)
    monkeypatch.setattr(MemoryFileSystem, "ls", lambda *_, **__: time.sleep(20))
    with pytest.raises(UserError, match=r"cannot be read \(no answer for 0\.1 s"):
        find_run("memory://bucket", "voc")


def test_the_best_checkpoint_comes_back_with_the_newest(tmp_path: Path, url: str) -> None:
    first = mirrored_run(tmp_path, url, "voc-1")
    oldest = sorted((first / "checkpoints").iterdir())[0]
    (first / "checkpoints/best.txt").write_text(f"{oldest.name}\n")
    mirror = Mirror(url, "voc-1")
    mirror.copy(first / "checkpoints/best.txt", "checkpoints/best.txt")
    mirror.close(10)
    fresh = tmp_path / "second_machine" / "voc-1"
    newest = fetch_run(url, "voc-1", fresh)
    assert newest is not None and newest.name != oldest.name
    assert (fresh / "checkpoints" / oldest.name).read_bytes() == oldest.read_bytes()
    assert (fresh / "checkpoints/best.txt").read_text().strip() == oldest.name


def test_a_file_that_was_pruned_before_its_copy_is_no_failure(tmp_path: Path) -> None:
    warnings: list[str] = []
    mirror = Mirror("memory://bucket", "voc-1", warnings.append)
    mirror.copy(tmp_path / "gone.ckpt", "checkpoints/gone.ckpt")
    mirror.close(10)
    assert warnings == []


def test_a_short_upload_never_takes_the_final_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(self: LocalFileSystem, source: str, target: str, **settings: Any) -> None:
        content = Path(source).read_bytes()
        Path(target).write_bytes(content[: len(content) // 2])

    monkeypatch.setattr(LocalFileSystem, "put_file", half)
    warnings: list[str] = []
    mirror = Mirror(str(tmp_path / "drive"), "voc-1", warnings.append)
    mirror.copy(save_step(tmp_path, 1), "checkpoints/1.ckpt")
    mirror.close(10)
    assert not (tmp_path / "drive" / "voc-1" / "checkpoints" / "1.ckpt").exists()
    assert "bytes of" in warnings[0]


@pytest.mark.parametrize("bad", ["nosuchscheme://bucket", "dropbox://folder"])
def test_a_scheme_without_its_library_is_a_usage_error(bad: str) -> None:
    with pytest.raises(UsageError, match="--mirror"):
        Mirror(bad, "voc-1")


def mirrored_run(tmp_path: Path, url: str, name: str, steps: tuple[int, ...] = (10, 20)) -> Path:
    run_dir = tmp_path / "first_machine" / name
    mirror = Mirror(url, name)
    for step in steps:
        path = save_step(run_dir, step)
        mirror.copy(path, f"checkpoints/{path.name}")
    (run_dir / "schedule.txt").write_text("planned")
    mirror.copy(run_dir / "schedule.txt", "schedule.txt")
    mirror.close(10)
    return run_dir


def test_a_run_comes_back_on_a_fresh_machine(tmp_path: Path, url: str) -> None:
    first = mirrored_run(tmp_path, url, "voc-1")
    fresh = tmp_path / "second_machine" / "voc-1"
    path = fetch_run(url, "voc-1", fresh)
    assert path is not None and path.name.startswith("epoch000-step000020")
    assert path.read_bytes() == (first / "checkpoints" / path.name).read_bytes()
    assert (fresh / "schedule.txt").read_text() == "planned"
    assert fetch_run(url, "voc-1", fresh) is None  # nothing newer any more


def test_a_fetch_that_breaks_off_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirrored_run(tmp_path, "flaky://bucket", "voc-1")
    fresh, get_file = tmp_path / "fresh", FlakyFileSystem.get_file
    for broken in ("schedule.txt", "epoch000-step000020-lr1.000e-03.ckpt"):

        def break_off(
            self: Any, path: str, *rest: Any, broken: str = broken, **settings: Any
        ) -> None:
            if path.endswith(broken):
                raise ConnectionError("gone")
            get_file(self, path, *rest, **settings)

        monkeypatch.setattr(FlakyFileSystem, "get_file", break_off)
        with pytest.raises(UserError, match="gone"):
            fetch_run("flaky://bucket", "voc-1", fresh)
    monkeypatch.setattr(FlakyFileSystem, "get_file", get_file)
    assert fetch_run("flaky://bucket", "voc-1", fresh) is not None
    assert (fresh / "schedule.txt").read_text() == "planned"


def test_strangers_at_a_mirror_are_left_there(tmp_path: Path, url: str) -> None:
    mirrored_run(tmp_path, url, "voc-1")
    fs, folder = fsspec.core.url_to_fs(f"{url}/voc-1/checkpoints")
    fs.pipe_file(f"{folder}/mine.ckpt", b"notes")
    path = fetch_run(url, "voc-1", tmp_path / "fresh")
    assert path is not None and "step000020" in path.name


def test_local_checkpoints_that_are_newer_win(tmp_path: Path, url: str) -> None:
    mirrored_run(tmp_path, url, "voc-1")
    fresh = tmp_path / "second_machine"
    save_step(fresh, 30)
    assert fetch_run(url, "voc-1", fresh) is None
    assert not (fresh / "schedule.txt").exists()


def test_a_damaged_copy_is_reported_and_the_one_before_taken(tmp_path: Path, url: str) -> None:
    mirrored_run(tmp_path, url, "voc-1")
    fs, newest = fsspec.core.url_to_fs(
        f"{url}/voc-1/checkpoints/epoch000-step000020-lr1.000e-03.ckpt"
    )
    fs.pipe_file(newest, fs.cat_file(newest)[:-100])
    warnings: list[str] = []
    path = fetch_run(url, "voc-1", tmp_path / "fresh", warnings.append)
    assert path is not None and "step000010" in path.name
    assert len(warnings) == 1 and "step000020" in warnings[0]
    assert [p.name for p in (tmp_path / "fresh" / "checkpoints").iterdir()] == [path.name]


def test_the_newest_unfinished_run_of_the_configuration_is_found(tmp_path: Path, url: str) -> None:
    assert find_run(url, "voc") is None  # an empty mirror
    for name in (
        "voc-20260101-000000",
        "voc-20260102-000000",
        "voc-20260103-000000",
        "digits-20260109-000000",
    ):
        mirrored_run(tmp_path, url, name, steps=(1,))
    fs, root = fsspec.core.url_to_fs(url)
    fs.pipe_file(f"{root}/voc-20260103-000000/results.json", b"{}")
    fs.makedirs(f"{root}/voc-20260105-000000")
    fs.pipe_file(
        f"{root}/voc-20260105-000000/schedule.txt", b"planned, and died before its first checkpoint"
    )
    assert find_run(url, "voc") == "voc-20260102-000000"
    assert fetch_run(url, "voc-20260104-000000", tmp_path / "none") is None


def test_an_unreadable_mirror_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: FlakyFileSystem, path: str, detail: bool = True, **settings: Any) -> list[str]:
        raise PermissionError("no\naccess")

    monkeypatch.setattr(FlakyFileSystem, "ls", refuse)
    for ask in (
        lambda: find_run("flaky://b", "voc"),
        lambda: fetch_run("flaky://b", "voc-1", tmp_path),
    ):
        with pytest.raises(UserError, match="cannot be read") as caught:
            ask()
        assert "\n" not in str(caught.value)


def test_resuming_brings_back_the_newest_unfinished_run_whether_local_or_not(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fresh").mkdir()
    monkeypatch.chdir(tmp_path / "fresh")
    lines: list[str] = []
    bring_back(url, "voc", None, lines.append)
    assert lines == []  # an empty mirror
    mirrored_run(tmp_path, url, "voc-20260101-000000", steps=(10, 20))
    bring_back(url, "voc", None, lines.append)
    assert lines == [f"fetched epoch000-step000020-lr1.000e-03.ckpt from {url}"]
    assert (Path("runs") / "voc-20260101-000000" / "schedule.txt").exists()
    save_step(Path("runs") / "voc-20260102-000000", 5)  # newer, and only here
    mirrored_run(tmp_path, url, "voc-20260101-000000", steps=(30,))
    bring_back(url, "voc", None, lines.append)
    assert len(lines) == 1


def test_a_dead_mirror_stops_a_resume_only_when_nothing_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: FlakyFileSystem, path: str, detail: bool = True, **settings: Any) -> list[str]:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(FlakyFileSystem, "ls", refuse)
    lines: list[str] = []
    with pytest.raises(UserError, match="no route"):
        bring_back("flaky://b", "voc", str(tmp_path / "run"), lines.append)
    save_step(tmp_path / "run", 5)
    bring_back("flaky://b", "voc", str(tmp_path / "run"), lines.append)
    assert len(lines) == 1 and "no route" in lines[0] and "going on" in lines[0]


def test_a_copy_that_no_run_can_go_on_from_is_as_good_as_damaged(tmp_path: Path) -> None:
    run = mirrored_run(tmp_path, url := f"{tmp_path}/drive", "voc-1", steps=(10,))
    strange = run / "checkpoints" / "epoch000-step000020-lr1.000e-03.ckpt"
    save_checkpoint(strange, {**whole_content(20), "best": torch.ones(2)})
    mirror = Mirror(url, "voc-1")
    mirror.copy(strange, f"checkpoints/{strange.name}")
    mirror.close(10)
    warnings: list[str] = []
    path = fetch_run(url, "voc-1", tmp_path / "fresh", warnings.append)
    assert path is not None and "step000010" in path.name
    assert len(warnings) == 1 and "best is not as training writes it" in warnings[0]


def test_files_that_only_look_like_checkpoints_are_left_at_the_mirror(tmp_path: Path) -> None:
    mirrored_run(tmp_path, url := f"{tmp_path}/drive", "voc-1", steps=(10,))
    (tmp_path / "drive/voc-1/checkpoints/epoch1-stepx-lr1.ckpt").write_text("")
    path = fetch_run(url, "voc-1", tmp_path / "fresh")
    assert path is not None and "step000010" in path.name
