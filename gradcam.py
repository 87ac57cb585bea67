"""Grad-CAM: heat maps of what raised a detection's score, and measures of how faithful they are.

python gradcam.py --images photo.jpg                       # the most confident box, as gradcam.png
python gradcam.py --images 'photos/*.jpg' --box all --output maps     # every box of every picture
python gradcam.py --images photo.jpg --method gradcam,layercam,eigencam --target object
python gradcam.py --images photo.jpg --class-name dog      # the whole picture's map of a class
python gradcam.py --images photo.jpg --class-name dog --missed 40,52,75,90   # of a missed object
python gradcam.py --evaluate --num-images 100 --data-root VOCdevkit   # pointing game, deletion, ...
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from yolo import cli
from yolo.config import Floats
from yolo.errors import UsageError, UserError
from yolo.files import free_path, write_json

if TYPE_CHECKING:
    from yolo.explain.cam import CamSettings
    from yolo.explain.panels import Question
    from yolo.runs.checkpoint import LoadedWeights
    from yolo.runs.logbook import Progress


@dataclass(frozen=True, kw_only=True)
class GradcamArgs:
    """What to explain, and how."""

    checkpoint: str | None = None
    """A run folder, a `.ckpt` or a `.safetensors` file, detector or classifier. Default: the
    bundled VOC detector."""
    last: bool = False
    """Of a run folder take the newest checkpoint, not the best."""
    images: str | None = None
    """A picture, a folder of pictures, or a glob in quotes."""
    output: str | None = None
    """PNG for one picture, else a folder. Default: `gradcam.png` or `gradcam/`."""
    method: str | None = None
    """gradcam, gradcam++, xgradcam, hirescam, layercam, eigencam; several with commas.
    Default: hirescam for a detector, gradcam for a classifier."""
    target: Literal["class", "object", "score"] = "class"
    """What is differentiated: the class's logit, the objectness logit, or the log of the score."""
    box: int | Literal["all"] = 0
    """Which detection, counted from the most confident, 0."""
    layer: str = "auto"
    """auto or fused; a detector has stride32, stride16, stride8, a classifier layer1 to layer3."""
    class_name: str | None = None
    """Explain this class: over the whole picture, or of the object that --missed names."""
    missed: Annotated[Floats, tyro.conf.arg(metavar="LEFT,TOP,RIGHT,BOTTOM")] = ()
    """Box in pixels of an object that was not found: explain the cell responsible for it."""
    score_threshold: float = 0.3
    """Lowest score of a detection."""
    opacity: float = 0.7
    """Of the hottest pixel."""
    evaluate: bool = False
    """Measure the maps on a test split: pointing game, energy, deletion, insertion, new head."""
    num_images: int = 50
    """With --evaluate: so many images, drawn at random. Each map costs 23 forward passes."""
    data_root: str | None = None
    """With --evaluate: folder of the data set, if not that of the training."""
    split: str | None = None
    """With --evaluate: the split, if not the test split of the training."""
    seed: int = 0
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        """Refuse what cannot be explained."""
        if not self.evaluate and self.images is None:
            raise UsageError("nothing to explain: give --images PATH|DIR|GLOB, or --evaluate")
        if self.missed and (len(self.missed) != 4 or self.class_name is None):
            raise UsageError(
                "--missed: want left,top,right,bottom in pixels, and --class-name of the object"
            )
        if isinstance(self.box, int) and self.box < 0:
            raise UsageError(
                f"--box {self.box}: detections are counted from 0; `all` explains every one"
            )
        if not 0 <= self.opacity <= 1 or not 0 <= self.score_threshold <= 1:
            raise UsageError("--opacity and --score-threshold must lie between 0 and 1")
        if self.num_images < 1:
            raise UsageError(f"--num-images {self.num_images}: must be positive")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, load, explain or measure; return the exit code."""
    args = cli.parse(GradcamArgs, argv, __doc__ or "")

    import torch

    from yolo.runs.checkpoint import load_weights, resolve_checkpoint

    if args.accelerator == "cuda" and not torch.cuda.is_available():
        raise UsageError("--accelerator cuda: no CUDA device is visible to torch")
    loaded = load_weights(resolve_checkpoint(args.checkpoint, last=args.last))
    loaded.model.to("cuda" if torch.cuda.is_available() and args.accelerator != "cpu" else "cpu")
    return evaluate(args, loaded) if args.evaluate else explain_pictures(args, loaded)


def explain_pictures(args: GradcamArgs, loaded: "LoadedWeights") -> int:
    """Write one PNG per picture; a picture that fails costs a line, not the others."""
    from yolo.data.images import list_pictures
    from yolo.explain.panels import make_panels, save_panels

    question = make_question(args, loaded)
    pictures = list_pictures(args.images or "")
    failed = 0
    for picture, output in zip(pictures, output_paths(args.output, pictures), strict=True):
        try:
            panels = make_panels(loaded, picture, question)
            save_panels(panels, output)
        except UsageError:
            raise
        except UserError as error:
            if len(pictures) == 1:
                raise
            print(f"{picture}: error: {error}")
            failed += 1
        else:
            titles = "; ".join(panel.title.replace("\n", ", ") for panel in panels)
            print(f"{picture}: {titles} -> {output}")
    return 1 if failed else 0


def make_question(args: GradcamArgs, loaded: "LoadedWeights") -> "Question":
    """Translate the flags.

    Raises:
        UsageError: if the model does not know the class.
    """
    from yolo.explain.panels import Question

    if args.class_name is not None and args.class_name not in loaded.class_names:
        known = ", ".join(loaded.class_names)
        raise UsageError(
            f"--class-name {args.class_name}: the model does not know it; it knows {known}"
        )
    return Question(
        cams=cam_settings(args, loaded),
        box=None if args.box == "all" else args.box,
        label=None if args.class_name is None else loaded.class_names.index(args.class_name),
        missed=args.missed or None,
        score_threshold=args.score_threshold,
        opacity=args.opacity,
    )


def cam_settings(args: GradcamArgs, loaded: "LoadedWeights") -> "tuple[CamSettings, ...]":
    """Return the settings of each name in `--method`, or of the default method of the task."""
    from yolo.explain.cam import CLASSIFIER_METHOD, DETECTOR_METHOD, CamSettings

    default = CLASSIFIER_METHOD if loaded.anchors is None else DETECTOR_METHOD
    methods = (args.method or default).split(",")
    return tuple(CamSettings(method, args.target, args.layer) for method in methods)


def output_paths(output: str | None, pictures: Sequence[Path]) -> list[Path]:
    """Return where the PNG of each picture goes: nowhere that something lies already.

    Raises:
        UsageError: if the output of one picture is no PNG, or that of several is a file.
    """
    if len(pictures) == 1 and not Path(output or "gradcam.png").is_dir():
        path = Path(output or "gradcam.png")
        if path.suffix.lower() != ".png":
            raise UsageError(f"--output {path}: must end in .png, or be a folder that exists")
        return [free_path(path)]
    folder = Path(output or "gradcam")
    if folder.is_file() or folder.suffix.lower() == ".png":
        raise UsageError(f"--output {folder}: must be a folder, there are {len(pictures)} pictures")
    paths: list[Path] = []
    for picture in pictures:  # with the old suffix, for a.jpg and a.png may be in one folder
        paths.append(free_path(folder / f"{picture.name}.png", taken=paths))
    return paths


def evaluate(args: GradcamArgs, loaded: "LoadedWeights") -> int:
    """Measure the methods' maps, EigenCAM's and random ones: a table and explanations.json."""
    from yolo.explain import faithfulness
    from yolo.models.resnet import ResNet
    from yolo.runs.logbook import Progress
    from yolo.runs.provenance import hardware, provenance
    from yolo.runs.trust import check_data_named
    from yolo.tasks.build import open_split

    given = {name: getattr(args, name) for name in ("data_root", "split") if getattr(args, name)}
    config = dataclasses.replace(loaded.config, **given)
    check_data_named(loaded, config)
    test = open_split(config, loaded.class_names, loaded.anchors)
    images = faithfulness.draw_images(len(test.dataset), args.num_images, args.seed)
    progress = Progress(len(images), "explaining", enabled=True)
    cams = cam_settings(args, loaded)
    methods = tuple(dict.fromkeys([*(settings.method for settings in cams), "eigencam"]))
    drawn = counted(images, progress)
    subjects: Iterable[faithfulness.Subject]
    if isinstance(loaded.model, ResNet):
        subjects = faithfulness.classified_images(loaded.model, test.dataset, drawn, cams[0])
    else:
        subjects = faithfulness.detected_objects(
            loaded, test.dataset, drawn, cams[0], args.score_threshold
        )
    explained, results = faithfulness.measure(subjects, methods, args.seed)
    if not explained:
        raise UserError(
            f"{test.dataset.name}: the model is right on none of {len(images)} images at a score "
            f"of {args.score_threshold}: nothing to explain; take more --num-images or train longer"
        )
    print("\n".join(measure_lines(results)))
    content = {
        "data": test.dataset.name,
        "images": len(images),
        "explained": explained,
        **{name: getattr(args, name) for name in ("target", "layer", "score_threshold", "seed")},
        "shares": faithfulness.SHARES.tolist(),
        "methods": results,
        "checkpoint": str(loaded.path),
        "checkpoint_digest": loaded.digest,
        "hardware": hardware(next(loaded.model.parameters()).device),
        **provenance(),
    }
    path = free_path(Path(args.output or "gradcam") / "explanations.json")
    write_json(path, content)
    print(
        f"{explained} correct predictions in {len(images)} images of {test.dataset.name} -> {path}"
    )
    return 0


def counted(images: Sequence[int], progress: "Progress") -> Iterator[int]:
    """Yield the images and show how far they are."""
    for done, index in enumerate(images):
        if done and done % 10 == 0:
            progress.note(f"{done} of {len(images)} images")
        yield index
        progress.update()
    progress.close()


def measure_lines(results: dict[str, dict[str, Any]]) -> list[str]:
    """Return a table: a line per method."""
    columns = (
        "deletion",
        "insertion",
        "pointing",
        "energy",
        "area",
        "zero",
        "similarity_after_reset",
    )
    shown = [name for name in columns if any(name in measures for measures in results.values())]
    lines = [f"{'':12}" + "".join(f"{name.removesuffix('_after_reset'):>12}" for name in shown)]
    for method, measures in results.items():
        values = "".join(
            f"{measures[name]:12.3f}" if name in measures else f"{'-':>12}" for name in shown
        )
        flag = (
            "  BLIND: the map hardly changes when the head is re-initialised"
            if measures.get("blind")
            else ""
        )
        lines.append(f"{method:12}{values}{flag}")
    return lines


if __name__ == "__main__":
    cli.run(main)
