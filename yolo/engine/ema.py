"""An exponential moving average of the weights: what is evaluated, exported and shown."""

import copy

from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Ema:
    """The averaged copy `module` of a model, its statistics included, always in eval mode.

    The decay rises from 0.1 to its final value, min(decay, (1 + step) / (10 + step)), so that the
    average does not remember the initial weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Copy a model that is where it stays: its tensors are listed once, not at each step."""
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.averages, self.values = _floating(self.module), _floating(model)

    def update(self, step: int) -> None:
        """Move the average towards the model after optimizer step number `step`, counted from 0."""
        average = get_ema_multi_avg_fn(min(self.decay, (1 + step) / (10 + step)))
        average(self.averages, self.values, step)


def _floating(model: nn.Module) -> list[Tensor]:
    return [
        value for value in model.state_dict(keep_vars=True).values() if value.is_floating_point()
    ]
