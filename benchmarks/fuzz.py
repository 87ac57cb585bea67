"""Every reader on mutated inputs, in one process: what cannot be read has to be one line."""

import faulthandler
import io
import json
import os
import resource
import signal
import struct
import sys
import tarfile
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import mutations as m
import torch

from yolo import cli
from yolo.app.uploads import read_picture
from yolo.config import Config, ResolvedConfig
from yolo.data import classifier_images
from yolo.data.coco import read_coco
from yolo.data.dataset import DetectionDataset, drop_unreadable
from yolo.data.images import letterboxed
from yolo.data.layouts import recognise
from yolo.data.voc import read_voc
from yolo.data.yolo import read_csv_layout, read_yolo_folder
from yolo.errors import UserError
from yolo.metrics.devkit import read_detections
from yolo.models.darknet_weights import write_darknet
from yolo.models.yolov3 import YoloV3
from yolo.runs.checkpoint import (
    FORMAT_VERSION,
    content_digest,
    load_weights,
    resolve_checkpoint,
    save_checkpoint,
    save_weights,
)
from yolo.runs.folder import RunFolder
from yolo.runs.logbook import Logbook
from yolo.runs.pretrained import init_weights
from yolo.schedule import plan_schedule, read_schedule, write_schedule

SECONDS = 10  # of a processor that one input may take
MEMORY = 4 << 30  # bytes that all may take beyond what the process has
WIDTH = 0.05


class Hang(BaseException):
    """An input took too long."""


@dataclass(frozen=True)
class Reader:
    """What is read, which file of it is damaged, and how."""

    name: str
    file: str
    structure: m.Mutate
    read: Callable[[Path, bool], Any]  # folder, whether to skip what is bad
    skips: bool = False  # with --skip-bad one bad file of several stops nothing


@dataclass
class Outcome:
    """What became of a reader's inputs."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: dict[str, str] = field(default_factory=dict)  # by place, the first input


def run(inputs: int, seed: int, only: str = "", kept: Path | None = None) -> Iterator[str]:
    """Yield the table; `kept` is where the first input of each fault goes."""
    yield "| reader | inputs | read | refused in one line | tracebacks | hangs |"
    yield "|---|---|---|---|---|---|"
    total: Counter[str] = Counter()
    faults: list[str] = []
    with TemporaryDirectory() as scratch, _limits():
        folder = Path(scratch)
        _write_inputs(folder)
        for reader in _readers(folder):
            if only not in reader.name:
                continue
            outcome = _try(reader, folder, inputs, seed, kept)
            total += outcome.counts
            faults += [f"{reader.name}: {what}" for what in outcome.faults.values()]
            yield _row(reader.name, outcome.counts)
    yield _row("all", total)
    yield from faults


def _row(name: str, counts: Counter[str]) -> str:
    kinds = ("read", "refused", "traceback", "hang")
    return (
        f"| {name} | {counts.total()} | " + " | ".join(str(counts[kind]) for kind in kinds) + " |"
    )


def _try(reader: Reader, folder: Path, inputs: int, seed: int, kept: Path | None) -> Outcome:
    path, outcome = folder / reader.file, Outcome()
    whole = path.read_bytes()
    for number in range(inputs):
        rng = Random(f"{seed} {reader.name} {number}")
        path.write_bytes((m.mutate_bytes, reader.structure)[number % 2](rng, whole))
        kind, why = _outcome(reader, folder, skip_bad=number % 4 > 1)
        outcome.counts[kind] += 1
        if why and why not in outcome.faults:
            outcome.faults[why] = f"input {number}: {why}"
            if kept:
                (kept / f"{reader.name.replace(' ', '_')}-{number}{path.suffix}").write_bytes(
                    path.read_bytes()
                )
    path.write_bytes(whole)
    return outcome


def _outcome(reader: Reader, folder: Path, skip_bad: bool) -> tuple[str, str | None]:
    """Return what happened, and where if it should not have."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 6 * SECONDS)  # for what waits without computing
    faulthandler.dump_traceback_later(12 * SECONDS, exit=True)  # where no signal gets through
    try:
        with redirect_stdout(io.StringIO()):
            reader.read(folder, skip_bad)
        return "read", None
    except UserError as error:
        text = str(error)
        if len(text) > 2000 or not text.isprintable():
            return (
                "traceback",
                f"an error of {len(text)} characters, or of several lines: {text[:200]!r}",
            )
        if skip_bad and reader.skips:
            return "traceback", f"--skip-bad did not pass it over: {text[:300]}"
        return "refused", None
    except SystemExit as error:
        return ("refused", None) if error.code == 2 else ("traceback", f"SystemExit {error.code}")
    except Hang:
        return "hang", f"more than {SECONDS} s at {_place()}"
    except BaseException as error:
        return "traceback", f"{type(error).__name__} at {_place()}: {str(error)[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()


