"""How many threads to compute with on a CPU that others use as well.

OpenMP's threads wait for one another, spinning: when one of them has to leave its core to another
program, all stand still. With one competitor on two cores two threads make a training twenty times
slower, one makes it half as fast.
"""

import multiprocessing
import time
from collections.abc import Callable

import psutil
import torch

from yolo.config import HardwareConfig
from yolo.engine.fabric import Fabric, ranks_per_node

SECONDS = 1.0  # between two looks at the machine
LOOKS = 3  # in a row that have to find room before a thread is taken back
# of a core that others may use: a thread is given up above the first, taken back below the second
TAKEN, FREE = 0.4, 0.25


class Threads:
    """Gives threads up while other programs need their cores, and takes them back later."""

    def __init__(self, most: int, adapts: bool, others: Callable[[], float | None] | None = None):
        """Start with `most` threads and stay there unless it `adapts`; `others` is for tests."""
        self.most = most
        self.adapts = adapts and most > 1
        self.others = others or OtherLoad()
        self.roomy_looks = 0
        self.take(most)

    @classmethod
    def of(cls, fabric: Fabric, cfg: HardwareConfig) -> "Threads":
        """Return this process's; they adapt with `--threads auto` if no other rank computes."""
        alone = fabric.device.type == "cpu" and ranks_per_node(fabric, cfg) == 1
        return cls(torch.get_num_threads(), adapts=cfg.threads == "auto" and alone)

    def adapt(self) -> str | None:
        """Look at the machine, once a second; return in words what was changed, if anything."""
        if not self.adapts or (used := self.others()) is None:
            return None
        cores = psutil.cpu_count() or self.most
        room = max(1, min(self.most, int(cores - used + TAKEN)))
        # Going up asks for more room than staying, and for it to last.
        roomy = room > self.count and cores - used >= self.count + 1 - FREE
        self.roomy_looks = self.roomy_looks + 1 if roomy else 0
        if room == self.count or (room > self.count and self.roomy_looks < LOOKS):
            return None
        change = (
            f"{room} instead of {self.count} threads: other programs use {used:.1f} of {cores} "
            "cores"
        )
        self.take(room)
        return change

    def take(self, count: int) -> None:
        """Compute with `count` threads from now on."""
        self.count, self.roomy_looks = count, 0
        torch.set_num_threads(count)


class OtherLoad:
    """Cores that programs other than this training and its workers used since the last look."""

    def __init__(self) -> None:
        self.time, self.busy, self.own = time.monotonic(), _machine_seconds(), _own_seconds()

    def __call__(self) -> float | None:
        """Return their number, None within a second of the last look."""
        now = time.monotonic()
        if (elapsed := now - self.time) < SECONDS:
            return None
        busy, own = _machine_seconds(), _own_seconds()
        used = (busy - self.busy - (own - self.own)) / elapsed
        self.time, self.busy, self.own = now, busy, own
        return max(0.0, used)


def _machine_seconds() -> float:
    """Return the seconds that all cores together have worked, or were taken away."""
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    return sum(times[:8]) - idle  # the rest, guests, is in the first two


def _own_seconds() -> float:
    """Return the CPU seconds of this process and of the workers that it has."""
    seconds = 0.0
    for pid in (None, *(worker.pid for worker in multiprocessing.active_children())):
        try:
            times = psutil.Process(pid).cpu_times()
        except psutil.Error:  # it has ended
            continue
        seconds += times.user + times.system
    return seconds
