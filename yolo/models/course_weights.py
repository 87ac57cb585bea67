"""Checkpoints of the course's own YOLOv3 code, by their names.

That code (a list of `layers` after `config`, as in Aladdin Persson's YOLOv3) has the same
convolutions in the same order. Its heads give `objectness, tx, ty, tw, th, classes`, ours
objectness last of the five; the last convolution of a head carries a batch normalisation that is
never used.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from yolo.models.darknet_weights import darknet_convolutions
from yolo.models.yolov3 import ANCHORS_PER_SCALE, YoloV3

CONVOLUTION = re.compile(r"(?:.*\.)?layers\.(\d+)((?:\.(?:layers|pred))?(?:\.\d+)*)\.conv\.weight")
_NORM = ("weight", "bias", "running_mean", "running_var")
_BOX = 5  # rows of an anchor before its classes


def from_course(model: YoloV3, state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return a state of the course's code under our names, or None if it is none, or not whole.

    Args:
        model: gives the names; its shapes are not compared.
        state: by the names `layers.0.conv.weight`, `layers.0.bn.weight`,
            `layers.2.layers.0.1.conv.weight`, `layers.15.pred.1.conv.bias` and so on, after any
            prefix.
    """
    found = [name for name in state if CONVOLUTION.fullmatch(name)]
    found.sort(key=lambda name: [int(part) for part in re.findall(r"\d+", name)])
    convolutions = darknet_convolutions(model)
    if len(found) != len(convolutions):
        return None
    names: dict[str, str] = {}  # ours -> theirs
    heads: set[str] = set()
    for theirs, ours in zip(found, convolutions, strict=True):
        stem = theirs.removesuffix("conv.weight")
        if ours.norm is None:
            heads |= {f"{ours.name}.weight", f"{ours.name}.bias"}
            names |= {f"{ours.name}.{kind}": f"{stem}conv.{kind}" for kind in ("weight", "bias")}
        else:
            names[f"{ours.name}.0.weight"] = f"{stem}conv.weight"
            names |= {f"{ours.name}.1.{kind}": f"{stem}bn.{kind}" for kind in _NORM}
    if not state.keys() >= {*names.values()}:
        return None
    renamed = {ours: state[theirs] for ours, theirs in names.items()}
    if not all(rows_fit(renamed[name], ANCHORS_PER_SCALE, _BOX) for name in heads):
        return None
    return renamed | {name: _objectness_last(renamed[name]) for name in heads}


def rows_fit(value: Tensor, groups: int, fixed: int) -> bool:
    """Return whether the rows of an output layer are `groups` times `fixed` and some classes."""
    return value.ndim > 0 and len(value) % groups == 0 and len(value) >= groups * fixed


def _objectness_last(value: Tensor) -> Tensor:
    rows = value.view(ANCHORS_PER_SCALE, len(value) // ANCHORS_PER_SCALE, *value.shape[1:])
    order = [1, 2, 3, 4, 0, *range(_BOX, rows.shape[1])]
    return rows[:, order].reshape(value.shape)
