"""Darknet's binary files, layer by layer, and every other kind of weights to start from."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from yolo.config import Config
from yolo.errors import UserError
from yolo.models.darknet import Darknet53
from yolo.models.darknet_weights import (
    BACKBONE_CONVOLUTIONS,
    DarknetCut,
    darknet_convolutions,
    find_cut,
    load_darknet,
    read_darknet,
    write_darknet,
)
from yolo.models.resnet import ResNet
from yolo.models.yolov3 import YoloV3
from yolo.runs.checkpoint import save_checkpoint, save_weights
from yolo.runs.pretrained import init_weights

WIDTH = 0.125
PUBLIC_FILES = [  # bytes of the files on pjreddie.com
    ("darknet53.conv.74", 162_482_580, DarknetCut(52, 80)),
    ("yolov3.weights", 248_007_048, DarknetCut(75, 80)),
]


def _random_model(num_classes: int = 3, seed: int = 0) -> YoloV3:
    torch.manual_seed(seed)
    with torch.device("meta"):  # no time for an initialisation that is overwritten
        model = YoloV3(num_classes, WIDTH)
    model.to_empty(device="cpu")
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape) + 0.5)
    return model


def _state(model: nn.Module, part: str = "") -> dict[str, torch.Tensor]:
    return {
        name: value.clone()
        for name, value in model.state_dict().items()
        if name.startswith(part) and value.is_floating_point()
    }


def _assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    # a scale is multiplied and divided again
    assert [name for name in a if not torch.allclose(a[name], b[name], rtol=1e-6, atol=0)] == []


def test_convolutions_are_those_of_yolov3_cfg_in_its_order() -> None:
    with torch.device("meta"):
        convolutions = darknet_convolutions(YoloV3(80))
    kernels = [conv.conv.kernel_size[0] for conv in convolutions]
    channels = [conv.conv.out_channels for conv in convolutions]
    assert len(convolutions) == 75
    assert channels[:6] == [32, 64, 32, 64, 128, 64]
    # neck, head, then the lateral of the coarse scale
    assert kernels[52:60] == [1, 3, 1, 3, 1, 3, 1, 1]
    assert channels[52:60] == [512, 1024, 512, 1024, 512, 1024, 255, 256]
    assert channels[60:68] == [256, 512, 256, 512, 256, 512, 255, 128]
    assert channels[68:] == [128, 256, 128, 256, 128, 256, 255]
    assert [i for i, conv in enumerate(convolutions) if conv.norm is None] == [58, 66, 74]


@pytest.mark.parametrize(("name", "size", "cut"), PUBLIC_FILES)
@pytest.mark.parametrize("num_classes", [20, 80])
def test_the_public_files_are_recognised_by_their_length(
    name: str, size: int, cut: DarknetCut, num_classes: int
) -> None:
    with torch.device("meta"):
        convolutions = darknet_convolutions(YoloV3(num_classes))
    headers = (16, 20)
    found = next(
        cut for h in headers if (cut := find_cut(convolutions, (size - h) // 4, num_classes))
    )
    assert found is not None and found.convolutions == cut.convolutions
    assert found.num_classes == (num_classes if cut.convolutions == BACKBONE_CONVOLUTIONS else 80)


@pytest.mark.parametrize("version", [(0, 1, 0), (0, 2, 0), (0, 2, 5), (1, 0, 0)])
def test_a_random_file_is_read_value_by_value_in_darknets_order(
    tmp_path: Path, version: tuple[int, int, int]
) -> None:
    """The file is written here from the format's description, without the code under test."""
    model = _random_model(seed=1)
    seen = "i" if version == (0, 1, 0) else "q"
    path = tmp_path / "random.weights"
    count = sum(value.numel() for value in _state(model).values())
    values = np.random.default_rng(0).random(count, np.float32)
    path.write_bytes(struct.pack(f"<3i{seen}", *version, 123) + values.tobytes())
    assert read_darknet(path).images_seen == 123
    assert load_darknet(model, path) == DarknetCut(75, 3)

    start = 0
    for conv in darknet_convolutions(model):
        if conv.norm is not None:
            stored = [
                conv.norm.bias,
                conv.norm.weight,
                conv.norm.running_mean,
                conv.norm.running_var,
            ]
        else:
            stored = [conv.conv.bias]
        for tensor in [*stored, conv.conv.weight]:
            part = values[start : start + tensor.numel()]
            if conv.norm is not None and tensor is conv.norm.weight:
                part = (part * conv.scale_factor().numpy()).astype(np.float32)
            assert np.array_equal(tensor.detach().numpy().ravel(), part), conv.name
            start += tensor.numel()
    assert start == count


