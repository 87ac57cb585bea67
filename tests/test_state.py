"""What the optimizer is told."""

from yolo.config import Config
from yolo.models.yolov3 import YoloV3
from yolo.state import make_optimizer


def test_only_kernels_decay():
    config, network = Config(), YoloV3(3, 0.0625)
    weights, others = make_optimizer(network, config).param_groups
    assert weights["weight_decay"] == config.weight_decay
    assert others["weight_decay"] == 0
    assert all(parameter.ndim > 1 for parameter in weights["params"])
    assert all(parameter.ndim == 1 for parameter in others["params"])
    count = sum(len(group["params"]) for group in (weights, others))
    assert count == len(list(network.parameters()))
