"""An evaluation on the disk and on the terminal: `results.json`, plots, TensorBoard, a table.

The measured numbers come from yolo/metrics; lines of a training alone are added by `Run.finish`, of
evaluate.py alone by its `measure`.
"""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from yolo.config import Config
from yolo.files import write_json
from yolo.runs.folder import RunFolder
from yolo.runs.logbook import duration, read_metrics, summary_lines
from yolo.runs.provenance import hardware, provenance
from yolo.viz.figures import Drawing, evaluation_figures, plot_curves, save_figures

if TYPE_CHECKING:  # scoring somebody's detections does without torch: two seconds less
    import torch

    from yolo.tasks.base import EvalSplit


def result_record(measured: Mapping[str, Any], dataset: Any, **about: Any) -> dict[str, Any]:
    """Return what was measured with everything that is needed to measure it again.

    Args:
        measured: numbers as the metrics computed them.
        dataset: what they were measured on.
        about: whose predictions they are, as from `about_model`.
    """
    finished = time.strftime("%Y-%m-%d %H:%M:%S %z")
    data = {"data": dataset.name, "skipped": len(dataset.skipped)}
    return {**measured, **about, **data, "finished": finished, **provenance()}


def about_model(
    cfg: Config, split: "EvalSplit", device: "torch.device", processes: int
) -> dict[str, Any]:
    """Return how the averaged weights were tested: what they saw, the thresholds, the machine."""
    names = ("score_threshold", "iou_threshold", "max_detections", "nms")
    return {
        "weights": "ema",
        "loader": split.loader,
        "test_size": cfg.resolved_test_size,
        "thresholds": {name: getattr(cfg, name) for name in names},
        "hardware": hardware(device, processes),
    }


def write_results(folder: RunFolder, record: Mapping[str, Any], seconds: float) -> str:
    """Write `results.json` and curves of a run that took `seconds`; return the closing table."""
    write_json(folder.results, record)
    lines = read_metrics(folder.metrics)
    plot_curves(lines, folder.plots / "curves.png")
    speeds = [line["images_per_second"] for line in lines if "images_per_second" in line]
    rows = [
        ("data", record["data"]),
        ("images seen", record["images_seen"]),
        ("images per second", f"{np.median(speeds):.1f}" if speeds else "-"),
        ("time of this process", duration(seconds)),
        ("run folder", folder.path),
    ]
    return "\n".join(summary_lines(record, rows))


def write_evaluation(
    folder: Path, results: Mapping[str, Any], pictures: Mapping[str, Drawing]
) -> None:
    """Write `results.json`, each figure and picture to `plots/`, and all as TensorBoard events."""
    write_json(folder / "results.json", results)
    images = evaluation_figures(results, pictures)
    save_figures(images, folder / "plots")
    numbers = {name: value for name, value in results.items() if isinstance(value, float)}
    values = [
        *(Summary.Value(tag=f"evaluation/{name}", simple_value=numbers[name]) for name in numbers),
        *(Summary.Value(tag=name, image=_event_image(image)) for name, image in images.items()),
    ]
    events = EventFileWriter(str(folder))
    step = results.get("step") or 0
    events.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
    events.close()


def _event_image(image: np.ndarray) -> Summary.Image:
    """Return an image as JPEG: TensorBoard's checksum takes .2 s for the PNG of a photograph."""
    height, width, colors = image.shape
    encoded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1]
    return Summary.Image(
        height=height, width=width, colorspace=colors, encoded_image_string=encoded.tobytes()
    )


def table(results: Mapping[str, Any], rows: list[tuple[str, Any]]) -> str:
    """Return what people want to read: headlines, classes, sizes, errors, calibration, `rows`."""
    shown, calibration = results.get("shown"), results.get("calibration")
    if shown and shown["precision"] is not None:
        at = f"shown (score >= {shown['score_threshold']})"
        recall = "-" if shown["recall"] is None else f"{shown['recall']:.3f}"
        rows = [(at, f"precision {shown['precision']:.3f}, recall {recall}"), *rows]
    if calibration and calibration["expected_error"] is not None:
        rows = [("calibration error (ECE)", f"{calibration['expected_error']:.4f}"), *rows]
    if (silent := results.get("at_no_object_98", {})).get("object_accuracy") is not None:
        at = f"objectness > {silent['threshold']:g}, no-object {silent['no_object_accuracy']:.4f}"
        rows = [
            ("object accuracy where no-object is 98 %", f"{silent['object_accuracy']:.4f} ({at})"),
            *rows,
        ]
    chosen = results.get("at_chosen_threshold")
    if (
        chosen
        and chosen["object_accuracy"] is not None
        and chosen["no_object_accuracy"] is not None
    ):
        accuracies = f"{chosen['no_object_accuracy']:.4f} / {chosen['object_accuracy']:.4f}"
        at = f"objectness > {chosen['threshold']:g}, chosen on other pictures"
        rows = [("no-object / object accuracy", f"{accuracies} ({at})"), *rows]
    if (before := (results.get("calibrated") or {}).get("expected_error_before")) is not None:
        rows = [("calibration error before", f"{before:.4f}"), *rows]
    if results.get("tta", "none") != "none":
        rows = [("test-time augmentation", results["tta"]), *rows]
    if undefined := results.get("classes_without_objects"):
        rows = [("without objects (AP undefined)", ", ".join(undefined)), *rows]
    blocks = ["\n".join(summary_lines(results, rows))]
    if results.get("map_50") is not None:
        parts = (_class_lines, _size_lines, _error_lines)
        blocks += ["\n".join(lines(results)) for lines in parts]
    elif "accuracy" in results:
        blocks.append("\n".join(_accuracy_lines(results)))
    return "\n\n".join(blocks)


def _class_lines(results: Mapping[str, Any]) -> Iterator[str]:
    width = max(map(len, [*results["per_class"], "class"]))
    accuracies = results.get("class_accuracy_by_class", {})
    yield f"  {'class':<{width}}  objects   AP@0.5  11-point  0.5:0.95  class accuracy"
    for name, row in results["per_class"].items():
        scores = "".join(_cell(row[key], 10) for key in ("ap_50_11pt", "ap_50_95"))
        accuracy = _cell(accuracies.get(name), 16)
        yield f"  {name:<{width}} {row['objects']:>8} {_cell(row['ap_50'], 8)}{scores}{accuracy}"


def _accuracy_lines(results: Mapping[str, Any]) -> Iterator[str]:
    width = max(map(len, [*results["per_class"], "class"]))
    yield f"  {'class':<{width}}   images  accuracy"
    for name, row in results["per_class"].items():
        yield f"  {name:<{width}} {row['images']:>8} {_cell(row['accuracy'], 9)}"


def _size_lines(results: Mapping[str, Any]) -> Iterator[str]:
    accuracies = results.get("class_accuracy_by_size", {})
    yield "  size     objects   AP@0.5  0.5:0.95  class accuracy"
    for name, row in results["by_size"].items():
        scores = f"{_cell(row['ap_50'], 8)}{_cell(row['ap_50_95'], 10)}"
        yield f"  {name:<7} {row['objects']:>8} {scores}{_cell(accuracies.get(name), 16)}"


def _error_lines(results: Mapping[str, Any]) -> Iterator[str]:
    yield "  error             count   mAP@0.5 it costs"
    for name, row in results["errors"].items():
        yield f"  {name.replace('_', ' '):<15} {row['count']:>7} {_cell(row['map_cost'], 18)}"


def _cell(value: float | None, width: int) -> str:
    return f"{'-' if value is None else f'{value:.4f}':>{width}}"
