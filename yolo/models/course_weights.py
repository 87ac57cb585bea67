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


def from_course(model: YoloV3, state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return a state of the course's code under our names, or None if it is none.

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
    renamed: dict[str, Tensor] = {}
    for theirs, ours in zip(found, convolutions, strict=True):
        stem = theirs.removesuffix("conv.weight")
        if ours.norm is None:
            for kind in ("weight", "bias"):
                value = state[f"{stem}conv.{kind}"]
                rows = value.view(ANCHORS_PER_SCALE, -1, *value.shape[1:])
                order = [1, 2, 3, 4, 0, *range(5, rows.shape[1])]
                renamed[f"{ours.name}.{kind}"] = rows[:, order].reshape(value.shape)
        else:
            renamed[f"{ours.name}.0.weight"] = state[f"{stem}conv.weight"]
            for kind in ("weight", "bias", "running_mean", "running_var"):
                renamed[f"{ours.name}.1.{kind}"] = state[f"{stem}bn.{kind}"]
    return renamed
