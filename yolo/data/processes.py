"""Many small files read by all cores: Python reads them one at a time, whatever the disk can do."""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from yolo.errors import UserError

T = TypeVar("T")
FEWEST = 1000  # for fewer, starting processes is not worth it
_work: list[Callable[[Any], Any]] = []  # that forked processes find here: it need not be pickled


def map_in_processes(
    function: Callable[[Any], T], items: Sequence[Any], fewest: int = FEWEST
) -> Iterable[T]:
    """Return `function` of each item, in order, computed by all cores where the system is Linux.

    With fewer than `fewest` items they stay in this process. What `function` changes elsewhere is
    lost; what it returns is pickled.

    Raises:
        UserError: if a process is killed.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if cores == 1 or len(items) < fewest or multiprocessing.current_process().daemon:
        return map(function, items)
    _work.append(function)
    try:
        fork = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(min(cores, len(items)), fork) as pool:
            return list(pool.map(_call, items, chunksize=max(1, len(items) // cores // 20)))
    except BrokenProcessPool:
        raise UserError(
            "a process was killed, most likely for lack of memory: close other programs, or take a "
            "machine with more"
        ) from None
    finally:
        _work.pop()


def _call(item: Any) -> Any:
    return _work[-1](item)