def _place() -> str:
    frames = traceback.extract_tb(sys.exc_info()[2])
    ours = [frame for frame in frames if "/yolo/" in frame.filename]
    return " > ".join(f"{Path(f.filename).name}:{f.lineno}" for f in (*ours[-2:], frames[-1]))


@contextmanager
def _limits() -> Iterator[None]:
    """Bound time and memory; C libraries' own lines about damaged pictures go nowhere."""

    def interrupt(*_: Any) -> None:
        raise Hang

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    terminal = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, interrupt)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(terminal, 2)
        resource.setrlimit(resource.RLIMIT_AS, before)


def _write_inputs(folder: Path) -> None:
    """Write a small input of each kind that `_readers` names."""
    boxes = "1 0.5 0.5 0.25 0.25\n0 0.25 0.25 0.1 0.2\n"
    _write_voc(folder / "voc")
    for root in ("yolo", "named", "list", "pictures"):
        _write_yolo(folder / root, boxes)
    (folder / "named" / "data.yaml").rename(folder / "named" / "classes.txt")
    (folder / "named" / "classes.txt").write_text("cat\ndog\n")
    (folder / "list" / "images/train").rename(folder / "list" / "elsewhere")
    (folder / "list" / "train.txt").write_text("".join(f"data/elsewhere/{n}.jpg\n" for n in "abc"))
    for n in "abc":
        (folder / "list" / "elsewhere" / f"{n}.txt").write_text(boxes)
    _write_yolo(folder / "csv", boxes)
    for kind in ("images", "labels"):
        for path in (folder / "csv" / kind / "train").iterdir():
            path.rename(folder / "csv" / kind / path.name)
    (folder / "csv" / "train.csv").write_text(
        "image,label\n" + "".join(f"{n}.jpg,{n}.txt\n" for n in "abc")
    )
    for kind in ("jpg", "png", "bmp", "webp", "tiff"):
        m.noise_picture(0).save(
            folder / f"picture.{kind}", **({"compression": "tiff_lzw"} if kind == "tiff" else {})
        )
    _write_coco(folder / "coco")
    _write_archives(folder)
    (folder / "cifar").mkdir()
    (folder / "cifar" / "test_batch.bin").write_bytes(
        bytes(classifier_images.RECORD_BYTES * classifier_images.IMAGES_PER_BATCH_FILE)
    )
    (folder / "config.yaml").write_text(Path("configs/voc.yaml").read_text())
    _write_weights(folder)
    (folder / "metrics").mkdir()
    (folder / "metrics" / "metrics.jsonl").write_text(
        "".join(
            f'{{"kind": "{kind}", "step": {step}, "loss": 0.5}}\n'
            for step in range(5)
            for kind in ("train", "evaluation")
        )
    )
    detections = folder / "detections"
    detections.mkdir()
    (detections / "comp4_det_train_cat.txt").write_text("a 0.9 1 1 50 50\nb 0.25 3.5 4 9 9\n")


