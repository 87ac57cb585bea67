"""A model's card, its results, its classes, and how to read a heat map."""

import re
from collections.abc import Sequence
from html import escape
from typing import Any

from yolo.app.samples import SampleSet
from yolo.data.class_names import VOC_CLASSES
from yolo.runs.checkpoint import LoadedWeights
from yolo.viz.draw import class_color

RESULT_ROWS = (
    ("map_50", "how well things are found and named; 1 is perfect (mAP at IoU 0.5)"),
    ("map_50_11pt", "the same as VOC 2007 counted it (11 points)"),
    ("map_50_95", "the same where frames must fit closely (mAP at IoU 0.5 to 0.95)"),
    ("class_accuracy", "right name, where something is"),
    ("object_accuracy", "places with something on which it is noticed"),
    ("no_object_accuracy", "empty places that stay silent"),
    ("object_accuracy_at_0.5", "noticed, where the model has to be half sure"),
    ("no_object_accuracy_at_0.5", "silent, where the model has to be half sure"),
    ("accuracy", "pictures with the right answer"),
    ("mean_class_accuracy", "the same, as the mean over the classes"),
)
DATA_NAMES = {"digits": "handwritten digits", "voc": "PASCAL VOC", "cifar10": "CIFAR-10"}
TASKS = {"detection": "object detection", "classification": "image classification"}
DIGITS = (
    "scikit-learn's copy of *Optical Recognition of Handwritten Digits* "
    "(E. Alpaydin, C. Kaynak, UCI Machine Learning Repository, CC BY 4.0)"
)
FLICKR = (
    "photographs from Flickr, collected for the PASCAL VOC challenges (Everingham et al.). They "
    "belong to those who took them; Flickr's terms of use apply, and they are meant for research"
)
ORIGINS = {
    ("digits", "detection"): (
        f"scenes that this project composes itself: {DIGITS} on crops of two photographs that come "
        "with scikit-learn, `china.jpg` by danielbuechele and `flower.jpg` by vultilion (Flickr, "
        "both CC BY 2.0)"
    ),
    ("digits", "classification"): DIGITS,
    ("voc", "detection"): FLICKR,
    ("cifar10", "classification"): (
        "CIFAR-10 (A. Krizhevsky, 2009), a labelled part of the Tiny Images collected from the "
        "web. Its authors state no licence; use it for research"
    ),
}
OWN_DATA = (
    "a data set of its own. Whoever publishes this model should name the source and its terms here"
)

HOW_TO_READ = """
### How to read a map

The map (called Grad-CAM) shows *which places of the picture made the model say what it says*. \
**Red**
places mattered most, **blue** ones little, and where the picture looks untouched nothing mattered.
Every map is scaled to its own strongest place: compare places within a map, never two maps.

- **Red beside the thing?** The surroundings decided. That is worth knowing: such a model fails when
  they change.
- **Something that was missed** has a dashed frame. Its map shows what looked most like it to the
  model, where it should have been found.
- **"The map is empty"** means that no place mattered to this method.
- **Methods.** *HiResCAM* and *LayerCAM* judge each place by itself. *Grad-CAM* judges the picture
  as a whole first, so it can light up other things of the kind, or nothing. *EigenCAM* shows the
  same map for everything, and is here for comparison only.

A map cannot tell *why* a place mattered, nor that nothing else would have done. It is coarse: it
divides the picture into a grid of some hundred places.
"""


def model_name(*models: LoadedWeights) -> str:
    """Return what models are called in titles, as in `YOLOv3 on PASCAL VOC`."""
    networks_of: dict[str, list[str]] = {}
    for loaded in models:
        data = DATA_NAMES.get(_data_set(loaded), "a data set of its own")
        networks_of.setdefault(data, []).append(
            "YOLOv3" if loaded.task == "detection" else "ResNet"
        )
    return ", ".join(
        f"{' and '.join(networks)} on {data}" for data, networks in networks_of.items()
    )


def literal(text: Any) -> str:
    """Return text from a weight file or a data set as Markdown that shows it as it is.

    Nothing in it becomes a link or markup.
    """
    marks = re.sub(r"[&<>\[\]*`~$\\|_]", lambda mark: f"&#{ord(mark[0])};", str(text))
    return marks.replace("://", "&#58;//")


def _code(text: str) -> str:
    """Return text for a span of code, which nothing but a backtick ends."""
    return text.replace("`", "'")


def classes_html(class_names: Sequence[str]) -> str:
    """Return the classes as chips in the colours of their boxes."""
    chips = "".join(
        f'<span class="chip"><i style="background:rgb{class_color(label)}"></i>'
        f"{escape(name)}</span>"
        for label, name in enumerate(class_names)
    )
    return f'<div class="chips">{chips}</div>'


