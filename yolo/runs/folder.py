"""The folder of a run: where it is, whether it may be written, and what lies in it."""

import hashlib
import json
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from filelock import BaseFileLock, FileLock, Timeout

from yolo.cli import read_yaml
from yolo.config import Config
from yolo.errors import UsageError, UserError
from yolo.files import read_text, replacing

RUNS = Path("runs")
INDEX = "index.tsv"  # of the runs that were started from here, also of those with another --out-dir
CHECKPOINT = re.compile(r"epoch[0-9]{1,18}-step([0-9]{1,18})-lr[^/]*\.ckpt")
SCHEDULE = re.compile(r"schedule-([0-9]{1,18})\.txt")
LOCK_SECONDS = 10.0  # a killed start may still be ending
_DIGEST = "# digest "


class RunFolder:
    """The names inside a run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.schedule = path / "schedule.txt"
        self.metrics = path / "metrics.jsonl"
        self.results = path / "results.json"
        self.checkpoints = path / "checkpoints"
        self.best = path / "best.safetensors"
        self.splits = path / "splits"
        self.stopped = path / "stopped.json"
        self.plots = path / "plots"
        self.launch = path / ".launch"

    @property
    def holds_a_run(self) -> bool:
        """Whether somebody trained here."""
        return self.metrics.exists() or bool(list_checkpoints(self.checkpoints))

    def is_of(self, data_root: str) -> bool:
        """Return whether the run is trained on the data of that folder, wherever it lies now."""
        try:
            root = str(self.read_config()[0].get("data_root") or "")
            return Path(root).resolve().name == Path(data_root).resolve().name
        except (OSError, UserError, ValueError):  # damaged, or a name that no folder can have
            return False

    def write_config(self, config: Config) -> None:
        """Store the configuration so that `--config` can read it back.

        `max_steps` stays out: it ends one start of the run, and a later one shall be able to go
        further.
        """
        values = {key: value for key, value in config.to_dict().items() if key != "max_steps"}
        text = yaml.safe_dump(values, sort_keys=False)
        with replacing(self.config) as temporary:
            temporary.write_text(f"{_digest_line(text)}\n{text}")

    def read_config(self) -> tuple[dict[str, Any], bool]:
        """Return the stored configuration, and whether it is as it was written.

        Files of earlier versions carry no digest: they count as intact.

        Raises:
            UsageError: if it cannot be read.
        """
        first, _, text = read_text(self.config).partition("\n")
        intact = not first.startswith(_DIGEST) or first == _digest_line(text)
        return read_yaml(self.config), intact

    def read_results(self) -> dict[str, Any]:
        """Return what is in `results.json`; nothing if it is missing or damaged."""
        try:
            results = json.loads(self.results.read_text())
        except (OSError, ValueError, RecursionError):
            return {}
        return results if isinstance(results, dict) else {}

    def state(self) -> tuple[tuple[str, int], ...]:
        """Return names and sizes of what a training writes here: they tell if one was at work."""
        files = [self.config, self.metrics, *list_checkpoints(self.checkpoints)]
        return tuple((file.name, file.stat().st_size) for file in files if file.exists())

    def lock(self) -> BaseFileLock | None:
        """Keep other trainings out until this process ends, however it ends.

        None on a file system without locks; anything worse shows at the next write.

        Raises:
            UserError: if another one is at work here.
        """
        # not a soft lock, which would outlive a killed process and keep its own resume out
        lock = FileLock(self.path / ".lock", is_singleton=True, fallback_to_soft=False)
        try:
            lock.acquire(timeout=LOCK_SECONDS)
        except Timeout:
            raise UserError(
                f"{self.path}: another training is at work in this folder; name another --out-dir"
            ) from None
        except OSError:
            return None
        return lock

    def schedules(self) -> list[Path]:
        """Return the schedule files, newest first.

        As in `schedule-3.txt`, `schedule-2.txt`, `schedule.txt`.
        """
        numbered = [
            (int(found[1]), path)
            for path in self.path.glob("schedule-*.txt")
            if (found := SCHEDULE.fullmatch(path.name))
        ]
        replanned = [path for _, path in sorted(numbered, reverse=True)]
        return [*replanned, *([self.schedule] if self.schedule.exists() else [])]

    def next_schedule(self) -> Path:
        """Return a name for one more schedule, beside those that are there."""
        taken = self.schedules()
        return self.path / f"schedule-{len(taken) + 1}.txt" if taken else self.schedule


@dataclass(frozen=True)
class Launch:
    """A start by torchrun, in one of its processes: what its restarts have in common."""

    run_id: str
    agent: int  # process id of torchrun on this node
    first_node: bool
    restarts: int

    def mark(self, folder: RunFolder) -> None:
        """Note that this launch writes here, for its restarts."""
        folder.launch.write_text(f"{self.run_id} {self.agent}")

    def wrote(self, folder: RunFolder) -> bool:
        """Whether it wrote here: the first node's agent did, the others only share its run id."""
        if not folder.launch.exists():
            return False
        run_id, _, agent = folder.launch.read_text().rpartition(" ")
        return run_id == self.run_id and (agent == str(self.agent) or not self.first_node)

    def find_folder(self, out_dir: str | None) -> RunFolder | None:
        """Return the newest folder that it has written to."""
        places = (
            [Path(out_dir)] if out_dir else sorted(RUNS.glob("*"), key=lambda path: path.name[-15:])
        )
        return next(filter(self.wrote, map(RunFolder, reversed(places))), None)


