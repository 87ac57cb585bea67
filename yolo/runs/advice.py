"""What to do next: at most three sentences about a detector's figures, each with its command."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from yolo.boxes import letterbox
from yolo.errors import UserError
from yolo.runs.folder import RunFolder
from yolo.runs.logbook import read_metrics

MOST = 3
STILL_RISES = 0.01  # of mAP, in the last third of the tests
FEW_BOXES = 30  # of a class, to learn from
SMALL_SIDE = 8.0  # pixels of the network input: the finest grid has cells of this size
SMALL_SHARE = 0.25  # of the boxes
FAR_ABOVE = 1.6  # times the training loss, which is of harder, augmented pictures
FALSE = 0.5  # precision


def training_facts(dataset: Any, test_size: int) -> dict[str, Any]:
    """Return what the advice needs of the training pictures: `boxes` by class, `small` share."""
    notes = getattr(dataset, "annotations", ())
    if not notes:
        return {}
    labels = np.concatenate([note.labels for note in notes])
    sides = [
        np.sqrt((note.boxes[:, 2:] - note.boxes[:, :2]).prod(axis=1))
        * letterbox(note.height, note.width, test_size).scale
        for note in notes
    ]
    counts = np.bincount(labels, minlength=len(dataset.class_names)).tolist()
    small = float((np.concatenate(sides) < SMALL_SIDE).mean()) if len(labels) else 0.0
    return {"boxes": dict(zip(dataset.class_names, counts, strict=True)), "small": small}


def advice(folder: RunFolder, results: Mapping[str, Any]) -> list[str]:
    """Return at most three sentences about a run, from its records and what was measured last.

    A run whose records are damaged gets none.

    Args:
        folder: of the run.
        results: of the test at its end, or of a later evaluation.
    """
    if not folder.config.exists() or "class_accuracy" not in results:
        return []
    try:
        return _sentences(folder, results)[:MOST]
    except (OSError, UserError, AttributeError, KeyError, TypeError, ValueError):
        return []


def _sentences(folder: RunFolder, results: Mapping[str, Any]) -> list[str]:
    config, _ = folder.read_config()
    training = results.get("training") or folder.read_results().get("training") or {}
    lines = read_metrics(folder.metrics)
    return [
        *_too_short(folder, config, lines),
        *_overfitted(config, lines),
        *_few_boxes(config, training),
        *_small_boxes(config, training),
        *_false_boxes(folder, results),
    ]


def _too_short(
    folder: RunFolder, config: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    tests = [line["map_50"] for line in lines if line.get("map_50") is not None]
    if len(tests) < 3:
        return
    before, last = max(tests[: -(len(tests) // 3)]), tests[-1]
    if last == max(tests) and last - before > STILL_RISES:
        yield (
            f"mAP still rose in the last third of the run ({before:.3f} to {last:.3f}): train "
            f"longer, python train.py --resume {folder.path} --epochs {2 * config['epochs']:g} "
            "--replan"
        )


def _overfitted(config: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    tested = [line["validation_loss"] for line in lines if "validation_loss" in line]
    trained = [line["loss"] for line in lines if line["kind"] == "train"]
    if not tested or not trained:
        return
    ratio = tested[-1] / max(float(np.mean(trained[-5:])), 1e-9)
    if ratio > FAR_ABOVE:
        yield (
            f"the loss on validation pictures is {ratio:.1f} times that on training pictures, "
            "which are known by heart: add pictures, or train for less, python train.py "
            f"--data-root {config['data_root']} --epochs {config['epochs'] / 2:g}"
        )


def _few_boxes(config: Mapping[str, Any], training: Mapping[str, Any]) -> Iterator[str]:
    boxes: Mapping[str, int] = training.get("boxes", {})
    rare = min(boxes, key=lambda name: boxes[name], default=None)
    if rare is not None and boxes[rare] < FEW_BOXES:
        yield (
            f"{rare} has {boxes[rare]} boxes to learn from: label more of it ({FEW_BOXES} at "
            f"least); python train.py --data-root {config['data_root']} --check-data counts them"
        )


def _small_boxes(config: Mapping[str, Any], training: Mapping[str, Any]) -> Iterator[str]:
    if training.get("small", 0) > SMALL_SHARE:
        sizes = [min(2 * size, 832) for size in config["img_sizes"][-2:]]
        test_size = max(sizes)
        yield (
            f"{training['small']:.0%} of the boxes are under {SMALL_SIDE:g} pixels wide for the "
            "network, less than its anchors: show it larger pictures, python train.py --data-root "
            f"{config['data_root']} --img-sizes {','.join(map(str, sizes))} --test-size {test_size}"
        )


def _false_boxes(folder: RunFolder, results: Mapping[str, Any]) -> Iterator[str]:
    shown, best = results.get("shown") or {}, results.get("best_f1_confidence")
    precision = shown.get("precision", results.get("best_f1_precision"))
    if precision is None or precision >= FALSE or best is None:
        return
    threshold = shown.get("score_threshold", best)
    higher = max(best, min(0.95, threshold + 0.2))
    yield (
        f"of the boxes shown from a confidence of {threshold:.2f} on, {precision:.0%} are right: "
        f"show fewer, python evaluate.py --checkpoint {folder.path} --images DIR --score-threshold "
        f"{higher:.2f}"
    )
