"""Darknet-53, YOLOv3's backbone (Redmon & Farhadi 2018, table 1), and blocks for all networks."""

from typing import cast

import torch
from torch import Tensor, nn


def scaled(channels: int, width: float) -> int:
    """Return `channels` x `width`, rounded to a multiple of 8, at least 8: kernels stay aligned."""
    return max(8, round(channels * width / 8) * 8)


class ConvBnAct(nn.Sequential):
    """Convolution without bias, batch normalisation, leaky ReLU of slope 0.1 or `act`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        act: nn.Module | None = None,
    ) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.LeakyReLU(0.1, inplace=True) if act is None else act,
        )


class Residual(nn.Module):
    """A 1x1 convolution to half the channels, a 3x3 back, and the sum with the input.

    The last normalisation starts at zero, so that the block starts as the identity and bears a
    higher learning rate (Goyal et al. 2017, arXiv:1706.02677, section 5.1).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = ConvBnAct(channels, channels // 2, 1)
        self.expand = ConvBnAct(channels // 2, channels, 3)
        nn.init.zeros_(cast(nn.BatchNorm2d, self.expand[1]).weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to the same shape."""
        return x + self.expand(self.reduce(x))


class Darknet53(nn.Module):
    """Darknet-53 without its classifier: 52 convolutions, their channels scaled by `width`."""

    STAGES = ((64, 1), (128, 2), (256, 8), (512, 8), (1024, 4))  # channels, residual blocks

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        self.stem = ConvBnAct(3, scaled(32, width), 3)
        stages, in_channels = [], scaled(32, width)
        for channels, blocks in self.STAGES:
            out_channels = scaled(channels, width)
            residuals = [Residual(out_channels) for _ in range(blocks)]
            halving = ConvBnAct(in_channels, out_channels, 3, stride=2)
            stages.append(nn.Sequential(halving, *residuals))
            in_channels = out_channels
        self.stages = nn.ModuleList(stages)
        # fine to coarse
        self.channels = tuple(scaled(channels, width) for channels, _ in self.STAGES[2:])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map float images [B, 3, S, S] to the features of strides 8, 16 and 32."""
        x = self.stem(images)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features[2], features[3], features[4]


def images_to_float(images: Tensor) -> Tensor:
    """Map uint8 images to [0, 1] in channels_last order; floating images keep their values."""
    # while a pixel is one byte: 4 times faster
    images = images.contiguous(memory_format=torch.channels_last)
    return images.float().div_(255) if images.dtype == torch.uint8 else images
