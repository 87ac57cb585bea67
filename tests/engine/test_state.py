"""What the optimizer is told, and when a state is beyond repair."""

from types import SimpleNamespace

import pytest
import torch

from yolo.config import Config
from yolo.engine.ema import Ema
from yolo.engine.fabric import make_fabric
from yolo.engine.state import State, make_optimizer
from yolo.models.resnet import ResNet
from yolo.models.yolov3 import YoloV3


def test_only_kernels_decay():
    config, network = Config(), YoloV3(3, 0.0625)
    weights, others = make_optimizer(network, config).param_groups
    assert weights["weight_decay"] == config.weight_decay
    assert others["weight_decay"] == 0
    assert all(parameter.ndim > 1 for parameter in weights["params"])
    assert all(parameter.ndim == 1 for parameter in others["params"])
    count = sum(len(group["params"]) for group in (weights, others))
    assert count == len(list(network.parameters()))


def test_adam_adds_the_decay_to_the_gradient():
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(layer.weight)
    layer.weight.grad = torch.zeros(1, 1)
    optimizer = make_optimizer(layer, Config(weight_decay=0.1, max_lr=1e-3))
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    optimizer.step()
    assert 1 - layer.weight.item() == pytest.approx(0.01, rel=1e-3)  # a full step of any gradient


def test_no_flag_of_the_backbone_moves_a_parameter_in_a_checkpoint():
    network = YoloV3(3, 0.0625)

    def order(**values):
        return [
            p
            for group in make_optimizer(network, Config(**values)).param_groups
            for p in group["params"]
        ]

    today = order()
    weights = [parameter for parameter in network.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in network.parameters() if parameter.ndim <= 1]
    for found in (today, order(backbone_lr_factor=0.1), order(freeze_backbone=2)):
        assert all(a is b for a, b in zip(found, [*weights, *others], strict=True))


def test_the_backbone_takes_its_share_of_the_rate():
    network = YoloV3(3, 0.0625)
    groups = make_optimizer(network, Config(backbone_lr_factor=0.1)).param_groups
    factors = {id(p): group["lr_factor"] for group in groups for p in group["params"]}
    for name, parameter in network.named_parameters():
        assert factors[id(parameter)] == (0.1 if name.startswith("backbone.") else 1.0)


def test_weights_and_statistics_have_to_be_finite_averaged_ones_too():
    network = ResNet(3, 0.125)
    ema = Ema(network, 0.9)
    fabric, _ = make_fabric(Config(accelerator="cpu", precision="32-true"))
    state = State(fabric, network, network, None, ema, None, torch.zeros(()))
    for module in (network, ema.module):
        for values in (module.prep[0].weight, module.prep[1].running_var):
            assert state.is_finite()
            kept = values.detach().clone()
            values.detach()[0] = torch.inf
            assert not state.is_finite()
            values.detach().copy_(kept)


def test_sums_of_other_terms_give_way_to_those_of_this_loss():
    state = SimpleNamespace(loss_sums={"unknown": torch.tensor(1.0, dtype=torch.float64)})
    for total in (3.0, 6.0):
        State.add_losses(state, ["box", "class"], torch.tensor([3.0, 1.0]))
        assert state.loss_sums.keys() == {"box", "class"}
        assert state.loss_sums["box"] == total
