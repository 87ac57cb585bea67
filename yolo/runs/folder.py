"""The folder of a run: where it is, whether it may be written, and what lies in it."""

import os
import time
from pathlib import Path

import yaml

from yolo.config import Config
from yolo.errors import UsageError
from yolo.files import replacing

RUNS = Path("runs")
CHECKPOINTS = "epoch*-step*-lr*.ckpt"


class RunFolder:
    """The names inside a run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.schedule = path / "schedule.txt"
        self.metrics = path / "metrics.jsonl"
        self.results = path / "results.json"
        self.checkpoints = path / "checkpoints"
        self.plots = path / "plots"
        self.launch = path / ".launch"
        self.lock = path / ".lock"

    @property
    def holds_a_run(self) -> bool:
        """Whether somebody trained here."""
        return self.metrics.exists() or bool(list_checkpoints(self.checkpoints))

    def write_config(self, config: Config) -> None:
        """Store the configuration so that `--config` can read it back.

        `max_steps` stays out: it ends one start of the run, and a later one shall be able to go further.
        """
        values = {key: value for key, value in config.to_dict().items() if key != "max_steps"}
        with replacing(self.config) as temporary:
            temporary.write_text(yaml.safe_dump(values, sort_keys=False))

    def mark_launch(self) -> None:
        """Note which torchrun writes here, for its restarts."""
        if "TORCHELASTIC_RUN_ID" in os.environ:
            self.launch.write_text(_launch())

    def schedules(self) -> list[Path]:
        """Return the schedule files, newest first: `schedule-3.txt`, `schedule-2.txt`, `schedule.txt`."""
        numbered = (path for path in self.path.glob("schedule-*.txt") if path.stem.split("-", 1)[1].isdigit())
        replanned = sorted(numbered, key=lambda path: int(path.stem.split("-")[1]))
        return [*reversed(replanned), *([self.schedule] if self.schedule.exists() else [])]

    def next_schedule(self) -> Path:
        """Return a name for one more schedule, beside those that are there."""
        taken = self.schedules()
        return self.path / f"schedule-{len(taken) + 1}.txt" if taken else self.schedule


def find_run_folder(
    config_name: str, out_dir: str | None, resume: str | None
) -> tuple[RunFolder, Path | None, bool]:
    """Choose where a run writes, and what it continues from.

    After a restart by torchrun that is where the start before it wrote, whatever the flags say.

    Args:
        config_name: stem of the configuration file; names new folders.
        out_dir: what `--out-dir` says.
        resume: None, `auto`, or the path of a checkpoint or run folder.

    Returns:
        The folder; the checkpoint to continue from if `resume` names one; whether to continue at all.

    Raises:
        UsageError: if the folder holds a run and `resume` is not given, or `resume` names nothing.
    """
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0 and (folder := _last_of_launch(out_dir)):
        return folder, None, True
    if resume is not None and resume != "auto":
        source = Path(resume)
        if not source.exists():
            raise UsageError(
                f"--resume {source}: no such checkpoint or run folder; --resume auto looks for the newest"
            )
        if source.is_dir() and not list_checkpoints(RunFolder(source).checkpoints):
            raise UsageError(f"--resume {source}: holds no checkpoints/; name a run folder or a checkpoint")
        if not source.is_dir() and source.absolute().parent.name != "checkpoints" and out_dir is None:
            raise UsageError(f"--resume {source}: lies in no run folder; say with --out-dir where to write")
        home = RunFolder(source if source.is_dir() else source.absolute().parent.parent)
        if out_dir is None or Path(out_dir).resolve() == home.path.resolve():
            return home, None if source.is_dir() else source, True
        if (folder := RunFolder(Path(out_dir))).holds_a_run:
            raise UsageError(f"--out-dir {out_dir} holds another run than --resume {resume}: leave one out")
        return folder, list_checkpoints(home.checkpoints)[-1] if source.is_dir() else source, True
    if out_dir is not None:
        folder = RunFolder(Path(out_dir))
        if folder.holds_a_run and resume is None:
            raise UsageError(
                f"--out-dir {out_dir} holds a run: continue it with --resume auto, or choose another folder"
            )
        return folder, None, resume == "auto"
    unfinished = newest_unfinished(config_name) if resume == "auto" else None
    fresh = RunFolder(RUNS / f"{config_name}-{time.strftime('%Y%m%d-%H%M%S')}")
    return unfinished or fresh, None, resume == "auto"


def stored_config(folder: RunFolder, source: Path | None) -> Path | None:
    """Return the configuration of the run to continue: the folder's, or that of the checkpoint `source`."""
    homes = [folder] if source is None else [folder, RunFolder(source.absolute().parent.parent)]
    return next((home.config for home in homes if home.config.exists()), None)


def newest_unfinished(config_name: str) -> RunFolder | None:
    """Return the newest folder of that configuration that has a checkpoint and no results yet."""
    folders = [RunFolder(path) for path in sorted(RUNS.glob(f"{config_name}-[0-9]*"), reverse=True)]
    return next((f for f in folders if list_checkpoints(f.checkpoints) and not f.results.exists()), None)


def _launch() -> str:
    """Return what the restarts of one torchrun have in common: its run id and its process on this node."""
    return f"{os.environ.get('TORCHELASTIC_RUN_ID')} {os.getppid()}"


def _is_of_launch(folder: RunFolder) -> bool:
    """Whether this launch has written here: rank 0 on the first node, and elsewhere all share its run id."""
    if not folder.launch.exists():
        return False
    if os.environ.get("GROUP_RANK", "0") == "0":
        return folder.launch.read_text() == _launch()
    return folder.launch.read_text().rpartition(" ")[0] == os.environ.get("TORCHELASTIC_RUN_ID")


def _last_of_launch(out_dir: str | None) -> RunFolder | None:
    places = [Path(out_dir)] if out_dir else sorted(RUNS.glob("*"), key=lambda path: path.name[-15:])
    return next(filter(_is_of_launch, map(RunFolder, reversed(places))), None)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a `checkpoints/` folder, oldest first (by step)."""
    return sorted(folder.glob(CHECKPOINTS), key=step_of)


def step_of(path: Path) -> int:
    """Return the number of optimizer steps done that a checkpoint's name carries."""
    return int(path.name.split("-step")[1].split("-")[0])
