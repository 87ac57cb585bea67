"""A trained network made fast for prediction: fused, in half precision, compiled."""

import copy
import os
import shutil
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from yolo.errors import UserError
from yolo.models.backbones import TimmBackbone
from yolo.models.darknet import images_to_float

Network = TypeVar("Network", bound=nn.Module)

SAME = 1e-3  # largest difference after fusing, as a share of the largest feature
COMPILERS = ("g++", "clang++", "cl")  # what torch.compile looks for on Linux, macOS and Windows


class FastModel(nn.Module):
    """A network in another precision that takes the usual images and gives float32 outputs."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        network = network.to(dtype)
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.dtype = dtype

    def forward(self, images: Tensor) -> Any:
        """Map images [B, 3, S, S], uint8 or in [0, 1], to the network's output in float32."""
        outputs = self.network(images_to_float(images).to(self.dtype))
        return (
            outputs.float()
            if isinstance(outputs, Tensor)
            else [output.float() for output in outputs]
        )


class FlipAveraged(nn.Module):
    """A network whose output is the mean of those for an image and for its mirror image.

    Averaging the raw outputs costs one suppression, not two, and on VOC gives as good an mAP as
    suppressing the boxes of both together (0.668 and 0.667; 0.356 and 0.351 at 0.5:0.95).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Any:
        """Map images [B, 3, S, S] to what the network gives, in float32."""
        direct, mirrored = self.network(images), self.network(images.flip(-1))
        if isinstance(direct, Tensor):
            return (direct.float() + mirrored.float()) / 2
        return [_mean_of_mirrored(*pair) for pair in zip(direct, mirrored, strict=True)]


def _mean_of_mirrored(direct: Tensor, mirrored: Tensor) -> Tensor:
    """Average raw outputs [B, A, H, W, 5 + C]; offsets and objectness as fractions."""
    direct, mirrored = direct.float(), mirrored.float().flip(3)
    mirrored = torch.cat([-mirrored[..., :1], mirrored[..., 1:]], dim=-1)  # 1 - sigmoid(tx)
    mean = (direct + mirrored) / 2
    for part in (slice(0, 2), slice(4, 5)):
        fraction = (direct[..., part].sigmoid() + mirrored[..., part].sigmoid()) / 2
        mean[..., part] = fraction.logit(eps=1e-7)
    return mean


def prepare(
    model: nn.Module, device: torch.device, *, fast: bool = False, compiled: bool = False
) -> nn.Module:
    """Move a trained network to the device that it predicts on, in the form that was asked for.

    Args:
        model: in eval mode.
        device: where it will run.
        fast: fold batch normalisation and compute in `fast_dtype`.
        compiled: torch.compile it; the first batch of each new image size waits for that.

    Raises:
        UserError: if `compiled` and there is no C++ compiler.
    """
    model = model.to(device)
    if fast:
        model = make_fast(model, fast_dtype(device))
    if not compiled:
        return model
    require_compiler()
    return torch.compile(model, dynamic=False)  # type: ignore[return-value]


def make_fast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy of a network in eval mode for prediction: fused, `dtype`, channels_last."""
    return FastModel(fuse(model), dtype).eval()


def fast_dtype(device: torch.device) -> torch.dtype:
    """Return half precision for GPUs, bfloat16 for CPUs that multiply it natively, else float32."""
    if device.type == "cpu":
        return torch.bfloat16 if cpu_computes_bf16() else torch.float32
    return torch.float16 if device.type == "cuda" else torch.float32


def cpu_computes_bf16() -> bool:
    """Return whether this CPU has bfloat16 instructions; without them it is slower than float32."""
    if not hasattr(torch.cpu, "get_capabilities"):  # torch 2.6
        return torch.cpu._is_avx512_bf16_supported()
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def fuse(model: Network) -> Network:
    """Return a copy in eval mode whose convolutions have absorbed the batch norms behind them."""
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            _fuse_pairs(module)
        elif isinstance(module, TimmBackbone):
            module.net = _fuse_timm(module.net)
    return model


def _fuse_pairs(layers: nn.Sequential) -> None:
    for i in range(len(layers) - 1):
        conv, norm = layers[i], layers[i + 1]
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            layers[i] = fuse_conv_bn_eval(conv, norm)
            layers[i + 1] = _activation(norm)


def _fuse_timm(net: nn.Module) -> nn.Module:
    """Fuse a network whose blocks keep their layers as attributes: a forward shows what feeds what.

    A convolution that feeds more than its normalisation cannot be told that way, so the result is
    compared; where it differs the network stays as it is.
    """
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(
        next(net.parameters())
    )
    expected, pairs = _watch(net, images)
    fused = copy.deepcopy(net)
    for conv_name, norm_name in pairs:
        conv = cast(nn.Conv2d, fused.get_submodule(conv_name))
        norm = cast(nn.BatchNorm2d, fused.get_submodule(norm_name))
        fused.set_submodule(conv_name, fuse_conv_bn_eval(conv, norm))
        fused.set_submodule(norm_name, _activation(norm))
    with torch.no_grad():
        same = all(
            (found - wanted).abs().max() <= SAME * wanted.abs().max()
            for found, wanted in zip(fused(images), expected, strict=True)
        )
    return fused if same else net


@torch.no_grad()
def _watch(net: nn.Module, images: Tensor) -> tuple[Any, list[tuple[str, str]]]:
    """Return a network's output, and which norm takes which convolution's output as it is."""
    made: dict[int, tuple[str, Tensor]] = {}  # the tensors are kept, else another takes their place
    pairs: list[tuple[str, str]] = []

    def note_conv(name: str, output: Tensor) -> None:
        made[id(output)] = (name, output)

    def note_norm(name: str, received: Tensor) -> None:
        if id(received) in made:
            pairs.append((made[id(received)][0], name))

    names = {module: name for name, module in net.named_modules()}
    hooks = [
        module.register_forward_hook(lambda conv, _, output: note_conv(names[conv], output))
        for module in names
        if isinstance(module, nn.Conv2d)
    ] + [
        module.register_forward_pre_hook(lambda norm, given: note_norm(names[norm], given[0]))
        for module in names
        if isinstance(module, nn.BatchNorm2d)
    ]
    try:
        return net(images), pairs
    finally:
        for hook in hooks:
            hook.remove()


def _activation(norm: nn.BatchNorm2d) -> nn.Module:
    """Return what is left of a normalisation that was folded: timm's have an activation in them."""
    act = getattr(norm, "act", None)
    return act if isinstance(act, nn.Module) else nn.Identity()


def require_compiler() -> None:
    """Stop with what to do if torch.compile would fail for want of a C++ compiler.

    Raises:
        UserError: if there is none.
    """
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else COMPILERS
    if not any(shutil.which(name) for name in wanted):
        names = " or ".join(wanted)
        raise UserError(
            f"--compile needs a C++ compiler ({names}): install one, or leave the flag out"
        )
