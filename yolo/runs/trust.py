"""What a weight file or checkpoint may decide, wherever it is from: one function for all scripts.

It gives weights, classes, anchors, sizes and thresholds, and says how it was trained. Where data
lie, which of them are tested on, whether they are fetched, and how this machine is used come from
flags, or from the `config.yaml` of the run folder that the file lies in.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor

from yolo.cli import as_type
from yolo.config import (
    UNSTORED,
    AugmentConfig,
    Config,
    DataConfig,
    HardwareConfig,
    ModelConfig,
    OptimizerConfig,
    PostprocessConfig,
    ResolvedConfig,
)
from yolo.errors import UsageError, UserError
from yolo.metrics.report import SHOWN_SCORE
from yolo.models.build import build_model
from yolo.models.yolov3 import ANCHORS_PER_SCALE, STRIDES
from yolo.runs.folder import RunFolder, run_of

_GROUPS = (ModelConfig, AugmentConfig, OptimizerConfig, PostprocessConfig)
# Of these keys the last two say what a model is from and how it was tried, as text for people.
OF_THE_MODEL = (
    {field.name for group in _GROUPS for field in fields(group)}
    - {"backbone_weights", "init_weights", "max_steps"}
) | {"task", "dataset", "precision", "train_split"}
OF_THE_RUN = {field.name for group in (DataConfig, HardwareConfig) for field in fields(group)} - (
    OF_THE_MODEL
)
MAX_WIDTH = 8.0
MAX_CLASSES = 10_000
MAX_SIZE = 4096  # pixels
MAX_TEXT = 300  # characters


@dataclass(frozen=True)
class Description:
    """What is known about a trained network besides its weights."""

    config: ResolvedConfig
    class_names: tuple[str, ...]
    anchors: Tensor | None  # [3, 3, 2]
    results: dict[str, Any]
    calibration: dict[str, Any] | None
    confidence: float  # from which on a detection is shown
    run: Path | None  # the folder whose `config.yaml` says where its data lie


def describe(path: Path, content: Mapping[str, Any]) -> Description:
    """Check what a file says about its network; nothing is allocated by its word.

    Args:
        path: of the weight file or checkpoint.
        content: `config`, `classes`, `anchors`, and perhaps `results`, `calibration`, `confidence`.

    Raises:
        UserError: if something is missing, of another type, or beyond its bounds; or if the
            `config.yaml` beside it was changed.
    """
    try:
        config, run = _settings(path, content["config"])
        return Description(
            config,
            _class_names(content["classes"]),
            _anchors(content["anchors"], config.task),
            public_results(dict(content.get("results") or {}), content["config"].get("data_root")),
            _calibration(content.get("calibration")),
            _confidence(content.get("confidence")),
            run,
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:MAX_TEXT]
        raise UserError(f"{path}: does not describe a network of this project ({reason})") from None


def check_tensors(path: Path, about: Description, tensors: Mapping[str, Tensor]) -> None:
    """Compare the names and shapes in a file with those that its configuration asks for.

    Raises:
        UserError: naming the first difference; no memory was taken for the network.
    """
    named = isinstance(tensors, Mapping) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in tensors.items()
    )
    if not named:
        raise UserError(f"{path}: holds no named tensors; it is damaged")
    with torch.device("meta"):
        own: dict[str, Tensor] = build_model(about.config, len(about.class_names)).state_dict()
    for name, value in own.items():
        theirs = tensors.get(name)
        if (
            theirs is None
            or theirs.shape != value.shape
            or theirs.is_floating_point() != value.is_floating_point()
        ):
            found = "missing" if theirs is None else f"{list(theirs.shape)} {theirs.dtype}"
            raise UserError(
                f"{path}: does not fit its own configuration ({name} is {found}, not "
                f"{list(value.shape)})"
            )
    if unknown := tensors.keys() - own.keys():
        raise UserError(f"{path}: does not fit its own configuration ({min(unknown)} has no place)")


def check_data_named(about: Any, config: Config) -> None:
    """Refuse to look for data in a folder that nobody named; `about` has `path` and `run`.

    Raises:
        UsageError: with the flag that is missing.
    """
    if config.data_root is None and about.run is None and config.dataset != "digits":
        raise UsageError(
            f"{about.path}: a weight file does not say where data lie: give --data-root, and "
            "--split for another than `test`"
        )


def stored_settings(config: Config) -> dict[str, Any]:
    """Return what a weight file tells of a configuration: no place and nothing of a machine."""
    return {key: value for key, value in config.to_dict().items() if key in OF_THE_MODEL}


def public_results(results: Mapping[str, Any], data_root: str | None) -> dict[str, Any]:
    """Return results with no more of the path of the data than its last part."""
    root = Path(data_root or "")
    return {
        key: value.replace(str(root), root.name) if isinstance(value, str) and root.name else value
        for key, value in results.items()
    }


def _settings(path: Path, stored: Mapping[str, Any]) -> tuple[ResolvedConfig, Path | None]:
    types = get_type_hints(ResolvedConfig)
    known = {**UNSTORED, **stored}
    values = {key: as_type(types[key], known[key]) for key in OF_THE_MODEL & known.keys()}
    if (folder := run_of(path)) is not None:
        values |= _of_the_run(folder, stored)
    for key, value in values.items():
        if isinstance(value, str) and not (value.isprintable() and len(value) <= MAX_TEXT):
            raise UserError(f"its {key} is no short text")
    config = ResolvedConfig(**values)
    if not config.width <= MAX_WIDTH:
        raise UserError(f"its width is {config.width:g}; at most {MAX_WIDTH:g} is allowed")
    if (largest := max(*config.img_sizes, config.resolved_test_size)) > MAX_SIZE:
        raise UserError(f"its images are {largest} pixels wide; at most {MAX_SIZE} is allowed")
    return config, folder.path if folder else None


def _of_the_run(folder: RunFolder, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a run's own `config.yaml` decides."""
    types = get_type_hints(ResolvedConfig)
    content, intact = folder.read_config()
    values = {
        key: as_type(types[key], value) for key, value in content.items() if key in OF_THE_RUN
    }
    if not intact and any(stored.get(key) != content[key] for key in values):
        raise UserError(
            f"{folder.config} was changed after it was written: undo that, and say by flags where "
            f"the data lie; or let the run take it over with train.py --resume {folder.path} "
            "--replan"
        )
    return values