def _readers(folder: Path) -> list[Reader]:
    """Return what reads each input of `_write_inputs`, and how it is damaged."""
    images = read_voc(folder / "voc", "train", None)
    return [
        Reader("VOC XML", "voc/Annotations/b.xml", m.mutate_xml, _voc, True),
        Reader("VOC split list", "voc/ImageSets/Main/train.txt", m.mutate_text, _voc),
        Reader("YOLO labels", "yolo/labels/train/b.txt", m.mutate_text, _yolo("yolo"), True),
        Reader("data.yaml", "yolo/data.yaml", m.mutate_yaml, _yolo("yolo")),
        Reader("classes.txt", "named/classes.txt", m.mutate_text, _yolo("named")),
        Reader("YOLO list", "list/train.txt", m.mutate_text, _yolo("list")),
        Reader("CSV list", "csv/train.csv", m.mutate_rows, _csv),
        Reader("COCO JSON", "coco/train.json", mutate_json, _coco),
        Reader(
            "--data-root alone, data.yaml",
            "yolo/data.yaml",
            m.mutate_yaml,
            lambda folder, _: recognise(folder / "yolo"),
        ),
        Reader(
            "--data-root alone, COCO JSON",
            "coco/train.json",
            mutate_json,
            lambda folder, _: recognise(folder / "coco"),
        ),
        Reader(
            "--data-root alone, zip",
            "classes.zip",
            m.mutate_zip,
            lambda folder, _: recognise(folder / "classes.zip", "yolo"),
        ),
        Reader(
            "--data-root alone, tar",
            "classes.tar",
            m.mutate_tar,
            lambda folder, _: recognise(folder / "classes.tar", "yolo"),
        ),
        Reader(
            "picture of a data set, JPEG",
            "pictures/images/train/b.jpg",
            m.mutate_image,
            _yolo("pictures"),
            True,
        ),
        *(
            Reader(
                f"--images, {kind}", f"picture.{kind}", m.mutate_image, _picture(f"picture.{kind}")
            )
            for kind in ("jpg", "png", "bmp", "webp", "tiff")
        ),
        Reader("class folders, zip", "classes.zip", m.mutate_zip, _classes("classes.zip")),
        Reader("class folders, tar", "classes.tar", m.mutate_tar, _classes("classes.tar")),
        Reader(
            "class folders, picture",
            "classes/train/cat/0.png",
            m.mutate_image,
            _classes("classes"),
            True,
        ),
        Reader("CIFAR-10 batch", "cifar/test_batch.bin", m.mutate_bytes, _cifar),
        Reader("--config", "config.yaml", m.mutate_yaml, _config),
        Reader(
            "schedule.txt",
            "schedule.txt",
            m.mutate_text,
            lambda folder, _: read_schedule(folder / "schedule.txt"),
        ),
        Reader(
            "metrics.jsonl",
            "metrics/metrics.jsonl",
            m.mutate_text,
            lambda folder, _: Logbook(folder / "metrics", 3).close(),
        ),
        Reader(
            "best.txt",
            "run/checkpoints/best.txt",
            m.mutate_text,
            lambda folder, _: resolve_checkpoint(folder / "run"),
        ),
        Reader(
            "checkpoint",
            "weights.ckpt",
            mutate_checkpoint,
            lambda folder, _: load_weights(folder / "weights.ckpt"),
        ),
        Reader(
            "weight file",
            "weights.safetensors",
            mutate_safetensors,
            lambda folder, _: load_weights(folder / "weights.safetensors"),
        ),
        Reader("Darknet weights", "yolo.weights", m.mutate_bytes, _start_from("yolo.weights")),
        Reader("PyTorch weights", "weights.pth", mutate_checkpoint, _start_from("weights.pth")),
        Reader(
            "--detections",
            "detections/comp4_det_train_cat.txt",
            m.mutate_text,
            lambda folder, _: read_detections(folder / "detections", images, "train"),
        ),
        *(
            Reader(
                f"upload, {kind}",
                f"picture.{kind}",
                m.mutate_image,
                lambda folder, _, kind=kind: read_picture(folder / f"picture.{kind}"),
            )
            for kind in ("jpg", "png", "webp", "tiff")
        ),
    ]


def _decode_all(dataset: DetectionDataset, skip_bad: bool) -> None:
    if skip_bad:
        drop_unreadable(dataset)
    for index in range(len(dataset)):
        dataset.image(index, 64)
    dataset.digest()


def _voc(folder: Path, skip_bad: bool) -> None:
    _decode_all(read_voc(folder / "voc", "train", None, skip_bad), skip_bad)


def _yolo(name: str) -> Callable[[Path, bool], None]:
    return lambda folder, skip_bad: _decode_all(
        read_yolo_folder(folder / name, "train", None, skip_bad), skip_bad
    )


def _csv(folder: Path, skip_bad: bool) -> None:
    _decode_all(read_csv_layout(folder / "csv", "train", ("cat", "dog"), skip_bad), skip_bad)


