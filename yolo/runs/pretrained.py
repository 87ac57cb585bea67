"""Start training from weights made elsewhere: timm's, Darknet's, our checkpoints, torch state dicts."""

import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from yolo.config import Config
from yolo.errors import UsageError, UserError
from yolo.files import find
from yolo.models.backbones import TimmBackbone, fetch_state, fit_state
from yolo.models.darknet_weights import darknet_convolutions, load_darknet
from yolo.models.yolov3 import ANCHORS_PER_SCALE, YoloV3
from yolo.runs.checkpoint import load_checkpoint

OUTPUT_LAYER = re.compile(r"heads\.\d+\.1\.|classifier\.")  # its size is that of the class list
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


def start_weights(model: nn.Module, config: Config) -> list[str]:
    """Give a new model the weights that `--backbone-weights` and `--init-weights` ask for, in place.

    Returns:
        What was loaded, in lines for people.

    Raises:
        UserError: if a file does not fit, or nothing can be fetched; the model is then unchanged.
    """
    lines = []
    wanted = config.backbone_weights
    if wanted == "auto" and config.init_weights:
        wanted = "none"  # that file brings its backbone
    if isinstance(model, YoloV3) and wanted != "none":
        lines += load_backbone(model, wanted)
    if config.init_weights:
        lines += init_weights(model, find(Path(config.init_weights))).lines()
    return lines


def load_backbone(model: YoloV3, source: str) -> list[str]:
    """Copy pretrained weights into the backbone, in place.

    Args:
        model: the detector. For one on Darknet-53 `auto` means none: its files come by --init-weights.
        source: `auto`, or a file.

    Returns:
        What was loaded, in lines for people.

    Raises:
        UserError: if there is no such file, it is damaged or of another network, or cannot be fetched.
    """
    backbone = model.backbone
    if not isinstance(backbone, TimmBackbone):
        if source == "auto":
            return []
        raise UsageError(
            f"--backbone-weights {source}: is for backbones of timm; darknet53 starts with --init-weights "
            "darknet53.conv.74, or take --backbone timm/darknet53"
        )
    if source == "auto":
        backbone.net.load_state_dict(fetch_state(backbone.name))
        return [f"backbone timm/{backbone.name}: timm's pretrained weights"]
    path = Path(source)
    if not path.is_file():
        raise UsageError(f"--backbone-weights {path}: no such file")
    try:
        fitting = fit_state(backbone, _read_state(path))
    except ValueError as error:
        raise UserError(f"{path}: is not of --backbone timm/{backbone.name}: {error}") from None
    backbone.net.load_state_dict(fitting, strict=False)  # a file may lack the counts of batches
    return [f"{path}: {len(fitting)} tensors of timm/{backbone.name} loaded"]


def init_weights(model: nn.Module, path: Path) -> LoadReport:
    """Copy what fits from a weight file into the model, in place; `.weights` and `.conv.N` are Darknet's.

    Output layers for another number of classes are left out. From our checkpoints come the averaged weights.

    Raises:
        UserError: if the file is missing, damaged, of an unknown kind, or made for another network; the model
            is then unchanged.
    """
    if not path.is_file():
        raise UsageError(f"--init-weights {path}: no such file")
    if path.suffix == ".weights" or re.search(r"\.conv\.\d+$", path.name):
        return _init_from_darknet(model, path)
    return _init_from_state(model, path, _read_state(path))


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


def _init_from_state(model: nn.Module, path: Path, state: Mapping[str, Tensor]) -> LoadReport:
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
            f"{path}: has another backbone ({min(theirs)}, ...); give the --backbone that it was made with"
        )
    other_shape = [name for name in shared if state[name].shape != own[name].shape]
    for name in other_shape:
        if not OUTPUT_LAYER.match(name):
            raise UserError(
                f"{path}: {name} is {list(state[name].shape)} there and {list(own[name].shape)} here; "
                "use the --width that the file was made with"
            )
    loaded = [name for name in shared if name not in other_shape]
    with torch.no_grad():
        for name in loaded:
            own[name].copy_(state[name])
        for name in other_shape:
            if name.startswith("heads."):  # where an object is does not depend on what it is called
                new, old = (
                    values.view(ANCHORS_PER_SCALE, -1, *values.shape[1:])
                    for values in (own[name], state[name])
                )
                new[:, :5] = old[:, :5]
    kept = [name for name in own if name not in loaded]
    unused = [
        name for name, value in state.items() if name not in own and value.is_floating_point()
    ]
    notes = []
    if other_shape:
        notes = [
            f"made for another number of classes: those outputs start anew ({', '.join(other_shape)})"
        ]
    return LoadReport(path, loaded, kept, unused, notes)


def _read_state(path: Path) -> dict[str, Tensor]:
    """Return the named tensors of a file, without the prefixes that wrappers add to the names."""
    if path.suffix == ".safetensors":
        try:
            content: Any = load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: is damaged or no safetensors file ({error})") from None
    elif path.suffix == ".ckpt":
        content = load_checkpoint(path)["ema"]
    else:
        content = _read_torch_file(path)
    tensors = {
        WRAPPERS.sub("", name): value
        for name, value in content.items()
        if isinstance(value, Tensor)
    }
    if not tensors:
        raise UserError(f"{path}: holds no named tensors")
    return tensors


def _read_torch_file(path: Path) -> Mapping[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: is no torch file, or holds more than tensors and plain types (which could run code); "
            "save its state_dict() alone"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, zipfile.BadZipFile) as error:
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