@dataclass(frozen=True)
class RunPlan:
    """Where a run writes, and what it continues."""

    folder: RunFolder
    resuming: bool = False
    checkpoint: Path | None = None  # named by `--resume`; None: the newest intact one of the folder
    launch: Launch | None = None
    config_name: str = ""  # stem of the configuration file
    unsure: frozenset[str] = frozenset()  # keys of a stored configuration that somebody changed
    seen: tuple[tuple[str, int], ...] = field(init=False)  # what lay in the folder

    def __post_init__(self) -> None:
        """Look into the folder."""
        object.__setattr__(self, "seen", self.folder.state())

    @property
    def stored_config(self) -> Path | None:
        """The configuration of the run to continue: the folder's, or that beside the checkpoint."""
        if not self.resuming:
            return None
        homes = [self.folder]
        if self.checkpoint is not None:
            homes.append(RunFolder(self.checkpoint.absolute().parent.parent))
        return next((home.config for home in homes if home.config.exists()), None)


def plan_run(
    config_name: str,
    out_dir: str | None,
    resume: str | None,
    launch: Launch | None = None,
    data_root: str | None = None,
) -> RunPlan:
    """Choose where a run writes, and what it continues from.

    After a restart by torchrun that is where the start before it wrote, whatever the flags say.

    Args:
        config_name: stem of the configuration file; names new folders.
        out_dir: what `--out-dir` says.
        resume: None, `auto`, or the path of a checkpoint or run folder.
        launch: by torchrun, if it is.
        data_root: of the run that `auto` goes on with, if that is given.

    Raises:
        UsageError: if the folder holds a run and `resume` is not given, or `resume` names nothing.
    """
    if launch and launch.restarts > 0 and (folder := launch.find_folder(out_dir)):
        return RunPlan(folder, True, launch=launch)
    if resume is not None and resume != "auto":
        folder, checkpoint = _named_run(Path(resume), out_dir)
        return RunPlan(folder, True, checkpoint, launch)
    if out_dir is None:
        unfinished = newest_unfinished(config_name, data_root) if resume == "auto" else None
        fresh = RunFolder(RUNS / f"{config_name}-{time.strftime('%Y%m%d-%H%M%S')}")
        return RunPlan(unfinished or fresh, resume == "auto", launch=launch)
    folder = RunFolder(Path(out_dir))
    if folder.holds_a_run and resume is None:
        raise UsageError(
            f"--out-dir {out_dir} holds a run: continue it with --resume auto, or choose another "
            "folder"
        )
    return RunPlan(folder, resume == "auto", launch=launch)