def _coco(folder: Path, skip_bad: bool) -> None:
    _decode_all(read_coco(folder / "coco", "train.json", None, skip_bad), skip_bad)


def _picture(name: str) -> Callable[[Path, bool], Any]:
    return lambda folder, _: letterboxed(folder / name, 64)


def _classes(name: str) -> Callable[[Path, bool], None]:
    def read(folder: Path, skip_bad: bool) -> None:
        cfg = Config(
            task="classification", dataset="images", data_root=str(folder / name), skip_bad=skip_bad
        )
        classifier_images.open_datasets(cfg)

    return read


def _cifar(folder: Path, _: bool) -> None:
    cfg = Config(task="classification", dataset="cifar10", data_root=str(folder / "cifar"))
    classifier_images.open_dataset(cfg, "test", classifier_images.CIFAR10_CLASSES)


def _config(folder: Path, _: bool) -> None:
    from train import TrainArgs

    args = cli.parse(TrainArgs, [], "", folder / "config.yaml")
    Config.from_dict(args.to_dict())


def _start_from(name: str) -> Callable[[Path, bool], Any]:
    network = YoloV3(2, WIDTH)
    return lambda folder, _: init_weights(network, folder / name)


def _write_voc(root: Path) -> None:
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    for number, name in enumerate("abc"):
        m.noise_picture(number).save(root / "JPEGImages" / f"{name}.jpg")
        thing = "".join(
            f"<object><name>{kind}</name><difficult>0</difficult>"
            f"<bndbox><xmin>5</xmin><ymin>6</ymin><xmax>{40 + number}</xmax><ymax>50</ymax>"
            "</bndbox></object>\n"
            for kind in ("cat", "dog")
        )
        size = "<size><width>96</width><height>96</height><depth>3</depth></size>"
        text = f"<annotation>\n<filename>{name}.jpg</filename>\n{size}\n{thing}</annotation>\n"
        (root / "Annotations" / f"{name}.xml").write_text(text)
    (root / "ImageSets/Main/train.txt").write_text("a\nb\nc\n")


def _write_yolo(root: Path, boxes: str) -> None:
    for name in ("images", "labels"):
        (root / name / "train").mkdir(parents=True)
    for number, name in enumerate("abc"):
        m.noise_picture(number).save(root / "images/train" / f"{name}.jpg")
        (root / "labels/train" / f"{name}.txt").write_text(boxes)
    (root / "data.yaml").write_text(
        "train: images/train\nval: images/train\nnc: 2\nnames:\n  0: cat\n  1: dog\n"
    )


def _write_coco(root: Path) -> None:
    root.mkdir()
    for number, name in enumerate("abc"):
        m.noise_picture(number).save(root / f"{name}.jpg")
    content = {
        "images": [
            {"id": i, "file_name": f"{name}.jpg", "height": 96, "width": 96}
            for i, name in enumerate("abc")
        ],
        "categories": [{"id": 1, "name": "cat", "supercategory": "x"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {
                "id": i,
                "image_id": i % 3,
                "category_id": 1 + i % 2,
                "bbox": [3, 4, 20 + i, 30],
                "iscrowd": int(i == 5),
            }
            for i in range(6)
        ],
    }
    (root / "train.json").write_text(json.dumps(content, indent=0))


def _write_archives(folder: Path) -> None:
    for split in ("train", "test"):
        for kind in ("cat", "dog"):
            (folder / "classes" / split / kind).mkdir(parents=True)
            for number in range(2):
                m.noise_picture(number, 40, 40).save(
                    folder / "classes" / split / kind / f"{number}.png"
                )
    files = sorted(path for path in (folder / "classes").rglob("*.png"))
    with (
        zipfile.ZipFile(folder / "classes.zip", "w") as packed,
        tarfile.open(folder / "classes.tar", "w") as tar,
    ):
        for path in files:
            name = path.relative_to(folder / "classes").as_posix()
            packed.write(path, name)
            tar.add(path, name)


def _write_weights(folder: Path) -> None:
    config = ResolvedConfig(width=WIDTH, img_sizes=(64,), data_root=str(folder))
    network, names = YoloV3(2, WIDTH), ("cat", "dog")
    anchors = torch.arange(1.0, 19).reshape(3, 3, 2)
    save_weights(folder / "weights.safetensors", network, config, names, anchors, {"step": 1})
    write_darknet(network, folder / "yolo.weights")
    torch.save(network.state_dict(), folder / "weights.pth")
    state = network.state_dict()
    content = {
        "model": state,
        "ema": state,
        "config": config.to_dict(),
        "classes": list(names),
        "anchors": anchors,
        "step": 1,
    }
    save_checkpoint(folder / "weights.ckpt", content)
    run = RunFolder(folder / "run")
    for step in (1, 2):
        save_checkpoint(run.checkpoints / f"epoch000-step00000{step}-lr1.000e-03.ckpt", content)
    (run.checkpoints / "best.txt").write_text("epoch000-step000001-lr1.000e-03.ckpt\n")
    schedule = plan_schedule(
        config, ranks=1, dataset_size=24, dataset_digest="abc", steps_per_epoch=4
    )
    write_schedule(schedule, folder / "schedule.txt")


VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    10**9,
    2**70,
    float("nan"),
    float("inf"),
    "",
    "x" * 100_000,
    "n" * 300,
    "a\0b.jpg",
    "/",
    "\x1b[31m\n",
    [],
    [[]],
    {},
    {"a": 1},
    [1] * 17,
    ["a", "a"],
    "../..",
    0.05,
    torch.zeros(3),
    torch.zeros(0),
    torch.full((3, 3, 2), float("nan")),
)