def results_markdown(loaded: LoadedWeights) -> str:
    """Return the measured results as a table, with what they were measured on."""
    results = loaded.results
    rows = [
        f"| {title} | {results[key]:.3f} |"
        for key, title in RESULT_ROWS
        if isinstance(results.get(key), int | float)
    ]
    if not rows:
        return (
            "No results are stored in this file. Weights that a finished run exports carry theirs; "
            "`evaluate.py --checkpoint` measures any checkpoint."
        )
    table = "\n".join(["| on pictures that it was not trained on | |", "|---|--:|", *rows])
    return f"{table}\n\n{_circumstances(results)}"


def model_card(loaded: LoadedWeights, samples: SampleSet | None, model_url: str | None) -> str:
    """Return the model's card as Markdown: what it is, how it was trained, and its limits."""
    config, size = loaded.config, loaded.test_size
    fitted = (
        "scaled, with grey bars beside them"
        if loaded.task == "detection"
        else "scaled, their shape is not kept"
    )
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    where = f"the file `{_code(loaded.path.name)}`, below"
    if model_url:
        where = f"[{model_url}]({model_url})"
    origin = ORIGINS.get((_data_set(loaded), config.task), OWN_DATA)
    lines = [
        f"- **What it does:** {TASKS[loaded.task]}, {len(loaded.class_names)} classes",
        f"- **Network:** {_network(loaded)}, {parameters / 1e6:.1f} million parameters",
        f"- **Input:** {size} x {size} pixels; other pictures are {fitted}",
        f"- **Link to the model:** {where}; digest `{loaded.digest}`",
        f"- **Training data:** {origin}.",
        f"- **Last training run:** {_training(loaded)}.",
        *_sample_lines(samples),
        "- **Limits:** it knows only its classes, and only as its training data show them. Do not "
        "use it where an error can hurt somebody.",
    ]
    return "\n".join(lines)


def _data_set(loaded: LoadedWeights) -> str:
    """Return whose data it is: `voc` and `csv` are layouts, in which other data come as well."""
    if loaded.config.dataset not in ("voc", "csv"):
        return loaded.config.dataset
    return "voc" if loaded.class_names == VOC_CLASSES else "own"


def _circumstances(results: dict[str, Any]) -> str:
    stored, weights = results.get("thresholds"), results.get("weights")
    thresholds = stored if isinstance(stored, dict) and "map_50" in results else {}
    facts = [
        ("weights", "running average (EMA)" if weights == "ema" else weights),
        ("data", results.get("data")),
        ("loader", results.get("loader")),
        ("image size", results.get("test_size")),
        ("epoch", results.get("epoch")),
        *((name.replace("_", " ").replace("iou", "IoU"), at) for name, at in thresholds.items()),
    ]
    shown = " · ".join(f"{name}: {value}" for name, value in facts if value is not None)
    return f"<sub>{literal(shown)}</sub>"


def _network(loaded: LoadedWeights) -> str:
    config = loaded.config
    if loaded.task == "classification":
        return f"ResNet for 32 x 32 images at width {config.width:g}"
    if config.backbone.startswith("timm/"):
        backbone = config.backbone.removeprefix("timm/")
        return f"YOLOv3 on timm's {backbone}, necks and heads at width {config.width:g}"
    return f"YOLOv3 (Darknet-53) at width {config.width:g}"


def _training(loaded: LoadedWeights) -> str:
    config, results = loaded.config, loaded.results
    sizes = ", ".join(map(str, config.img_sizes))
    facts = [
        (
            f"{config.epochs:g} epochs of `{_code(config.train_split)}` in batches of "
            f"{config.batch_size}"
        ),
        f"images of {sizes} pixels",
        f"Adam with one cycle up to a rate of {config.max_lr:g}",
    ]
    if loaded.task == "detection" and config.mosaic_prob:
        facts.append(f"mosaics of four images on {config.mosaic_prob:.0%}")
    if isinstance(results.get("images_seen"), int):
        facts.append(f"{results['images_seen']:,} images seen")
    return "; ".join(facts)


def _sample_lines(samples: SampleSet | None) -> list[str]:
    if samples is None or not samples.samples:
        return []
    credits = sorted({sample.credit for sample in samples.samples if sample.credit})
    line = f"- **Samples:** {samples.choice} ({literal(samples.data)})"
    return [line + (f". Photographs by {literal('; '.join(credits))}." if credits else ".")]
