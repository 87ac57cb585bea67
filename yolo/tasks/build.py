"""From a configuration to its task."""

from collections.abc import Sequence

from torch import Tensor

from yolo.config import Config
from yolo.tasks.base import EvalSplit, Task
from yolo.tasks.classification import ClassificationTask
from yolo.tasks.detection import DetectionTask

TASKS: dict[str, type[DetectionTask] | type[ClassificationTask]] = {
    "detection": DetectionTask,
    "classification": ClassificationTask,
}


def build_task(config: Config, processes: int = 1) -> Task:
    """Open the data that `config` names, in `processes` of this machine, and build the rest."""
    return TASKS[config.task].build(config, processes)


def open_split(config: Config, class_names: Sequence[str], anchors: Tensor | None) -> EvalSplit:
    """Open `config.split` for testing a trained model, with its classes and anchors."""
    return TASKS[config.task].open_split(config, class_names, anchors)
