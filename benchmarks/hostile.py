"""Strangers' weight files that name folders of this machine: what is looked at, shown, written."""

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import mutations as m
import torch
from safetensors.torch import save_file

from yolo.app.models import load_models
from yolo.app.space import find_samples
from yolo.config import ResolvedConfig
from yolo.errors import UserError
from yolo.models.yolov3 import YoloV3
from yolo.runs.checkpoint import (
    content_digest,
    load_checkpoint,
    read_safetensors,
    save_checkpoint,
    save_weights,
)

looked_at: list[str] = []
private = Path()


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Note every file that is opened and every folder that is listed in the private one."""
    if event in ("open", "os.listdir", "os.scandir") and private != Path():
        name = arguments[0]
        if isinstance(name, str | bytes | os.PathLike) and os.fsdecode(name).startswith(
            f"{private}/"
        ):
            looked_at.append(os.fsdecode(name))


def run(files: int, seed: int) -> Iterator[str]:
    """Yield what became of weight files that want to see a private folder."""
    global private
    import evaluate

    sys.addaudithook(_watch)
    refused = shown = written = 0
    before = Path.cwd()
    with TemporaryDirectory() as scratch:
        secret, work = Path(scratch) / "private", Path(scratch) / "work"
        work.mkdir()
        _write_private(secret)
        os.chdir(work)
        private = secret
        for number in range(files):
            path = _hostile(work / f"{number}", Random(f"{seed} {number}"), secret)
            words = ["--checkpoint", str(path), "--accelerator", "cpu", "--workers", "0"]
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                try:
                    models = load_models([str(path)], None)
                    for task, model in models.items():
                        shown += (
                            find_samples(work / f"made{number}" / task, model, 4, {}, None)
                            is not None
                        )
                    evaluate.main(words)
                except UserError:
                    refused += 1
        private = Path()
        written = sum(path.is_file() for path in secret.rglob("*")) - len(FILES)
        os.chdir(before)
    yield (
        "| weight files that name a private folder | refused | samples shown | files opened | "
        "written |"
    )
    yield "|---|---|---|---|---|"
    yield f"| {files} | {refused} | {shown} | {len(looked_at)} | {written} |"


FILES = (
    "Annotations/a.xml", "JPEGImages/a.jpg", "ImageSets/Main/test.txt", "ImageSets/Main/train.txt",
    "images/test/a.jpg", "labels/test/a.txt", "data.yaml", "test/cat/a.png",
)  # fmt: skip


def _write_private(root: Path) -> None:
    """Write a folder that several layouts can read."""
    for name in FILES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith((".jpg", ".png")):
            m.noise_picture(1).save(root / name)
        else:
            (root / name).write_text("a\n")
    (root / "labels/test/a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (root / "data.yaml").write_text("names: [cat, dog]\n")
    (root / "Annotations/a.xml").write_text(
        "<annotation><size><width>96</width><height>96</height></size><object><name>cat</name>"
        "<bndbox><xmin>9</xmin><ymin>9</ymin><xmax>50</xmax><ymax>50</ymax></bndbox></object>"
        "</annotation>"
    )


def _hostile(path: Path, rng: Random, secret: Path) -> Path:
    """Write a whole and working weight file or checkpoint whose settings point into the folder."""
    config = ResolvedConfig(width=0.05, img_sizes=(64,))
    names, anchors = ("cat", "dog"), torch.arange(1.0, 19).reshape(3, 3, 2)
    wishes = {
        "dataset": rng.choice(("voc", "yolo", "csv", "coco", "images", "cifar10", "digits")),
        "data_root": str(
            rng.choice((secret, secret / "images", "../private", f"{secret}/../private"))
        ),
        "split": rng.choice(("test", "train", "../test", "2007:test", ".")),
        "val_split": "test",
        "train_split": "train",
        "download": rng.random() < 0.2,
        "init_weights": str(secret / "data.yaml"),
        "backbone_weights": str(secret / "data.yaml"),
        "cache": "ram",
    }  # fmt: skip
    network = YoloV3(2, 0.05)
    if rng.random() < 0.3:
        state = network.state_dict()
        content = {
            "model": state, "ema": state, "config": {**config.to_dict(), **wishes},
            "classes": list(names), "anchors": anchors, "step": 1,
        }  # fmt: skip
        target = (
            path / "checkpoints" / "epoch000-step000001-lr1.000e-03.ckpt"
            if rng.random() < 0.5
            else path / "x.ckpt"
        )
        save_checkpoint(target, content)
        assert load_checkpoint(target)
        return target
    target = path / "x.safetensors"
    save_weights(
        target, network, config, names, anchors, {"checkpoint": str(secret), "data": str(secret)}
    )
    tensors, metadata = read_safetensors(target)
    metadata["config"] = json.dumps({**json.loads(metadata["config"]), **wishes})
    if rng.random() < 0.5:
        metadata["format_version"] = "1"  # of the time before digests
        save_file(tensors, target, metadata)
    else:
        digest = content_digest({"metadata": metadata, "tensors": tensors})
        save_file(tensors, target, metadata | {"digest": digest})
    return target
