"""The first lines that a training prints: what is about to run, and where."""

from typing import Any

import torch

from yolo.config import ResolvedConfig
from yolo.data.anchors import anchors_gained
from yolo.engine.fabric import Fabric, pick_precision
from yolo.runs.provenance import hardware
from yolo.runs.run import Run
from yolo.tasks.base import Task

SHOWN_CLASSES = 20


def _counted(dataset: Any) -> str:
    """Return how many images a data set has, and how many of them without a box."""
    annotations = getattr(dataset, "annotations", ())
    empty = sum(not len(annotation.labels) for annotation in annotations)
    without = f", {empty} without boxes" if empty else ""
    return f"{dataset.name}: {len(dataset)} images{without}"


def introduction(fabric: Fabric, cfg: ResolvedConfig, task: Task, run: Run) -> str:
    """Return what is about to run, and where, for people; hints and skipped files included."""
    precision, why = pick_precision(cfg.precision, fabric.device.type)
    name = f"YoloV3 on {cfg.backbone}" if cfg.task == "detection" else type(task.model).__name__
    parameters = sum(parameter.numel() for parameter in task.model.parameters())
    eval_set = task.eval_split.dataset
    sets = {"data": task.train_set, "test": eval_set}
    if task.test_split is not None:
        sets |= {"validation": eval_set, "test": task.test_split.dataset}
    others = "; ".join(f"{role} {_counted(data)}" for role, data in sets.items() if role != "data")
    classes = task.class_names
    shown = ", ".join(classes[:SHOWN_CLASSES]) + (", ..." if len(classes) > SHOWN_CLASSES else "")
    lines = [
        f"run folder   {run.folder.path}",
        f"data         {_counted(task.train_set)}; {others}; {len(classes)} classes",
        f"classes      {shown}",
        f"model        {name}, width {cfg.width:g}, {parameters:,} parameters",
        f"hardware     {fabric.world_size} process(es) on {hardware(fabric.device)}; "
        f"precision {precision}: {why}",
        f"schedule     {len(run.schedule)} steps of batch {cfg.batch_size} at "
        f"{','.join(map(str, cfg.img_sizes))} px, test at {cfg.resolved_test_size} px",
    ]
    if cfg.task == "detection":
        share = cfg.mosaic_prob * (
            1 - max(cfg.mosaic_off_epochs / cfg.epochs, cfg.mosaic_off_share)
        )
        lines.append(f"mosaic       {share:.0%} of the samples of the whole run")
    if cfg.maps_each_test:
        lines.append(f"best         by mAP on {eval_set.name}: {run.folder.best}")
    on_gpu = fabric.device.type == "cuda" and cfg.devices != "auto"
    if on_gpu and (gpus := torch.cuda.device_count()) > fabric.world_size:
        lines.append(f"hint         {gpus} GPUs are visible: --devices auto uses all of them")
    if cfg.mosaic_prob > 0.75:
        lines.append(
            "hint         --mosaic-prob 0.5 to 0.75 is advised: no object in a mosaic is large"
        )
    if cfg.anchors == "auto" and task.anchors is not None:
        lines += [f"anchors      {line}" for line in anchors_gained(task.train_set, cfg)]
    for data in sets.values():
        lines += [f"notice       {data.name}: {line}" for line in data.notices]
        lines += [f"skipped      {defect}" for defect in data.skipped]
    return "\n".join(lines)
