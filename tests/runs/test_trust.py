"""What a weight file or checkpoint from elsewhere may decide, and that damage to it is seen."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import compress
from lively import lively_detector
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import app
import evaluate
import gradcam
from yolo.app.models import load_models
from yolo.app.space import find_samples
from yolo.config import Config
from yolo.data.classifier_images import CIFAR10_CLASSES
from yolo.errors import UserError
from yolo.files import bundled
from yolo.models.resnet import ResNet
from yolo.runs.checkpoint import (
    bundled_weights,
    content_digest,
    load_checkpoint,
    load_weights,
    read_safetensors,
    save_checkpoint,
    save_weights,
)
from yolo.runs.folder import RunFolder

Parts = tuple[dict[str, Tensor], dict[str, str]]
CPU = ["--accelerator", "cpu", "--workers", "0"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """Tensors and metadata of a small classifier's weight file."""
    path = tmp_path_factory.mktemp("classifier") / "w.safetensors"
    config = Config(task="classification", dataset="cifar10", width=0.0625, img_sizes=(32,))
    torch.manual_seed(0)
    save_weights(path, ResNet(10, 0.0625), config, CIFAR10_CLASSES, None, {"accuracy": 0.5})
    return read_safetensors(path)


def write(path: Path, parts: Parts, **changes: Any) -> Path:
    """Write a file as its author could: with a digest that is right."""
    tensors, metadata = parts
    metadata = metadata | {key: json.dumps(value) for key, value in changes.items()}
    digest = content_digest({"metadata": metadata, "tensors": tensors})
    save_file(tensors, path, metadata | {"digest": digest})
    return path


def config_of(parts: Parts, **changes: Any) -> dict[str, Any]:
    return json.loads(parts[1]["config"]) | changes


@pytest.mark.parametrize("kind", ["weights", "checkpoint"])
def test_a_flipped_bit_anywhere_is_seen_or_without_effect(
    tmp_path: Path, parts: Parts, kind: str
) -> None:
    if kind == "weights":
        path, read = write(tmp_path / "w.safetensors", parts), read_safetensors
    else:
        path, read = tmp_path / "a.ckpt", load_checkpoint
        save_checkpoint(path, {"model": {"w": torch.rand(20)}, "step": 3, "lr": 0.1})
    whole, rng = path.read_bytes(), random.Random(0)
    before = content_digest({"read": read(path)})
    header = len(whole) - sum(value.nbytes for value in parts[0].values())
    places = [rng.randrange(len(whole)) for _ in range(100)]
    places += [rng.randrange(header if kind == "weights" else len(whole)) for _ in range(100)]
    for place in places:
        content = bytearray(whole)
        content[place] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        try:
            assert content_digest({"read": read(path)}) == before, place
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)


def test_a_cut_weight_file_is_one_clear_line(tmp_path: Path, parts: Parts) -> None:
    path = write(tmp_path / "w.safetensors", parts)
    whole = path.read_bytes()
    for size in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="damaged or no safetensors"):
            load_weights(path)


@pytest.mark.parametrize("lost", ["digest", "format_version"])
def test_a_file_whose_version_demands_a_digest_is_refused_without(
    tmp_path: Path, parts: Parts, lost: str
) -> None:
    path = write(tmp_path / "w.safetensors", parts)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    del metadata[lost]
    save_file(parts[0], path, metadata)
    with pytest.raises(UserError, match="damaged"):
        load_weights(path)
    save_file(parts[0], path, metadata | {"format_version": "3"})
    with pytest.raises(UserError, match=r"weight format 3; this one reads 1 and 2"):
        load_weights(path)


def test_an_older_file_loads_with_a_notice_and_a_bundled_one_without(
    tmp_path: Path, parts: Parts, capsys: pytest.CaptureFixture
) -> None:
    tensors, metadata = parts
    save_file(tensors, tmp_path / "old.safetensors", metadata | {"format_version": "1"})
    assert load_weights(tmp_path / "old.safetensors").class_names == CIFAR10_CLASSES
    notice = capsys.readouterr().err
    assert "notice:" in notice and "old.safetensors" in notice and notice.count("\n") == 1
    for path in bundled_weights().values():
        read_safetensors(path)
    assert capsys.readouterr() == ("", "")


