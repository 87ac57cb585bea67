"""What the network costs beside this machine's best: rows for `benchmarks/throughput.py`.

The limit of a row is the arithmetic of its convolutions at the fastest convolution measured here,
or the bytes that it has to move at the measured speed of a copy.
"""

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from scoring import random_scenes
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from yolo.config import COCO_ANCHORS, Config, HardwareConfig
from yolo.engine import loop
from yolo.engine.fabric import make_fabric
from yolo.engine.state import make_state
from yolo.explain.cam import explain_detections, trace_detector
from yolo.inference.export import export_onnx
from yolo.inference.fast import cpu_computes_bf16, make_fast, prepare
from yolo.losses import YoloLoss, assign_targets, count_targets
from yolo.metrics.average_precision import average_precision
from yolo.models.yolov3 import YoloV3, make_anchors, postprocess
from yolo.runs.checkpoint import LoadedWeights
from yolo.runs.provenance import hardware
from yolo.tasks.assigned import AssignedTargets
from yolo.tasks.detection import DetectionTask

NUM_CLASSES = 20
BOXES_PER_IMAGE = 8
PRECISION = {torch.float32: "32-true"}  # slow to fast; without native instructions bf16 is emulated
if cpu_computes_bf16():
    PRECISION[torch.bfloat16] = "bf16-mixed"
FASTEST = list(PRECISION)[-1]
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Row:
    """One measurement: seconds for `images` images, and the least that they could take."""

    part: str
    setting: str
    seconds: float
    images: int = 1
    limit: float | None = None  # seconds
    basis: str = ""

    def line(self) -> str:
        """Return the row of a Markdown table."""
        measured = self._amount(self.seconds)
        if self.limit is None:
            return f"| {self.part} | {self.setting} | {measured} | {self.basis} | |"
        limit = f"{self._amount(self.limit)} ({self.basis})"
        return (
            f"| {self.part} | {self.setting} | {measured} | {limit} | "
            f"{self.limit / self.seconds:.0%} |"
        )

    def _amount(self, seconds: float) -> str:
        return (
            f"{self.images / seconds:.2f} images/s"
            if self.images > 1
            else f"{seconds * 1e3:.1f} ms"
        )


HEADER = "| part | setting | measured | limit | ratio |\n|---|---|---|---|---|"


def machine() -> str:
    """Say where the table was made."""
    peaks = ", ".join(
        f"{NAMES[dtype]} {convolution_peak(dtype) / 1e9:.0f} GFLOP/s" for dtype in PRECISION
    )
    return (
        f"{hardware(torch.device('cpu'))}; torch {torch.__version__}, {torch.get_num_threads()} "
        f"thread(s), {'elapsed' if clock is time.perf_counter else 'CPU'} time; fastest "
        f"convolution {peaks}; copy {copy_speed() / 1e9:.1f} GB/s"
    )


clock: Callable[[], float] = time.perf_counter


def use_cpu_time() -> None:
    """From here on count the CPU seconds of one thread: right on a machine that others use."""
    global clock
    torch.set_num_threads(1)
    # with finished children
    clock = lambda: time.process_time() + sum(os.times()[2:4])  # noqa: E731


def seconds_of(call: Callable[[], Any], repeats: int = 5, warm_up: int = 1) -> float:
    """Return the median time of a call."""
    for _ in range(warm_up):
        call()
    times = []
    for _ in range(repeats):
        start = clock()
        call()
        times.append(clock() - start)
    return statistics.median(times)


def convolution_peak(dtype: torch.dtype) -> float:
    """Return the FLOP/s of the fastest of YOLOv3's large 3x3 convolutions, measured now."""
    best = 0.0
    for channels, side in ((128, 52), (256, 26), (512, 13)):
        conv = nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False)
        conv = conv.to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = torch.rand(8, channels, side, side, dtype=dtype).to(memory_format=torch.channels_last)
        flops = 2 * 9 * channels * 2 * channels * 8 * side**2
        with torch.inference_mode():
            best = max(
                best, flops / seconds_of(lambda conv=conv, x=x: conv(x), repeats=9, warm_up=3)
            )
    return best


def beside_peak(
    call: Callable[[], Any], repeats: int, flops: float, dtype: torch.dtype
) -> tuple[float, float]:
    """Return the seconds of a call, and the least that its arithmetic could take.

    The peak is measured before and after it: a shared machine is faster in one minute than in the
    next.
    """
    before, seconds = convolution_peak(dtype), seconds_of(call, repeats)
    return seconds, flops / max(before, convolution_peak(dtype))


@cache
def copy_speed() -> float:
    """Return the bytes per second, read and written, of a copy that no cache holds."""
    source = torch.ones(2**26)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source))