@pytest.mark.parametrize(
    ("convolutions", "version"),
    [
        (1, (0, 2, 0)),
        (BACKBONE_CONVOLUTIONS, (0, 1, 0)),
        (58, (0, 2, 0)),  # up to the first head's output
        (59, (0, 2, 0)),  # with it
        (60, (0, 2, 0)),  # a lateral
        (74, (0, 2, 0)),
        (75, (0, 1, 0)),
    ],
)
def test_any_cut_is_written_and_read_back(
    tmp_path: Path, convolutions: int, version: tuple[int, int, int]
) -> None:
    source, model = _random_model(seed=1), _random_model(seed=2)
    before = _state(model)
    path = tmp_path / f"yolov3.conv.{convolutions}"
    write_darknet(source, path, convolutions, version, images_seen=2**31 - 1)
    assert load_darknet(model, path) == DarknetCut(convolutions, 3)
    names = [conv.name for conv in darknet_convolutions(model)]
    loaded = tuple(f"{name}." for name in names[:convolutions])
    given = _state(source)
    expected = {name: (given if name.startswith(loaded) else before)[name] for name in before}
    _assert_equal(_state(model), expected)


def test_a_read_network_answers_by_darknets_formula(tmp_path: Path) -> None:
    """Normalisation by the deviation + 1e-6, also where the variance is next to nothing."""
    source, model = _random_model(seed=1), _random_model(seed=2)
    norm = darknet_convolutions(source)[0].norm
    norm.running_var.data = torch.logspace(-12, 1, len(norm.running_var))
    count = sum(conv.num_values(3) for conv in darknet_convolutions(source)[:1])
    stored = [norm.bias, norm.weight, norm.running_mean, norm.running_var]
    values = [value.detach() for value in [*stored, darknet_convolutions(source)[0].conv.weight]]
    path = tmp_path / "yolov3.conv.1"
    numbers = np.concatenate([value.numpy().ravel() for value in values])
    path.write_bytes(struct.pack("<3iq", 0, 2, 0, 1) + numbers.astype("<f4").tobytes())
    assert len(numbers) == count and load_darknet(model, path).convolutions == 1

    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    bias, scale, mean, variance, kernel = (value.double() for value in values)
    raw = nn.functional.conv2d(images.double(), kernel, padding=1).movedim(1, -1)
    wanted = scale * (raw - mean) / (variance.sqrt() + 1e-6) + bias
    first = model.eval().backbone.stem
    with torch.no_grad():
        found = first[1](first[0](images)).movedim(1, -1).double()
    assert ((found - wanted).abs() / wanted.abs().clamp(min=1)).max() < 1e-5


def test_heads_for_other_classes_are_left_out_and_said(tmp_path: Path) -> None:
    source, model = _random_model(num_classes=80, seed=1), _random_model(num_classes=20, seed=2)
    before = _state(model)
    write_darknet(source, tmp_path / "coco.weights")
    report = init_weights(model, tmp_path / "coco.weights")
    after = _state(model)
    wanted = _state(source)
    for name, value in after.items():
        untouched = name.startswith(("heads.0.1.", "heads.1.1.", "heads.2.1."))
        assert torch.equal(value, before[name] if untouched else wanted[name]), name
    assert "72 of 75" in report.lines()[0]
    assert "the file has 80 classes, this run 20" in report.lines()[-1]


