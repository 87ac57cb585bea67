"""What other programs and strangers wrote ends a start with one line, or is left out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import compress
from safetensors.torch import save_file
from torch import Tensor

from yolo.config import Config
from yolo.errors import UserError
from yolo.models.darknet_weights import darknet_convolutions
from yolo.models.resnet import ResNet
from yolo.models.yolov3 import YoloV3
from yolo.runs.checkpoint import save_checkpoint
from yolo.runs.pretrained import init_weights, start_weights

WIDTH = 0.0625
CLASSES = 4


@pytest.fixture
def model() -> YoloV3:
    torch.manual_seed(0)
    return YoloV3(CLASSES, WIDTH)


def state_of(model: YoloV3) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def ones_of(model: YoloV3) -> dict[str, Tensor]:
    return {name: torch.ones_like(value) for name, value in model.state_dict().items()}


def is_unchanged(model: YoloV3, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "classes", ['{"classes": "20"}', "20", "[1, 2]", '"cup"', "no json", "[" * 100_000]
)
def test_classes_of_another_program_are_not_known(
    model: YoloV3, tmp_path: Path, classes: str
) -> None:
    save_file(ones_of(model), tmp_path / "a.safetensors", {"classes": classes})
    report = init_weights(model, tmp_path / "a.safetensors", ["a", "b", "c", "d"])
    assert not report.kept and not report.notes


@pytest.mark.parametrize("content", [{}, {"ema": 5}, {"ema": {0: torch.ones(1)}, "classes": 5}])
def test_a_checkpoint_without_averaged_weights_is_one_clear_line(
    model: YoloV3, tmp_path: Path, content: dict[str, Any]
) -> None:
    save_checkpoint(tmp_path / "a.ckpt", {"model": {}, **content})
    with pytest.raises(UserError, match=r"a\.ckpt: holds no named tensors"):
        init_weights(model, tmp_path / "a.ckpt")


@pytest.mark.parametrize("suffix", [".pt", ".ckpt"])
def test_tensors_without_a_name_are_left_out(model: YoloV3, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    torch.save({0: torch.ones(1)}, path)
    with pytest.raises(UserError, match=r"holds no named tensors|is no checkpoint"):
        init_weights(model, path)
    torch.save({0: torch.ones(1), **ones_of(model)}, tmp_path / "b.pt")
    assert not init_weights(model, tmp_path / "b.pt").kept


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("heads.0.1.weight", (28, 64, 1, 1)),
        ("heads.0.1.bias", (12,)),
        ("heads.0.1.bias", ()),
        ("heads.2.1.weight", (30, 5, 1, 1)),
        ("heads.2.1.weight", (0, 16, 1, 1)),
    ],
)
def test_rows_that_are_no_three_anchors_change_nothing(
    model: YoloV3, tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    before = state_of(model)
    torch.save({**ones_of(model), name: torch.ones(shape)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=f"{name} is .* there and "):
        init_weights(model, tmp_path / "a.pt")
    assert is_unchanged(model, before)


def test_more_class_names_than_rows_change_nothing(model: YoloV3, tmp_path: Path) -> None:
    before = state_of(model)
    names = ["x1", "x2", "x3", "x4", "x5", "cup"]
    save_file(ones_of(model), tmp_path / "a.safetensors", {"classes": json.dumps(names)})
    with pytest.raises(UserError, match=r"heads\.0\.1\."):
        init_weights(model, tmp_path / "a.safetensors", ["cup", "b", "c", "d"])
    assert is_unchanged(model, before)


def test_a_classifier_of_another_width_changes_nothing(tmp_path: Path) -> None:
    model = ResNet(CLASSES, WIDTH)
    name = next(name for name in model.state_dict() if name.startswith("classifier."))
    torch.save({name: torch.ones(9, 3)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"classifier\..* is \[9, 3\] there"):
        init_weights(model, tmp_path / "a.pt")


def sparse(value: Tensor) -> Tensor:
    return value.to_sparse()


def quantized(value: Tensor) -> Tensor:
    return torch.quantize_per_tensor(value, 0.1, 0, torch.qint8)


def without_values(value: Tensor) -> Tensor:
    return value.to("meta")


@pytest.mark.parametrize("change", [sparse, quantized, without_values])
def test_what_cannot_be_copied_is_left_out(model: YoloV3, tmp_path: Path, change: Any) -> None:
    names = [name for name, value in model.state_dict().items() if value.ndim == 4]
    name = names[3]
    before, content = state_of(model), ones_of(model)
    torch.save({**content, name: change(content[name])}, tmp_path / "a.pt")
    assert init_weights(model, tmp_path / "a.pt").kept == [name]
    assert torch.equal(model.state_dict()[name], before[name])
    assert (model.state_dict()[names[4]] == 1).all()


@pytest.mark.parametrize("harm", ["norm", "bias", "rows"])
def test_a_checkpoint_of_the_course_that_is_not_whole_is_one_clear_line(
    model: YoloV3, tmp_path: Path, harm: str
) -> None:
    before, content = state_of(model), {}
    for number, conv in enumerate(darknet_convolutions(model)):
        stem = f"layers.{number}."
        content[f"{stem}conv.weight"] = conv.conv.weight.detach()
        if conv.norm is None:
            content[f"{stem}conv.bias"] = torch.ones(28 if harm == "rows" else 27)
        else:
            content |= {f"{stem}bn.{name}": value for name, value in conv.norm.state_dict().items()}
    content = {
        name: value
        for name, value in content.items()
        if not (harm == "norm" and "layers.7.bn" in name)
        and not (harm == "bias" and name.endswith("conv.bias"))
    }
    torch.save(content, tmp_path / "course.pth")
    with pytest.raises(UserError, match="no tensor in it has a name of this network's"):
        init_weights(model, tmp_path / "course.pth")
    assert is_unchanged(model, before)


def test_a_compressed_file_is_refused_before_it_is_unpacked(model: YoloV3, tmp_path: Path) -> None:
    torch.save(ones_of(model), tmp_path / "a.pt")
    compress(tmp_path / "a.pt", tmp_path / "b.pt")
    with pytest.raises(UserError, match="it is compressed"):
        init_weights(model, tmp_path / "b.pt")


def test_files_of_before_torch_1_6_are_read(model: YoloV3, tmp_path: Path) -> None:
    torch.save(ones_of(model), tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert not init_weights(model, tmp_path / "a.pt").kept


def test_a_name_that_no_file_can_have_is_no_such_file(model: YoloV3) -> None:
    with pytest.raises(UserError, match="no such file"):
        start_weights(model, Config(init_weights="a\0b", backbone_weights="none"))
