"""Measure a trained model, score anybody's detections, or let a model answer about pictures.

python evaluate.py --checkpoint runs/digits-...                 # table, plots, results.json
python evaluate.py --checkpoint C --data-root VOCdevkit --split 2007:test
python evaluate.py --checkpoint C --write-detections DIR        # as comp4_det_<split>_<class>.txt
python evaluate.py --detections DIR --data-root VOCdevkit --split 2007:test --matching devkit
python evaluate.py --images photo.jpg                           # the newest run's model, or ours
python evaluate.py --images DIR|GLOB|URL|film.mp4|webcam:0      # boxes drawn, JSON, CSV or mp4
python evaluate.py --images DIR --write-labels yolo             # a start for labelling the next
python evaluate.py --checkpoint C --split 2007:val --calibrate  # C-calibrated.safetensors beside it
python evaluate.py --checkpoint C --export model.onnx           # or model.safetensors
python evaluate.py --checkpoint C --export model.onnx --nms merge   # boxes, scores, labels
"""

import dataclasses
import gc
import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from yolo import cli
from yolo.config import Config, HardwareConfig
from yolo.errors import UsageError, UserError
from yolo.files import free_path

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from yolo.inference.predict import Detector
    from yolo.inference.sources import Video
    from yolo.metrics.matching import Detections, Objects
    from yolo.runs.checkpoint import LoadedWeights
    from yolo.viz.figures import Drawing


T = TypeVar("T", bound=Config)
# what makes a folder one of results, of evaluate.py or a run
WRITTEN = ("results.json", "plots", "predictions.json", "predictions.jsonl", "pictures")


@dataclass(frozen=True, kw_only=True)
class EvaluateArgs(HardwareConfig):
    """What to measure; settings of the data that are not given are those of the training run."""

    checkpoint: str | None = None
    """A run folder (its best checkpoint), a `.ckpt` or a `.safetensors` file."""
    last: bool = False
    """Of a run folder take the newest checkpoint, not the best."""
    detections: str | None = None
    """Instead of a checkpoint: a folder of any detector's `comp4_det_<split>_<class>.txt`."""
    images: str | None = None
    """Predict instead of measure: a picture, a folder of pictures, a glob in quotes, a video file,
    `webcam:0`, or the address of a picture, video or camera. Without --checkpoint by the best
    weights of the newest run, else by the bundled ones."""
    write_labels: Literal["yolo", "voc", "coco"] | None = None
    """With --images: write what was found as label files too, to be corrected and trained on."""
    dataset: Literal["digits", "voc", "csv", "yolo", "coco", "cifar10", "images"] | None = None
    """Layout of the data. With --detections: `voc` by default."""
    data_root: str | None = None
    """Folder of the data set."""
    split: str | None = None
    """As in `2007:test`."""
    classes: str = "auto"
    """With --detections: `voc`, `auto` (those in the split), or a comma list."""
    test_size: int | None = None
    """Side in pixels of the network input."""
    batch_size: int | None = None
    """Images at a time."""
    score_threshold: float | None = None
    """Lowest score that enters mAP or, with --images, that is drawn (default there: the
    one at the best F1 of the training, else 0.3)."""
    iou_threshold: float | None = None
    """Overlap above which non-maximum suppression drops the weaker box of a class."""
    nms: Literal["standard", "merge"] | None = None
    """`merge`: a kept box is the mean, weighted by score, of those around the same object. With
    --export FILE.onnx: put it into the model, which then gives boxes, scores and labels."""
    max_detections: int | None = None
    """Most detections kept per image."""
    matching: Literal["plain", "devkit"] = "plain"
    """`devkit` wants an IoU above 0.5, `plain` at least 0.5; both count whole pixels."""
    tta: Literal["none", "flip"] = "none"
    """`flip`: answer with the mean over each picture and its mirror image, in twice the time."""
    calibrate: bool = False
    """Refit the scores on --split, which must hold pictures that the weights have not seen, and
    write `<checkpoint>-calibrated.safetensors` beside the checkpoint."""
    mosaic: bool = False
    """Measure the cells on mosaics of four test images instead of single ones. No mAP."""
    write_detections: str | None = None
    """Write the detections into this folder, as the VOC devkit reads them."""
    skip_bad: bool = False
    """Leave out unreadable images and broken boxes, and print what was left out."""
    export: str | None = None
    """Instead of measuring: write the model as `.onnx` (any batch and size) or `.safetensors`."""
    fast: bool = False
    """Fold batch normalisation; compute in bfloat16 (CPUs that have it) or half precision (GPU)."""
    out_dir: str | None = None
    """Folder of the results. Default: `evaluations/<time>/` in the run folder."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        if (self.checkpoint and self.detections) or not (
            self.checkpoint or self.detections or self.images
        ):
            raise UsageError(
                "give --checkpoint FILE to measure it, --images SOURCE to predict, or "
                "--detections DIR to score somebody's files"
            )
        if self.write_labels and not self.images:
            raise UsageError("--write-labels writes what is found on pictures: give --images")
        if self.detections and (self.images or self.mosaic or self.write_detections or self.export):
            raise UsageError(
                "--detections is scored as it is: --images, --mosaic, --write-detections and "
                "--export need a --checkpoint"
            )
        if self.calibrate and (self.split is None or self.mosaic or self.images or self.export):
            raise UsageError(
                "--calibrate needs --split, pictures that the weights have not seen, and goes "
                "without --mosaic, --images and --export"
            )
        if self.mosaic and self.write_detections:
            raise UsageError("--write-detections needs whole images: leave out --mosaic")

    def over(self, trained: T) -> T:
        """Return the configuration of the training with everything that was given here."""
        names = {field.name for field in dataclasses.fields(Config)} - {"classes"}
        given = {name: getattr(self, name, None) for name in names}
        given["skip_bad"] = self.skip_bad or trained.skip_bad
        return dataclasses.replace(
            trained, **{name: value for name, value in given.items() if value is not None}
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, load, measure or predict; return the exit code."""
    args = cli.parse(EvaluateArgs, argv, __doc__ or "")
    if args.detections is not None:
        with without_garbage_collection():
            return score_files(args)

    from yolo.runs.checkpoint import load_weights, resolve_checkpoint
    from yolo.runs.folder import list_runs

    newest = next(iter(list_runs()), None)
    loaded = load_weights(resolve_checkpoint(args.checkpoint or newest, last=args.last))
    if args.export:
        from yolo.inference.export import export

        trained = args.over(loaded.config)
        if args.score_threshold is not None:
            loaded.confidence = args.score_threshold
        loaded = dataclasses.replace(loaded, config=trained)
        print(export(loaded, Path(args.export), nms=args.nms is not None))
        return 0
    if args.images:
        return predict_pictures(args, loaded)
    if args.calibrate:
        return calibrate(args, loaded)
    measure(args, loaded)
    return 0


