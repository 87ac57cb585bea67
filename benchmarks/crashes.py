"""Trainings that are killed or lose power, files whose bits flip: what a resume makes of them."""

import os
import pickle
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import zip_longest
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from launching import start_training

from yolo.errors import UserError
from yolo.runs.checkpoint import content_digest, load_checkpoint, load_weights, resolve_checkpoint
from yolo.runs.folder import RunFolder, list_checkpoints
from yolo.runs.logbook import TIMINGS, read_metrics
from yolo.schedule import read_schedule

FLAGS = """
dataset: digits
data_root: {root}
width: 0.05
batch_size: 4
epochs: 3
img_sizes: [32, 64]
workers: 0
precision: 32-true
accelerator: cpu
log_every: 1
save_every: "2"
max_lr: 0.01
threads: 1
"""
SAME = ("model", "ema", "optimizer", "step", "epoch", "batch", "best_score")


class Trial:
    """A small training of 18 steps, and how it ends when nothing happens to it."""

    def __init__(self, folder: Path) -> None:
        from yolo.data.digits import write_digits

        self.folder, self.config = folder, folder / "tiny.yaml"
        write_digits(folder / "digits", num_scenes={"train": 24, "test": 7})
        self.config.write_text(FLAGS.format(root=folder / "digits"))
        self.whole = folder / "whole"
        for run in (folder / "first", self.whole):  # the first waits for imports
            start = time.monotonic()
            assert self.train(run) == 0, run.with_suffix(".log").read_text()
            self.seconds = time.monotonic() - start
        self.end = outcome(self.whole)

    def train(
        self, run: Path, kill_after: float | None = None, hook: Callable[[], None] | None = None
    ) -> int | None:
        """Start or go on; return the exit code (-9: killed)."""
        argv = ["--config", str(self.config), "--out-dir", str(run), "--resume", "auto"]
        process = start_training(argv, run.with_suffix(".log"), hook=hook)
        process.join(600 if kill_after is None else kill_after)
        if process.exitcode is None:
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
        return process.exitcode


def outcome(run: Path) -> tuple[str, list[dict[str, Any]]]:
    """Return what has to be the same: weights and all else that is learned, and the records."""
    content = load_checkpoint(list_checkpoints(run / "checkpoints")[-1])
    lines = read_metrics(run / "metrics.jsonl")
    kept = [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]
    return content_digest({name: content[name] for name in SAME}), kept


def difference(code: int | None, run: Path, trial: Trial) -> str:
    """Return how a continued training differs from the whole one; nothing if it does not."""
    if code:
        return f"exit code {code}: {run.with_suffix('.log').read_text()[-300:]}"
    (weights, lines), (whole_weights, whole_lines) = outcome(run), trial.end
    pairs = zip_longest(lines, whole_lines)
    first = next((f"line {i}: {a} and not {b}" for i, (a, b) in enumerate(pairs) if a != b), "")
    return first or ("" if weights == whole_weights else "other weights")


def kills(chains: int, seed: int) -> Iterator[str]:
    """Yield how many chains of killed starts end as the training that nobody killed."""
    same, killed = 0, 0
    with TemporaryDirectory() as scratch:
        trial = Trial(Path(scratch))
        for chain in range(chains):
            rng, run = Random(f"{seed} {chain}"), trial.folder / f"chain{chain}"
            for _ in range(rng.randrange(1, 5)):
                killed += trial.train(run, rng.uniform(0, 0.9 * trial.seconds)) == -signal.SIGKILL
            code = trial.train(run)
            found = difference(code, run, trial)
            same += not found
            if found:
                yield f"chain {chain}: {found}"
            shutil.rmtree(run)
    yield "| `kill -9` at random times | chains | kills | end bit-identical |\n|---|---|---|---|"
    yield f"| a training of 18 steps, gone on with `--resume auto` | {chains} | {killed} | {same} |"


def flips(count: int, seed: int) -> Iterator[str]:
    """Yield, for each kind of file, how many flipped bits are found or change nothing."""
    yield "| a flipped bit in | flips | found | without effect | changed something unseen |"
    yield "|---|---|---|---|---|"
    with TemporaryDirectory() as scratch:
        trial = Trial(Path(scratch))
        folder = RunFolder(trial.whole)
        newest = list_checkpoints(folder.checkpoints)[-1]
        weights = trial.folder / "weights.safetensors"
        _export(newest, weights)
        (folder.checkpoints / "best.txt").touch()
        reads: dict[Path, Callable[[], Any]] = {
            newest: lambda: content_digest(load_checkpoint(newest)),
            weights: lambda: _described(weights),
            folder.config: lambda: _intact(folder),
            folder.schedule: lambda: read_schedule(folder.schedule),
            folder.checkpoints / "best.txt": lambda: resolve_checkpoint(folder.path),
        }
        for path, read in reads.items():
            yield _row(path, read, count, seed)


