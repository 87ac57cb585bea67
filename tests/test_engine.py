"""How the engine reads its surroundings, and what one optimizer step does."""

import copy

import pytest
import torch

from yolo import engine
from yolo.config import Config
from yolo.errors import UsageError
from yolo.tasks import build_task

ENVIRONMENT = ("LOCAL_WORLD_SIZE", "WORLD_SIZE", "SLURM_NTASKS_PER_NODE", "SLURM_NNODES")


@pytest.fixture
def task(tiny_digits):
    return build_task(
        Config(data_root=str(tiny_digits), width=0.0625, img_sizes=(64,), batch_size=8, aug_flip=0.0, seed=3)
    )


def make_fabric(**settings):
    return engine.make_fabric(Config(accelerator="cpu", precision="32-true", **settings))


@pytest.mark.parametrize(
    ("environment", "flags", "world"),
    [
        ({"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "8"}, {}, (2, 4)),  # torchrun wins over the flags
        ({"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}, {"devices": 7}, (2, 1)),
        ({"SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "3"}, {}, (4, 3)),
        ({}, {"devices": 2, "num_nodes": 3}, (2, 3)),
    ],
)
def test_the_world_is_what_the_launcher_says(monkeypatch, environment, flags, world):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert engine._world(Config(**flags)) == world


@pytest.mark.parametrize(
    ("wanted", "device", "picked"),
    [("auto", "cuda", "16-mixed"), ("auto", "mps", "32-true"), ("bf16-mixed", "cuda", "bf16-mixed")],
)
def test_precision_follows_the_device_unless_it_is_given(wanted, device, picked):
    precision, why = engine.pick_precision(wanted, device)
    assert precision == picked
    assert why


def test_a_batch_that_cannot_be_shared_is_refused_by_its_flag():
    fabric, _ = make_fabric()
    with pytest.raises(UsageError, match="--batch-size 6"):
        engine.make_sampler(fabric, Config(batch_size=6, grad_accum_steps=4), 100)


def test_only_kernels_decay(task):
    weights, others = engine.make_optimizer(task.model, task.config).param_groups
    assert weights["weight_decay"] == task.config.weight_decay
    assert others["weight_decay"] == 0
    assert all(parameter.ndim > 1 for parameter in weights["params"])
    assert all(parameter.ndim == 1 for parameter in others["params"])
    count = sum(len(group["params"]) for group in (weights, others))
    assert count == len(list(task.model.parameters()))


def test_a_step_uses_the_given_rate_and_moves_the_average(task):
    fabric, scaler = make_fabric()
    state = engine.make_state(fabric, scaler, task.config, task)
    before = copy.deepcopy(state.network.state_dict())
    loader = engine.make_train_loader(
        fabric, Config(workers=0), task, engine.make_sampler(fabric, task.config, len(task.train_set))
    )
    [micro_batches] = [step for step, _ in zip(engine.optimizer_steps(loader, 1), range(1), strict=False)]
    engine.train_step(fabric, state, task, micro_batches, lr=1e-3, beta1=0.9)
    assert (state.step, state.batch) == (1, 1)
    assert {group["lr"] for group in state.optimizer.param_groups} == {1e-3}
    moved = [name for name, value in state.network.named_parameters() if not torch.equal(value, before[name])]
    assert len(moved) == len(list(state.network.parameters()))
    name = "backbone.stem.0.weight"
    averaged = 0.1 * before[name] + 0.9 * state.network.state_dict()[name]  # the decay begins at 0.1
    torch.testing.assert_close(state.ema.module.state_dict()[name], averaged)


def test_micro_batches_add_up_to_the_gradient_of_the_whole_batch(task):
    gradients = []
    for parts in (1, 4):
        model = copy.deepcopy(task.model).double().eval()  # batch statistics would depend on the parts
        images, targets = task.test.collate([task.test.samples[i] for i in range(8)])
        assigned = [task.assign(targets[i::parts], 64) for i in range(parts)]
        counts = torch.stack([task.count(part) for part in assigned]).sum(0)
        for i in range(parts):
            sum(
                task.criterion(model(images[i::parts].double() / 255), assigned[i], counts).values()
            ).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for whole, summed in zip(*gradients, strict=True):
        torch.testing.assert_close(summed, whole, rtol=1e-6, atol=1e-9)
