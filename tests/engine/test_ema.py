"""The average of the weights against its recurrence."""

import torch
from torch import nn

from yolo.engine.ema import Ema


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def test_the_average_follows_its_recurrence_and_includes_the_statistics():
    model = make_model()
    ema = Ema(model, decay=0.9)
    expected = {
        name: value.clone()
        for name, value in model.state_dict().items()
        if value.is_floating_point()
    }
    for step in range(30):
        with torch.no_grad():
            for value in model.state_dict().values():
                if value.is_floating_point():
                    value += torch.randn_like(value)
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        for name, value in expected.items():
            value.mul_(decay).add_(model.state_dict()[name], alpha=1 - decay)
    for name, value in expected.items():
        torch.testing.assert_close(ema.module.state_dict()[name], value)
    assert "1.running_mean" in expected


def test_the_model_itself_stays_and_the_average_is_not_trained():
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ema = Ema(model, decay=0.5)
    ema.update(0)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())
    assert not ema.module.training
    assert model.training
