"""Darknet's binary `.weights` files: `darknet53.conv.74`, `yolov3.weights`, or any other cut.

Format (Darknet's `src/parser.c`, `load_weights_upto`): int32 major, minor and revision, the number
of images seen (int64 from version 0.2 on, int32 before), then little-endian float32. A convolution
with batch normalisation stores bias, scale, running mean and running variance, then the kernel; the
last convolution of a head its bias, then the kernel. The channels of its heads are in our order
(`tx, ty, tw, th, objectness, classes` per anchor), but its classes are trained as independent
sigmoids, and its batch normalisation is scale (x - mean) / (sqrt(variance) + 1e-6) + bias
(`blas.c`, `normalize_cpu`), where torch takes sqrt(variance + 1e-5): the scale makes up for that,
both ways.
"""

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from yolo.errors import UserError
from yolo.files import replacing
from yolo.models.darknet import ConvBnAct
from yolo.models.yolov3 import ANCHORS_PER_SCALE, YoloV3

BACKBONE_CONVOLUTIONS = 52  # what `darknet53.conv.74` holds
# beyond this a number of classes is taken for an accident of the file's length
MAX_CLASSES = 10_000
EPSILON = 1e-6  # that Darknet adds to the deviation


class DarknetConv(NamedTuple):
    """One convolution in the order of Darknet's file."""

    name: str
    conv: nn.Conv2d
    norm: nn.BatchNorm2d | None  # None for the last convolution of a head

    def tensors(self) -> list[Tensor]:
        """Return the stored tensors in the file's order."""
        if self.norm is None:
            assert self.conv.bias is not None
            return [self.conv.bias, self.conv.weight]
        mean, var = self.norm.running_mean, self.norm.running_var
        assert mean is not None and var is not None
        return [self.norm.bias, self.norm.weight, mean, var, self.conv.weight]

    def scale_factor(self) -> Tensor:
        """Return [C] what Darknet's scale is multiplied by to give the same output in torch."""
        assert self.norm is not None and self.norm.running_var is not None
        variance = self.norm.running_var.double().clamp(min=0)
        return (variance + self.norm.eps).sqrt() / (variance.sqrt() + EPSILON)

    def num_values(self, num_classes: int) -> int:
        """Return how many numbers a model with `num_classes` stores for it."""
        if self.norm is None:
            return ANCHORS_PER_SCALE * (5 + num_classes) * (self.conv.in_channels + 1)
        return sum(tensor.numel() for tensor in self.tensors())


class DarknetCut(NamedTuple):
    """What a file holds: the first `convolutions`, with heads for `num_classes` classes."""

    convolutions: int
    num_classes: int


class DarknetFile(NamedTuple):
    """The header and the numbers of a file."""

    version: tuple[int, int, int]
    images_seen: int
    values: np.ndarray  # float32 [N]


def darknet_convolutions(model: YoloV3) -> list[DarknetConv]:
    """Return the 75 convolutions as in `yolov3.cfg`: backbone; per scale neck, head, lateral."""
    parts: list[tuple[str, nn.Module]] = [("backbone", model.backbone)]
    for scale, (neck, head) in enumerate(zip(model.necks, model.heads, strict=True)):
        parts += [(f"necks.{scale}", neck), (f"heads.{scale}", head)]
        if scale < len(model.laterals):
            parts.append((f"laterals.{scale}", model.laterals[scale]))
    return [conv for name, part in parts for conv in _convolutions(name, part)]


def _convolutions(prefix: str, part: nn.Module) -> Iterator[DarknetConv]:
    normed: set[nn.Module] = set()
    for name, module in part.named_modules(prefix=prefix):
        if isinstance(module, ConvBnAct):
            normed.add(module[0])
            yield DarknetConv(name, module[0], module[1])  # type: ignore[arg-type]
        elif isinstance(module, nn.Conv2d) and module not in normed:
            yield DarknetConv(name, module, None)


