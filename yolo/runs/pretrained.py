"""Start from weights made elsewhere: timm's, Darknet's, our checkpoints, torch state dicts."""

import json
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from yolo.config import Config
from yolo.errors import UsageError, UserError
from yolo.files import bundled, find
from yolo.models.backbones import TimmBackbone, fetch_state, fit_state
from yolo.models.course_weights import CONVOLUTION, from_course, rows_fit
from yolo.models.darknet_weights import darknet_convolutions, load_darknet
from yolo.models.yolov3 import ANCHORS_PER_SCALE, YoloV3
from yolo.runs.checkpoint import (
    check_stored,
    load_checkpoint,
    read_safetensors,
    resolve_checkpoint,
)

OUTPUT_LAYER = re.compile(r"heads\.\d+\.1\.|classifier\.")  # its size is that of the class list
ZIP_START = b"PK\x03\x04"  # by which torch knows its files, but for those of before version 1.6
TYPES = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
}
WRAPPERS = re.compile(
    r"^(module\.|_orig_mod\.|_forward_module\.)+"
)  # of DDP, torch.compile and Fabric


@dataclass(frozen=True)
class LoadReport:
    """What a file gave to the network, by names of tensors or of convolutions."""

    path: Path
    loaded: list[str]
    kept: list[str]  # of the network, not in the file: they keep their initial values
    unused: list[str] = field(default_factory=list)  # of the file, not in the network
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Return the report for people, one statement a line."""
        total = len(self.loaded) + len(self.kept)
        lines = [
            f"{self.path}: {len(self.loaded)} of {total} weights loaded ({_summary(self.loaded)})"
        ]
        if self.kept:
            lines.append(f"not in the file, left at their initial values: {_summary(self.kept)}")
        if self.unused:
            lines.append(f"in the file, not used: {_summary(self.unused)}")
        return lines + self.notes


def start_weights(
    model: nn.Module, config: Config, class_names: Sequence[str] | None = None
) -> list[str]:
    """Give a new model the weights that `--backbone-weights` and `--init-weights` name, in place.

    Args:
        model: as built.
        config: of the run.
        class_names: of the run: classes that the file knows by the same name keep their outputs.

    Returns:
        What was loaded, in lines for people.

    Raises:
        UserError: if a file does not fit, or nothing can be fetched; the model is then unchanged.
    """
    lines = []
    wanted, start = config.backbone_weights, config.init_weights
    if start and (other := _other_network(start, config)):
        start = None
        instead = "ImageNet weights" if config.backbone.startswith("timm/") else "random weights"
        lines.append(f"{config.init_weights}: is of {other}: this run starts from {instead}")
    if wanted == "auto" and start:
        wanted = "none"  # that file brings its backbone
    if isinstance(model, YoloV3) and wanted != "none":
        lines += load_backbone(model, wanted)
    if start:
        path = find(Path(start))
        path = resolve_checkpoint(path) if path.is_dir() else path
        lines += init_weights(model, path, class_names).lines()
    return lines


def _other_network(start: str, config: Config) -> str | None:
    """Return backbone and width of the bundled weights, if `start` names them and they differ."""
    path = find(Path(start))
    if not path.is_file() or path.resolve().parent != bundled("weights").resolve():
        return None
    with safe_open(path, framework="pt") as file:
        theirs = json.loads(file.metadata()["config"])
    backbone, width = theirs.get("backbone", "darknet53"), theirs["width"]
    if (backbone, width) == (config.backbone, config.width):
        return None
    return f"--backbone {backbone} --width {width:g}"


def load_backbone(model: YoloV3, source: str) -> list[str]:
    """Copy pretrained weights into the backbone, in place.

    Args:
        model: the detector. For one on Darknet-53 `auto` means none: its files come by
            --init-weights.
        source: `auto`, or a file.

    Returns:
        What was loaded, in lines for people.

    Raises:
        UserError: if there is no such file, it is damaged or of another network, or cannot be
            fetched.
    """
    backbone = model.backbone
    if not isinstance(backbone, TimmBackbone):
        if source == "auto":
            return []
        raise UsageError(
            f"--backbone-weights {source}: is for backbones of timm; darknet53 starts with "
            "--init-weights darknet53.conv.74, or take --backbone timm/darknet53"
        )
    if source == "auto":
        backbone.net.load_state_dict(fetch_state(backbone.name))
        return [f"backbone timm/{backbone.name}: timm's pretrained weights"]
    path = Path(source)
    if not path.is_file():
        raise UsageError(f"--backbone-weights {path}: no such file")
    try:
        fitting = fit_state(backbone, _read_state(path)[0])
    except ValueError as error:
        raise UserError(f"{path}: is not of --backbone timm/{backbone.name}: {error}") from None
    backbone.net.load_state_dict(fitting, strict=False)  # a file may lack the counts of batches
    return [f"{path}: {len(fitting)} tensors of timm/{backbone.name} loaded"]


def init_weights(
    model: nn.Module, path: Path, class_names: Sequence[str] | None = None
) -> LoadReport:
    """Copy what fits from a weight file into the model, in place.

    Files `.weights` and `.conv.N` are Darknet's. From our checkpoints come the averaged weights; a
    checkpoint of the course's own code is read by `from_course`. Of the output layers for other
    classes the rows of box and objectness are taken, and those of classes that both name; the
    others start anew.

    Raises:
        UserError: if the file is missing, damaged, of an unknown kind, or made for another network;
            the model is then unchanged.
    """
    if not path.is_file():
        raise UsageError(f"--init-weights {path}: no such file")
    if path.suffix == ".weights" or re.search(r"\.conv\.\d+$", path.name):
        return _init_from_darknet(model, path)
    state, stored = _read_state(path)
    if isinstance(model, YoloV3) and not isinstance(model.backbone, TimmBackbone):
        state = from_course(model, state) or state
    return _init_from_state(model, path, state, same_classes(class_names, stored))


def same_classes(
    names: Sequence[str] | None, stored: Sequence[str] | None
) -> list[tuple[int, int]] | None:
    """Return pairs of labels, here and there, of the classes that share a name; None if all do."""
    if names is None or stored is None or [*names] == [*stored]:
        return None
    there = {name.casefold(): label for label, name in enumerate(stored)}
    pairs = ((label, there.get(name.casefold())) for label, name in enumerate(names))
    return [(label, other) for label, other in pairs if other is not None]


def _init_from_darknet(model: nn.Module, path: Path) -> LoadReport:
    if not isinstance(model, YoloV3):
        raise UsageError(
            f"--init-weights {path}: Darknet's files are for the detector, not for a classifier"
        )
    if isinstance(model.backbone, TimmBackbone):
        raise UsageError(f"--init-weights {path}: Darknet's files are for --backbone darknet53")
    cut = load_darknet(model, path)
    convolutions = darknet_convolutions(model)
    present, absent = convolutions[: cut.convolutions], convolutions[cut.convolutions :]
    left_out = [
        conv.name for conv in present if conv.norm is None and cut.num_classes != model.num_classes
    ]
    notes = []
    if left_out:
        difference = f"the file has {cut.num_classes} classes, this run {model.num_classes}"
        notes = [f"{difference}: {', '.join(left_out)} left out"]
    loaded = [conv.name for conv in present if conv.name not in left_out]
    return LoadReport(path, loaded, left_out + [conv.name for conv in absent], notes=notes)


def _init_from_state(
    model: nn.Module,
    path: Path,
    state: Mapping[str, Tensor],
    same: list[tuple[int, int]] | None = None,
) -> LoadReport:
    own = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    shared = [name for name in own if name in state]
    if not shared:
        raise UserError(
            f"{path}: no tensor in it has a name of this network's ({next(iter(own))}, ...)"
        )
    theirs, ours = (
        {name for name in names if name.startswith("backbone.")} for names in (state, own)
    )
    if theirs and ours and not theirs & ours:
        raise UserError(
            f"{path}: has another backbone ({min(theirs)}, ...); give the --backbone that it was "
            "made with"
        )
    other_shape = [
        name
        for name in shared
        if state[name].shape != own[name].shape or (same is not None and OUTPUT_LAYER.match(name))
    ]
    for name in other_shape:
        if not OUTPUT_LAYER.match(name) or not _rows_fit(name, state[name], own[name], same):
            raise UserError(
                f"{path}: {name} is {list(state[name].shape)} there and {list(own[name].shape)} "
                "here; use the --width that the file was made with"
            )
    loaded = [name for name in shared if name not in other_shape]
    with torch.no_grad():
        for name in loaded:
            own[name].copy_(state[name])
        for name in other_shape:
            # where an object is does not depend on what it is called
            groups, fixed = _rows(name)
            new, old = (
                values.reshape(groups, len(values) // groups, *values.shape[1:])
                for values in (own[name], state[name])
            )
            new[:, :fixed] = old[:, :fixed]
            for label, other in same or ():
                new[:, fixed + label] = old[:, fixed + other].to(new.dtype)
    kept = [name for name in own if name not in loaded]
    unused = [
        name for name, value in state.items() if name not in own and value.is_floating_point()
    ]
    notes = []
    if other_shape:
        kept_classes = f"; {len(same)} share a name and keep their outputs" if same else ""
        notes = [
            "made for other classes: their outputs start anew "
            f"({', '.join(other_shape)}){kept_classes}"
        ]
    return LoadReport(path, loaded, kept, unused, notes)


def _rows(name: str) -> tuple[int, int]:
    """Return the anchors of an output layer, and the rows of each before its classes."""
    return (ANCHORS_PER_SCALE, 5) if name.startswith("heads.") else (1, 0)


def _rows_fit(
    name: str, theirs: Tensor, ours: Tensor, same: Sequence[tuple[int, int]] | None
) -> bool:
    """Return whether a layer is of this network but for its classes, and has those it shares."""
    groups, fixed = _rows(name)
    last = max((other for _, other in same or ()), default=-1)
    return rows_fit(theirs, groups, fixed + last + 1) and theirs.shape[1:] == ours.shape[1:]


def _read_state(path: Path) -> tuple[dict[str, Tensor], list[str] | None]:
    """Return the named tensors of a file, without the prefixes of wrappers, and its class names."""
    names: Any = None
    if path.suffix == ".safetensors":
        content: Any
        content, metadata = read_safetensors(path)
        try:
            names = json.loads(metadata.get("classes", "null"))
        except (ValueError, RecursionError):  # of another program
            names = None
    elif path.suffix == ".ckpt":
        try:
            stored = load_checkpoint(path)
            content, names = stored.get("ema"), stored.get("classes")
        except UserError:
            content = _read_torch_file(path)
            if not any(map(CONVOLUTION.fullmatch, _tensors(content))):  # the course's, by Lightning
                raise
    else:
        content = _read_torch_file(path)
    tensors = _tensors(content)
    if not tensors:
        raise UserError(f"{path}: holds no named tensors")
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return tensors, names if is_list else None


def _tensors(content: Any) -> dict[str, Tensor]:
    """Return what can be copied from a file, without the prefixes of wrappers.

    Sparse and quantized tensors, and those without values, are left out.
    """
    items = content.items() if isinstance(content, Mapping) else ()
    return {
        WRAPPERS.sub("", name): value
        for name, value in items
        if isinstance(name, str)
        and isinstance(value, Tensor)
        and value.dtype in TYPES
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_nested
    }


def _read_torch_file(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            start = file.read(len(ZIP_START))
        if start == ZIP_START:
            check_stored(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: is no torch file, or holds more than tensors and plain types (which could "
            "run code); save its state_dict() alone"
        ) from None
    except Exception as error:  # on damaged bytes torch raises all sorts
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: is damaged or no torch file ({reason})") from None
    for key in ("ema", "model", "state_dict", "model_state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            return content[key]
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a state dict")
    return content


def _summary(names: list[str]) -> str:
    """Count names by their first part: `backbone 260, heads 21`."""
    counts: dict[str, int] = {}
    for name in names:
        part = name.split(".")[0]
        counts[part] = counts.get(part, 0) + 1
    return ", ".join(f"{part} {count}" for part, count in counts.items()) or "none"