def calibrate(args: EvaluateArgs, loaded: "LoadedWeights") -> int:
    """Refit the scores on the split, measure them there, and write the weights as a new file."""
    from yolo.engine.calibrate import calibrate_scores
    from yolo.engine.fabric import make_fabric
    from yolo.runs.checkpoint import publish_weights
    from yolo.runs.trust import check_data_named
    from yolo.tasks.build import open_split

    path = loaded.path.with_name(f"{loaded.path.stem}-calibrated.safetensors")
    if loaded.task != "detection" or loaded.calibration is not None:
        what = "is a classifier" if loaded.task != "detection" else "is calibrated already"
        raise UserError(
            f"{args.checkpoint}: {what}; --calibrate wants a detector as it was trained"
        )
    if path.exists():
        raise UserError(f"{path}: is there already; move it away to calibrate anew")
    cfg = args.over(loaded.config)
    check_data_named(loaded, cfg)
    fabric, _ = make_fabric(cfg)
    split = open_split(cfg, loaded.class_names, loaded.anchors)
    calibrated = calibrate_scores(fabric, cfg, loaded, split)
    results = measure(args, calibrated, fabric)
    if results is None:
        return 0
    calibrated.calibration = calibrated.calibration | {
        "images": results["image_count"],
        "expected_error_after": results["calibration"]["expected_error"],
        "object_threshold": results["at_no_object_98"]["threshold"],
    }
    publish_weights(path, calibrated)
    print(f"calibrated weights: {path}")
    return 0