def mutate_checkpoint(rng: Random, data: bytes) -> bytes:
    """Exchange or lose a part of the content, with the digest that belongs to it."""
    content = torch.load(io.BytesIO(data), weights_only=True)
    for _ in range(rng.choice((1, 1, 2))):
        place: Any = content
        while isinstance(place, dict) and place and rng.random() < 0.6:
            inner = place[rng.choice([*place])]
            if not isinstance(inner, dict) or not inner:
                break
            place = inner
        key = rng.choice([*place])
        if rng.random() < 0.3:
            del place[key]
        else:
            place[key] = rng.choice(VALUES)
    if "format_version" in content:
        content.pop("digest", None)
        content["digest"] = content_digest(content)
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def mutate_json(rng: Random, data: bytes) -> bytes:
    """Exchange or lose a part; or as text."""
    if rng.random() < 0.3:
        return m.mutate_text(rng, data)
    content = json.loads(data)
    for _ in range(rng.choice((1, 1, 3))):
        place: Any = content
        while True:
            keys: list[Any] = [*place] if isinstance(place, dict) else [*range(len(place))]
            if not keys:
                break
            key = rng.choice(keys)
            if not isinstance(place[key], dict | list) or rng.random() < 0.2:
                break
            place = place[key]
        if keys and rng.random() < 0.3:
            del place[key]
        elif keys:
            values = [value for value in VALUES if not isinstance(value, torch.Tensor)]
            place[key] = deepcopy(rng.choice(values))  # nothing may come to contain itself
    return json.dumps(content).encode()


def mutate_safetensors(rng: Random, data: bytes) -> bytes:
    """Let the header or the metadata lie; as a file of the first version, which has no digest."""
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    metadata = header["__metadata__"]
    metadata.pop("digest", None)
    metadata["format_version"] = str(FORMAT_VERSION)
    values = [value for value in VALUES if not isinstance(value, torch.Tensor)]
    for _ in range(rng.choice((1, 1, 2))):
        match rng.randrange(4):
            case 0:
                metadata[rng.choice([*metadata])] = rng.choice(m.WORDS)
            case 1:
                config = (
                    json.loads(metadata["config"])
                    if metadata.get("config", "").startswith("{")
                    else {"width": 1}
                )
                config[rng.choice([*config])] = rng.choice(values)
                metadata["config"] = json.dumps(config)
            case 2:
                metadata[rng.choice([*metadata])] = json.dumps(rng.choice(values))
            case 3:
                tensor = header[rng.choice([name for name in header if name != "__metadata__"])]
                tensor[rng.choice([*tensor])] = rng.choice(
                    ([2**40], [0], [], "F64", "I8", [0, 4], [0, 2**60], "what")
                )
    text = json.dumps(header).encode()
    size = len(text) if rng.random() < 0.9 else rng.choice((0, 2**63, 2**40, len(text) + 9))
    return struct.pack("<Q", size) + text + body