PLACES = {
    "data_root": "/home/victim/private",
    "split": "../../secret",
    "classes": "/etc/passwd",
    "download": True,
    "backbone_weights": "/home/victim/x.pt",
    "init_weights": "/home/victim/x.pt",
    "workers": 4096,
    "num_nodes": 64,
    "compile": True,
    "accelerator": "cuda",
    "cache": "ram",
    "skip_bad": True,
}


def test_a_weight_file_names_no_place_and_gives_no_orders(tmp_path: Path, parts: Parts) -> None:
    loaded = load_weights(
        write(tmp_path / "w.safetensors", parts, config=config_of(parts, **PLACES))
    )
    plain = Config()
    assert {name: getattr(loaded.config, name) for name in PLACES} == {
        name: getattr(plain, name) for name in PLACES
    }
    assert (loaded.config.width, loaded.config.dataset) == (0.0625, "cifar10")


def test_what_is_saved_names_no_place(tmp_path: Path, parts: Parts) -> None:
    config = Config(task="classification", width=0.0625, **PLACES)
    results = {"data": f"CIFAR-10 in {PLACES['data_root']}"}
    path = tmp_path / "w.safetensors"
    save_weights(path, ResNet(2, 0.0625), config, ("a", "b"), None, results)
    stored = read_safetensors(path)[1]
    assert not PLACES.keys() & json.loads(stored["config"]).keys()
    assert b"victim" not in path.read_bytes() and json.loads(stored["results"]) == {
        "data": "CIFAR-10 in private"
    }


def test_a_checkpoint_takes_places_from_its_own_run_alone(tmp_path: Path, parts: Parts) -> None:
    content = {
        "model": {},
        "ema": parts[0],
        "config": config_of(parts, **PLACES),
        "classes": list(CIFAR10_CLASSES),
        "anchors": None,
        "step": 1,
    }
    run = RunFolder(tmp_path / "run")
    inside, outside = run.checkpoints / "a.ckpt", tmp_path / "a.ckpt"
    for path in (inside, outside):
        save_checkpoint(path, content)
    run.write_config(Config(task="classification", data_root="mine", split="2007:test", workers=1))
    for path, found in ((inside, ("mine", "2007:test", 1)), (outside, (None, "test", "auto"))):
        loaded = load_weights(path)
        assert (loaded.config.data_root, loaded.config.split, loaded.config.workers) == found
        assert (loaded.run is None) == (path == outside)
        assert loaded.config.width == 0.0625, "the network is the file's"


