"""How fast the parts are. Prints tables and asserts nothing.

python benchmarks/throughput.py loader                                     # on the digits python
benchmarks/throughput.py loader --data-root BCCD --config configs/voc.yaml --train-split trainval --skip-bad
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
    names = ("mosaic_prob", "aug_flip", "aug_affine", "aug_color", "aug_blur", "aug_clahe", "aug_gray")
    print(", ".join(f"{name} {getattr(args, name)}" for name in names))
    print(f"{'cache':>6} {'workers':>8} {'images/s':>9} {'ms/image/worker':>16}")
    for cache in ("none", "ram"):
        if cache == "ram":
            cache_images(dataset, max(args.img_sizes), progress=False)
        for workers in (int(word) for word in args.num_workers.split(",")):
            rate = _images_per_second(_train_batches(dataset, args, workers), args.seconds)
            print(f"{cache:>6} {workers:>8} {rate:>9.0f} {1000 * max(1, workers) / rate:>16.2f}", flush=True)


def _train_batches(dataset: object, args: Config, workers: int) -> Iterator[int]:
    """Yield the sizes of endless training batches."""
    import cv2
    from torch.utils.data import DataLoader

    from yolo.data.collate import MosaicCollate, TrainSamples, init_worker
    from yolo.data.samplers import MultiSizeBatchSampler

    cv2.setNumThreads(0)
    sampler = MultiSizeBatchSampler(len(dataset), args.batch_size, args.img_sizes, args.seed)  # type: ignore
    loader = DataLoader(
        TrainSamples(dataset, args, args.seed),  # type: ignore[arg-type]
        batch_sampler=sampler,  # type: ignore[arg-type]
        collate_fn=MosaicCollate(args, args.seed),
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=init_worker,
    )
    for epoch in range(10**6):
        sampler.set_position(epoch, 0)
        for images, _ in loader:
            yield len(images)


def _images_per_second(batches: Iterator[int], seconds: float, warm_up: int = 10) -> float:
    for _ in islice(batches, warm_up):
        pass
    start, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        count += next(batches)
    return count / elapsed


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"loader": bench_loader}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the benchmarks."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] not in COMMANDS:
        print(f"{__doc__}\nbenchmarks: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    COMMANDS[words[0]](words[1:])
    return 0


if __name__ == "__main__":
    cli.run(main)
