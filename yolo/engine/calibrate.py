"""Calibrate a detector's scores on images that its weights have not seen."""

import copy
import dataclasses
from typing import cast

import torch

from yolo.config import ResolvedConfig
from yolo.engine.fabric import Fabric
from yolo.engine.loaders import make_eval_loader
from yolo.engine.loop import evaluate
from yolo.models.yolov3 import YoloV3, rescale_objectness
from yolo.runs.checkpoint import LoadedWeights
from yolo.tasks.calibration import CalibrationSplit
from yolo.tasks.detection import DetectionSplit

# new scores keep other boxes: a second fit halved the error of the first, a third did nothing
PASSES = 2
SCORE_THRESHOLD = 0.001  # of calibrated weights: most boxes that held 0.01 before are below it now


def calibrate_scores(
    fabric: Fabric, cfg: ResolvedConfig, loaded: LoadedWeights, split: DetectionSplit
) -> LoadedWeights:
    """Return the weights with heads whose scores say how often a detection is right.

    Each scale's objectness becomes a * objectness + b, folded into the last convolution of its
    head, so that whatever uses the weights uses the calibration; the cell accuracies alone undo it.
    It is told in `calibration`: the factors [3, 2], coarse to fine, and the expected error before.
    """
    model = cast(YoloV3, copy.deepcopy(loaded.model)).to(fabric.device)
    factors, errors = torch.tensor([[1.0, 0.0]] * 3), list[float]()
    for _ in range(PASSES):
        config = dataclasses.replace(
            split.config, score_threshold=SCORE_THRESHOLD if errors else 0.01
        )
        data_split = CalibrationSplit.like(dataclasses.replace(split, config=config))
        data = evaluate(fabric, model, data_split, make_eval_loader(fabric, cfg, split), full=True)
        assert data is not None
        fitted = fabric.broadcast(data.compute() if fabric.is_global_zero else {})
        errors.append(fitted["expected_error"])
        rescale_objectness(model, fitted["factors"])
        a, b = fitted["factors"].T
        factors = torch.stack([a * factors[:, 0], a * factors[:, 1] + b], dim=1)
    return dataclasses.replace(
        loaded,
        model=model,
        config=dataclasses.replace(  # suppression is part of what was fitted
            loaded.config,
            score_threshold=SCORE_THRESHOLD,
            nms=cfg.nms,
            iou_threshold=cfg.iou_threshold,
        ),
        calibration={"factors": factors.tolist(), "expected_error_before": errors[0]},
    )
