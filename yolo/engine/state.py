"""Everything that changes while training: the networks, the optimizer, and how far they are."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from yolo.config import Config
from yolo.engine.ema import Ema
from yolo.engine.fabric import Fabric, gather
from yolo.engine.sharing import Threads
from yolo.inference.fast import require_compiler
from yolo.models.yolov3 import YoloV3
from yolo.tasks.base import Task


@dataclass
class State:
    """Everything that changes while training, and therefore everything that a checkpoint holds."""

    fabric: Fabric
    network: nn.Module  # the bare network: its weights are what is saved
    model: Any  # the same, as Fabric wrapped it
    optimizer: Any
    ema: Ema
    scaler: torch.amp.GradScaler | None
    bad_steps: Tensor  # consecutive steps whose loss was not finite, on this rank
    threads: Threads = field(default_factory=lambda: Threads(torch.get_num_threads(), adapts=False))
    # of this rank, since the last log line
    loss_sums: dict[str, Tensor] = field(default_factory=dict)
    logged_scale: float = 1.0  # the scaler's factor at the last log line
    step: int = 0  # optimizer steps done
    epoch: int = 0
    batch: int = 0  # optimizer steps done within the epoch
    evaluation_due: bool = False  # an epoch has ended and was not tested yet
    best_score: float = -1.0
    is_compiled: bool = False  # for all image sizes, in this start
    confidence: float | None = None  # at the best F1 of the last test that computed mAP

    def __post_init__(self) -> None:
        """List the parameters once: finding them at each step takes a millisecond."""
        self.parameters = list(self.network.parameters())
        modules: list[Any] = list(self.network.modules())
        self.norms = [norm for norm in modules if getattr(norm, "running_mean", None) is not None]

    def statistics(self) -> list[Tensor]:
        """Return the running means and variances that a step changes: not a frozen part's."""
        norms = [norm for norm in self.norms if norm.training]
        return [value for norm in norms for value in (norm.running_mean, norm.running_var)]

    def add_losses(self, names: Sequence[str], terms: Tensor) -> None:
        """Add the terms [T] of one micro-batch to the sums since the last log line.

        Sums of other terms, as a checkpoint may bring them, give way.
        """
        values = terms.double().unbind()
        if self.loss_sums.keys() == {*names}:
            torch._foreach_add_([self.loss_sums[name] for name in names], values)
        else:
            self.loss_sums = dict(zip(names, values, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain types only. Every rank has to call it and adds its loss sums."""
        return {
            "model": self.network.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "loss_sums": gather(
                self.fabric, {name: float(value) for name, value in self.loss_sums.items()}
            ),
            "logged_scale": self.logged_scale,
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "evaluation_due": self.evaluation_due,
            "best_score": self.best_score,
            "confidence": self.confidence,
        }

    def load_state_dict(self, content: dict[str, Any]) -> list[str]:
        """Take over what `state_dict` returned; return notices worth printing."""
        self.network.load_state_dict(content["model"])
        self.ema.module.load_state_dict(content["ema"])
        own_groups = self.optimizer.state_dict()["param_groups"]  # the flags of this start
        self.optimizer.load_state_dict({**content["optimizer"], "param_groups": own_groups})
        for name in ("step", "epoch", "batch", "evaluation_due", "best_score"):
            setattr(self, name, content[name])
        self.confidence = content.get("confidence")
        self.loss_sums = self._own_loss_sums(content["loss_sums"])
        if (self.scaler is None) != (content["scaler"] is None):
            return [
                "the checkpoint was made in another precision: the gradient scaler starts fresh"
            ]
        if self.scaler is not None:
            self.scaler.load_state_dict(content["scaler"])
            self.logged_scale = content["logged_scale"]
        return []

    def _own_loss_sums(self, by_rank: list[dict[str, float]]) -> dict[str, Tensor]:
        rank, world_size = self.fabric.global_rank, self.fabric.world_size
        mine = by_rank[rank::world_size]  # all of them, whatever the number of ranks was
        device = self.bad_steps.device
        return {
            name: torch.tensor(sum(sums[name] for sums in mine), dtype=torch.float64, device=device)
            for name in by_rank[0]
        }

    def is_finite(self) -> Tensor:
        """Return, on the device, whether all weights and statistics, averaged ones too, are finite.

        A loss can look well again after an overflow; the statistics that it went into do not
        recover.
        """
        largest = torch._foreach_norm([*self.ema.values, *self.ema.averages], torch.inf)
        return torch.stack(largest).isfinite().all()


def make_state(
    fabric: Fabric, scaler: torch.amp.GradScaler | None, cfg: Config, task: Task
) -> State:
    """Move the task to the device, wrap the model and build optimizer and EMA."""
    network = task.model
    if cfg.sync_batchnorm and fabric.world_size > 1:
        # torch's own would drop the activations of timm's
        from timm.layers import convert_sync_batchnorm

        network = convert_sync_batchnorm(network)
    network = network.to(fabric.device).to(memory_format=torch.channels_last)
    task.criterion.to(fabric.device)
    ema = Ema(network, cfg.ema_decay)
    optimizer = make_optimizer(network, cfg)
    if cfg.compile:
        require_compiler()
    runnable: Any = torch.compile(network, dynamic=False) if cfg.compile else network
    model, optimizer = fabric.setup(runnable, optimizer)
    zero = torch.zeros((), dtype=torch.int64, device=fabric.device)
    scale = scaler.get_scale() if scaler else 1.0
    threads = Threads.of(fabric, cfg)
    return State(fabric, network, model, optimizer, ema, scaler, zero, threads, logged_scale=scale)


def make_optimizer(network: nn.Module, cfg: Config) -> torch.optim.Adam:
    """Return Adam without a rate of its own; weights of two or more dimensions decay.

    Each group takes its `lr_factor` of the schedule's rate. A backbone that is frozen or learns
    more slowly has groups of its own. A checkpoint stores Adam's state by position: the backbone
    comes first within the weights and within the others, as it does in the network, so no flag
    moves a parameter.

    It is fused: with a gradient scaler, only then is a step that overflowed left out without asking
    the GPU.
    """
    apart = cfg.backbone_lr_factor != 1 or cfg.freeze_backbone > 0
    backbone = {*network.backbone.parameters()} if apart and isinstance(network, YoloV3) else set()
    groups = []
    for decays in (True, False):
        for in_backbone in (True, False):
            parameters = [
                parameter
                for parameter in network.parameters()
                if (parameter.ndim > 1) == decays and (parameter in backbone) == in_backbone
            ]
            if parameters:
                group = {
                    "params": parameters,
                    "weight_decay": cfg.weight_decay if decays else 0.0,
                    "lr_factor": cfg.backbone_lr_factor if in_backbone else 1.0,
                    "in_backbone": in_backbone,
                }
                groups.append(group)
    return torch.optim.Adam(groups, fused=True)


def freeze_backbone(state: State, cfg: Config) -> None:
    """Hold the backbone still for the first `cfg.freeze_backbone` epochs, then let it learn.

    Frozen, its rate is zero (and with it the decay) and its batch statistics stay. It follows from
    the epoch alone, so that a resumed run and every rank know it.
    """
    if not cfg.freeze_backbone or not isinstance(state.network, YoloV3):
        return
    frozen = state.epoch < cfg.freeze_backbone
    state.network.backbone.train(not frozen)
    for group in state.optimizer.param_groups:
        if group["in_backbone"]:
            group["lr_factor"] = 0.0 if frozen else cfg.backbone_lr_factor
