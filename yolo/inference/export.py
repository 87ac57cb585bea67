"""A trained network as ONNX, for any batch and image size, with what reading its output needs."""

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

from yolo.errors import UsageError, UserError
from yolo.files import replacing
from yolo.inference.fast import fuse
from yolo.models.yolov3 import STRIDES, decode
from yolo.runs.checkpoint import LoadedWeights, publish_weights

# largest difference from eager, of scores and of boxes relative to the image or, beyond it, the box
PARITY = 1e-3


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


class ExportedClassifier(nn.Module):
    """The classifier with its softmax."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Map images [B, 3, 32, 32] to probabilities [B, C]."""
        return (self.network(images).softmax(-1),)


def export(loaded: LoadedWeights, path: Path) -> str:
    """Write a trained network as `.onnx` or `.safetensors`, whole or not at all; describe it.

    Raises:
        UsageError: for another suffix.
        UserError: if it cannot be written, a package is missing, or the result differs from eager.
    """
    writers = {".onnx": export_onnx, ".safetensors": export_safetensors}
    if path.suffix not in writers:
        raise UsageError(f"--export {path}: want a name that ends in {' or '.join(writers)}")
    try:
        return writers[path.suffix](loaded, path)
    except OSError as error:
        raise UserError(f"--export {path}: cannot be written ({error.strerror or error})") from None


def export_safetensors(loaded: LoadedWeights, path: Path) -> str:
    """Write the weights in half precision with their metadata, as the scripts read them."""
    publish_weights(path, loaded)
    return f"{path}: {_megabytes(path)}, half precision; evaluate.py, gradcam.py and app.py read it"


def export_onnx(loaded: LoadedWeights, path: Path) -> str:
    """Write and check `images` [B, 3, H, W] in [0, 1] -> `boxes`, `scores` or `probabilities`.

    B is free; H and W are free multiples of 32 for the detector.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch's exporter needs it)
    except ImportError:
        raise UserError("--export to ONNX needs: pip install onnx onnxscript onnxruntime") from None
    model, names = _with_readable_outputs(loaded)
    with replacing(path) as temporary:
        temporary.touch()  # a path that cannot be written shows before the slow export
        _write_onnx(model, temporary, names, _example(loaded), _metadata(loaded))
        session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])
        difference = parity(model, session, _example(loaded, batch=1), loaded.test_size)
    return f"{path}: {_megabytes(path)}, within {difference:.1e} of eager in onnxruntime"


def parity(model: nn.Module, session: Any, images: Tensor, size: int) -> float:
    """Return the largest difference between a model and its ONNX session, boxes relative to `size`.

    Raises:
        UserError: if it is beyond `PARITY`.
    """
    with torch.inference_mode():
        expected = model(images)
    found = session.run(None, {"images": images.numpy()})
    units = [size if output.name == "boxes" else 1 for output in session.get_outputs()]
    difference = max(
        ((torch.from_numpy(a) - b).abs() / b.abs().clamp(min=unit)).max().item()
        for a, b, unit in zip(found, expected, units, strict=True)
    )
    if not difference <= PARITY:
        raise UserError(
            f"the ONNX model differs from this network by {difference:.1e}; nothing was written"
        )
    return difference


def _with_readable_outputs(loaded: LoadedWeights) -> tuple[nn.Module, list[str]]:
    network = fuse(loaded.model).cpu().float()
    if loaded.anchors is None:
        return ExportedClassifier(network).eval(), ["probabilities"]
    return ExportedDetector(network, loaded.anchors.cpu()).eval(), ["boxes", "scores"]


def _example(loaded: LoadedWeights, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, 3, loaded.test_size, loaded.test_size, generator=generator)


def _write_onnx(
    model: nn.Module, path: Path, names: list[str], images: Tensor, metadata: dict[str, str]
) -> None:
    import onnx

    dims: dict[int, Any] = {0: torch.export.Dim("batch")}
    if isinstance(model, ExportedDetector):
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


def _metadata(loaded: LoadedWeights) -> dict[str, str]:
    return {
        "task": loaded.task,
        "classes": json.dumps(loaded.class_names),
        "test_size": str(loaded.test_size),
        "anchors": json.dumps(None if loaded.anchors is None else loaded.anchors.tolist()),
        "weights_digest": loaded.digest,
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
