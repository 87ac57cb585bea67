"""What it costs to score detections, beside torchmetrics: rows for `benchmarks/throughput.py`."""

import time
import tracemalloc
from collections.abc import Callable, Iterator

import numpy as np
import torch

from yolo.metrics.average_precision import area_ap, average_precision, precision_recall
from yolo.metrics.matching import Detections, Objects, match_voc
from yolo.metrics.report import detection_report

OBJECTS_PER_IMAGE = 3  # as in VOC 2007 test: 14,976 on 4,952 images


def lines(images: int, detections: int, classes: int, repeats: int, compare: bool) -> Iterator[str]:
    """Yield the table, line by line."""
    found, objects = random_scenes(images, detections, classes)
    names = [str(label) for label in range(classes)]
    yield (
        f"{images:,} images, {len(objects):,} objects, {detections:,} detections, {classes} classes"
    )
    yield f"{'':<44} {'seconds':>8} {'of CPU':>8} {'peak MB':>8}"
    yield line("mAP@0.5 (sort, match, area)", lambda: ap_50(found, objects, classes), repeats)
    for factor in (2, 4):
        more, in_more = random_scenes(images * factor, detections * factor, classes)
        yield line(
            f"mAP@0.5, {factor} x as many", lambda f=more, o=in_more: ap_50(f, o, classes), repeats
        )
    whole = lambda: average_precision(found.by_score(), objects, names)  # noqa: E731
    yield line("mAP@0.5, 11 points, 50:95 (all of a test)", whole, repeats)
    yield line(
        "everything that evaluate.py reports",
        lambda: detection_report(found.by_score(), objects, names),
        1,
    )
    if compare:
        yield line("torchmetrics with faster-coco-eval", lambda: theirs(found, objects), 1)


def line(name: str, work: Callable[[], object], repeats: int) -> str:
    """Return the fastest repetition, and the most memory allocated on top of the detections."""
    clocks = []
    for _ in range(repeats):
        start, cpu_start = time.perf_counter(), time.process_time()
        work()
        clocks.append((time.perf_counter() - start, time.process_time() - cpu_start))
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    seconds, cpu = min(clocks)
    return f"{name:<44} {seconds:>8.3f} {cpu:>8.3f} {peak / 1e6:>8.0f}"


def ap_50(found: Detections, objects: Objects, classes: int) -> float:
    """Return mAP@0.5 (area), from unsorted detections."""
    ordered = found.by_score()
    matches = match_voc(ordered, objects)
    totals = np.bincount(objects.labels[~objects.ignored], minlength=classes)
    curves = (
        precision_recall(matches, ordered.labels == k, int(totals[k]))[0] for k in range(classes)
    )
    return float(np.mean([area_ap(*curve) for curve in curves]))


def theirs(found: Detections, objects: Objects) -> None:
    """Score the same with torchmetrics, from lists of tensors as it takes them."""
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision(iou_thresholds=[0.5], backend="faster_coco_eval")
    found, objects = found.at(found.images.argsort()), objects.at(objects.images.argsort())
    for image in range(int(objects.images.max()) + 1):
        rows = found.at(slice(*np.searchsorted(found.images, [image, image + 1])))
        truth = objects.at(slice(*np.searchsorted(objects.images, [image, image + 1])))
        metric.update(
            [as_tensors(rows) | {"scores": torch.from_numpy(rows.scores)}], [as_tensors(truth)]
        )
    metric.compute()


def as_tensors(items: Detections | Objects) -> dict[str, torch.Tensor]:
    return {"boxes": torch.from_numpy(items.boxes), "labels": torch.from_numpy(items.labels)}


def random_scenes(
    images: int, detections: int, classes: int, seed: int = 0
) -> tuple[Detections, Objects]:
    """Return detections of which half lie around an object, most of these with its class."""
    rng = np.random.default_rng(seed)
    count = OBJECTS_PER_IMAGE * images
    objects = Objects(
        np.sort(rng.integers(0, images, count)),
        random_boxes(rng, count),
        rng.integers(0, classes, count),
        rng.random(count) < 0.1,
    )
    source = rng.integers(0, count, detections)
    near = rng.random(detections) < 0.5
    around = objects.boxes[source] + rng.normal(0, 12, (detections, 4))
    around[:, 2:] = np.maximum(around[:, 2:], around[:, :2] + 1)
    same_class = near & (rng.random(detections) < 0.8)
    return Detections(
        np.where(near, objects.images[source], rng.integers(0, images, detections)),
        np.where(near[:, None], around, random_boxes(rng, detections)),
        rng.random(detections),
        np.where(same_class, objects.labels[source], rng.integers(0, classes, detections)),
    ), objects


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    corner, size = rng.random((count, 2)) * 350, 20 + rng.random((count, 2)) * 130
    return np.concatenate([corner, corner + size], axis=1)