def test_the_backbone_file_leaves_the_rest_alone(tmp_path: Path) -> None:
    source, model = _random_model(seed=1), _random_model(seed=2)
    necks = _state(model, "necks")
    write_darknet(source, tmp_path / "darknet53.conv.74", BACKBONE_CONVOLUTIONS)
    report = init_weights(model, tmp_path / "darknet53.conv.74")
    _assert_equal(_state(model, "backbone"), _state(source, "backbone"))
    _assert_equal(_state(model, "necks"), necks)
    assert report.lines()[0].endswith("52 of 75 weights loaded (backbone 52)")
    assert report.lines()[1].endswith("necks 15, heads 6, laterals 2")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-4], r"end inside convolution 75 of 75 \(heads\.2\.1\)"),
        (lambda data: data[:40_000], r"end inside convolution \d+ of 75 \(backbone"),
        (lambda data: data[:-1], "is truncated"),
        (lambda data: data + bytes(8), "are more than this network's"),
        (lambda data: b"PK\x03\x04" + data, "is no Darknet weights file"),
        (lambda data: b"<!DOCTYPE html><html></html>", "is no Darknet weights file"),
        (lambda data: b"", r"is no Darknet weights file \(0 bytes\)"),
        (lambda data: data[:-4] + struct.pack("<f", float("nan")), "are not finite"),
    ],
)
def test_a_truncated_or_foreign_file_changes_nothing(tmp_path: Path, damage, message: str) -> None:
    source, model = _random_model(seed=1), _random_model(seed=2)
    before = _state(model)
    path = tmp_path / "broken.weights"
    write_darknet(source, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=message):
        init_weights(model, path)
    _assert_equal(_state(model), before)


def test_a_file_of_another_width_is_refused(tmp_path: Path) -> None:
    write_darknet(YoloV3(3, 0.25), tmp_path / "wide.weights")
    with pytest.raises(UserError, match="another --width"):
        init_weights(_random_model(), tmp_path / "wide.weights")


@pytest.mark.parametrize("nested", [False, True])
def test_a_torch_state_dict_is_taken_with_or_without_wrapping(tmp_path: Path, nested: bool) -> None:
    source, model = _random_model(seed=1), _random_model(seed=2)
    state = {f"module._orig_mod.{name}": value for name, value in source.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state} if nested else state, tmp_path / "weights.pth")
    report = init_weights(model, tmp_path / "weights.pth")
    _assert_equal(_state(model), _state(source))
    assert report.kept == report.unused == report.notes == []


def test_a_part_of_a_network_is_a_start(tmp_path: Path) -> None:
    model = _random_model()
    backbone = Darknet53(WIDTH)
    save_file(
        {f"backbone.{n}": v for n, v in backbone.state_dict().items()}
        | {"extra.bias": torch.zeros(1)},
        tmp_path / "backbone.safetensors",
    )
    report = init_weights(model, tmp_path / "backbone.safetensors")
    _assert_equal(_state(model.backbone), _state(backbone))
    assert report.unused == ["extra.bias"]
    assert {name.split(".")[0] for name in report.kept} == {"necks", "heads", "laterals"}


def test_a_classifier_for_other_classes_keeps_its_own_output_layer(tmp_path: Path) -> None:
    source, model = ResNet(10, WIDTH), ResNet(7, WIDTH)
    classifier = _state(model, "classifier")
    torch.save(source.state_dict(), tmp_path / "ten.pt")
    report = init_weights(model, tmp_path / "ten.pt")
    _assert_equal(_state(model, "classifier"), classifier)
    _assert_equal(_state(model, "layer3"), _state(source, "layer3"))
    assert "start anew (classifier.weight, classifier.bias)" in report.lines()[-1]