def _row(path: Path, read: Callable[[], Any], count: int, seed: int) -> str:
    whole, expected = path.read_bytes(), read()
    found = same = unseen = 0
    for number in range(count if whole else 0):
        rng, data = Random(f"{seed} {path.suffix} {number}"), bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            result = read()
        except UserError:
            found += 1
            continue
        same, unseen = same + (result == expected), unseen + (result != expected)
    path.write_bytes(whole)
    name = f"`{path.suffix}`" if path.suffix in (".ckpt", ".safetensors") else f"`{path.name}`"
    return f"| {name} | {found + same + unseen} | {found} | {same} | {unseen} |"


def _export(checkpoint: Path, target: Path) -> None:
    from yolo.inference.export import export

    export(load_weights(checkpoint), target)


def _described(path: Path) -> Any:
    loaded = load_weights(path)
    return loaded.digest, loaded.config, loaded.class_names, str(loaded.anchors), loaded.results


def _intact(folder: RunFolder) -> Any:
    values, intact = folder.read_config()
    if not intact:
        raise UserError("it was changed")
    return values


# ---- power cuts


def record(folder: Path, log: Path) -> None:
    """Write down, in a training's process, what reaches the disk and in which order."""
    fsync, replace, unlink, lock = os.fsync, os.replace, os.unlink, threading.Lock()
    events: list[tuple[Any, ...]] = []

    def note(*event: Any) -> None:
        with lock:
            events.append(event)
            with log.open("ab") as file:
                pickle.dump(event, file)

    def noted_fsync(descriptor: int) -> None:
        fsync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_relative_to(folder):
            note("sync", path, None if path.is_dir() else path.read_bytes())

    def noted_replace(source: Any, target: Any, **options: Any) -> None:
        replace(source, target, **options)
        if Path(target).is_relative_to(folder):
            note("move", Path(source), Path(target))

    def noted_unlink(path: Any, **options: Any) -> None:
        unlink(path, **options)
        if Path(path).is_relative_to(folder):
            note("move", Path(path), None)

    os.fsync, os.replace, os.rename = noted_fsync, noted_replace, noted_replace  # type: ignore
    os.unlink = os.remove = noted_unlink  # type: ignore[assignment]


def after_cut(events: list[tuple[Any, ...]], rng: Random) -> dict[Path, bytes]:
    """Return the files that a disk holds when the power goes after these events.

    Data that no fsync has written is gone. A renaming or deletion since the last fsync of its
    folder has happened or not, in order: some file systems write it at once, some late.
    """
    volatile: dict[Path, list[bytes]] = {}  # by name, what the file holds on the disk
    durable: dict[Path, list[bytes]] = {}
    pending: list[tuple[Path, Path | None, list[bytes]]] = []

    def settle(moves: list[tuple[Path, Path | None, list[bytes]]]) -> None:
        for source, target, content in moves:
            durable.pop(source, None)
            if target is not None:
                durable[target] = content

    for kind, path, more in events:
        if kind == "move":
            content = volatile.pop(path, [b""])
            if more is not None:
                volatile[more] = content
            pending.append((path, more, content))
        elif more is None:
            settle([move for move in pending if (move[1] or move[0]).parent == path])
            pending = [move for move in pending if (move[1] or move[0]).parent != path]
        else:
            content = volatile.setdefault(path, [b""])
            content[0] = more
            durable.setdefault(path, content)
    settle(pending[: rng.randrange(len(pending) + 1)])
    return {path: content[0] for path, content in durable.items()}


def power_cuts(cuts: int, seed: int) -> Iterator[str]:
    """Yield how many trainings go on as if nothing had happened after the power was cut."""
    whole = same = 0
    with TemporaryDirectory() as scratch:
        trial = Trial(Path(scratch).resolve())
        run, log = trial.folder / "cut", trial.folder / "events"
        assert trial.train(run, hook=partial(record, run, log)) == 0, run.with_suffix(
            ".log"
        ).read_text()
        events = []
        with log.open("rb") as file:
            while file.peek(1):
                events.append(pickle.load(file))
        first = next(
            i
            for i, event in enumerate(events)
            if event[1].suffix == ".ckpt" or "ckpt" in str(event[2])[:200]
        )
        for number in range(cuts):
            rng = Random(f"{seed} {number}")
            files = after_cut(events[: rng.randrange(first + 4, len(events))], rng)
            shutil.rmtree(run)
            for path, content in files.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            whole += _has_whole_records(run, trial)
            code = trial.train(run)
            found = difference(code, run, trial)
            same += not found
            if found:
                yield f"cut {number}: {found}"
    yield "| power cuts, all unsynced data lost | cuts | metrics.jsonl whole | end bit-identical |"
    yield "|---|---|---|---|"
    yield (
        f"| at a random write, fsync or rename ({len(events)} recorded) | {cuts} | {whole} | "
        f"{same} |"
    )


def _has_whole_records(run: Path, trial: Trial) -> bool:
    checkpoints = list_checkpoints(run / "checkpoints")
    step = load_checkpoint(checkpoints[-1])["step"] if checkpoints else 0
    lines = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "train"]
    return [line["step"] for line in lines if line["step"] <= step] == list(range(1, step + 1))
