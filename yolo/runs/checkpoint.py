"""Checkpoints that never overwrite one another, and the small weight files that are made from them.

A checkpoint (`epoch012-step004321-lr3.412e-04.ckpt`) is a dict of tensors and plain types, read with
`weights_only=True`. A weight file (`.safetensors`) holds the averaged weights alone; its metadata carries
all that inference needs.
"""

import dataclasses
import hashlib
import json
import pickle
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from yolo.config import Config, ResolvedConfig, parse_interval
from yolo.errors import UserError
from yolo.files import bundled, find, replacing
from yolo.metrics.report import SHOWN_SCORE
from yolo.models.build import build_model
from yolo.runs.folder import RunFolder, checkpoint_name, list_checkpoints, step_of

FORMAT_VERSION = 1
BEST_FILE = "best.txt"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file and what was read from it."""

    path: Path
    content: dict[str, Any]


@dataclass
class LoadedWeights:
    """A trained network, ready for inference, with everything needed to read its output."""

    model: nn.Module  # eval mode, averaged weights
    config: ResolvedConfig
    class_names: tuple[str, ...]
    anchors: (
        Tensor | None
    )  # [3, A, 2] pixels at the test size, coarse to fine; None for classification
    results: dict[str, Any]
    digest: str
    path: Path
    calibration: dict[str, Any] | None = None  # how the scores were calibrated, if they were
    confidence: float = SHOWN_SCORE  # from which on a detection is shown

    @property
    def task(self) -> str:
        """`detection` or `classification`."""
        return self.config.task

    @property
    def test_size(self) -> int:
        """Side in pixels of the square input that the anchors belong to."""
        return self.config.resolved_test_size


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write `state` (tensors and plain types) with its digest: whole or not at all.

    Raises:
        UserError: if the disk is full or not writable; earlier checkpoints are untouched.
    """
    content = {"format_version": FORMAT_VERSION, **state}
    content["digest"] = content_digest(content)
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        reason = error.__context__ or error  # torch's writer hides the disk's error behind its own
        raise UserError(
            f"cannot write {path} ({reason}); earlier checkpoints are untouched: free some space and "
            "--resume, or continue in another --out-dir"
        ) from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU and check it.

    Raises:
        UserError: if the file is missing, damaged, no checkpoint of ours, or of another format version.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        OSError,
        RuntimeError,
        EOFError,
        ValueError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path}: is damaged or no checkpoint ({first_line}); take an earlier one"
        ) from None
    if not isinstance(content, dict) or "format_version" not in content or "model" not in content:
        raise UserError(
            f"{path}: is no checkpoint of this project; --init-weights reads other weight files"
        )
    if content["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{path}: has checkpoint format {content['format_version']}, this version reads "
            f"{FORMAT_VERSION}; use the version of the code that wrote it"
        )
    if content.pop("digest", None) != content_digest(content):
        raise UserError(
            f"{path}: is damaged (its digest does not match its content); take an earlier one"
        )
    return content


