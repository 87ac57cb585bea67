"""A training beside other programs."""

from collections.abc import Iterator

import psutil
import pytest
import torch

from yolo.config import Config
from yolo.engine import sharing
from yolo.engine.fabric import make_fabric
from yolo.engine.sharing import LOOKS, OtherLoad, Threads


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def counts(monkeypatch: pytest.MonkeyPatch, cores: int, loads: list[float | None]) -> list[int]:
    """The number of threads after each look at the load of others."""
    monkeypatch.setattr(psutil, "cpu_count", lambda: cores)
    readings = iter(loads)
    threads = Threads(cores, adapts=True, others=lambda: next(readings))
    found = []
    for _ in loads:
        threads.adapt()
        found.append(torch.get_num_threads())
    return found


def test_threads_are_given_up_at_once_and_taken_back_when_the_others_are_gone(monkeypatch) -> None:
    loads = [0.0, 0.7, 1.0, 1.0, 0.0, None, 0.1, 0.0]
    assert counts(monkeypatch, 2, loads) == [2, 1, 1, 1, 1, 1, 1, 2]
    assert LOOKS == 3


@pytest.mark.parametrize(
    ("others", "threads"),
    [(0.2, 8), (0.9, 7), (1.0, 7), (2.3, 6), (7.0, 1), (8.0, 1), (20.0, 1)],
)
def test_as_many_threads_as_cores_are_left(monkeypatch, others: float, threads: int) -> None:
    assert counts(monkeypatch, 8, [others]) == [threads]


def test_one_short_pause_of_the_others_takes_nothing_back(monkeypatch) -> None:
    assert counts(monkeypatch, 2, [1.0, 0.0, 0.0, 1.0, 0.0, 0.0]) == [1] * 6


def test_a_given_number_stays(monkeypatch) -> None:
    config = Config(accelerator="cpu", precision="32-true", threads=2)
    threads = Threads.of(make_fabric(config)[0], config)
    threads.others = lambda: 5.0
    assert threads.adapt() is None
    assert torch.get_num_threads() == 2


def test_the_load_of_others_is_what_this_process_did_not_use(monkeypatch) -> None:
    clock = iter([0.0, 0.5, 2.0])
    machine, own = iter([10.0, 13.0]), iter([4.0, 5.0])
    monkeypatch.setattr(sharing.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(sharing, "_machine_seconds", lambda: next(machine))
    monkeypatch.setattr(sharing, "_own_seconds", lambda: next(own))
    load = OtherLoad()
    assert load() is None  # half a second later
    assert load() == pytest.approx((3.0 - 1.0) / 2)


def test_this_machine_can_be_looked_at() -> None:
    assert sharing._machine_seconds() > sharing._own_seconds() > 0
