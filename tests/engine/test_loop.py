"""What one optimizer step does."""

import copy
import dataclasses
from itertools import islice

import pytest
import torch

from yolo.config import Config
from yolo.data.samplers import MultiSizeBatchSampler
from yolo.engine.fabric import make_fabric
from yolo.engine.loaders import make_sampler, make_train_loader
from yolo.engine.loop import optimizer_steps, train_step
from yolo.engine.state import make_state
from yolo.losses import assign_targets
from yolo.models import yolov3
from yolo.models.darknet import Residual
from yolo.tasks.assigned import AssignedTargets
from yolo.tasks.build import build_task


@pytest.fixture
def task(tiny_digits):
    return build_task(
        Config(
            data_root=str(tiny_digits),
            width=0.0625,
            img_sizes=(64,),
            batch_size=8,
            aug_flip=0.0,
            seed=3,
            accelerator="cpu",
            precision="32-true",
        )
    )


def test_a_step_uses_the_given_rate_and_moves_the_average(task):
    fabric, scaler = make_fabric(task.config)
    for module in task.model.modules():
        # starts as the identity: its convolutions would wait a step
        if isinstance(module, Residual):
            torch.nn.init.ones_(module.expand[1].weight)
    state = make_state(fabric, scaler, task.config, task)
    before = copy.deepcopy(state.network.state_dict())
    loader = make_train_loader(
        fabric, Config(workers=0), task, make_sampler(fabric, task.config, len(task.train_set))
    )
    [micro_batches] = [step for step, _ in zip(optimizer_steps(loader, 1), range(1), strict=False)]
    train_step(fabric, state, task, micro_batches, lr=1e-3, beta1=0.9)
    assert (state.step, state.batch) == (1, 1)
    assert {group["lr"] for group in state.optimizer.param_groups} == {1e-3}
    moved = [
        name
        for name, value in state.network.named_parameters()
        if not torch.equal(value, before[name])
    ]
    assert len(moved) == len(list(state.network.parameters()))
    name = "backbone.stem.0.weight"
    # the decay begins at 0.1
    averaged = 0.1 * before[name] + 0.9 * state.network.state_dict()[name]
    torch.testing.assert_close(state.ema.module.state_dict()[name], averaged)


def test_micro_batches_add_up_to_the_gradient_of_the_whole_batch(task):
    gradients = []
    for parts in (1, 4):
        # batch statistics would depend on the parts
        model = copy.deepcopy(task.model).double().eval()
        images, targets = task.eval_split.collate([task.eval_split.samples[i] for i in range(8)])
        assigned = [
            AssignedTargets.pack(assign_targets(targets[i::parts], task.anchors, 64))
            for i in range(parts)
        ]
        counts = torch.stack([task.count(part) for part in assigned]).sum(0)
        for i in range(parts):
            sum(
                task.criterion(model(images[i::parts].double() / 255), assigned[i], counts).values()
            ).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for whole, summed in zip(*gradients, strict=True):
        torch.testing.assert_close(summed, whole, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_makes_a_step_fast_leaves_its_losses_alone(task, compiled, monkeypatch):
    """Channels last, late floats, fused Adam: against channels first, floats, and plain Adam."""
    config = dataclasses.replace(task.config, compile=compiled)
    sampler = MultiSizeBatchSampler(len(task.train_set), 8, (64,), seed=3)
    batches = [
        task.train_collate([task.train_samples[key] for key in keys]) for keys in islice(sampler, 3)
    ]
    plain = copy.deepcopy(task.model).train()
    optimizer = torch.optim.Adam(plain.parameters(), lr=2e-4, foreach=False)
    weights = [parameter for parameter in plain.parameters() if parameter.ndim > 1]
    wanted = []
    monkeypatch.setattr(yolov3, "images_to_float", lambda images: images.contiguous().float() / 255)
    for images, targets in batches:
        losses = task.criterion(plain(images), targets, task.count(targets))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), task.config.max_norm, foreach=False)
        for weight in weights:
            weight.grad.add_(weight.detach(), alpha=task.config.weight_decay)
        optimizer.step()
        wanted.append([loss.item() for loss in losses.values()])
    monkeypatch.undo()

    fabric, scaler = make_fabric(config)
    state = make_state(fabric, scaler, config, task)
    found = []
    for batch in batches:
        state.loss_sums = {}
        train_step(fabric, state, task, [batch], lr=2e-4, beta1=0.9)
        found.append([float(loss) for loss in state.loss_sums.values()])
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-4, atol=1e-4)
    assert found[-1] != pytest.approx(found[0], rel=0.01)  # it did learn in between
