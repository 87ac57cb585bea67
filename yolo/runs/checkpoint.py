"""Checkpoints that never overwrite one another, and the small weight files that are made from them.

A checkpoint (`epoch012-step004321-lr3.412e-04.ckpt`) is a dict of tensors and plain types, read
with `weights_only=True`. A weight file (`.safetensors`) holds the averaged weights alone; its
metadata carries all that inference needs.
"""

import hashlib
import json
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from yolo.config import Config, ResolvedConfig, parse_interval
from yolo.errors import UserError
from yolo.files import bundled, find, replacing
from yolo.metrics.report import SHOWN_SCORE
from yolo.models.build import build_model
from yolo.runs.folder import RunFolder, checkpoint_name, list_checkpoints, step_of
from yolo.runs.resumable import check_content
from yolo.runs.trust import check_tensors, describe, public_results, stored_settings

FORMAT_VERSION = 1
WEIGHTS_VERSION = 2  # of `.safetensors`: from 2 on they carry a digest
BEST_FILE = "best.txt"
REPLACED = {"voc_small_yolov3.safetensors": "voc.safetensors"}  # bundled weights, then and now
# metadata of `.safetensors`
_AS_JSON = ("config", "classes", "anchors", "results", "calibration", "confidence")


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
    run: Path | None = None  # the run folder that it lies in, whose `config.yaml` names its data

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
            f"cannot write {path} ({reason}); earlier checkpoints are untouched: free some space "
            "and --resume, or continue in another --out-dir"
        ) from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU and check it.

    Raises:
        UserError: if the file is missing, damaged, no checkpoint of ours, or of another format
            version.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        check_stored(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on damaged bytes torch raises all sorts
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path}: is damaged or no checkpoint ({first_line}); take an earlier one"
        ) from None
    if not isinstance(content, dict) or "format_version" not in content or "model" not in content:
        raise UserError(
            f"{path}: is no checkpoint of this project; --init-weights reads other weight files"
        )
    version = content["format_version"]
    if not isinstance(version, int) or version != FORMAT_VERSION:
        shown = version if isinstance(version, int) else f"of type {type(version).__name__}"
        raise UserError(
            f"{path}: has checkpoint format {shown}, this version reads "
            f"{FORMAT_VERSION}; use the version of the code that wrote it"
        )
    try:
        intact = content.pop("digest", None) == content_digest(content)
    except (RuntimeError, RecursionError, MemoryError):  # tensors that no checkpoint of ours holds
        intact = False
    if not intact:
        raise UserError(
            f"{path}: is damaged (its digest does not match its content); take an earlier one"
        )
    return content


def load_resumable(path: Path) -> dict[str, Any]:
    """Read a checkpoint that a run is to go on from, and check all that it takes over.

    Raises:
        UserError: as `load_checkpoint`, or if something is missing or of another type.
    """
    content = load_checkpoint(path)
    check_content(path, content)
    return content


def check_stored(path: Path) -> None:
    """Refuse a compressed archive: torch writes none, and few bytes could unpack to all memory.

    Raises:
        ValueError: if it is one.
        Exception: if it is no archive.
    """
    with zipfile.ZipFile(path) as archive:
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            raise ValueError("it is compressed")