def _class_names(names: Any) -> tuple[str, ...]:
    if not isinstance(names, list | tuple) or not 0 < len(names) <= MAX_CLASSES:
        raise UserError(f"want a list of 1 to {MAX_CLASSES} classes")
    for label, name in enumerate(names):
        if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= MAX_TEXT:
            raise UserError(f"the name of class {label} is no short text")
    if len(set(names)) < len(names):
        raise UserError("two of its classes have the same name")
    return tuple(names)


def _anchors(anchors: Any, task: str) -> Tensor | None:
    if (anchors is None) != (task == "classification"):
        raise UserError(f"its task is {task}, which its anchors contradict")
    if anchors is None:
        return None
    values = torch.as_tensor(anchors, dtype=torch.float32)
    if values.shape != (len(STRIDES), ANCHORS_PER_SCALE, 2) or not (
        values.isfinite().all() and (values > 0).all()
    ):
        raise UserError("its anchors are not nine positive pairs")
    return values


def _confidence(stored: Any) -> float:
    value = float(SHOWN_SCORE if stored is None else stored)
    if not 0 <= value <= 1:
        raise UserError("its confidence does not lie between 0 and 1")
    return value


def _calibration(stored: Any) -> dict[str, Any] | None:
    if stored is None:
        return None
    factors = torch.tensor(stored["factors"], dtype=torch.float32)
    numbers = {key: value for key, value in stored.items() if key != "factors"}
    if factors.shape != (len(STRIDES), 2) or not factors.isfinite().all():
        raise UserError("the factors of its calibration are not three pairs of numbers")
    if any(value is not None and not math.isfinite(value) for value in numbers.values()):
        raise UserError("its calibration holds more than finite numbers")
    return {**numbers, "factors": stored["factors"]}
