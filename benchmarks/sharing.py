"""How fast a training on the CPU stays beside other programs: a real one, on digits."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from yolo.data.digits import write_digits

ROOT = Path(__file__).parents[1]
SETTLE = 5.0  # seconds, in which the training notices what has changed
BUSY = [sys.executable, "-c", "while True: pass"]


def lines(seconds: float, threads: str) -> Iterator[str]:
    """Yield the table: quiet, beside one, beside two busy programs of one thread, quiet again."""
    flags = {
        "config": "configs/digits.yaml", "epochs": 1000, "eval-every": 1000, "log-every": 1,
        "save-every": "10h", "threads": threads, "accelerator": "cpu",
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    yield f"| {threads} threads | images/s | of the quiet | threads at the end |\n|---|---|---|---|"
    with tempfile.TemporaryDirectory() as folder:
        metrics, data = Path(folder) / "run" / "metrics.jsonl", Path(folder) / "digits"
        write_digits(data, 0, {"train": 1000, "test": 16})
        folders = ["--out-dir", str(metrics.parent), "--data-root", str(data)]
        command = [sys.executable, "train.py", *folders, *words]
        training = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        others: list[subprocess.Popen] = []
        quiet = 0.0
        try:
            while not metrics.exists() or not metrics.read_text():
                if training.poll() is not None:
                    raise RuntimeError(f"{' '.join(command)} ended with {training.returncode}")
                time.sleep(0.2)
            for name, count in (("quiet", 0), ("beside one", 1), ("beside two", 2), ("quiet", 0)):
                while len(others) < count:
                    others.append(subprocess.Popen(BUSY))
                while len(others) > count:
                    others.pop().kill()
                time.sleep(SETTLE)
                rate = _rate(metrics, seconds)
                quiet = quiet or rate
                used = [row["threads"] for row in _rows(metrics) if row["kind"] == "threads"]
                at_end = str(used[-1]) if used else "as at first"
                yield f"| {name} | {rate:.1f} | {rate / quiet:.0%} | {at_end} |"
        finally:
            for process in (*others, training):
                process.kill()
                process.wait()


def _rows(metrics: Path) -> list[dict]:
    lines = metrics.read_text().split("\n")[:-1]  # the last may be half written
    return [json.loads(line) for line in lines]


def _rate(metrics: Path, seconds: float) -> float:
    """Return images per second over whole steps."""
    start, first = time.monotonic(), len(_rows(metrics))
    time.sleep(seconds)
    while len(rows := _rows(metrics)) == first:
        time.sleep(0.1)
    elapsed = time.monotonic() - start
    done = [row for row in rows[first:] if row["kind"] == "train"]
    return 8 * len(done) / elapsed
