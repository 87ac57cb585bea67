"""What training and prediction reach on the card at hand: rows for `benchmarks/throughput.py gpu`.

It is made for a card that is borrowed for minutes. So a row that fails, for want of memory or of a
package, says why in one line and the next one goes on; and no row goes on beyond the time that was
given.
"""

import gc
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from speed import NUM_CLASSES, ROOT, assigned_batch, make_batch, make_task
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from yolo.config import Config
from yolo.engine import loop
from yolo.engine.fabric import make_fabric
from yolo.engine.state import make_state
from yolo.inference.fast import prepare
from yolo.models.build import build_model
from yolo.runs.provenance import hardware

VOC_IMAGES, VOC_EPOCHS = 16_551, 40  # trainval of 2007 and 2012; configs/voc.yaml
PHOTOGRAPH = (375, 500)  # height and width of most images of VOC
STEP_LINE = re.compile(r"step (\d+) .*\(wait (\d+)%\)")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured; `tiny` makes it small enough for a test on a CPU."""

    width: float = 1.0
    size: int = 416
    batches: tuple[int, ...] = (64, 32)
    row_seconds: float = 3.0  # that one row measures, after its warm-up
    run_seconds: float = 20.0  # of a real run, after its start
    images: int = 2048  # made-up photographs of the real run
    workers: str = "auto"
    data_root: Path | None = None  # a VOCdevkit instead of them
    train_split: str = "2007:trainval"
    split: str = "2007:test"
    matrix: int = 8192  # rows and columns of the products that show the peak

    @classmethod
    def tiny(cls) -> "Settings":
        """Return settings for a CPU and a few seconds."""
        return cls(
            width=0.05, size=64, batches=(2,), row_seconds=0.1, images=8, workers="0", matrix=256
        )


@dataclass(frozen=True)
class Row:
    """One line of the table; a failed one has an `error` and no numbers."""

    name: str
    setting: str
    images_per_second: float | None = None
    milliseconds: float | None = None  # of a step or a forward pass
    launch_milliseconds: float | None = (
        None  # until the main process is done with its part of a step
    )
    share_of_peak: float | None = None
    memory_gib: float | None = None
    note: str = ""
    error: str | None = None

    def line(self) -> str:
        """Return the row of a Markdown table."""
        if self.error:
            return f"| {self.name} | {self.setting} | failed: {self.error} | | | | |"
        numbers = (
            ("{:.0f}", self.images_per_second),
            ("{:.1f}", self.milliseconds),
            ("{:.1f}", self.launch_milliseconds),
            ("{:.0%}", self.share_of_peak),
            ("{:.1f}", self.memory_gib),
        )
        cells = ["" if value is None else form.format(value) for form, value in numbers]
        return f"| {' | '.join([self.name, self.setting, *cells])} | {self.note} |"


HEADER = (
    "| row | setting | images/s | ms | launched in ms | of the peak | GiB | |\n" + "|---" * 8 + "|"
)


class Table:
    """The rows of one card, measured one after another."""

    def __init__(self, settings: Settings, seconds: float, out: Path | None) -> None:
        self.settings = settings
        self.deadline = time.monotonic() + seconds
        self.out = out
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.on_gpu = self.device.type == "cuda"
        self.half = "16-mixed" if self.on_gpu else "32-true"
        self.peak: float | None = None  # FLOP/s
        self.rows: list[Row] = []

    def measure(self, names: tuple[str, ...] = ()) -> Iterator[str]:
        """Yield the table's lines, of all rows or those of `names`; write the file after each."""
        yield (
            f"{hardware(self.device)}; torch {torch.__version__}, CUDA "
            f"{torch.version.cuda}\n\n{HEADER}"
        )
        with tempfile.TemporaryDirectory() as folder:
            for name, setting, call in self._plan(Path(folder)):
                if not names or name in names:
                    row = self._try(name, setting, call)
                    self.rows.append(row)
                    self._write()
                    yield row.line()
        yield self._forecast()

    def _plan(self, folder: Path) -> Iterator[tuple[str, str, Callable[[], dict[str, Any]]]]:
        """Yield name, setting and measurement of each row, most wanted first: time may run out."""
        wanted = self.settings
        yield "peak", f"product of {wanted.matrix} x {wanted.matrix} matrices", self._peak
        detector = Config(width=wanted.width, img_sizes=(wanted.size,))
        precisions = (self.half, "bf16-mixed") if self.on_gpu else (self.half,)
        plans = [(precision, batch) for precision in precisions for batch in wanted.batches]
        for precision, batch in plans:
            step = partial(self._step, replace(detector, precision=precision), batch)
            yield (
                "step",
                f"{precision}, width {wanted.width:g}, {wanted.size} px, batch {batch}",
                step,
            )
        yield "run", f"train.py, batch {wanted.batches[0]}", partial(self._run, folder)
        yield "lite2", f"EfficientNet-Lite2, batch {2 * wanted.batches[0]}", self._lite2
        for batch in (1, wanted.batches[-1]):
            yield (
                "inference",
                f"fused, half precision, batch {batch}",
                partial(self._inference, batch),
            )
        yield "kernels", f"{self.half}, batch {wanted.batches[0]}", partial(self._kernels, detector)
        yield "torchrun", "one rank, SyncBatchNorm", partial(self._run, folder, under_torchrun=True)

    def _try(self, name: str, setting: str, call: Callable[[], dict[str, Any]]) -> Row:
        """Measure a row, whatever goes wrong: the card is here for minutes, next rows count."""
        try:
            with _time_limit(self.deadline - time.monotonic()):
                return Row(name, setting, **call())
        except Exception as error:
            if self.on_gpu and not isinstance(error, TimeoutError):
                traceback.print_exc()
            return Row(
                name, setting, error=f"{type(error).__name__}: {error}".splitlines()[0][:200]
            )
        finally:
            if self.on_gpu:
                gc.collect()
                with suppress(RuntimeError):
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()

    def _write(self) -> None:
        if self.out:
            about = {
                "hardware": hardware(self.device),
                "torch": torch.__version__,
                "peak_flops": self.peak,
            }
            self.out.write_text(
                json.dumps({**about, "rows": [asdict(row) for row in self.rows]}, indent=1)
            )

    def _forecast(self) -> str:
        """Say how long VOC's recipe takes, by the real run if there is one, else the best step."""
        measured = [row for row in self.rows if row.images_per_second]
        runs = [row for row in measured if row.name == "run"] or [
            row for row in measured if row.name == "step"
        ]
        if not runs:
            return "no row tells how long a training takes"
        rate = max(row.images_per_second or 0.0 for row in runs)
        minutes = VOC_EPOCHS * VOC_IMAGES / rate / 60
        basis = "the real run" if runs[0].name == "run" else "the step alone"
        return (
            f"\n{VOC_EPOCHS} epochs of VOC 2007+2012 ({VOC_IMAGES:,} images) at "
            f"{self.settings.size} px on this card: {minutes:.0f} minutes, by {basis}"
        )

    def _peak(self) -> dict[str, Any]:
        """Measure the fastest product of two square matrices, in half precision on a GPU."""
        side, dtype = self.settings.matrix, torch.float16 if self.on_gpu else torch.float32
        a, b = (torch.randn(side, side, dtype=dtype, device=self.device) for _ in range(2))
        seconds, _ = self._time(lambda: torch.mm(a, b), self.settings.row_seconds / 3)
        self.peak = 2 * side**3 / seconds
        return {"milliseconds": 1e3 * seconds, "note": f"{self.peak / 1e12:.1f} TFLOP/s"}

    def _step(self, config: Config, batch: int, model: nn.Module | None = None) -> dict[str, Any]:
        """Measure whole optimizer steps, their batch ready in pinned memory."""
        step, network = self._training(config, batch, model)
        seconds, launch = self._time(step, self.settings.row_seconds)
        return {
            **self._rate(batch, seconds, 3 * _flops(network, config.img_sizes[0])),
            "launch_milliseconds": 1e3 * launch,
        }

    def _training(
        self, config: Config, batch: int, model: nn.Module | None = None
    ) -> tuple[Callable[[], None], nn.Module]:
        fabric, scaler = make_fabric(replace(config, devices=1))
        state = make_state(fabric, scaler, config, task := make_task(config, model))
        batches = [assigned_batch(batch, config.img_sizes[0])]
        if self.on_gpu:
            batches = [(images.pin_memory(), targets.pin_memory()) for images, targets in batches]
        return partial(
            loop.train_step, fabric, state, task, batches, lr=1e-5, beta1=0.9
        ), state.network

    def _lite2(self) -> dict[str, Any]:
        """Measure a light backbone, if timm is installed."""
        half: Any = self.half
        lite2 = "timm/tf_efficientnet_lite2"
        config = Config(backbone=lite2, width=0.5, img_sizes=(self.settings.size,), precision=half)
        return self._step(config, 2 * self.settings.batches[0], build_model(config, NUM_CLASSES))

    def _inference(self, batch: int) -> dict[str, Any]:
        """Measure the network alone on images that are there; one at a time awaits each answer."""
        config = Config(width=self.settings.width, img_sizes=(self.settings.size,))
        network = build_model(config, NUM_CLASSES).eval()
        model = prepare(network.to(memory_format=torch.channels_last), self.device, fast=True)
        images = make_batch(batch, self.settings.size)[0].to(self.device)

        @torch.inference_mode()
        def predict() -> None:
            model(images)
            if batch == 1:
                self._wait()

        seconds, _ = self._time(predict, self.settings.row_seconds / 3)
        return self._rate(batch, seconds, _flops(network, self.settings.size))

    def _kernels(self, config: Config) -> dict[str, Any]:
        """Count the kernels of a step, and the time in which the GPU was busy with them."""
        from torch.profiler import ProfilerActivity, profile

        batch = self.settings.batches[0]
        step, _ = self._training(replace(config, precision=self.half), batch)
        for _ in range(5):
            step()
        self._wait()
        activity = ProfilerActivity.CUDA if self.on_gpu else ProfilerActivity.CPU
        with profile(activities=[activity]) as profiler:
            step()
            self._wait()
        events = [event for event in profiler.key_averages() if event.self_device_time_total]
        busy = {event.key: event.self_device_time_total / 1e3 for event in events}
        largest = sorted(busy, key=busy.__getitem__, reverse=True)[:12]
        return {
            "milliseconds": sum(busy.values()),
            "memory_gib": self._memory(),
            "note": f"{sum(event.count for event in events)} kernels; "
            + ", ".join(f"{name[:60]} {busy[name]:.2f}" for name in largest),
        }

    def _run(self, folder: Path, under_torchrun: bool = False) -> dict[str, Any]:
        """Measure the training script itself, from first log line to last: epochs' ends count."""
        wanted, batch = self.settings, self.settings.batches[0]
        root, seconds = (
            wanted.data_root,
            min(wanted.run_seconds, self.deadline - time.monotonic() - 5),
        )
        if root is None:
            root = folder / "VOCdevkit"
            write_voc(root, wanted.images)
        launcher = (
            ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
            if under_torchrun
            else []
        )
        flags = {
            "--config": "configs/voc.yaml",
            "--backbone": "darknet53",  # as in the steps above; and no weights to fetch
            "--backbone-weights": "none",
            "--data-root": root,
            "--train-split": wanted.train_split,
            "--split": wanted.split,
            "--out-dir": folder / ("torchrun" if under_torchrun else "run"),
            "--width": wanted.width,
            "--img-sizes": wanted.size,
            "--batch-size": batch,
            "--workers": wanted.workers,
            "--precision": self.half,
            "--cache": "ram",
            "--max-time": f"{max(5, round(seconds))}s",
            "--epochs": 400,
            "--eval-every": 10**6,
            "--save-every": 10**6,
        }
        words = [
            sys.executable,
            *launcher,
            "train.py",
            *(str(word) for pair in flags.items() for word in pair),
        ]
        lines = _lines_with_times([*words, *(["--sync-batchnorm"] if under_torchrun else [])])
        found = [(when, STEP_LINE.search(line)) for when, line in lines]
        steps = [(when, int(match[1]), int(match[2])) for when, match in found if match]
        if len(steps) < 3:
            raise RuntimeError(
                f"{len(steps)} lines of log; the output ended in: {lines[-1][1] if lines else '-'}"
            )
        (start, first, _), (end, last, _) = steps[1], steps[-1]
        milliseconds = 1e3 * (end - start) / (last - first)
        wait = np.mean([share for *_, share in steps[2:]])
        return {
            "images_per_second": 1e3 * batch / milliseconds,
            "milliseconds": milliseconds,
            "note": (
                f"{wanted.workers} workers, steps {first} to {last}, waited {wait:.0f}% for the "
                "loader"
            ),
        }

    def _time(self, call: Callable[[], Any], seconds: float) -> tuple[float, float]:
        """Return the seconds of a call, and those until it returned with the GPU idle before it."""
        for _ in range(3):
            call()
        self._wait()
        launches = []
        for _ in range(3):
            start = time.perf_counter()
            call()
            launches.append(time.perf_counter() - start)
            self._wait()
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds or count < 3:
            call()
            count += 1
        self._wait()
        return (time.perf_counter() - start) / count, min(launches)

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def _memory(self) -> float | None:
        return torch.cuda.max_memory_allocated() / 2**30 if self.on_gpu else None

    def _rate(self, batch: int, seconds: float, flops_per_image: float) -> dict[str, Any]:
        return {
            "images_per_second": batch / seconds,
            "milliseconds": 1e3 * seconds,
            "share_of_peak": flops_per_image * batch / seconds / self.peak if self.peak else None,
            "memory_gib": self._memory(),
        }


