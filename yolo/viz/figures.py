"""Figures: training curves, an evaluation drawn from its `results.json`, grids of pictures."""

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from yolo.data.processes import map_in_processes
from yolo.files import replacing
from yolo.viz.draw import class_color

STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "text.parse_math": False,  # a $ in a class name is a $
}
INK, GREY = "#333333", "#777777"
BLUE, NAVY, ORANGE, GREEN, RED = "#2f6fbb", "#16365c", "#e07b39", "#3a9a5b", "#c8423b"
# object, no-object, class accuracy
GOALS = {"goal": (0.70, 0.95, 0.75), "better": (0.78, 0.98, 0.80)}
MAX_NAMED_CLASSES = 30
DPI = 130  # pixels per inch

_BESIDE_TITLE: dict[str, Any] = {
    "loc": "lower right",
    "bbox_to_anchor": (1, 1),
    "fontsize": 7.5,
    "columnspacing": 0.9,
    "handlelength": 0.9,
}
_OPAQUE: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "pad": 1}
_OFFSET: dict[str, Any] = {"textcoords": "offset points"}

Results = Mapping[str, Any]
Drawing = Callable[[], np.ndarray | None]  # an RGB uint8 image [H, W, 3], if there is one to draw


def evaluation_figures(
    results: Results, pictures: Mapping[str, Drawing] | None = None
) -> dict[str, np.ndarray]:
    """Draw every figure that `results` holds the numbers for, and more pictures beside them.

    Returns:
        RGB uint8 images [H, W, 3] by name, without the pictures that came to nothing.
    """
    figures: dict[str, tuple[str, Callable[[Results], Figure]]] = {
        "threshold_sweep": ("object_accuracy", threshold_sweep),
        "precision_recall": ("precision_recall", precision_recall_curves),
        "ap_per_class": ("map_50", ap_per_class),
        "ap_by_size": ("by_size", ap_by_size),
        "error_budget": ("errors", error_budget),
        "confusion_matrix": ("confusion_matrix", confusion_matrix),
        "reliability": ("calibration", reliability),
    }
    drawings = dict(pictures or {}) | {  # first what takes longest
        name: lambda draw=draw: _pixels(draw(results))
        for name, (key, draw) in figures.items()
        if results.get(key) not in (None, {})
    }
    # Where torch is, there may be threads, and a fork would inherit the locks that they hold.
    fewest = len(drawings) + 1 if "torch" in sys.modules else 2
    with matplotlib.rc_context(STYLE):
        images = map_in_processes(lambda name: drawings[name](), list(drawings), fewest)
        return {
            name: image for name, image in zip(drawings, images, strict=True) if image is not None
        }