def content_digest(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a nested dict of tensors and plain types, independent of how it is stored."""
    digest = hashlib.sha256()
    for part in _parts(content):
        digest.update(part)
    return digest.hexdigest()


def find_newest(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """Read the newest intact checkpoint of a folder, None if there is none at all; `warn` of damaged ones.

    Raises:
        UserError: if there are checkpoints and all are damaged.
    """
    paths = list_checkpoints(folder)
    for path in reversed(paths):
        try:
            return Checkpoint(path, load_checkpoint(path))
        except UserError as error:
            warn(f"warning: {error}")
    if paths:
        raise UserError(f"{folder}: no checkpoint can be read; start anew in another --out-dir")
    return None


def prune_checkpoints(folder: Path, keep: int) -> list[Path]:
    """Delete all but the `keep` newest checkpoints and the best one; return what was deleted."""
    best = read_best(folder)
    pruned = [path for path in list_checkpoints(folder)[:-keep] if path != best]
    for path in pruned:
        path.unlink()
    return pruned


def set_aside(folder: Path, step: int) -> list[Path]:
    """Rename the checkpoints after `step` to `NAME.aside`; return the old names.

    They are damaged, or of a course that was given up. Training will come to their steps again, and a
    checkpoint never overwrites another.
    """
    paths = [path for path in list_checkpoints(folder) if step_of(path) > step]
    for path in paths:
        path.replace(path.with_name(path.name + ".aside"))
    return paths


def read_best(folder: Path) -> Path | None:
    """Return the checkpoint that `best.txt` names, if there is one."""
    file = folder / BEST_FILE
    return folder / file.read_text().strip() if file.exists() else None


def save_weights(
    path: Path,
    model: nn.Module,
    config: Config,
    class_names: tuple[str, ...],
    anchors: Tensor | None,
    results: Mapping[str, Any],
    calibration: Mapping[str, Any] | None = None,
    confidence: float | None = None,
) -> None:
    """Write half-precision `.safetensors` with all else as metadata."""
    weights = {
        name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()
    }
    tensors = {
        name: value.half() if value.is_floating_point() else value
        for name, value in weights.items()
    }
    metadata = {
        "format_version": str(FORMAT_VERSION),
        "config": json.dumps(config.to_dict()),
        "classes": json.dumps(class_names),
        "anchors": json.dumps(None if anchors is None else anchors.tolist()),
        "results": json.dumps(results),
        "calibration": json.dumps(calibration),
        "confidence": json.dumps(confidence),
    }
    with replacing(path) as temporary:
        temporary.write_bytes(save(tensors, metadata))  # `save_file` would let nobody else read it


def publish_weights(path: Path, loaded: LoadedWeights) -> None:
    """Write a model for others: as `save_weights`, without what belongs to the machine that trained it."""
    weights = loaded.config.backbone_weights
    config = dataclasses.replace(
        loaded.config,
        data_root=None,
        init_weights=None,
        backbone_weights=Path(weights).name if weights else "none",
        download=False,
    )
    save_weights(
        path,
        loaded.model,
        config,
        loaded.class_names,
        loaded.anchors,
        public_results(loaded),
        loaded.calibration,
        loaded.confidence,
    )


def public_results(loaded: LoadedWeights) -> dict[str, Any]:
    """Return the results with no more of the path of the data than its last part."""
    root = Path(loaded.config.data_root or "")
    if not root.name:
        return loaded.results
    return {
        key: value.replace(str(root), root.name) if isinstance(value, str) else value
        for key, value in loaded.results.items()
    }


def bundled_weights() -> dict[str, Path]:
    """Return the weight files that come with this package, by task."""
    files: dict[str, Path] = {}
    for path in sorted(bundled("weights").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:  # the metadata alone: no tensor is read
            config = json.loads(file.metadata()["config"])
        files.setdefault(config.get("task", "detection"), path)
    return files


def resolve_checkpoint(path: str | Path | None = None, *, last: bool = False) -> Path:
    """Return the file that is meant by a weight file, a checkpoint or a run folder.

    Of a run folder that are its best weights, or the newest checkpoint where none is marked or the
    `last` is asked for. Without `path` it is the detector that comes with this package.

    Raises:
        UserError: if the folder holds no checkpoint, or no detector is bundled.
    """
    if path is None:
        if "detection" not in (files := bundled_weights()):
            raise UserError(f"{bundled('weights')}: holds no detector; name a --checkpoint")
        return files["detection"]
    path = Path(path)
    if not path.is_dir():
        return path
    folder = RunFolder(path)
    places = () if last else (folder.best, read_best(folder.checkpoints))
    best = next((place for place in places if place and place.exists()), None)
    found = [best] if best else list_checkpoints(folder.checkpoints)
    if not found:
        raise UserError(
            f"{path}: holds no checkpoint; name a run folder, a .ckpt or a .safetensors"
        )
    return found[-1]


def load_weights(path: Path) -> LoadedWeights:
    """Read a `.ckpt` (its averaged weights) or a `.safetensors` file for inference, on the CPU in float32.

    Raises:
        UserError: if the file is missing, damaged or not ours.
    """
    path = find(path)
    content = _read_safetensors(path) if path.suffix == ".safetensors" else load_checkpoint(path)
    config = ResolvedConfig.from_dict(content["config"])
    class_names = tuple(content["classes"])
    model = build_model(config, len(class_names))
    weights = {
        name: value.float() if value.is_floating_point() else value
        for name, value in content["ema"].items()
    }
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"{path}: does not fit its own configuration ({str(error).splitlines()[1].strip()})"
        ) from None
    anchors = content["anchors"]
    return LoadedWeights(
        model=model.eval().to(memory_format=torch.channels_last),
        config=config,
        class_names=class_names,
        anchors=None if anchors is None else torch.as_tensor(anchors, dtype=torch.float32),
        results=content.get("results") or _results_of_run(path, content),
        digest=content_digest({"weights": content["ema"]})[:16],
        path=path,
        calibration=content.get("calibration"),
        confidence=content.get("confidence") or SHOWN_SCORE,
    )


def _results_of_run(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `results.json` of the run that a checkpoint ended; nothing for an earlier checkpoint."""
    file = path.absolute().parent.parent / "results.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    return results if results.get("step") == content.get("step") else {}


def _read_safetensors(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such weight file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: is damaged or no safetensors file ({error})") from None
    if "config" not in metadata:
        raise UserError(f"{path}: was not written by this project (it carries no configuration)")
    return {
        "ema": tensors,
        **{key: json.loads(metadata[key]) for key in ("config", "classes", "anchors", "results")},
        **{key: json.loads(metadata.get(key, "null")) for key in ("calibration", "confidence")},
    }


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, Tensor):
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield str(key).encode()
            yield from _parts(value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _parts(item)
    else:
        yield repr(value).encode()


class CheckpointWriter:
    """Saves a run into its `checkpoints/` folder, and knows when that is due."""

    def __init__(self, folder: Path, save_every: str) -> None:
        """Write into `folder`; `save_every` as in `--save-every`."""
        self.folder = folder
        self.every_steps, self.every_seconds = parse_interval(save_every)
        self.last_time = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Return whether the interval has passed since the last save."""
        if self.every_steps is not None:
            return step % self.every_steps == 0
        return time.monotonic() - self.last_time >= (self.every_seconds or 0)

    def save(self, content: Mapping[str, Any]) -> Path:
        """Save `content` (with `epoch`, `step`, `lr`) unless this step is saved already; return the path."""
        path = self.folder / checkpoint_name(content["epoch"], content["step"], content["lr"])
        if not path.exists():
            save_checkpoint(path, content)
        self.last_time = time.monotonic()
        return path

    def mark_best(self, path: Path) -> None:
        """Let `best.txt` name a checkpoint."""
        with replacing(self.folder / BEST_FILE) as temporary:
            temporary.write_text(path.name + "\n")