def content_digest(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a nested dict of tensors and plain types, however it is stored."""
    digest = hashlib.sha256()
    for part in _parts(content):
        digest.update(part)
    return digest.hexdigest()


def find_newest(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """Read a folder's newest intact checkpoint, None if it holds none; `warn` of damaged ones.

    Raises:
        UserError: if there are checkpoints and all are damaged.
    """
    paths = list_checkpoints(folder)
    for path in reversed(paths):
        try:
            return Checkpoint(path, load_resumable(path))
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

    They are damaged, or of a course that was given up. Training will come to their steps again, and
    a checkpoint never overwrites another.
    """
    paths = [path for path in list_checkpoints(folder) if step_of(path) > step]
    for path in paths:
        path.replace(path.with_name(path.name + ".aside"))
    return paths


def read_best(folder: Path) -> Path | None:
    """Return the best checkpoint so far, as the newest that can be read names it; None without one.

    `best.txt` is for people, and for the checkpoints of earlier versions, which do not know it.
    """
    for path in reversed(list_checkpoints(folder)):
        try:  # mapped: no tensor is read
            check_stored(path)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            name = content["best"] if "best" in content else marked_best(folder)
            return folder / name if name and (folder / name).exists() else None
        except Exception:  # on damaged bytes torch raises all sorts
            continue
    return None


def marked_best(folder: Path) -> str | None:
    """Return the checkpoint that `best.txt` names, if it names one that is there."""
    file = folder / BEST_FILE
    name = file.read_text(errors="replace").strip() if file.exists() else ""
    return name if folder / name in list_checkpoints(folder) else None


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
    """Write half-precision `.safetensors` with all else as metadata, and a digest of both.

    What belongs to the machine that trained it stays out, as the path of the data.

    Raises:
        UserError: if a weight is not finite, or too large for half precision.
    """
    tensors = {}
    for name, value in model.state_dict().items():
        value = value.detach().cpu().contiguous()
        tensors[name] = value.half() if value.is_floating_point() else value
        if not tensors[name].isfinite().all():
            raise UserError(
                f"{path}: {name} holds values up to {value.abs().max():.3g}, half precision ends "
                f"at {torch.finfo(torch.half).max:.0f}: nothing was written; export to .onnx, "
                "which keeps them"
            )
    metadata = {
        "format_version": str(WEIGHTS_VERSION),
        "config": json.dumps(stored_settings(config)),
        "classes": json.dumps(class_names),
        "anchors": json.dumps(None if anchors is None else anchors.tolist()),
        "results": json.dumps(public_results(results, config.data_root)),
        "calibration": json.dumps(calibration),
        "confidence": json.dumps(confidence),
    }
    metadata["digest"] = content_digest({"metadata": metadata, "tensors": tensors})
    with replacing(path) as temporary:
        temporary.write_bytes(save(tensors, metadata))  # `save_file` would let nobody else read it


def publish_weights(path: Path, loaded: LoadedWeights) -> None:
    """Write a loaded model for others; see `save_weights`."""
    save_weights(
        path,
        loaded.model,
        loaded.config,
        loaded.class_names,
        loaded.anchors,
        loaded.results,
        loaded.calibration,
        loaded.confidence,
    )


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
    path = _still_bundled(Path(path))
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


def _still_bundled(path: Path) -> Path:
    """Return the weights that took the place of bundled ones of earlier versions; else `path`."""
    if path.parent.name != "weights" or path.name not in REPLACED or find(path).exists():
        return path
    successor = path.with_name(REPLACED[path.name])
    print(f"note: {path} is not bundled any more; {successor.name} took its place and is opened")
    return successor


def load_weights(path: Path) -> LoadedWeights:
    """Read a `.ckpt` (averaged weights) or `.safetensors` for inference, on the CPU in float32.

    Raises:
        UserError: if the file is missing, damaged or not ours.
    """
    path = find(path)
    if path.suffix == ".safetensors":
        tensors, metadata = read_safetensors(path)
        try:
            content = {key: json.loads(value) for key, value in metadata.items() if key in _AS_JSON}
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: its metadata cannot be read ({error})") from None
        if "config" not in content:
            raise UserError(
                f"{path}: was not written by this project (it carries no configuration)"
            )
    else:
        content = load_checkpoint(path)
        content["results"] = _results_of_run(path, content)
        tensors = content.get("ema", {})
    about = describe(path, content)
    check_tensors(path, about, tensors)
    model = build_model(about.config, len(about.class_names))
    model.load_state_dict(tensors)
    return LoadedWeights(
        model=model.eval().to(memory_format=torch.channels_last),
        digest=content_digest({"weights": tensors})[:16],
        path=path,
        **vars(about),
    )


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a file, checked by its digest if it is one of ours.

    Files of earlier versions have none, which is said; those of other programs may hold anything.

    Raises:
        UserError: if it is missing, damaged, or of a later version.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such weight file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # safe_open is no dict
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # on damaged bytes it raises all sorts
        raise UserError(f"{path}: is damaged or no safetensors file ({error})") from None
    if not metadata.keys() & {"format_version", "config", "digest"}:
        return tensors, metadata
    version, digest = metadata.get("format_version"), metadata.pop("digest", None)
    if version not in ("1", str(WEIGHTS_VERSION)):
        raise UserError(
            f"{path}: is damaged, or of a later version of this project (weight format {version}; "
            f"this one reads 1 and {WEIGHTS_VERSION})"
        )
    if digest is None and version == "1":
        print(
            f"notice: {path}: is of a version without digests: damage would go unseen; "
            "evaluate.py --export writes it anew",
            file=sys.stderr,
            flush=True,
        )
    elif digest != content_digest({"metadata": metadata, "tensors": tensors}):
        raise UserError(f"{path}: is damaged (its digest does not match its content)")
    return tensors, metadata


def _results_of_run(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `results.json` of the run that a checkpoint ended; nothing for an earlier one."""
    results, step = RunFolder(path.absolute().parent.parent).read_results(), content.get("step")
    return results if isinstance(step, int) and results.get("step") == step else {}


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, Tensor):
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
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

    def save(self, content: Mapping[str, Any], *, anew: bool = False) -> Path:
        """Save `content` (with `epoch`, `step`, `lr`) and return the path.

        A step that is saved already is left as it is, unless it is to be written `anew`.
        """
        path = self.folder / checkpoint_name(content["epoch"], content["step"], content["lr"])
        if anew or not path.exists():
            save_checkpoint(path, content)
        self.last_time = time.monotonic()
        return path

    def mark_best(self, path: Path) -> None:
        """Let `best.txt` name a checkpoint."""
        with replacing(self.folder / BEST_FILE) as temporary:
            temporary.write_text(path.name + "\n")
