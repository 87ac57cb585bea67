"""How fast the parts are. Prints tables and asserts nothing.

python benchmarks/throughput.py                         # the network's table, with physical limits
python benchmarks/throughput.py training --width 0.25 --compile    # a part, with other settings
python benchmarks/throughput.py loader                  # on the digits
python benchmarks/throughput.py gradcam                 # ten boxes of an image explained
python benchmarks/throughput.py map                     # detections scored
python benchmarks/throughput.py host                    # what a step costs besides the network
python benchmarks/throughput.py epochs                  # what short epochs lose between them
python benchmarks/throughput.py shared                  # a training beside other programs
python benchmarks/throughput.py gpu --out card.json     # what the card can do, in two minutes
python benchmarks/throughput.py loader --data-root BCCD --config configs/voc.yaml \\
    --train-split trainval
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from yolo import cli
from yolo.config import Config


@dataclass(frozen=True, kw_only=True)
class LoaderArgs(Config):
    """Data and augmentations as in training; the defaults are those of `--config`."""

    config: str = "configs/digits.yaml"
    """YAML file with the data set and its augmentations."""
    num_workers: str = "0,1,2"
    """Worker processes to compare."""
    seconds: float = 8.0
    """How long each row is measured."""


def bench_loader(words: Sequence[str]) -> None:
    """Print images per second of the training loader, with and without the cache."""
    config = cli.value_of("--config", words) or "configs/digits.yaml"
    args = cli.parse(LoaderArgs, words, "Images per second of the training loader.", config)
    from yolo.data.cache import cache_images
    from yolo.data.sources import open_dataset

    dataset = open_dataset(args, args.train_split, None)
    print(f"{dataset.name}: {len(dataset)} images, sizes {args.img_sizes}, batch {args.batch_size}")
    names = (
        "mosaic_prob",
        "aug_flip",
        "aug_affine",
        "aug_color",
        "aug_blur",
        "aug_clahe",
        "aug_gray",
    )
    print(", ".join(f"{name} {getattr(args, name)}" for name in names))
    print(f"{'cache':>6} {'workers':>8} {'images/s':>9} {'ms/image/worker':>16}")
    for cache in ("none", "ram"):
        if cache == "ram":
            cache_images(dataset, max(args.img_sizes), progress=False)
        for workers in (int(word) for word in args.num_workers.split(",")):
            rate = _images_per_second(_train_batches(dataset, args, workers), args.seconds)
            print(
                f"{cache:>6} {workers:>8} {rate:>9.0f} {1000 * max(1, workers) / rate:>16.2f}",
                flush=True,
            )


def _train_batches(dataset: object, args: Config, workers: int) -> Iterator[int]:
    """Yield the sizes of endless training batches."""
    import cv2
    from torch.utils.data import DataLoader

    from yolo.data.samplers import MultiSizeBatchSampler
    from yolo.data.samples import MosaicCollate, TrainSamples, init_worker

    cv2.setNumThreads(0)
    sampler = MultiSizeBatchSampler(
        len(dataset),  # type: ignore[arg-type]
        args.batch_size,  # type: ignore[arg-type]
        args.img_sizes,
        args.seed,
    )
    loader = DataLoader(
        TrainSamples(dataset, args, args.seed),  # type: ignore[arg-type]
        batch_sampler=sampler,  # type: ignore[arg-type]
        collate_fn=MosaicCollate(args, args.seed),
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=init_worker,
    )
    for images, _ in loader:
        yield len(images)


def _images_per_second(batches: Iterator[int], seconds: float, warm_up: int = 10) -> float:
    for _ in islice(batches, warm_up):
        pass
    start, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        count += next(batches)
    return count / elapsed


@dataclass(frozen=True, kw_only=True)
class NetworkArgs:
    """What the network is measured with."""

    width: float = 1.0
    """Factor on every channel count."""
    size: int = 416
    """Side of the images in pixels."""
    batch: int = 8
    """Images of a training step."""
    repeats: int = 3
    """Timed repetitions of the larger parts; the median counts."""
    compile: bool = False
    """Also with torch.compile, which takes minutes to start."""
    cpu_time: bool = False
    """Count the CPU seconds of one thread, which are right on a machine that others use as well."""
    plain_malloc: bool = False
    """Give freed memory back to the system, as the C library does by itself: to compare."""


def bench_network(part: str, words: Sequence[str]) -> None:
    """Print one part of the table, or all of it, beside what this machine could do at best."""
    args = cli.parse(NetworkArgs, words, "What the network costs beside the physical limit.")
    import speed

    from yolo.engine import fabric as processes

    if args.cpu_time:
        speed.use_cpu_time()
    if args.plain_malloc:
        processes.keep_freed_memory = lambda: None
    compiled = (False, True) if args.compile else (False,)
    parts = {
        "training": lambda: speed.training_rows(
            args.width, args.size, args.batch, args.repeats, compiled
        ),
        "inference": lambda: speed.inference_rows(
            args.width, args.size, (1, 8), args.repeats, args.compile
        ),
        "answers": lambda: speed.answer_rows(args.width, args.size),
        "start": speed.start_rows,
    }
    print(speed.machine(), speed.HEADER, sep="\n\n", flush=True)
    for name in parts if part == "all" else [part]:
        for row in parts[name]():
            print(row.line(), flush=True)


@dataclass(frozen=True, kw_only=True)
class GradcamArgs:
    """What is explained."""

    width: float = 1.0
    """Factor on every channel count."""
    size: int = 416
    """Side of the image in pixels."""
    boxes: int = 10
    """Explained boxes, spread over the scales."""
    repeats: int = 5
    """Timed repetitions; the median counts."""


def bench_gradcam(words: Sequence[str]) -> None:
    """Print the seconds of a forward and all boxes explained, beside the library once per box."""
    args = cli.parse(GradcamArgs, words, "Seconds for an image with all its boxes explained.")
    import explaining

    for line in explaining.lines(args.width, args.size, args.boxes, args.repeats):
        print(line, flush=True)


@dataclass(frozen=True, kw_only=True)
class MapArgs:
    """What is scored."""

    images: int = 4952
    """Images, three objects on each: the default is VOC 2007 test."""
    detections: int = 250_000
    """Detections on all images together."""
    classes: int = 20
    """Classes."""
    repeats: int = 5
    """Timed repetitions; the median counts."""
    compare: bool = False
    """Also time torchmetrics with faster-coco-eval."""


def bench_map(words: Sequence[str]) -> None:
    """Print the seconds and the memory of scoring random detections."""
    args = cli.parse(MapArgs, words, "Seconds and memory of scoring detections.")
    import scoring

    for line in scoring.lines(
        args.images, args.detections, args.classes, args.repeats, args.compare
    ):
        print(line, flush=True)


@dataclass(frozen=True, kw_only=True)
class HostArgs:
    """What a step of no work is made with."""

    size: int = 416
    """Side of the images in pixels."""
    batch: int = 64
    """Images of a training step."""
    workers: int = 2
    """Processes that load them."""
    steps: int = 60
    """Timed steps."""


def bench_host(words: Sequence[str]) -> None:
    """Print what a training step costs the main process apart from network and loss."""
    args = cli.parse(HostArgs, words, "CPU milliseconds of the main process per training step.")
    import host

    for line in host.lines(args.size, args.batch, args.workers, args.steps):
        print(line, flush=True)


@dataclass(frozen=True, kw_only=True)
class EpochsArgs:
    """What a run of short epochs is made with."""

    epochs: int = 20
    """Epochs, each with a test and a checkpoint."""
    steps: int = 60
    """Optimizer steps of an epoch."""
    milliseconds: float = 20.0
    """How long a step lasts."""
    workers: int = 1
    """Processes that load images."""


def bench_epochs(words: Sequence[str]) -> None:
    """Print the share of a run of short epochs that is spent in steps and tests."""
    args = cli.parse(EpochsArgs, words, "What is lost between the epochs of a run.")
    import epochs

    for line in epochs.lines(args.epochs, args.steps, args.milliseconds / 1e3, args.workers):
        print(line, flush=True)


@dataclass(frozen=True, kw_only=True)
class SharedArgs:
    """How the machine is shared."""

    seconds: float = 15.0
    """How long each row is measured."""
    threads: str = "auto"
    """As in train.py: a number stays."""


def bench_shared(words: Sequence[str]) -> None:
    """Print how fast a training stays beside busy programs."""
    args = cli.parse(SharedArgs, words, "A training on the CPU beside other programs.")
    import sharing

    for line in sharing.lines(args.seconds, args.threads):
        print(line, flush=True)


@dataclass(frozen=True, kw_only=True)
class GpuArgs:
    """What is measured on the card at hand."""

    data_root: str | None = None
    """A VOCdevkit for the real run. Default: made-up photographs."""
    train_split: str = "2007:trainval"
    """What the real run trains on."""
    split: str = "2007:test"
    """What it would be tested on."""
    workers: str = "auto"
    """Loader processes of the real run."""
    seconds: float = 110.0
    """No row goes on beyond this time."""
    rows: str = "all"
    """Some of them, as in `peak,step,run`: peak, step, run, lite2, inference, kernels, torchrun."""
    out: str | None = None
    """Write the rows to this JSON file as well."""
    tiny: bool = False
    """Measure next to nothing: to try this on a CPU."""


def bench_gpu(words: Sequence[str]) -> None:
    """Print what training and prediction reach on this card, in two minutes."""
    args = cli.parse(GpuArgs, words, "Training and prediction on the card at hand, in two minutes.")
    import gpu

    settings = replace(
        gpu.Settings.tiny() if args.tiny else gpu.Settings(),
        train_split=args.train_split,
        split=args.split,
        workers=args.workers,
        data_root=Path(args.data_root) if args.data_root else None,
    )
    names = () if args.rows == "all" else tuple(args.rows.split(","))
    table = gpu.Table(settings, args.seconds, Path(args.out) if args.out else None)
    for line in table.measure(names):
        print(line, flush=True)


NETWORK_PARTS = ("all", "training", "inference", "answers", "start")
COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "loader": bench_loader,
    "gradcam": bench_gradcam,
    "map": bench_map,
    "host": bench_host,
    "epochs": bench_epochs,
    "shared": bench_shared,
    "gpu": bench_gpu,
    **{part: partial(bench_network, part) for part in NETWORK_PARTS},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the benchmarks."""
    words = cli.command_line(argv) or ["all"]
    if words[0] not in COMMANDS:
        print(f"{__doc__}\nbenchmarks: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    COMMANDS[words[0]](words[1:])
    return 0


if __name__ == "__main__":
    cli.run(main)