def measure(
    args: EvaluateArgs, loaded: "LoadedWeights", fabric: "Fabric | None" = None
) -> dict[str, Any] | None:
    """Run the model over the split; write, print and return the results (on rank 0)."""
    import torch

    from yolo.engine import loop
    from yolo.engine.fabric import make_fabric, pick_precision
    from yolo.engine.loaders import make_eval_loader
    from yolo.inference.fast import FlipAveraged, prepare
    from yolo.metrics.devkit import write_detections
    from yolo.runs.advice import advice
    from yolo.runs.folder import RunFolder
    from yolo.runs.results import about_model
    from yolo.runs.trust import check_data_named
    from yolo.tasks.build import open_split
    from yolo.tasks.detection import DetectionSplit, MosaicSplit

    if loaded.task != "detection" and (args.mosaic or args.write_detections):
        raise UsageError(
            f"--mosaic and --write-detections need a detector; {args.checkpoint} is a classifier"
        )
    cfg = args.over(loaded.config)
    check_data_named(loaded, cfg)
    fabric = fabric or make_fabric(cfg)[0]
    split = open_split(cfg, loaded.class_names, loaded.anchors)
    if args.mosaic:
        split = MosaicSplit.like(cast(DetectionSplit, split))
    if loaded.calibration:
        factors = torch.tensor(loaded.calibration["factors"])
        split = dataclasses.replace(cast(DetectionSplit, split), calibration=factors)
    loader = make_eval_loader(fabric, cfg, split)
    model = prepare(loaded.model, fabric.device, fast=args.fast, compiled=args.compile)
    if args.tta == "flip":
        model = FlipAveraged(model)
    start = time.perf_counter()
    metrics: Any = loop.evaluate(fabric, model, split, loader, full=True)
    if not fabric.is_global_zero:
        return None
    measured = {
        "image_count": len(split.dataset),
        **metrics.compute(),
        "seconds": time.perf_counter() - start,
    }
    about = {
        **about_model(cfg, split, fabric.device, fabric.world_size),
        "checkpoint": str(loaded.path),
        "checkpoint_digest": loaded.digest,
        "precision": pick_precision(cfg.precision, fabric.device.type)[0],
        "fast": args.fast,
        "tta": args.tta,
        "calibrated": loaded.calibration,
    }
    if loaded.calibration and "object_threshold" in loaded.calibration:
        measured["at_chosen_threshold"] = metrics.cells.at(loaded.calibration["object_threshold"])
    found = getattr(metrics, "detections", None)
    if args.write_detections and found:
        folder = Path(args.write_detections)
        folder = free_path(folder) if [*folder.glob("comp*_det_*.txt")] else folder
        name = re.sub(r"[^\w-]+", "-", cfg.split.split(":")[-1]).strip("-") or "all"
        write_detections(folder, found.detections(), split.dataset, name)
    pictures: dict[str, Drawing] = {}
    if loaded.task == "classification":
        from yolo.explain.misclassified import misclassified_grid

        pictures["misclassified"] = partial(
            misclassified_grid, loaded.model, split.dataset, metrics
        )
    scored = (found.detections(), found.objects()) if found else ()
    record = report(args, measured, about, split.dataset, pictures, *scored)
    for sentence in advice(RunFolder(run_of(loaded.path)), record):
        print(f"advice: {sentence}")
    return record


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Do not look for garbage: it takes a twelfth of the time of scoring, which makes none."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def score_files(args: EvaluateArgs) -> int:
    """Score the devkit files of any detector against a data set."""
    from yolo.data.class_names import named_classes
    from yolo.data.sources import open_dataset
    from yolo.metrics.average_precision import load_objects
    from yolo.metrics.devkit import read_detections

    cfg = args.over(Config(dataset="voc", classes=args.classes))
    dataset = open_dataset(cfg, cfg.split, named_classes(cfg))
    split, log = cfg.split.split(":")[-1], dataset.notices.append
    detections = read_detections(Path(args.detections or ""), dataset, split, log)
    objects = load_objects(dataset, range(len(dataset)))
    about = {"detections": args.detections}
    report(args, {"image_count": len(dataset)}, about, dataset, {}, detections, objects)
    return 0


def report(
    args: EvaluateArgs,
    measured: dict[str, Any],
    about: dict[str, Any],
    dataset: Any,
    pictures: "dict[str, Drawing]",
    detections: "Detections | None" = None,
    objects: "Objects | None" = None,
) -> dict[str, Any]:
    """Add the measures of the detections; write, print and return the results."""
    from yolo.metrics.report import detection_report
    from yolo.runs.results import result_record, table, write_evaluation
    from yolo.viz.error_grids import error_grids

    if detections is not None and objects is not None:
        measured |= detection_report(detections, objects, dataset.class_names, args.matching)
        about["matching"] = args.matching
        pictures |= error_grids(dataset, detections, objects, args.matching)
    record = result_record(measured, dataset, **about)
    folder = output_folder(args, "evaluations", Path(record.get("checkpoint", "")))
    write_evaluation(folder, record, pictures)
    for heading, lines in (("notice", dataset.notices), ("skipped", dataset.skipped)):
        print("".join(f"{heading:<12} {line}\n" for line in lines), end="")
    source = ", ".join(str(record[key]) for key in ("data", "loader") if key in record)
    print(
        table(
            record, [("data", f"{source}: {record['image_count']} images"), ("written to", folder)]
        )
    )
    return record