def save_figures(figures: Mapping[str, np.ndarray], folder: Path) -> list[Path]:
    """Write each image as `<name>.png`; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor() as pool:
        files = pool.map(lambda image: cv2.imencode(".png", image[..., ::-1])[1], figures.values())
        for name, file in zip(figures, files, strict=True):
            with replacing(folder / f"{name}.png") as temporary:
                temporary.write_bytes(file.tobytes())
    return [folder / f"{name}.png" for name in figures]


def threshold_sweep(results: Results) -> Figure:
    """Object against no-object accuracy over all thresholds, and false cells per image."""
    sweep = {name: np.array(values) for name, values in results["threshold_sweep"].items()}
    found, silent, fired = (
        sweep[name] for name in ("object_accuracy", "no_object_accuracy", "false_cells_per_image")
    )
    headline = int(np.argmin(np.abs(sweep["threshold"] - 0.05)))
    figure = Figure(figsize=(9.6, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, (x, y, classes)), color in zip(GOALS.items(), (ORANGE, GREEN), strict=True):
        label = f"{name}: {x:.0%} / {y:.0%} / {classes:.0%}"
        left.plot([x, x, 1.01], [1.002, y, y], color=color, linewidth=1.2, label=label)
        left.fill_between([x, 1.01], y, 1.002, color=color, alpha=0.08, linewidth=0)
    left.plot(found, silent, color=BLUE, linewidth=2)
    for threshold, color in ((0.05, BLUE), (0.5, NAVY)):
        k = int(np.argmin(np.abs(sweep["threshold"] - threshold)))
        shares = (found[k], silent[k], results["class_accuracy"])
        label = f"at {threshold:g}: " + " / ".join(f"{share:.1%}" for share in shares)
        dot: dict[str, Any] = {"color": color, "markersize": 7, "zorder": 3}
        left.plot(found[k], silent[k], "o", clip_on=False, label=label, **dot)
        right.plot(threshold, max(fired[k], 1e-3), "o", **dot)
        right.annotate(
            f" {fired[k]:.3g} at {threshold:g}", (threshold, max(fired[k], 1e-3)), (4, 4), **_OFFSET
        )
    left.set_title("Objectness over all thresholds")
    left.set(xlabel="object accuracy", ylabel="no-object accuracy")
    left.set(xlim=(0, 1.01), ylim=(min(0.9, silent[headline] - 0.03), 1.002))
    left.legend(loc="lower left", title="object / no-object / class accuracy", alignment="left")
    _as_percent(left.xaxis, left.yaxis)
    right.plot(sweep["threshold"], np.where(fired > 0, fired, np.nan), color=BLUE, linewidth=2)
    right.set(title="False alarms", xlabel="objectness threshold")
    right.set_ylabel("empty cells that fire, per image")
    right.set(yscale="log", xlim=(0, 1))
    return figure


def precision_recall_curves(results: Results) -> Figure:
    """Precision over recall of each class at IoU 0.5, and their mean."""
    curves = {name: np.array(values) for name, values in results["precision_recall"].items()}
    figure = Figure(figsize=(7.6, 4.6), layout="constrained")
    axes = figure.add_subplot(
        title="Precision and recall at IoU 0.5", xlabel="recall", ylabel="precision"
    )
    ap = {name: results["per_class"][name]["ap_50"] for name in curves}
    recalls = np.linspace(0, 1, 101)
    names = list(results["per_class"])
    for name in sorted(curves, key=lambda name: -ap[name]):
        color = np.array(class_color(names.index(name))) / 255 * 0.85  # darker: lines are thin
        label = f"{ap[name]:.3f}  {name}" if len(curves) <= MAX_NAMED_CLASSES else None
        axes.plot(recalls, curves[name], color=color, linewidth=1.1, label=label)
    mean = np.mean(list(curves.values()), axis=0)
    axes.plot(recalls, mean, color=INK, linewidth=2.6, label=f"{results['map_50']:.3f}  mean")
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), title="AP", alignment="left")
    _as_percent(axes.xaxis, axes.yaxis)
    return figure


def ap_per_class(results: Results) -> Figure:
    """AP@0.5 and AP@0.5:0.95 of each class, sorted, with how many objects stand behind it."""
    rows = [(name, row) for name, row in results["per_class"].items() if row["ap_50"] is not None]
    rows.sort(key=lambda item: item[1]["ap_50"])
    figure = Figure(figsize=(7, 1.3 + 0.24 * len(rows)), layout="constrained")
    axes = figure.add_subplot(title=f"Average precision: mAP@0.5 {results['map_50']:.3f}")
    places = range(len(rows))
    values = np.array([row["ap_50"] for _, row in rows])
    strict = [row["ap_50_95"] for _, row in rows]
    axes.barh(places, values, color=BLUE, height=0.72, label="AP@0.5")
    axes.barh(places, strict, color=NAVY, height=0.28, label="AP@0.5:0.95")
    for place, value, (_, row) in zip(places, values, rows, strict=True):
        axes.text(value + 0.008, place, f"{value:.3f}", va="center", color=INK, bbox=_OPAQUE)
        axes.text(1.16, place, f"{row['objects']:,}", va="center", ha="right", color=GREY)
    axes.text(1.16, len(rows) - 0.3, "objects", va="bottom", ha="right", color=GREY)
    axes.axvline(results["map_50"], color=ORANGE, linewidth=1.2, linestyle="--", zorder=0.5)
    axes.set_yticks(places, [name for name, _ in rows])
    axes.set(xlim=(0, 1.17), xticks=np.arange(0, 1.01, 0.2), ylim=(-0.6, len(rows) - 0.4))
    axes.grid(visible=False, axis="y")
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.2 / (1 + 0.1 * len(rows))), ncols=2)
    return figure


def ap_by_size(results: Results) -> Figure:
    """AP of small, medium and large objects."""
    rows = results["by_size"]
    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    axes = figure.add_subplot(title="Average precision by size of the object")
    titles = {
        "small": "small\n< 32² px",
        "medium": "medium\n32² to 96² px",
        "large": "large\n> 96² px",
    }
    for k, row in enumerate(rows.values()):
        for shift, key, color in ((-0.2, "ap_50", BLUE), (0.2, "ap_50_95", NAVY)):
            value = row[key]
            axes.bar(k + shift, value or 0, width=0.38, color=color)
            text = "-" if value is None else f"{value:.3f}"
            axes.text(k + shift, (value or 0) + 0.01, text, ha="center")
    axes.set_xticks(
        range(len(rows)),
        [f"{titles[name]}\n{row['objects']:,} objects" for name, row in rows.items()],
    )
    axes.set(ylim=(0, 1.2), yticks=np.arange(0, 1.01, 0.2))
    axes.grid(visible=False, axis="x")
    axes.legend(
        handles=axes.patches[:2], labels=["AP@0.5", "AP@0.5:0.95"], ncols=2, loc="upper center"
    )
    return figure


def error_budget(results: Results) -> Figure:
    """What each kind of error costs in mAP@0.5, the most expensive on top."""
    rows = {name: row for name, row in results["errors"].items() if not name.startswith("false_")}
    order = sorted(rows, key=lambda name: rows[name]["map_cost"] or 0)
    figure = Figure(figsize=(6.4, 3), layout="constrained")
    axes = figure.add_subplot(
        title="What each kind of error costs", xlabel="mAP@0.5 gained if it were mended"
    )
    colors = {"missed": RED, "background": ORANGE}
    costs = [rows[name]["map_cost"] or 0 for name in order]
    axes.barh(order, costs, color=[colors.get(name, BLUE) for name in order], height=0.68)
    for place, (name, cost) in enumerate(zip(order, costs, strict=True)):
        what = "objects" if name == "missed" else "detections"
        value = axes.annotate(
            f"{cost:.3f}", (cost, place), (5, 0), va="center", color=INK, weight="bold", **_OFFSET
        )
        axes.annotate(
            f"  {rows[name]['count']:,} {what}",
            (1, 0.5),
            xycoords=value,
            va="center",
            color=GREY,
            fontsize=8,
        )
    axes.set_xlim(0, max(costs) * 1.4 + 1e-3)
    axes.grid(visible=False, axis="y")
    return figure


def confusion_matrix(results: Results) -> Figure:
    """Which class was found as which, in per cent of the objects of a class."""
    counts = np.array(results["confusion_matrix"])
    names = [*(results.get("per_class") or range(len(counts) - 1)), "background"][: len(counts)]
    has_background = len(names) == len(counts) and len(counts) > len(results["per_class"])
    side = max(4.2, 1.8 + 0.34 * len(counts))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot(
        title="What was found as what (% of the objects)", xlabel="found as", ylabel="truth"
    )
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    # 441 texts inside the axes need not be laid out
    cell: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 6.5, "in_layout": False}
    for row, column in np.argwhere(counts):
        of_background = has_background and row == len(counts) - 1
        text = f"{counts[row, column]}" if of_background else f"{share[row, column] * 100:.0f}"
        color = "white" if share[row, column] > 0.55 else INK
        axes.text(column, row, text, color=color, **cell)
    columns = [*names[:-1], "not found"] if has_background else names
    rows = [*names[:-1], "background (count)"] if has_background else names
    slanted: dict[str, Any] = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(names)), columns, **(slanted if max(map(len, columns)) > 3 else {}))
    axes.set_yticks(range(len(names)), rows)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def reliability(results: Results) -> Figure:
    """How often a detection is right, over how confident it is."""
    bins = results["calibration"]["bins"]
    figure = Figure(figsize=(4.6, 4.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    confidence = np.array([row["confidence"] for row in bins])
    accuracy = np.array([row["accuracy"] for row in bins])
    top.plot([0, 1], [0, 1], color="#aaaaaa", linestyle="--", linewidth=1, label="honest")
    top.vlines(
        confidence,
        np.minimum(confidence, accuracy),
        np.maximum(confidence, accuracy),
        color=RED,
        alpha=0.5,
    )
    top.plot(confidence, accuracy, "o-", color=BLUE, linewidth=1.6, markersize=5)
    error = results["calibration"]["expected_error"]
    title = "Are the scores honest?" + ("" if error is None else f"  ECE {error:.3f}")
    top.set(title=title, ylabel="share that is right", xlim=(0, 1), ylim=(0, 1.02))
    top.legend(loc="upper left")
    bottom.bar(confidence, [row["count"] for row in bins], width=0.05, color=BLUE)
    bottom.set(xlabel="score", ylabel="detections", yscale="log")
    return figure


def picture_grid(
    tiles: Sequence[tuple[np.ndarray, str]], title: str, columns: int = 4
) -> np.ndarray:
    """Return small pictures with captions as one RGB image.

    Args:
        tiles: RGB uint8 images of any size, each with the line under it.
        title: of the whole.
        columns: how many side by side.
    """
    rows = max(1, -(-len(tiles) // columns))
    shape = max(image.shape[0] / image.shape[1] for image, _ in tiles)
    # inches of a tile, its picture and its caption; to lay out axes for each would take a second
    width, height, room = 2.4, 2.3 * shape, 0.42
    size = (width * columns, (height + room) * rows + 0.4)
    corners = [  # the middle of each picture's upper edge
        (width * (k % columns + 0.5), 0.4 + room + (height + room) * (k // columns))
        for k in range(len(tiles))
    ]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size)
        figure.text(0.5, 1 - 0.25 / size[1], title, ha="center", va="center", weight="bold")
        for (x, y), (_, caption) in zip(corners, tiles, strict=True):
            at = (x / size[0], 1 - (y - 0.04) / size[1])
            figure.text(*at, caption, ha="center", va="bottom", fontsize=8)
        canvas = _pixels(figure)
    for (x, y), (image, _) in zip(corners, tiles, strict=True):
        zoom = min((width - 0.1) / image.shape[1], height / image.shape[0]) * DPI
        sides = [max(1, round(side * zoom)) for side in image.shape[1::-1]]
        left, top = round(x * DPI - sides[0] / 2), round(y * DPI)
        smooth = cv2.INTER_AREA if zoom < 1 else cv2.INTER_LINEAR
        shown = cv2.resize(image, sides, interpolation=smooth)[: len(canvas) - top]
        canvas[top : top + len(shown), left : left + sides[0]] = shown
    return canvas


def plot_curves(metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw what a run logged over its steps: loss terms, test numbers, learning rate and speed.

    Args:
        metrics: the lines of `metrics.jsonl`.
        path: PNG to write.
    """
    train = [line for line in metrics if line["kind"] == "train"]
    tests = [line for line in metrics if line["kind"] == "evaluation"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 6), layout="constrained")
        (losses, scores), (rates, speeds) = figure.subplots(2, 2, sharex=True)
        _draw_losses(losses, train)
        _draw_scores(scores, tests)
        rates.plot(*_series(train, "lr"), color=ORANGE)
        rates.set(title="Learning rate", xlabel="optimizer step", ylim=(0, None))
        speeds.plot(*_series(train, "images_per_second"), color=BLUE)
        speeds.set(title="Images per second", xlabel="optimizer step", ylim=(0, None))
        save_figures({path.stem: _pixels(figure)}, path.parent)