def test_unfit_torch_files_are_refused_in_one_line(tmp_path: Path) -> None:
    model = _random_model()
    before = _state(model)
    torch.save(YoloV3(3, 0.25).state_dict(), tmp_path / "wide.pt")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "foreign.pt")
    torch.save(nn.Linear(1, 1), tmp_path / "pickled.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("not a torch file")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "wide.pt").read_bytes()[:1000])
    (tmp_path / "empty.pt").touch()
    wide = (tmp_path / "wide.pt").read_bytes()
    (tmp_path / "stack.pt").write_bytes(wide.replace(b"\x80\x02c", b"\x80\x02R", 1))
    (tmp_path / "text.safetensors").write_text("not a safetensors file")
    for name, message in {
        "wide.pt": r"backbone\.stem\.0\.weight is \[8, 3, 3, 3\]|use the --width",
        "foreign.pt": "no tensor in it has a name of this network's",
        "pickled.pt": r"save its state_dict\(\) alone",
        "list.pt": "holds a list",
        "text.pt": "is no torch file",
        "cut.pt": "is damaged or no torch file",
        "empty.pt": "is damaged or no torch file",
        "stack.pt": "is damaged or no torch file",
        "text.safetensors": "is damaged or no safetensors file",
        "missing.pt": "no such file",
        "missing.weights": "no such file",
    }.items():
        with pytest.raises(UserError, match=message):
            init_weights(model, tmp_path / name)
    with pytest.raises(UserError, match="not for a classifier"):
        (tmp_path / "darknet.weights").write_bytes(bytes(20))
        init_weights(ResNet(10, WIDTH), tmp_path / "darknet.weights")
    _assert_equal(_state(model), before)


def test_our_own_files_are_a_start(tmp_path: Path) -> None:

    source, model = _random_model(seed=1), _random_model(seed=2)
    content = {"model": {}, "ema": source.state_dict(), "config": {}, "classes": ["a", "b", "c"]}
    save_checkpoint(tmp_path / "epoch.ckpt", content)
    init_weights(model, tmp_path / "epoch.ckpt")
    _assert_equal(_state(model), _state(source))
    save_weights(tmp_path / "half.safetensors", source, Config(), ("a", "b", "c"), None, {})
    init_weights(model, tmp_path / "half.safetensors")
    _assert_equal(
        _state(model), {name: value.half().float() for name, value in _state(source).items()}
    )


def test_a_detector_for_other_classes_keeps_where_and_whether_there_is_an_object(
    tmp_path: Path,
) -> None:
    source, model = YoloV3(5, WIDTH), YoloV3(2, WIDTH)
    own = _state(model)["heads.0.1.weight"].view(3, 7, -1)
    torch.save(source.state_dict(), tmp_path / "five.pt")
    report = init_weights(model, tmp_path / "five.pt")
    theirs = _state(source)["heads.0.1.weight"].view(3, 10, -1)
    now = _state(model)["heads.0.1.weight"].view(3, 7, -1)
    assert torch.equal(now[:, :5], theirs[:, :5]) and torch.equal(now[:, 5:], own[:, 5:])
    assert "start anew (heads.0.1.weight" in report.lines()[-1]


@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
def test_classes_that_share_a_name_keep_their_outputs(kind: str, tmp_path: Path) -> None:
    source, model = YoloV3(3, WIDTH), YoloV3(3, WIDTH)
    own, path = _state(model)["heads.1.1.bias"].view(3, 8), tmp_path / f"three.{kind}"
    if kind == "ckpt":
        names = ["cat", "dog", "cow"]
        weights = {"model": source.state_dict(), "ema": source.state_dict(), "classes": names}
        save_checkpoint(path, weights)
    else:
        save_weights(path, source.half().float(), Config(), ("cat", "dog", "cow"), None, {})
    report = init_weights(model, path, ["Cow", "sheep", "cat"])
    theirs, now = (_state(net)["heads.1.1.bias"].view(3, 8) for net in (source, model))
    assert torch.equal(now[:, :5], theirs[:, :5])  # where, and whether there is an object
    assert torch.equal(now[:, 5], theirs[:, 7]) and torch.equal(now[:, 7], theirs[:, 5])
    assert torch.equal(now[:, 6], own[:, 6])
    assert "2 share a name and keep their outputs" in report.lines()[-1]