def read_darknet(path: Path) -> DarknetFile:
    """Read a file without knowing the network.

    Raises:
        UserError: if the file cannot be read or is none of Darknet's.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) < 16:
        raise UserError(f"{path}: is no Darknet weights file ({len(data)} bytes)")
    major, minor, revision = struct.unpack_from("<3i", data)
    if not (0 <= major < 100 and 0 <= minor < 100 and 0 <= revision < 100):
        raise UserError(
            f"{path}: is no Darknet weights file (its header reads {major}, {minor}, {revision})"
        )
    seen_format = "<q" if major * 10 + minor >= 2 else "<i"
    start = 12 + struct.calcsize(seen_format)
    if len(data) % 4:
        raise UserError(
            f"{path}: is truncated ({len(data):,} bytes are no whole number of float32)"
        )
    (images_seen,) = struct.unpack_from(seen_format, data, 12)
    values = np.frombuffer(data, "<f4", offset=start)
    return DarknetFile((major, minor, revision), images_seen, values)


def write_darknet(
    model: YoloV3,
    path: Path,
    convolutions: int | None = None,
    version: tuple[int, int, int] = (0, 2, 0),
    images_seen: int = 0,
) -> None:
    """Write the first `convolutions` (default: all) of the network, whole or not at all."""
    seen_format = "q" if version[0] * 10 + version[1] >= 2 else "i"
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack(f"<3i{seen_format}", *version, images_seen))
        for conv in darknet_convolutions(model)[:convolutions]:
            for tensor in conv.tensors():
                if conv.norm is not None and tensor is conv.norm.weight:
                    tensor = tensor.double() / conv.scale_factor()
                file.write(tensor.detach().float().cpu().numpy().astype("<f4").tobytes())


def find_cut(
    convolutions: Sequence[DarknetConv], num_values: int, num_classes: int
) -> DarknetCut | None:
    """Return the cut at which this network has stored exactly `num_values`, or None.

    The file does not say how many classes its heads have, but its length does. Where several
    answers fit, the model's own number of classes comes first, then the whole network.
    """
    cuts = []
    fixed, per_class = 0, 0  # the values so far are fixed + per_class * classes
    for count, conv in enumerate(convolutions, start=1):
        without = conv.num_values(0)
        fixed += without
        per_class += conv.num_values(1) - without
        classes, remainder = num_classes, num_values - fixed
        if per_class:
            classes, remainder = divmod(remainder, per_class)
        if remainder == 0 and 0 < classes <= MAX_CLASSES:
            cuts.append(DarknetCut(count, classes))
    return max(cuts, key=lambda cut: (cut.num_classes == num_classes, cut[0]), default=None)


def load_darknet(model: YoloV3, path: Path) -> DarknetCut:
    """Copy a file into the model, in place, but no heads for another number of classes.

    Returns:
        What the file held.

    Raises:
        UserError: for a file that is truncated, not Darknet's, or cut within a convolution; the
            model is then unchanged.
    """
    values = read_darknet(path).values
    convolutions = darknet_convolutions(model)
    cut = find_cut(convolutions, len(values), model.num_classes)
    if cut is None:
        raise UserError(f"{path}: {_where_it_ends(convolutions, len(values), model.num_classes)}")
    if not np.isfinite(values).all():
        raise UserError(
            f"{path}: holds values that are not finite; it is damaged or no Darknet weights file"
        )
    start = 0
    with torch.no_grad():
        for conv in convolutions[: cut.convolutions]:
            size = conv.num_values(cut.num_classes)
            if conv.norm is not None or cut.num_classes == model.num_classes:
                tensors, stored = conv.tensors(), torch.tensor(values[start : start + size])
                parts = stored.split([tensor.numel() for tensor in tensors])
                for tensor, part in zip(tensors, parts, strict=True):
                    tensor.copy_(part.view_as(tensor))
                if conv.norm is not None:
                    conv.norm.weight.copy_(conv.norm.weight * conv.scale_factor())
            start += size
    return cut


def _where_it_ends(convolutions: Sequence[DarknetConv], num_values: int, num_classes: int) -> str:
    end = 0
    for count, conv in enumerate(convolutions, start=1):
        end += conv.num_values(num_classes)
        if num_values < end:
            place = f"convolution {count} of {len(convolutions)} ({conv.name})"
            what = f"its {num_values:,} values end inside {place}"
            return f"{what}; is it truncated, or of another --width?"
    what = f"its {num_values:,} values are more than this network's {end:,}"
    return f"{what}; is it of another --width?"
