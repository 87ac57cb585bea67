"""A custom ResNet for 32 x 32 images: a first layer, then three that pool, two with a residual."""

import torch
from torch import Tensor, nn

from yolo.models.darknet import ConvBnAct, images_to_float, scaled

# one step of Adam moves a sum over 512 features by much; factor of Page 2018, "ResNet-9"
LOGIT_SCALE = 0.125


class PooledLayer(nn.Sequential):
    """Convolution, 2x2 max-pooling, batch normalisation, ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and the sum with the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            ConvBnAct(channels, channels, 3, act=nn.ReLU(inplace=True)),
            ConvBnAct(channels, channels, 3, act=nn.ReLU(inplace=True)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to the same shape."""
        return x + self.body(x)


class ResNet(nn.Module):
    """The classifier; 6,573,130 parameters at width 1 with ten classes."""

    def __init__(self, num_classes: int, width: float = 1.0) -> None:
        super().__init__()
        prep, first, second, third = (scaled(channels, width) for channels in (64, 128, 256, 512))
        self.prep = ConvBnAct(3, prep, 3, act=nn.ReLU(inplace=True))
        self.layer1 = nn.Sequential(PooledLayer(prep, first), ResidualBlock(first))
        self.layer2 = PooledLayer(first, second)
        self.layer3 = nn.Sequential(PooledLayer(second, third), ResidualBlock(third))
        self.pool = nn.MaxPool2d(4)
        self.classifier = nn.Linear(third, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, 32, 32], uint8 or float in [0, 1], to logits [B, num_classes]."""
        # [0, 1] -> about unit variance around the middle grey
        x = self.prep(images_to_float(images) * 4 - 2)
        x = self.pool(self.layer3(self.layer2(self.layer1(x))))
        return self.classifier(torch.flatten(x, 1)) * LOGIT_SCALE
