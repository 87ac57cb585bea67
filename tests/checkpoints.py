"""What a checkpoint holds, in small."""

import zipfile
from pathlib import Path
from typing import Any

import torch

from yolo.config import ResolvedConfig


def whole_content(step: int, value: float = 0.0, size: int = 3) -> dict[str, Any]:
    """Return all that a run goes on from, of a network of one tensor."""
    weights = {"weight": torch.full((size,), value)}
    moments = {"step": torch.tensor(1.0), "exp_avg": weights["weight"]}
    return {
        "model": dict(weights),
        "ema": dict(weights),
        "optimizer": {"state": {0: {**moments, "exp_avg_sq": weights["weight"]}}},
        "scaler": None,
        "loss_sums": [{"box": 0.5}],
        "logged_scale": 1.0,
        "step": step,
        "epoch": step // 10,
        "batch": 0,
        "evaluation_due": False,
        "best_score": -1.0,
        "config": ResolvedConfig().to_dict(),
        "classes": ["cup"],
        "anchors": None,
        "rng": {"torch": torch.get_rng_state()},
        "threads": 1,
        "schedule_digest": "0",
        "lr": 1e-3,
    }


def compress(source: Path, target: Path) -> None:
    """Write a torch file again with what torch never uses: few bytes may stand for all memory."""
    with (
        zipfile.ZipFile(source) as stored,
        zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
