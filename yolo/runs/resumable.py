"""What a checkpoint has to hold for a run to go on from it: anyone can write one with a digest."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from yolo.config import ResolvedConfig
from yolo.errors import UserError

_SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}
_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}  # of Adam


def check_content(path: Path, content: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that lacks what a run goes on from, or holds it as another type.

    Raises:
        UserError: naming the first such key.
    """
    for key, fits in (_FITS | _FITS_IF_THERE).items():
        if key not in content and key in _FITS:
            raise _fault(path, f"{key} is missing")
        if key in content and not fits(content[key]):
            raise _fault(path, f"{key} is not as training writes it")


def check_fits(path: Path, content: Mapping[str, Any], state: Any) -> None:
    """Refuse a checked content whose tensors are not of this network; nothing was taken over.

    Raises:
        UserError: naming the key.
    """
    own = _shapes(state.network.state_dict())
    for key in ("model", "ema"):
        if _shapes(content[key]) != own:
            raise _fault(path, f"{key} holds other tensors than this network")
    parameters = [value for group in state.optimizer.param_groups for value in group["params"]]
    shapes = {position: value.shape for position, value in enumerate(parameters)}
    for position, moments in content["optimizer"]["state"].items():
        if any(moments[key].shape != shapes.get(position) for key in ("exp_avg", "exp_avg_sq")):
            raise _fault(path, "optimizer holds other tensors than this network")


def _fault(path: Path, what: str) -> UserError:
    return UserError(f"{path}: is damaged or not ours ({what}); take an earlier one")


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, bool]]:
    return {name: (value.shape, value.is_floating_point()) for name, value in tensors.items()}


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_score(value: Any) -> bool:
    return type(value) in (int, float)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_classes(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _is_named_tensors(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and all(map(_is_text, value))
        and all(map(_is_tensor, value.values()))
    )


def _is_optimizer(value: Any) -> bool:
    """Return whether it holds Adam's moments by the position of their parameter."""
    moments = value.get("state") if isinstance(value, dict) else None
    return isinstance(moments, dict) and all(
        _is_count(position)
        and _is_named_tensors(tensors)
        and tensors.keys() >= _MOMENTS
        and tensors["step"].numel() == 1
        for position, tensors in moments.items()
    )


def _is_scaler(value: Any) -> bool:
    return (
        isinstance(value, dict) and value.keys() >= _SCALER and all(map(_is_number, value.values()))
    )


def _is_loss_sums(value: Any) -> bool:
    """Return whether it is a list of the ranks' sums, each of the same terms."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(sums, dict) and all(map(_is_text, sums)) for sums in value)
        and all(sums.keys() == value[0].keys() for sums in value)
        and all(type(number) in (int, float) for sums in value for number in sums.values())
    )


def _is_random_state(value: Any) -> bool:
    try:
        torch.Generator().set_state(value["torch"])
    except (KeyError, TypeError, RuntimeError, IndexError):
        return False
    return True


def _is_plain(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return all(item is None or type(item) in (bool, int, float, str) for item in items)


def _is_config(value: Any) -> bool:
    """Return whether settings can be read, and those that a later start takes over are numbers."""
    if not (isinstance(value, dict) and all(map(_is_text, value))):
        return False
    if not all(map(_is_plain, value.values())):
        return False
    try:
        config = ResolvedConfig.from_dict(value)
    except (UserError, TypeError, ValueError):
        return False
    numbers = (config.width, config.max_lr, config.epochs)
    return _is_count(config.batch_size) and all(map(_is_number, numbers))


def _or_none(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


_FITS: dict[str, Callable[[Any], bool]] = {
    "model": _is_named_tensors,
    "ema": _is_named_tensors,
    "optimizer": _is_optimizer,
    "scaler": _or_none(_is_scaler),
    "loss_sums": _is_loss_sums,
    "logged_scale": _is_number,
    "step": _is_count,
    "epoch": _is_count,
    "batch": _is_count,
    "evaluation_due": _is_bool,
    "best_score": _is_score,
    "config": _is_config,
    "classes": _is_classes,
    "anchors": _or_none(_is_tensor),
    "rng": _is_random_state,
    "threads": _is_count,
    "schedule_digest": _is_text,
}
_FITS_IF_THERE: dict[str, Callable[[Any], bool]] = {  # earlier versions did not write these
    "best": _or_none(_is_text),
    "confidence": _or_none(_is_number),
}