def _draw_losses(axes: Axes, train: Sequence[Mapping[str, Any]]) -> None:
    for name, color in {"box": BLUE, "object": GREEN, "no_object": ORANGE, "class": RED}.items():
        steps, values = _series(train, name)
        if steps:
            axes.plot(steps, values, label=name.replace("_", "-"), color=color, linewidth=1.2)
    axes.plot(*_series(train, "loss"), label="sum", color=INK, linewidth=1.8)
    axes.set(title="Training loss", yscale="log")
    axes.legend(ncols=5, **_BESIDE_TITLE)


def _draw_scores(axes: Axes, tests: Sequence[Mapping[str, Any]]) -> None:
    names = {
        "class_accuracy": ("class", RED),
        "object_accuracy": ("object", GREEN),
        "no_object_accuracy": ("no-object", ORANGE),
        "accuracy": ("accuracy", BLUE),
        "map_50": ("mAP@0.5", BLUE),
    }
    for key, (label, color) in names.items():
        steps, values = _series(tests, key)
        if steps:
            axes.plot(
                steps, values, "o-", label=f"{label} {values[-1]:.3f}", color=color, markersize=4
            )
    axes.set(title="Test", ylim=(0, 1.02))
    axes.legend(ncols=4, **_BESIDE_TITLE)


def _series(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _pixels(figure: Figure) -> np.ndarray:
    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # what the font lacks is drawn as a box
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _as_percent(*axis: Any) -> None:
    for one in axis:
        one.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
