"""A checkpoint of the course's own YOLOv3 code, rebuilt here in small, gives the same answers."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from yolo.errors import UserError
from yolo.models.course_weights import from_course
from yolo.models.darknet import scaled
from yolo.models.yolov3 import YoloV3
from yolo.runs.pretrained import init_weights

WIDTH = 0.0625
CLASSES = 4
# Aladdin Persson's list: (channels, kernel, stride); "B" residual blocks, "S" a head, "U"
# upsampling
CONFIG = [
    (32, 3, 1), (64, 3, 2), ["B", 1], (128, 3, 2), ["B", 2], (256, 3, 2), ["B", 8], (512, 3, 2),
    ["B", 8], (1024, 3, 2), ["B", 4], (512, 1, 1), (1024, 3, 1), "S", (256, 1, 1), "U",
    (256, 1, 1), (512, 3, 1), "S", (128, 1, 1), "U", (128, 1, 1), (256, 3, 1), "S",
]  # fmt: skip


class CNNBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, bn_act: bool = True, **kwargs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, bias=not bn_act, **kwargs)
        self.bn = nn.BatchNorm2d(outputs)
        self.leaky = nn.LeakyReLU(0.1)
        self.use_bn_act = bn_act

    def forward(self, x: Tensor) -> Tensor:
        return self.leaky(self.bn(self.conv(x))) if self.use_bn_act else self.conv(x)


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, use_residual: bool = True, num_repeats: int = 1) -> None:
        super().__init__()
        half = channels // 2
        self.layers = nn.ModuleList(
            nn.Sequential(
                CNNBlock(channels, half, kernel_size=1),
                CNNBlock(half, channels, kernel_size=3, padding=1),
            )
            for _ in range(num_repeats)
        )
        self.use_residual = use_residual
        self.num_repeats = num_repeats

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x) if self.use_residual else layer(x)
        return x


class ScalePrediction(nn.Module):
    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.pred = nn.Sequential(
            CNNBlock(channels, 2 * channels, kernel_size=3, padding=1),
            CNNBlock(2 * channels, (num_classes + 5) * 3, bn_act=False, kernel_size=1),
        )
        self.num_classes = num_classes

    def forward(self, x: Tensor) -> Tensor:
        shape = (x.shape[0], 3, self.num_classes + 5, x.shape[2], x.shape[3])
        return self.pred(x).reshape(shape).permute(0, 1, 3, 4, 2)


class CourseYoloV3(nn.Module):
    def __init__(self, num_classes: int, width: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        channels = 3
        for module in CONFIG:
            if isinstance(module, tuple):
                outputs, kernel, stride = module
                outputs = scaled(outputs, width)
                padding = 1 if kernel == 3 else 0
                self.layers.append(
                    CNNBlock(channels, outputs, kernel_size=kernel, stride=stride, padding=padding)
                )
                channels = outputs
            elif isinstance(module, list):
                self.layers.append(ResidualBlock(channels, num_repeats=int(module[1])))
            elif module == "S":
                self.layers.append(ResidualBlock(channels, use_residual=False))
                self.layers.append(CNNBlock(channels, channels // 2, kernel_size=1))
                channels //= 2
                self.layers.append(ScalePrediction(channels, num_classes))
            else:
                self.layers.append(nn.Upsample(scale_factor=2))
                channels *= 3

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs, routes = [], []
        for layer in self.layers:
            if isinstance(layer, ScalePrediction):
                outputs.append(layer(x))
                continue
            x = layer(x)
            if isinstance(layer, ResidualBlock) and layer.num_repeats == 8:
                routes.append(x)
            elif isinstance(layer, nn.Upsample):
                x = torch.cat([x, routes.pop()], dim=1)
        return outputs


@pytest.fixture(scope="module")
def course() -> CourseYoloV3:
    torch.manual_seed(0)
    model = CourseYoloV3(CLASSES, WIDTH)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize("prefix", ["", "model.", "module.network."])
@pytest.mark.parametrize("suffix", [".pth.tar", ".ckpt"])
def test_the_same_outputs_come_out_with_objectness_in_its_place(
    course: CourseYoloV3, tmp_path: Path, prefix: str, suffix: str
) -> None:
    state = {prefix + name: value for name, value in course.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / f"course{suffix}")
    model = YoloV3(CLASSES, WIDTH).eval()
    report = init_weights(model, tmp_path / f"course{suffix}")
    assert not report.kept and not report.unused
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        for ours, theirs in zip(model(images), course(images), strict=True):
            moved = theirs[..., [1, 2, 3, 4, 0, *range(5, 5 + CLASSES)]]
            assert torch.allclose(ours, moved, rtol=1e-4, atol=1e-5)


def test_another_number_of_classes_keeps_boxes_and_objectness(
    course: CourseYoloV3, tmp_path: Path
) -> None:
    torch.save({"state_dict": course.state_dict()}, tmp_path / "course.pth")
    model = YoloV3(CLASSES + 3, WIDTH).eval()
    assert "made for other classes" in init_weights(model, tmp_path / "course.pth").notes[0]
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for ours, theirs in zip(model(images), course(images), strict=True):
            wanted = theirs[..., [1, 2, 3, 4, 0]]
            assert torch.allclose(ours[..., :5], wanted, rtol=1e-4, atol=1e-5)


def test_at_full_width_every_parameter_of_the_paper_is_named() -> None:
    with torch.device("meta"):
        theirs, ours = CourseYoloV3(20, 1.0), YoloV3(20)
        renamed = from_course(ours, theirs.state_dict())
    own = dict(ours.named_parameters())
    assert renamed is not None and own.keys() <= renamed.keys()
    assert all(renamed[name].shape == value.shape for name, value in own.items())
    assert sum(value.numel() for value in own.values()) == 61_626_049


def test_a_checkpoint_of_lightning_that_holds_another_network_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"fc.weight": torch.zeros(3, 3)}}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="is no checkpoint of this project"):
        init_weights(YoloV3(CLASSES, WIDTH), tmp_path / "other.ckpt")