def test_an_edited_configuration_beside_a_checkpoint_names_no_data(
    tmp_path: Path, parts: Parts
) -> None:
    run = RunFolder(tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    path = write(run.checkpoints / "w.safetensors", parts)
    run.write_config(Config(task="classification", data_root="mine"))
    run.config.write_text(run.config.read_text().replace("mine", "nine"))
    with pytest.raises(UserError, match=r"config\.yaml was changed after it was written.*--replan"):
        load_weights(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("width", 1e9, "width is 1e.09; at most 8"),
        ("width", float("inf"), "width inf: must be positive and finite"),
        ("width", float("nan"), "must be positive"),
        ("width", "wide", "could not convert"),
        ("width", 4.0, "does not fit its own configuration"),
        ("test_size", 32_000_000, "32000000 pixels wide; at most 4096"),
        ("img_sizes", [32_000_000], "pixels wide"),
        ("img_sizes", [33], "multiples of 32"),
        ("img_sizes", {"a": 1}, "does not describe"),
        ("max_detections", -1, "must be positive"),
        ("task", "detection", "anchors contradict"),
        ("task", ["detection"], "does not describe"),
        ("train_split", "\x1b[31m", "no short text"),
        ("train_split", "a" * 301, "no short text"),
    ],
)
def test_numbers_and_text_of_a_file_are_bounded_before_anything_is_allocated(
    tmp_path: Path, parts: Parts, key: str, value: Any, message: str
) -> None:
    path = write(tmp_path / "w.safetensors", parts, config=config_of(parts, **{key: value}))
    with pytest.raises(UserError, match=message) as caught:
        load_weights(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("classes", []),
        ("classes", 10),
        ("classes", list(range(10))),
        ("classes", ["a\nb", *CIFAR10_CLASSES[1:]]),
        ("classes", ["\x1b[2J", *CIFAR10_CLASSES[1:]]),
        ("classes", ["frog", *CIFAR10_CLASSES[1:]]),
        ("classes", [str(number) for number in range(20_000)]),
        ("anchors", [[1]]),
        ("calibration", {"factors": [[1]]}),
        ("calibration", [1]),
        ("config", [1]),
        ("config", {}),
        ("results", [1]),
    ],
)
def test_a_description_of_another_shape_is_one_clear_line(
    tmp_path: Path, parts: Parts, key: str, value: Any
) -> None:
    path = write(tmp_path / "w.safetensors", parts, **{key: value})
    with pytest.raises(UserError) as caught:
        load_weights(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_compressed_checkpoint_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.ckpt", {"model": {"w": torch.zeros(1_000_000)}})
    compress(tmp_path / "a.ckpt", tmp_path / "bomb.ckpt")
    with pytest.raises(UserError, match="it is compressed"):
        load_checkpoint(tmp_path / "bomb.ckpt")


def test_a_tensor_that_pretends_to_be_huge_is_refused(tmp_path: Path) -> None:
    huge = torch.zeros(1).expand(1 << 45)
    torch.save({"format_version": 1, "model": {"w": huge}, "digest": ""}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(tmp_path / "a.ckpt")


def in_evaluate(path: Path, *flags: str) -> None:
    evaluate.main(["--checkpoint", str(path), "--out-dir", "out", *CPU, *flags])


def in_gradcam(path: Path, *flags: str) -> None:
    gradcam.main(["--checkpoint", str(path), "--evaluate", "--accelerator", "cpu", *flags])


@pytest.mark.parametrize("use", [in_evaluate, in_gradcam])
@pytest.mark.parametrize("root", ["private", None])
def test_no_script_opens_data_that_a_weight_file_names(
    tmp_path: Path,
    parts: Parts,
    monkeypatch: pytest.MonkeyPatch,
    use: Callable[..., None],
    root: str | None,
) -> None:
    """Neither the folder in the file, nor `data/images`, which lies there by chance."""
    for folder in ("private", "data/images"):
        for name in ("a", "b"):
            place = tmp_path / folder / "test" / name
            place.mkdir(parents=True)
            (place / "1.png").symlink_to(next(bundled("samples").rglob("*.png")))
    monkeypatch.chdir(tmp_path)
    settings = {"dataset": "images", "data_root": root, "split": "test"}
    path = write(Path("w.safetensors"), parts, config=config_of(parts, **settings))
    before = set(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="give --data-root"):
        use(path)
    assert set(tmp_path.rglob("*")) == before


def test_a_space_holds_no_picture_of_a_folder_that_a_weight_file_names(
    tmp_path: Path, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "private/test/a"
    place.mkdir(parents=True)
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(picture).save(place / "1.png")
    monkeypatch.chdir(tmp_path)
    settings = {"dataset": "images", "data_root": "private", "split": "test"}
    write(Path("w.safetensors"), parts, config=config_of(parts, **settings))
    app.main(["--checkpoint", "w.safetensors", "--build-space", "space"])
    assert (tmp_path / "space/app.py").exists()
    pictures = [p for p in (tmp_path / "space").rglob("*") if p.suffix in (".png", ".jpg")]
    ours = {path.read_bytes() for path in bundled("samples").rglob("*") if path.is_file()}
    assert {path.read_bytes() for path in pictures} <= ours


def test_the_app_shows_no_samples_of_a_strange_file(
    tmp_path: Path, parts: Parts, capsys: pytest.CaptureFixture
) -> None:
    config = config_of(parts, dataset="images", data_root=str(tmp_path))
    path = write(tmp_path / "w.safetensors", parts, config=config)
    [model] = load_models([str(path)], None).values()
    assert find_samples(tmp_path / "made", model, 12, {}, None) is None
    assert "no samples" in capsys.readouterr().out and not (tmp_path / "made").exists()


def test_half_precision_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    loaded = lively_detector(width=0.0625)
    save = replace(loaded).model.state_dict()
    name = next(name for name in save if name.endswith("running_var"))
    for value in (7e4, float("nan")):
        save[name][0] = value
        with pytest.raises(UserError, match=rf"{name} holds values.*half precision ends at 65504"):
            save_weights(
                tmp_path / "w.safetensors", loaded.model, loaded.config, loaded.class_names,
                loaded.anchors, {},
            )  # fmt: skip
    assert not list(tmp_path.iterdir())
