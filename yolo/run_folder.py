"""The folder of a run: where it is, whether it may be written, and what lies in it."""

import time
from pathlib import Path

import yaml

from yolo.atomic import replacing
from yolo.config import Config
from yolo.errors import UsageError

RUNS = Path("runs")


class RunFolder:
    """The names inside a run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.schedule = path / "schedule.txt"
        self.schedule_plot = path / "schedule.png"
        self.metrics = path / "metrics.jsonl"
        self.results = path / "results.json"
        self.checkpoints = path / "checkpoints"
        self.plots = path / "plots"

    @property
    def holds_a_run(self) -> bool:
        """Whether somebody trained here."""
        return self.metrics.exists() or bool(list_checkpoints(self.checkpoints))

    def write_config(self, config: Config) -> None:
        """Store the configuration so that `--config` can read it back."""
        with replacing(self.config) as temporary:
            temporary.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))


def find_run_folder(
    config_name: str, out_dir: str | None, resume: str | None
) -> tuple[RunFolder, Path | None]:
    """Choose where a run writes, and the one checkpoint to continue from if `resume` names a file.

    Args:
        config_name: stem of the configuration file; names new folders.
        out_dir: what `--out-dir` says.
        resume: None, `auto`, or the path of a checkpoint or run folder.

    Raises:
        UsageError: if the folder holds a run and `resume` is not given, or `resume` names nothing.
    """
    if resume is not None and resume != "auto":
        source = Path(resume)
        if not source.exists():
            raise UsageError(
                f"--resume {source}: no such checkpoint or run folder; --resume auto looks for the newest"
            )
        home = source if source.is_dir() else source.absolute().parent.parent
        return RunFolder(Path(out_dir) if out_dir else home), None if source.is_dir() else source
    if out_dir is not None:
        folder = RunFolder(Path(out_dir))
        if folder.holds_a_run and resume is None:
            raise UsageError(
                f"--out-dir {out_dir} holds a run: continue it with --resume auto, or choose another folder"
            )
        return folder, None
    unfinished = newest_unfinished(config_name) if resume == "auto" else None
    return unfinished or RunFolder(RUNS / f"{config_name}-{time.strftime('%Y%m%d-%H%M%S')}"), None


def newest_unfinished(config_name: str) -> RunFolder | None:
    """Return the newest folder of that configuration that has a checkpoint and no results yet."""
    folders = [RunFolder(path) for path in sorted(RUNS.glob(f"{config_name}-*"), reverse=True)]
    return next((f for f in folders if list_checkpoints(f.checkpoints) and not f.results.exists()), None)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a `checkpoints/` folder, oldest first (by step)."""
    return sorted(folder.glob("epoch*-step*-lr*.ckpt"), key=step_of)


def step_of(path: Path) -> int:
    """Return the number of optimizer steps done that a checkpoint's name carries."""
    return int(path.name.split("-step")[1].split("-")[0])