@cache
def forward_flops(width: float, size: int) -> int:
    """Return the floating-point operations of one image."""
    with torch.device("meta"):
        model, images = YoloV3(NUM_CLASSES, width).eval(), torch.rand(1, 3, size, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    return counter.get_total_flops()


def make_detector(width: float, size: int) -> tuple[YoloV3, Tensor]:
    """Return an untrained network, batch normalisation set to random images, and its anchors."""
    torch.manual_seed(0)
    model = YoloV3(NUM_CLASSES, width).to(memory_format=torch.channels_last)  # type: ignore
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model(make_batch(2, 128)[0])
    for norm in norms:
        norm.momentum = 0.1
    return model, make_anchors(COCO_ANCHORS, size)


def make_batch(batch: int, size: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Return random images and boxes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, generator=generator)
    return images.permute(0, 3, 1, 2), make_targets(batch, size, generator)


def make_targets(batch: int, size: int, generator: torch.Generator) -> list[dict[str, Tensor]]:
    """Return as many random boxes an image as a mosaic has."""
    targets = []
    for _ in range(batch):
        corners = torch.rand(BOXES_PER_IMAGE, 2, generator=generator) * 0.6 * size
        sides = (0.05 + 0.35 * torch.rand(BOXES_PER_IMAGE, 2, generator=generator)) * size
        labels = torch.randint(0, NUM_CLASSES, (BOXES_PER_IMAGE,), generator=generator)
        targets.append({"boxes": torch.cat([corners, corners + sides], 1), "labels": labels})
    return targets


def assigned_batch(batch: int, size: int) -> tuple[Tensor, AssignedTargets]:
    """Return a batch as it comes from the loader of a training."""
    images, targets = make_batch(batch, size)
    return images, AssignedTargets.pack(
        assign_targets(targets, make_anchors(COCO_ANCHORS, size), size)
    )


def make_task(config: Config, model: nn.Module | None = None) -> DetectionTask:
    """Return what a training step needs but data; without a `model`, for `make_detector`'s."""
    size = config.img_sizes[0]
    anchors, nothing = make_anchors(COCO_ANCHORS, size), cast(Any, None)
    return DetectionTask(
        config=config,
        class_names=tuple(map(str, range(NUM_CLASSES))),
        model=model or make_detector(config.width, size)[0],
        criterion=YoloLoss(anchors, config.loss_settings),
        train_set=nothing,
        train_samples=nothing,
        train_collate=nothing,
        eval_split=nothing,
        anchors=anchors,
    )


def training_rows(
    width: float, size: int, batch: int, repeats: int, compiled: Sequence[bool]
) -> Iterator[Row]:
    """Measure whole optimizer steps, and what assignment and loss take of them."""
    for dtype, precision in PRECISION.items():
        for compile_it in compiled:
            if compile_it and dtype != FASTEST:
                continue
            step = _training_step(width, size, batch, precision, compile_it)
            seconds, limit = beside_peak(
                step, repeats, 3 * forward_flops(width, size) * batch, dtype
            )
            form = f"{NAMES[dtype]}, compiled" if compile_it else NAMES[dtype]
            setting = f"{form}, width {width:g}, {size} px, batch {batch}"
            yield Row("training step", setting, seconds, batch, limit, "arithmetic of 3 forwards")
    yield loss_row(width, size, batch, seconds)


def _training_step(
    width: float, size: int, batch: int, precision: str, compiled: bool
) -> Callable[[], None]:
    with contextlib.redirect_stderr(None):
        fabric, scaler = make_fabric(
            HardwareConfig(accelerator="cpu", precision=precision)  # type: ignore[arg-type]
        )
    task = make_task(Config(width=width, img_sizes=(size,)))
    state = make_state(fabric, scaler, task.config, task)
    if compiled:
        state.model = torch.compile(state.model, dynamic=False)
    micro_batches = [assigned_batch(batch, size)]
    return lambda: loop.train_step(fabric, state, task, micro_batches, lr=1e-5, beta1=0.9)


def loss_row(width: float, size: int, batch: int, step_seconds: float) -> Row:
    """Measure target assignment, loss and its gradient with respect to the outputs."""
    task = make_task(Config(width=0.125, img_sizes=(size,)))
    images, targets = make_batch(batch, size)
    anchors = make_anchors(COCO_ANCHORS, size)
    with torch.no_grad():
        outputs = [output.to(FASTEST) for output in task.model(images)]

    def once() -> None:
        leaves = [output.detach().requires_grad_() for output in outputs]
        assigned = assign_targets(targets, anchors, size)
        losses = task.criterion(leaves, assigned, count_targets(assigned))
        sum(losses.values()).backward()

    seconds = seconds_of(once, repeats=9)
    share = f"{seconds / step_seconds:.1%} of the last step above"
    return Row(
        "assignment + loss",
        f"{BOXES_PER_IMAGE} boxes an image, batch {batch}",
        seconds,
        basis=share,
    )


def inference_rows(
    width: float, size: int, batches: Sequence[int], repeats: int, compiled: bool
) -> Iterator[Row]:
    """Measure the network alone, in every form that it can be shipped in."""
    model, _ = make_detector(width, size)
    model.eval()
    forms: dict[str, tuple[torch.dtype, Callable[[Tensor], Any]]] = {
        "eager fp32": (torch.float32, model),
    }
    for dtype in PRECISION:
        forms[f"fused {NAMES[dtype]}"] = (dtype, make_fast(model, dtype))
    if compiled:
        fast = prepare(make_fast(model, FASTEST), torch.device("cpu"), compiled=True)
        forms[f"fused {NAMES[FASTEST]}, compiled"] = (FASTEST, fast)
    forms["ONNX Runtime fp32"] = (torch.float32, _onnx_session(model, width, size))
    for batch in batches:
        images = make_batch(batch, size)[0]
        for name, (dtype, run) in forms.items():
            forward, flops = partial(run, images), forward_flops(width, size) * batch
            with torch.inference_mode():
                seconds, limit = beside_peak(forward, repeats, flops, dtype)
            setting = f"{name}, width {width:g}, {size} px, batch {batch}"
            yield Row("inference", setting, seconds, batch, limit, "arithmetic")


def _onnx_session(model: YoloV3, width: float, size: int) -> Callable[[Tensor], Any]:
    import onnxruntime

    config = Config(width=width, img_sizes=(size,))
    names, anchors = tuple(map(str, range(NUM_CLASSES))), make_anchors(COCO_ANCHORS, size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(LoadedWeights(model, config, names, anchors, {}, "", path), path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": (images.float() / 255).contiguous().numpy()})


def answer_rows(width: float, size: int) -> Iterator[Row]:
    """Measure what comes after the network: boxes, explanations, and the mAP of a whole test."""
    model, anchors = make_detector(width, size)
    model.eval()
    images = make_batch(8, size)[0]
    with torch.no_grad():
        outputs = model(images)
    for (
        output
    ) in outputs:  # an untrained network finds nothing: let one prediction in 50 be something
        output[..., 4] = torch.where(torch.rand(output.shape[:-1]) < 0.02, 2.0, -9.0)
    bytes_read = sum(output.nbytes for output in outputs)
    settings = {"score_threshold": 0.01, "iou_threshold": 0.45, "max_detections": 300}
    with torch.inference_mode():
        seconds = seconds_of(lambda: postprocess(outputs, anchors, **settings))
    candidates = sum(int((output[..., 4] > 0).sum()) for output in outputs) / len(images)
    setting = f"batch 8, {candidates:.0f} candidates an image"
    yield Row("decode + NMS", setting, seconds, 8, bytes_read / copy_speed(), "reading the outputs")
    yield _explanation_row(model, anchors, width, size)
    yield _map_row()


def _explanation_row(model: YoloV3, anchors: Tensor, width: float, size: int) -> Row:
    image = make_batch(1, size)[0][0].permute(1, 2, 0).contiguous().numpy()

    def explain() -> None:
        trace = trace_detector(model, image, size)
        found = postprocess(
            trace.outputs, anchors, score_threshold=0.0, iou_threshold=0.45, max_detections=1
        )[0]
        explain_detections(trace, found["index"].tolist(), found["labels"].tolist())

    seconds, limit = beside_peak(explain, 3, forward_flops(width, size), torch.float32)
    setting = f"one box, fp32, width {width:g}, {size} px"
    return Row("Grad-CAM", setting, seconds, 1, limit, "one forward")


def _map_row() -> Row:
    found, objects = random_scenes(4952, 250_000, NUM_CLASSES)
    names = [str(label) for label in range(NUM_CLASSES)]
    seconds = seconds_of(lambda: average_precision(found.by_score(), objects, names), 3)
    limit = seconds_of(lambda: np.argsort(-found.scores))
    return Row(
        "mAP",
        "250,000 detections on 4,952 images, all thresholds",
        seconds,
        1,
        limit,
        "sorting the scores",
    )


def start_rows() -> Iterator[Row]:
    """Measure how long a person waits for the scripts."""
    bare = seconds_of(lambda: _run_python("-c", "pass"))
    yield Row(
        "start",
        "train.py --help",
        seconds_of(lambda: _run_python("train.py", "--help")),
        1,
        bare,
        "bare Python",
    )
    torch_import = seconds_of(
        lambda: _run_python("-c", "import torch, lightning.fabric, torchvision"), 3
    )
    with tempfile.TemporaryDirectory() as folder:
        words = (
            "train.py",
            "--config",
            "configs/digits_classify.yaml",
            "--plan-only",
            "--out-dir",
            folder,
        )
        seconds = seconds_of(lambda: _run_python(*words), 3)
    yield Row(
        "start",
        "train.py to a planned schedule",
        seconds,
        1,
        torch_import,
        "imports of torch and Fabric",
    )


def _run_python(*words: str) -> None:
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True)
