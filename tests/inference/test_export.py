"""ONNX and safetensors files, and the fast forms of a network, against the network itself."""

import copy
import json
import os
from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from yolo.config import COCO_ANCHORS, Config
from yolo.errors import UsageError, UserError
from yolo.inference import export as exporting
from yolo.inference.export import PARITY, export
from yolo.inference.fast import fast_dtype, fuse, make_fast, prepare, require_compiler
from yolo.models.darknet import Darknet53
from yolo.models.resnet import ResNet
from yolo.models.yolov3 import YoloV3, decode, make_anchors, to_detections
from yolo.runs.checkpoint import LoadedWeights, load_weights

CLASSES = ("a", "b", "c")


def _trained(network: nn.Module) -> nn.Module:
    """Give batch normalisation something to do."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value, low in ((module.weight, 0.5), (module.running_var, 1.0)):
                value.data.copy_(low + torch.rand(value.shape, generator=generator))
            for value in (module.bias, module.running_mean):
                value.data.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    return network.eval()


@pytest.fixture(scope="module")
def detector() -> LoadedWeights:
    torch.manual_seed(0)
    config = Config(width=0.03125, img_sizes=(64,))
    # one block a stage, as the exporter's time grows with depth
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Darknet53, "STAGES", tuple((channels, 1) for channels, _ in Darknet53.STAGES))
        model, anchors = (
            _trained(YoloV3(len(CLASSES), config.width)),
            make_anchors(COCO_ANCHORS, 64),
        )
    for head in model.heads:
        head[-1].weight.data *= 100  # scores that differ: constant ones would prove nothing
    return LoadedWeights(model, config, CLASSES, anchors, {"map_50": 0.5}, "digest", Path())


@pytest.fixture(scope="module")
def classifier() -> LoadedWeights:
    torch.manual_seed(0)
    config = Config(task="classification", width=0.125, img_sizes=(32,))
    model = _trained(ResNet(len(CLASSES), config.width))
    return LoadedWeights(model, config, CLASSES, None, {}, "digest", Path())


@pytest.fixture(scope="module")
def detector_onnx(detector: LoadedWeights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "detector.onnx"
    assert "of PyTorch in onnxruntime on 5 photographs" in export(detector, path)
    return path


def _run(path: Path, images: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(output) for output in session.run(None, {"images": images.numpy()})]


@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 96, 96), (2, 64, 160)])
def test_onnx_detects_as_eager_at_any_batch_and_size(
    detector: LoadedWeights, detector_onnx: Path, shape: tuple[int, int, int]
) -> None:
    batch, height, width = shape
    images = torch.rand(batch, 3, height, width)
    boxes, scores = _run(detector_onnx, images)
    assert detector.anchors is not None
    with torch.inference_mode():
        expected_boxes, objectness, class_probs = decode(detector.model(images), detector.anchors)
    assert ((boxes - expected_boxes).abs() / max(height, width)).max() < PARITY
    assert (scores - objectness[..., None] * class_probs).abs().max() < PARITY
    assert scores.max() - scores.min() > 100 * PARITY


def test_onnx_carries_what_is_needed_to_read_its_output(
    detector: LoadedWeights, detector_onnx: Path
) -> None:
    metadata = {entry.key: entry.value for entry in onnx.load(detector_onnx).metadata_props}
    assert metadata["classes"] == '["a", "b", "c"]'
    assert (metadata["task"], metadata["test_size"]) == ("detection", "64")
    preprocessing = json.loads(metadata["preprocessing"])
    assert (preprocessing["colors"], preprocessing["size"], preprocessing["pad"]) == (
        "RGB",
        64,
        114,
    )
    assert preprocessing["resize"].startswith("letterbox") and preprocessing["interpolation"]
    thresholds = json.loads(metadata["thresholds"])
    assert thresholds["iou"] == detector.config.iou_threshold and not thresholds["applied"]
    assert json.loads(metadata["version"])["torch"] == torch.__version__
    assert not list(detector_onnx.parent.glob("*.part"))


def test_onnx_with_suppression_finds_what_the_detector_finds(
    detector: LoadedWeights, tmp_path: Path
) -> None:
    config = replace(detector.config, nms="merge", max_detections=100)
    model = copy.deepcopy(detector.model)
    for head in model.heads:  # each anchor has a class of its own
        head[-1].weight.data.view(3, 8, -1)[:, 5:] = 0
        head[-1].bias.data.view(3, -1)[:, 5:] = 50 * torch.eye(3)
    loaded = replace(detector, model=model, config=config, confidence=0.02)
    export(loaded, tmp_path / "nms.onnx", nms=True)
    images = torch.rand(1, 3, 64, 96)
    boxes, scores, labels = _run(tmp_path / "nms.onnx", images)
    with torch.inference_mode():
        [found] = to_detections(
            loaded.model(images), loaded.anchors, config, score_threshold=loaded.confidence
        )
    assert 1 < len(scores) <= 100 and len(labels.unique()) > 1
    assert torch.equal(labels, found["labels"])
    assert torch.allclose(scores, found["scores"], atol=PARITY)
    assert (boxes - found["boxes"]).abs().max() < 96 * PARITY


def test_a_classifier_has_nothing_to_suppress(classifier: LoadedWeights, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="only an ONNX detector"):
        export(classifier, tmp_path / "classifier.onnx", nms=True)


def test_onnx_classifies_as_eager(classifier: LoadedWeights, tmp_path: Path) -> None:
    export(classifier, tmp_path / "classifier.onnx")
    images = torch.rand(5, 3, 32, 32)
    (probabilities,) = _run(tmp_path / "classifier.onnx", images)
    with torch.inference_mode():
        expected = classifier.model(images).softmax(-1)
    assert (probabilities - expected).abs().max() < PARITY
    assert expected.std() > 1e-3


def test_safetensors_are_read_back_with_everything(tmp_path: Path) -> None:
    config, anchors = Config(width=0.03125, img_sizes=(64,)), make_anchors(COCO_ANCHORS, 64)
    model = YoloV3(len(CLASSES), config.width)
    loaded = LoadedWeights(model, config, CLASSES, anchors, {"map_50": 0.5}, "digest", Path())
    export(loaded, tmp_path / "small.safetensors")
    again = load_weights(tmp_path / "small.safetensors")
    assert (again.task, again.class_names, again.test_size) == ("detection", CLASSES, 64)
    assert again.results == {"map_50": 0.5} and torch.equal(again.anchors, anchors)
    for name, value in again.model.state_dict().items():
        if value.is_floating_point():
            assert torch.equal(value, model.state_dict()[name].half().float()), name
    (tmp_path / "plain").touch()
    modes = {(tmp_path / name).stat().st_mode for name in ("small.safetensors", "plain")}
    assert len(modes) == 1, "a web server or a colleague cannot read it"


def test_an_export_leaves_the_file_that_is_there(
    classifier: LoadedWeights, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("somebody's")
    assert "model-2.safetensors" in export(classifier, path)
    assert path.read_text() == "somebody's" and load_weights(tmp_path / "model-2.safetensors")
    assert "is there already: written to" in capsys.readouterr().out


def test_weights_for_others_do_not_tell_where_the_data_lay(tmp_path: Path) -> None:
    config = Config(
        width=0.03125, dataset="voc", data_root="/home/me/VOCdevkit/", init_weights="/home/me/x.pt"
    )
    results = {"map_50": 0.5, "data": "VOC 2007:test in /home/me/VOCdevkit"}
    anchors = make_anchors(COCO_ANCHORS, 416)
    model = YoloV3(len(CLASSES), config.width)
    export(
        LoadedWeights(model, config, CLASSES, anchors, results, "", Path()),
        tmp_path / "w.safetensors",
    )
    assert b"/home/me" not in (tmp_path / "w.safetensors").read_bytes()
    again = load_weights(tmp_path / "w.safetensors")
    assert again.results == {"map_50": 0.5, "data": "VOC 2007:test in VOCdevkit"}
    assert again.config.dataset == "voc"


def test_a_difference_from_eager_leaves_no_file(
    classifier: LoadedWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "PARITY", -1.0)
    with pytest.raises(UserError, match="differs from this network"):
        export(classifier, tmp_path / "classifier.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".onnx", ".safetensors"])
def test_a_path_that_cannot_be_written_is_one_clear_line(
    classifier: LoadedWeights, tmp_path: Path, suffix: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        export(classifier, tmp_path / "file" / f"model{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        export(classifier, tmp_path / f"folder{suffix}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", f"folder{suffix}"]


def test_other_formats_are_refused(classifier: LoadedWeights, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"ends in \.onnx or \.safetensors"):
        export(classifier, tmp_path / "model.pb")


@pytest.mark.parametrize("network", ["detector", "classifier"])
def test_fusing_changes_no_output_and_leaves_the_network_alone(
    network: str, request: pytest.FixtureRequest
) -> None:
    loaded = request.getfixturevalue(network)
    images = torch.rand(2, 3, loaded.test_size, loaded.test_size)
    with torch.inference_mode():
        before = loaded.model(images)
        fused = fuse(loaded.model)
        torch.testing.assert_close(fused(images), before, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(loaded.model(images), before, rtol=0, atol=0)
    count = sum(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    # max-pooling keeps three apart from their kernels
    assert count == {"detector": 0, "classifier": 3}[network]


def test_the_fast_form_takes_bytes_and_gives_float32(detector: LoadedWeights) -> None:
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        expected = detector.model(images)
        exact = make_fast(detector.model, torch.float32)(images)
        rounded = make_fast(detector.model, torch.bfloat16)(images)
    torch.testing.assert_close(exact, expected, rtol=1e-4, atol=1e-4)
    assert all(output.dtype == torch.float32 for output in rounded)
    for output, reference in zip(rounded, expected, strict=True):
        assert (output - reference).abs().mean() < 0.03 * reference.abs().mean()
    assert fast_dtype(torch.device("cuda")) == torch.float16


def test_compiling_without_a_compiler_is_refused(
    detector: LoadedWeights, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setitem(os.environ, "PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler \(g\+\+ or clang\+\+"):
        prepare(detector.model, torch.device("cpu"), compiled=True)


@pytest.mark.slow
def test_the_compiled_form_equals_eager(classifier: LoadedWeights) -> None:
    require_compiler()
    images = torch.rand(4, 3, 32, 32)
    with torch.inference_mode():
        compiled = prepare(classifier.model, torch.device("cpu"), compiled=True)(images)
        torch.testing.assert_close(compiled, classifier.model(images), rtol=1e-4, atol=1e-4)
