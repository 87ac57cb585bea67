"""A run goes on from what training writes alone: a digest is no proof of who wrote a file."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import whole_content
from torch import Tensor, nn

from yolo.errors import UserError
from yolo.runs.checkpoint import find_newest, load_resumable, save_checkpoint
from yolo.runs.resumable import check_content, check_fits

TWO = torch.ones(2)
SCALER = {
    "scale": 2.0,
    "growth_factor": 2.0,
    "backoff_factor": 0.5,
    "growth_interval": 9,
    "_growth_tracker": 0,
}
WRONG: list[tuple[str, Any]] = [
    ("model", 5),
    ("model", {0: TWO}),
    ("model", {"weight": 5}),
    ("ema", None),
    ("optimizer", {}),
    ("optimizer", {"state": {"a": {}}}),
    ("optimizer", {"state": {0: {"exp_avg": TWO}}}),
    ("scaler", {}),
    ("scaler", {**SCALER, "scale": TWO}),
    ("loss_sums", []),
    ("loss_sums", [{"box": TWO}]),
    ("loss_sums", [{"box": 1.0}, {}]),
    ("logged_scale", "1"),
    ("step", TWO),
    ("step", -1),
    ("step", True),
    ("epoch", "3"),
    ("batch", 1.5),
    ("evaluation_due", TWO),
    ("best_score", TWO),
    ("config", 5),
    ("config", {"width": TWO}),
    ("config", {"width": "wide"}),
    ("config", {"width": [1]}),
    ("config", {"batch_size": TWO}),
    ("config", {"batch_size": "auto"}),
    ("config", {"img_sizes": [TWO]}),
    ("config", {0: 5}),
    ("classes", 5),
    ("classes", [1, 2]),
    ("anchors", 5),
    ("rng", {}),
    ("rng", {"torch": TWO}),
    ("rng", TWO),
    ("threads", TWO),
    ("schedule_digest", 5),
    ("best", TWO),
    ("confidence", TWO),
]


def test_what_training_writes_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    save_checkpoint(path, {**whole_content(7), "best": None, "confidence": 0.5, "scaler": SCALER})
    assert load_resumable(path)["step"] == 7


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_a_value_of_another_type_is_named(tmp_path: Path, key: str, value: Any) -> None:
    path = tmp_path / "a.ckpt"
    save_checkpoint(path, {**whole_content(7), key: value})
    with pytest.raises(UserError) as caught:
        load_resumable(path)
    fault = f"{key} is not as training writes it"
    assert str(caught.value) == f"{path}: is damaged or not ours ({fault}); take an earlier one"


@pytest.mark.parametrize("key", sorted(whole_content(7).keys() - {"lr"}))
def test_a_value_that_is_missing_is_named(key: str) -> None:
    content = whole_content(7)
    del content[key]
    with pytest.raises(UserError, match=rf"a\.ckpt: .*\({key} is missing\)"):
        check_content(Path("a.ckpt"), content)


def test_the_one_before_is_taken_in_place_of_a_stranger(tmp_path: Path) -> None:
    for step, threads in ((1, 1), (2, TWO)):
        path = tmp_path / f"epoch000-step{step:06d}-lr1.000e-03.ckpt"
        save_checkpoint(path, {**whole_content(step), "threads": threads})
    warnings: list[str] = []
    newest = find_newest(tmp_path, warnings.append)
    assert newest and newest.content["step"] == 1
    assert len(warnings) == 1 and "threads is not as" in warnings[0]


def moments(weight: Tensor, position: int = 0) -> dict[str, Any]:
    return {"state": {position: {"step": TWO[0], "exp_avg": weight, "exp_avg_sq": weight}}}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", {}),
        ("model", {"weight": torch.ones(4)}),
        ("ema", {"weight": torch.ones(1, 3), "more": TWO}),
        ("ema", {"weight": torch.ones(1, 3, dtype=torch.int64)}),
        ("optimizer", moments(TWO)),
        ("optimizer", moments(torch.ones(1, 3), position=1)),
    ],
)
def test_tensors_of_another_network_are_refused_before_any_is_copied(key: str, value: Any) -> None:
    network = nn.Linear(3, 1, bias=False)
    state = SimpleNamespace(network=network, optimizer=torch.optim.Adam(network.parameters()))
    weights = {"weight": torch.ones(1, 3)}
    content = {"model": weights, "ema": weights, "optimizer": moments(weights["weight"])}
    check_fits(Path("a.ckpt"), content, state)
    with pytest.raises(UserError, match=f"{key} holds other tensors than this network"):
        check_fits(Path("a.ckpt"), {**content, key: value}, state)
