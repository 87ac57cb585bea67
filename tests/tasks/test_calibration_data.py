"""What the scores are refit to."""

from types import SimpleNamespace

import torch

from yolo.boxes import letterbox
from yolo.config import COCO_ANCHORS, Config
from yolo.models.yolov3 import STRIDES, make_anchors
from yolo.tasks.calibration import CalibrationSplit
from yolo.tasks.detection import DetectionSplit

SIZE = 64


def test_an_image_without_any_detection_adds_no_row() -> None:
    images = SimpleNamespace(class_names=("a", "b", "c"))
    anchors = make_anchors(COCO_ANCHORS, SIZE)
    split = DetectionSplit(Config(), images, None, None, "", anchors)
    outputs = [torch.zeros(2, 3, SIZE // s, SIZE // s, 8) for s in STRIDES]
    for output in outputs:
        output[..., 4] = -20.0
    outputs[0][1, 0, 0, 0, 4] = 3.0
    sizes = {"height": SIZE, "width": SIZE, "letterbox": letterbox(SIZE, SIZE, SIZE)}
    targets = [{"image_index": index, **sizes} for index in range(2)]
    data = CalibrationSplit.like(split).metrics(full=True)
    data.update(outputs, targets)
    rows = data.state()["rows"]
    assert rows[:, 6].tolist() == [0, 1, 2]  # each class is a detection of its own
    for row in rows:  # the image, its logit, the coarsest scale
        assert row[[0, 7, 9]].tolist() == [1, 3, 0]