def _named_run(source: Path, out_dir: str | None) -> tuple[RunFolder, Path | None]:
    """Return where `--resume` goes on, and with which checkpoint unless it is the newest there."""
    if not source.exists():
        raise UsageError(
            f"--resume {source}: no such checkpoint or run folder; --resume auto looks for the "
            "newest"
        )
    if source.is_dir() and not list_checkpoints(RunFolder(source).checkpoints):
        raise UsageError(
            f"--resume {source}: holds no checkpoints/; name a run folder or a checkpoint"
        )
    if not source.is_dir() and source.absolute().parent.name != "checkpoints" and out_dir is None:
        raise UsageError(
            f"--resume {source}: lies in no run folder; say with --out-dir where to write"
        )
    home = RunFolder(source if source.is_dir() else source.absolute().parent.parent)
    if out_dir is None or Path(out_dir).resolve() == home.path.resolve():
        return home, None if source.is_dir() else source
    if (folder := RunFolder(Path(out_dir))).holds_a_run:
        raise UsageError(
            f"--out-dir {out_dir} holds another run than --resume {source}: leave one out"
        )
    return folder, list_checkpoints(home.checkpoints)[-1] if source.is_dir() else source


def newest_unfinished(config_name: str, data_root: str | None = None) -> RunFolder | None:
    """Return the newest folder of that configuration that has a checkpoint and no results yet.

    Args:
        config_name: stem of the configuration file.
        data_root: of the run, if that is to be the same.
    """
    started = {path: path.name[-15:] for path in RUNS.glob(f"{config_name}-[0-9]*")}
    for when, name, folder in _index():
        if name == config_name:
            started.setdefault(Path(folder), when)
    for path in sorted(started, key=lambda path: started[path], reverse=True):
        run = RunFolder(path)
        if run.results.exists() or not list_checkpoints(run.checkpoints):
            continue
        if data_root is None or run.is_of(data_root):
            return run
    return None


def _index() -> list[list[str]]:
    """Return start, configuration and folder of the runs that were started from here."""
    file = RUNS / INDEX
    lines = file.read_text(errors="replace").splitlines() if file.exists() else []
    # no folder can have a NUL in its name
    return [fields for line in lines if len(fields := line.split("\t")) == 3 and "\0" not in line]


def note_run(config_name: str, folder: Path) -> None:
    """Remember a run under `runs/`, wherever its folder is, so that `--resume auto` finds it."""
    path = str(folder.absolute())
    kept = [fields for fields in _index() if fields[2] != path and Path(fields[2]).is_dir()]
    RUNS.mkdir(parents=True, exist_ok=True)
    lines = [*kept, [time.strftime("%Y%m%d-%H%M%S"), config_name, path]]
    with replacing(RUNS / INDEX) as temporary:
        temporary.write_text("".join("\t".join(fields) + "\n" for fields in lines))


def list_runs() -> list[Path]:
    """Return the run folders started from here that hold checkpoints, last saved to first."""
    folders = {*RUNS.glob("*"), *(Path(folder) for _, _, folder in _index())}
    saved: dict[Path, float] = {}
    for run in {folder.resolve(): folder for folder in sorted(folders)}.values():
        if checkpoints := list_checkpoints(run / "checkpoints"):
            saved[run] = max(file.stat().st_mtime for file in checkpoints)
    return sorted(saved, key=saved.__getitem__, reverse=True)


def checkpoint_name(epoch: int, step: int, lr: float) -> str:
    """Return the name of a checkpoint, which carries the schedule's value."""
    return f"epoch{epoch:03d}-step{step:06d}-lr{lr:.3e}.ckpt"


def _digest_line(text: str) -> str:
    return f"{_DIGEST}{hashlib.sha256(text.encode()).hexdigest()}"


def run_of(path: Path) -> RunFolder | None:
    """Return the run folder a file lies in, or in its `checkpoints/`; None for one elsewhere."""
    home = path.absolute().parent
    folder = RunFolder(home.parent if home.name == "checkpoints" else home)
    return folder if folder.config.exists() and folder.checkpoints.is_dir() else None


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a `checkpoints/` folder, oldest first (by step)."""
    return sorted(filter(is_checkpoint, folder.glob("epoch*.ckpt")), key=step_of)


def is_checkpoint(path: Path) -> bool:
    """Return whether a file is named as `checkpoint_name` does it."""
    return CHECKPOINT.fullmatch(path.name) is not None


def step_of(path: Path) -> int:
    """Return the number of optimizer steps done that a checkpoint's name carries."""
    return int(path.name.split("-step")[1].split("-")[0])