def write_voc(root: Path, count: int) -> None:
    """Write `count` made-up photographs with boxes, as large on the disk as VOC's, once."""
    folder = root / "VOC2007"
    if folder.exists():
        return
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for name, ids in (("trainval", range(count)), ("test", range(min(8, count)))):
        text = "".join(f"{number:06d}\n" for number in ids)
        (folder / f"ImageSets/Main/{name}.txt").write_text(text)
    with ThreadPoolExecutor() as pool:
        list(pool.map(partial(_write_photograph, folder), range(count)))


def _write_photograph(folder: Path, number: int) -> None:
    height, width = PHOTOGRAPH
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 256, (height // 6, width // 6, 3), dtype=np.uint8)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    cv2.imwrite(str(folder / f"JPEGImages/{number:06d}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 90])
    objects = ""
    for _ in range(1 + rng.poisson(1.4)):
        x, y = rng.integers(1, width // 2), rng.integers(1, height // 2)
        right, bottom = x + rng.integers(20, width // 2), y + rng.integers(20, height // 2)
        objects += (
            f"<object><name>{rng.choice(['person', 'car', 'dog'])}</name><difficult>0</difficult>"
            f"<bndbox><xmin>{x}</xmin><ymin>{y}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax>"
            "</bndbox></object>"
        )
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    name = f"<filename>{number:06d}.jpg</filename>"
    (folder / f"Annotations/{number:06d}.xml").write_text(
        f"<annotation>{name}{size}{objects}</annotation>"
    )


def _flops(network: nn.Module, size: int) -> int:
    """Return the floating-point operations of one image."""
    device = next(network.parameters()).device
    training = network.training
    network.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, size, size, device=device))
    network.train(training)
    return counter.get_total_flops()


def _lines_with_times(words: list[str]) -> list[tuple[float, str]]:
    """Run a command; return what it printed, and when."""
    process = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert process.stdout
        return [(time.perf_counter(), line.rstrip()) for line in process.stdout]
    finally:  # also when the time is up
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError after some seconds, wherever the program is."""

    def stop(*_: Any) -> None:
        raise TimeoutError("no time left")

    if seconds < 1:
        raise TimeoutError("no time left")
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
