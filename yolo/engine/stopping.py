"""When to stop early: a signal, or the time that a borrowed machine gives."""

import os
import signal
import sys
import time
from types import FrameType

EXIT_CODES = {"SIGTERM": 143, "SIGINT": 130, "--max-time": 0}
SAME_SIGNAL = 2.0  # seconds: torchrun passes on what its ranks may have received already


class StopRequest:
    """Remembers the first reason to stop; the loop asks for it between two optimizer steps.

    A second signal, a while after the first, exits at once, without saving.
    """

    def __init__(self, max_seconds: float | None = None) -> None:
        """Listen for SIGTERM and SIGINT; `max_seconds` counts from now."""
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self.reserve = 0.0  # seconds before the deadline that a last test takes
        self._signal: str | None = None
        self._signal_time = 0.0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    @property
    def reason(self) -> str | None:
        """`SIGTERM`, `SIGINT`, `--max-time`, or None to go on."""
        if (
            self._signal is None
            and self._deadline is not None
            and time.monotonic() >= self._deadline - self.reserve
        ):
            return "--max-time"
        return self._signal

    def _remember(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._signal is not None:
            if time.monotonic() - self._signal_time > SAME_SIGNAL:
                os._exit(EXIT_CODES[name])
            return
        self._signal, self._signal_time = name, time.monotonic()
        print(
            f"\n{name}: finishing this step and saving (again: exit at once)",
            file=sys.stderr,
            flush=True,
        )
