"""Runs on backbones of timm: frozen, killed and resumed, exported."""

import signal
from functools import partial
from pathlib import Path
from typing import Any

import faults
import onnxruntime
import pytest
import torch
from launching import train

from yolo.inference.export import PARITY, export
from yolo.models.yolov3 import decode
from yolo.runs.checkpoint import content_digest, load_checkpoint, load_weights
from yolo.runs.folder import list_checkpoints

EXACT = ("model", "ema", "optimizer", "step", "epoch", "batch", "best_score", "loss_sums")
FLAGS = ("--backbone-weights", "none", "--freeze-backbone", "1", "--backbone-lr-factor", "0.5")


def _newest(run: Path) -> dict[str, Any]:
    return load_checkpoint(list_checkpoints(run / "checkpoints")[-1])


def _digest(content: dict[str, Any]) -> str:
    return content_digest({key: content[key] for key in EXACT})


def _backbone(content: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in content["model"].items() if name.startswith("backbone.")}


@pytest.fixture(scope="module", params=["mobilenetv3_small_050", "regnetx_002"])
def run(
    request: pytest.FixtureRequest, tiny_config: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of two epochs of six steps; it was killed in either, and resumed."""
    run = tmp_path_factory.mktemp("timm") / "run"
    log = run.with_suffix(".log")
    flags = ["--config", str(tiny_config), "--backbone", f"timm/{request.param}", *FLAGS]
    assert train([*flags, "--out-dir", str(run.with_name("whole"))], log) == 0, log.read_text()
    for step in (4, 8):
        kill = partial(faults.kill_after_step, step)
        resume = ["--resume", "auto", "--out-dir", str(run)]
        assert train([*flags, *resume], log, hook=kill) == -signal.SIGKILL, log.read_text()
    assert train([*flags, *resume], log) == 0, log.read_text()
    assert f"YoloV3 on timm/{request.param}" in log.read_text()
    return run


def test_a_killed_run_ends_bit_identically(run: Path) -> None:
    assert _digest(_newest(run)) == _digest(_newest(run.with_name("whole")))


def test_a_frozen_backbone_stays_as_it_is_statistics_included_and_then_learns(run: Path) -> None:
    first, frozen, free = (
        next(
            load_checkpoint(path)
            for path in list_checkpoints(run / "checkpoints")
            if f"step{step:06}" in path.name
        )
        for step in (3, 6, 9)
    )
    assert content_digest(_backbone(first)) == content_digest(_backbone(frozen))
    assert not torch.equal(first["model"]["heads.0.1.weight"], frozen["model"]["heads.0.1.weight"])
    changed = [
        name
        for name, value in _backbone(free).items()
        if not torch.equal(value, frozen["model"][name])
    ]
    assert set(changed) == set(_backbone(free))


@pytest.mark.slow
def test_it_exports_with_parity_at_any_size(run: Path, tmp_path: Path) -> None:
    loaded = load_weights(list_checkpoints(run / "checkpoints")[-1])
    export(loaded, tmp_path / "model.safetensors")
    again = load_weights(tmp_path / "model.safetensors")
    assert again.config.backbone == loaded.config.backbone
    export(again, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(
        tmp_path / "model.onnx", providers=["CPUExecutionProvider"]
    )
    images = torch.rand(2, 3, 96, 64)
    boxes, scores = (
        torch.from_numpy(output) for output in session.run(None, {"images": images.numpy()})
    )
    assert again.anchors is not None
    with torch.inference_mode():
        wanted, objectness, class_probs = decode(again.model(images), again.anchors)
    assert (boxes - wanted).abs().max() / 96 < PARITY
    assert (scores - objectness[..., None] * class_probs).abs().max() < PARITY