def predict_pictures(args: EvaluateArgs, loaded: "LoadedWeights") -> int:
    """Let the model answer about pictures or a video; return 1 if some could not be read."""
    from yolo.data.labels import write_labels
    from yolo.engine import loop
    from yolo.engine.fabric import make_fabric
    from yolo.inference.fast import FlipAveraged, prepare
    from yolo.inference.predict import Detector, picture_names, predict_files, write_predictions
    from yolo.inference.sources import Video, open_source

    if loaded.anchors is None and args.write_labels:
        raise UsageError(f"--write-labels needs a detector; {loaded.path} is a classifier")
    # one process: several would write the same files
    cfg = dataclasses.replace(args.over(loaded.config), devices=1, num_nodes=1)
    fabric, _ = make_fabric(cfg)
    if not fabric.is_global_zero:  # torchrun's number of processes wins
        return 0
    folder = output_folder(args, "predictions", loaded.path)
    source = open_source(args.images or "", folder / "downloads")
    print(f"weights: {loaded.path}")
    model = prepare(loaded.model, fabric.device, fast=args.fast, compiled=args.compile)
    if args.tta == "flip":
        model = FlipAveraged(model)
    predict = partial(loop.predict, fabric, model)
    loaded = dataclasses.replace(loaded, config=cfg)
    threshold = loaded.confidence if args.score_threshold is None else args.score_threshold
    if isinstance(source, Video):
        return predict_film(args, Detector(loaded, predict), source, folder, threshold)
    start = time.perf_counter()
    answers = predict_files(loaded, predict, source, folder, print, threshold)
    seconds = time.perf_counter() - start
    write_predictions(answers, folder)
    if args.write_labels:
        names = dict(zip(map(str, source), picture_names(source), strict=True))
        named = {names[answer["image"]]: answer for answer in answers}
        print(f"labels: {write_labels(folder, args.write_labels, named, loaded.class_names)}")
    speed = f"{seconds:.1f} s, {len(answers) / seconds:.1f} a second"
    print(f"{len(answers)} of {len(source)} pictures ({speed}): see {folder}")
    return 0 if len(answers) == len(source) else 1


def predict_film(
    args: EvaluateArgs, detector: "Detector", video: "Video", folder: Path, threshold: float
) -> int:
    """Let the model answer about a video until it ends or Ctrl-C; return the exit code."""
    from yolo.data.labels import write_labels
    from yolo.engine.stopping import EXIT_CODES, StopRequest
    from yolo.inference.video import predict_video

    request = StopRequest()
    start = time.perf_counter()
    images = folder / "images" if args.write_labels else None
    frames = predict_video(
        detector, video, folder, threshold, stop=lambda: request.reason is not None, images=images
    )
    seconds = time.perf_counter() - start
    if args.write_labels:
        lines = map(json.loads, (folder / "predictions.jsonl").read_text().splitlines())
        named = {Path(line["image"]).stem: line for line in lines}
        names = detector.loaded.class_names
        print(f"labels: {write_labels(folder, args.write_labels, named, names)}")
    speed = f"{seconds:.1f} s, {frames / seconds:.1f} a second"
    print(f"{frames} frames ({speed}): see {folder / video.name}.mp4")
    return EXIT_CODES[request.reason] if request.reason else 0


def output_folder(args: EvaluateArgs, kind: str, checkpoint: Path = Path()) -> Path:
    """Return `--out-dir`, or a new folder in the run that the checkpoint belongs to.

    Where results, plots or predictions lie already, the folder gets a number.
    """
    if args.out_dir is not None:
        folder = Path(args.out_dir)
        return free_path(folder) if any((folder / name).exists() for name in WRITTEN) else folder
    return free_path(run_of(checkpoint) / kind / time.strftime("%Y%m%d-%H%M%S"))


def run_of(checkpoint: Path) -> Path:
    """Return the folder of the run that a checkpoint or its best weights lie in, else `runs`."""
    homes = (checkpoint.parent.parent, checkpoint.parent)
    return next((home for home in homes if (home / "config.yaml").is_file()), Path("runs"))


if __name__ == "__main__":
    cli.run(main)
