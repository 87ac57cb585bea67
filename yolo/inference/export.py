"""A trained network as ONNX, with what others need to use it alone.

`images` [B, 3, H, W] in [0, 1] become `boxes` and `scores` of every prediction, or with suppression
inside the `boxes`, `scores` and `labels` of what was found on one image. The metadata say how to
make `images` from a picture, and all else that reading the output needs, as JSON.
"""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision import ops

from yolo.config import Config
from yolo.data.classifier_images import to_32
from yolo.data.dataset import read_rgb
from yolo.data.images import letterboxed
from yolo.data.transforms import FILL
from yolo.errors import UsageError, UserError
from yolo.files import bundled, free_path, replacing
from yolo.inference.fast import fuse
from yolo.models.yolov3 import MERGE_IOU, STRIDES, decode
from yolo.runs.checkpoint import LoadedWeights, publish_weights

# largest difference from eager, of scores and of boxes relative to the image or, beyond it, the box
PARITY = 1e-3
METADATA_VERSION = 2
CLASS_OFFSET = 8192.0  # pixels: more than an image is wide


class ExportedDetector(nn.Module):
    """The detector with decoding: everything but non-maximum suppression."""

    def __init__(self, network: nn.Module, anchors: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("anchors", anchors)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map images [B, 3, H, W] to boxes [B, N, 4] (xyxy, input pixels) and scores [B, N, C]."""
        outputs = self.network(images)
        anchors = cast(Tensor, self.anchors)
        boxes, objectness, class_probs = decode(outputs, anchors)
        return boxes, objectness[..., None] * class_probs


class SuppressedDetector(nn.Module):
    """The detector with everything: what it found on one image."""

    def __init__(self, detector: ExportedDetector, config: Config, score_threshold: float) -> None:
        super().__init__()
        self.detector = detector
        self.config = config
        self.score_threshold = score_threshold

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map images [1, 3, H, W] to boxes [K, 4] (xyxy, input pixels), scores [K], labels [K]."""
        all_boxes, all_scores = self.detector(images)
        best, likeliest = all_scores[0].max(-1)
        index = (best >= self.score_threshold).nonzero()[:, 0]
        boxes, scores, labels = all_boxes[0][index], best[index], likeliest[index]
        # classes do not overlap where each has a place of its own
        apart = boxes + labels[:, None] * CLASS_OFFSET
        kept = ops.nms(apart, scores, self.config.iou_threshold)[: self.config.max_detections]
        placed = boxes[kept]
        if self.config.nms == "merge":
            weights = (ops.box_iou(apart[kept], apart) > MERGE_IOU) * scores
            total = weights.sum(1, keepdim=True)  # nothing where a box has no area
            placed = torch.where(total > 0, weights @ boxes / total.clamp(min=1e-9), placed)
        return placed, scores[kept], labels[kept]


class ExportedClassifier(nn.Module):
    """The classifier with its softmax."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Map images [B, 3, 32, 32] to probabilities [B, C]."""
        return (self.network(images).softmax(-1),)


def export(loaded: LoadedWeights, path: Path, nms: bool = False) -> str:
    """Write a trained network as `.onnx` or `.safetensors`, whole or not at all; describe it.

    A file that is there stays: the new one gets a number.

    Args:
        loaded: the network; its configuration and `confidence` are the thresholds of `nms`.
        path: the file.
        nms: put non-maximum suppression into an ONNX detector.

    Raises:
        UsageError: for another suffix, or suppression where there is none.
        UserError: if it cannot be written, a package is missing, or the result differs from eager.
    """
    if path.suffix not in (".onnx", ".safetensors"):
        raise UsageError(f"--export {path}: want a name that ends in .onnx or .safetensors")
    if nms and (path.suffix != ".onnx" or loaded.anchors is None):
        raise UsageError(f"--export {path} --nms: only an ONNX detector has suppression inside")
    try:
        path = free_path(path) if path.is_file() else path
        return (
            export_onnx(loaded, path, nms)
            if path.suffix == ".onnx"
            else export_safetensors(loaded, path)
        )
    except OSError as error:
        raise UserError(f"--export {path}: cannot be written ({error.strerror or error})") from None


def export_safetensors(loaded: LoadedWeights, path: Path) -> str:
    """Write the weights in half precision with their metadata, as the scripts read them."""
    publish_weights(path, loaded)
    return f"{path}: {_megabytes(path)}, half precision; evaluate.py, gradcam.py and app.py read it"


def export_onnx(loaded: LoadedWeights, path: Path, nms: bool = False) -> str:
    """Write and check `images` [B, 3, H, W] in [0, 1] -> `boxes`, `scores` or `probabilities`.

    B is free, but 1 with `nms`; H and W are free multiples of 32 for the detector.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch's exporter needs it)
    except ImportError:
        raise UserError("--export to ONNX needs: pip install onnx onnxscript onnxruntime") from None
    model, names = _with_readable_outputs(loaded, nms)
    with replacing(path) as temporary:
        temporary.touch()  # a path that cannot be written shows before the slow export
        _write_onnx(
            model, temporary, names, _example(loaded, 1 if nms else 2), _metadata(loaded, nms)
        )
        session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])
        pictures = _pictures(loaded)
        difference = max(parity(model, session, image, loaded.test_size) for image in pictures)
    return (
        f"{path}: {_megabytes(path)}, within {difference:.1e} of PyTorch in onnxruntime on "
        f"{len(pictures)} photographs"
    )


def parity(model: nn.Module, session: Any, images: Tensor, size: int) -> float:
    """Return the largest difference between a model and its ONNX session, boxes relative to `size`.

    Raises:
        UserError: if it is beyond `PARITY`, or another number of objects is found.
    """
    with torch.inference_mode():
        expected = model(images)
    found = session.run(None, {"images": images.numpy()})
    units = [size if output.name == "boxes" else 1 for output in session.get_outputs()]
    difference = 0.0
    for array, wanted, unit in zip(found, expected, units, strict=True):
        if array.shape != wanted.shape:
            difference = float("inf")
        elif array.size:
            apart = (torch.from_numpy(array) - wanted).abs() / wanted.abs().clamp(min=unit)
            difference = max(difference, apart.max().item())
    if not difference <= PARITY:
        raise UserError(
            f"the ONNX model differs from this network by {difference:.1e}; nothing was written"
        )
    return difference


def _pictures(loaded: LoadedWeights) -> list[Tensor]:
    """Return the bundled photographs as [1, 3, S, S] in [0, 1], as the network is shown them."""
    paths = sorted(bundled(f"samples/{loaded.task}").glob("*.[jp][pn]g"))
    if loaded.anchors is None:
        arrays = [torch.from_numpy(to_32(read_rgb(path))).permute(2, 0, 1) for path in paths]
    else:
        arrays = [letterboxed(path, loaded.test_size).image for path in paths]
    return [array[None].float() / 255 for array in arrays] or [_example(loaded, 1)]


def _with_readable_outputs(loaded: LoadedWeights, nms: bool) -> tuple[nn.Module, list[str]]:
    network = fuse(loaded.model).cpu().float()
    if loaded.anchors is None:
        return ExportedClassifier(network).eval(), ["probabilities"]
    detector = ExportedDetector(network, loaded.anchors.cpu()).eval()
    if not nms:
        return detector, ["boxes", "scores"]
    model = SuppressedDetector(detector, loaded.config, loaded.confidence)
    return model.eval(), ["boxes", "scores", "labels"]


def _example(loaded: LoadedWeights, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, 3, loaded.test_size, loaded.test_size, generator=generator)


def _write_onnx(
    model: nn.Module, path: Path, names: list[str], images: Tensor, metadata: dict[str, str]
) -> None:
    import onnx

    dims: dict[int, Any] = {0: torch.export.Dim("batch")} if len(images) > 1 else {}
    if not isinstance(model, ExportedClassifier):
        dims |= {
            axis: STRIDES[0] * torch.export.Dim(name)
            for axis, name in ((2, "rows"), (3, "columns"))
        }
    with _quiet():
        program = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            dynamic_shapes={"images": dims},
            input_names=["images"],
            output_names=names,
        )
    assert program is not None
    proto = program.model_proto
    onnx.helper.set_model_props(proto, metadata)
    onnx.save(proto, path)


def _metadata(loaded: LoadedWeights, nms: bool) -> dict[str, str]:
    detects, config = loaded.anchors is not None, loaded.config
    preprocessing = {
        "colors": "RGB",
        "layout": "NCHW",
        "scale": "pixel / 255",
        "size": loaded.test_size,
        "resize": "letterbox: the longer side becomes `size`, the picture lies in the middle"
        if detects
        else "stretch: both sides become `size`",
        "pad": FILL if detects else None,
        "interpolation": "bilinear; area where a side shrinks"
        + (" to less than half" if detects else ""),
    }
    thresholds = {
        "confidence": loaded.confidence,
        "iou": config.iou_threshold,
        "max_detections": config.max_detections,
        "nms": config.nms,
        "applied": nms,
    }
    return {
        "task": loaded.task,
        "classes": json.dumps(loaded.class_names),
        "test_size": str(loaded.test_size),
        "anchors": json.dumps(loaded.anchors.tolist() if loaded.anchors is not None else None),
        "preprocessing": json.dumps(preprocessing),
        "thresholds": json.dumps(thresholds if detects else None),
        "outputs": "boxes: xyxy in pixels of `images`; a score is objectness x class",
        "weights_digest": loaded.digest,
        "version": json.dumps({"metadata": METADATA_VERSION, "torch": torch.__version__}),
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter, which reports its stages and warns of what torch will change."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _megabytes(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.1f} MB"
