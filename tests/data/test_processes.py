"""Reading on all cores."""

import os
import signal

import pytest

from yolo.data import processes
from yolo.data.processes import map_in_processes
from yolo.errors import UserError


def test_many_items_are_worked_on_by_other_processes_in_their_order(monkeypatch) -> None:
    monkeypatch.setattr(processes.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    offset = 3  # what a closure holds need not be pickled
    found = list(map_in_processes(lambda item: (item + offset, os.getpid()), range(1200)))
    assert [value for value, _ in found] == list(range(3, 1203))
    assert os.getpid() not in {pid for _, pid in found}


def test_a_process_that_is_killed_is_one_line(monkeypatch) -> None:
    monkeypatch.setattr(processes.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    with pytest.raises(UserError, match="lack of memory"):
        list(map_in_processes(lambda _: os.kill(os.getpid(), signal.SIGKILL), range(1200)))


def test_few_items_stay_in_this_process() -> None:
    assert set(map_in_processes(lambda _: os.getpid(), range(9))) == {os.getpid()}
