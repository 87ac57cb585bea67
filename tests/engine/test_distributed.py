"""Several processes train the same model as one: gloo on the CPU, two ranks on this machine."""

import copy
import dataclasses
import os
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import faults
import pytest
import torch
from launching import rank_env, start_process, start_training
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import train as script
from yolo.cli import read_yaml
from yolo.config import Config
from yolo.runs.checkpoint import content_digest, load_checkpoint
from yolo.runs.folder import list_checkpoints
from yolo.runs.logbook import TIMINGS, read_metrics
from yolo.schedule import read_schedule

ROOT = Path(__file__).parent.parent.parent
WEIGHTS = ("model", "ema", "optimizer")


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def weights_digest(run_dir: Path) -> str:
    content = load_checkpoint(list_checkpoints(run_dir / "checkpoints")[-1])
    return content_digest({name: content[name] for name in WEIGHTS})


def saved_steps(run_dir: Path) -> list[str]:
    return [path.name[:19] for path in list_checkpoints(run_dir / "checkpoints")]


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    lines = read_metrics(run_dir / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


# What each rank of a world computes: called in processes of their own.


def gradient(config: Config, grad_accum_steps: int) -> dict[str, torch.Tensor]:
    """Return the gradient of the first global batch: float64, BatchNorm statistics frozen."""
    from yolo.engine import fabric as processes
    from yolo.engine import loaders, loop, state
    from yolo.tasks.build import build_task

    config = dataclasses.replace(
        config, grad_accum_steps=grad_accum_steps, max_norm=1e9, img_sizes=(64,)
    )
    fabric, _ = processes.make_fabric(config)
    torch.manual_seed(0)
    task = build_task(config)
    task.model.double().register_forward_pre_hook(lambda _, images: (images[0].double() / 255,))
    state.make_optimizer = unit_descent  # type: ignore[assignment]
    training = state.make_state(fabric, None, config, task)
    training.network.eval()
    before = copy.deepcopy(training.network.state_dict())
    loader = loaders.make_train_loader(
        fabric, config, task, loaders.make_sampler(fabric, config, 24)
    )
    micro_batches = next(loop.optimizer_steps(loader, grad_accum_steps))
    loop.train_step(fabric, training, task, micro_batches, lr=1.0, beta1=0.0)
    after = training.network.state_dict()
    return {name: before[name] - after[name] for name, _ in training.network.named_parameters()}


def statistics(config: Config) -> dict[str, dict[str, torch.Tensor]]:
    """Return, after a step of two micro-batches, the network's running means and variances, the
    average's, and those that this rank's images alone would have made."""
    from yolo.engine import fabric as processes
    from yolo.engine import loaders, loop, state
    from yolo.tasks.build import build_task

    config = dataclasses.replace(config, grad_accum_steps=2, img_sizes=(64,))
    fabric, _ = processes.make_fabric(config)
    torch.manual_seed(0)
    task = build_task(config)
    training = state.make_state(fabric, None, config, task)
    alone = copy.deepcopy(training.network)
    sampler = loaders.make_sampler(fabric, config, 24)
    loader = loaders.make_train_loader(fabric, config, task, sampler)
    micro_batches = next(loop.optimizer_steps(loader, 2))
    for images, _ in micro_batches:
        alone(images)
    loop.train_step(fabric, training, task, micro_batches, lr=0.0, beta1=0.9)
    networks = {"network": training.network, "average": training.ema.module, "alone": alone}
    return {
        name: {k: v for k, v in network.state_dict().items() if "running" in k}
        for name, network in networks.items()
    }


def unit_descent(network: torch.nn.Module, *_: Any, **__: Any) -> torch.optim.SGD:
    """An optimizer that only subtracts the gradient."""
    group = {"params": network.parameters(), "betas": (0.0, 0.0), "lr_factor": 1.0}
    return torch.optim.SGD([group], lr=1.0)


def detect_nearly_the_truth() -> None:
    """Add some detections that count to the untrained network's, equal for an image on any rank."""
    from yolo.tasks.detection import DetectionEvaluation

    update = DetectionEvaluation.update

    def update_with_more(self: Any, outputs: Any, targets: Any) -> None:
        update(self, outputs, targets)
        for index in [target["image_index"] for target in targets]:
            truth = self.detections.dataset.annotation(index)
            generator = torch.Generator().manual_seed(index)
            moves = 4 * torch.randn(len(truth.boxes), 2, generator=generator)
            boxes = torch.as_tensor(truth.boxes) + torch.cat([moves, moves], dim=1)
            scores = torch.rand(len(boxes), generator=generator)
            labels = torch.as_tensor(truth.labels)
            self.detections.update(index, {"boxes": boxes, "scores": scores, "labels": labels})

    DetectionEvaluation.update = update_with_more  # type: ignore[method-assign]


def evaluation(config: Config) -> dict[str, Any]:
    """Test an untrained network, one image at a time."""
    from yolo.engine import fabric as processes
    from yolo.engine import loaders, loop
    from yolo.tasks.build import build_task

    detect_nearly_the_truth()
    fabric, _ = processes.make_fabric(config)
    torch.manual_seed(0)
    task = build_task(dataclasses.replace(config, score_threshold=0.0))
    loader = loaders.make_eval_loader(
        fabric, dataclasses.replace(config, batch_size=fabric.world_size), task.eval_split
    )
    metrics = loop.evaluate(fabric, task.model.eval(), task.eval_split, loader, full=True)
    assert metrics is not None
    return {"shares": len(loader), "image_count": len(task.eval_split.dataset), **metrics.compute()}


def probe(config: Config, path: Path) -> None:
    """Compute everything that must not depend on the number of ranks; each rank saves its own."""
    found: dict[str, Any] = {"evaluation": evaluation(config), "statistics": statistics(config)}
    for grad_accum_steps in (1, 2):
        found[f"gradient_{grad_accum_steps}"] = gradient(config, grad_accum_steps)
    torch.save(found, path)


@pytest.fixture(scope="module")
def probes(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What one process finds, then what rank 0 and rank 1 of two find."""
    folder = tmp_path_factory.mktemp("probes")
    config = Config.from_dict(read_yaml(tiny_config))
    port = free_port()
    envs = [{}, rank_env(0, 2, port), rank_env(1, 2, port)]
    processes = [
        start_process(partial(probe, config, folder / f"{i}.pt"), folder / f"{i}.log", env=env)
        for i, env in enumerate(envs)
    ]
    for i, process in enumerate(processes):
        process.join(300)
        assert process.exitcode == 0, (folder / f"{i}.log").read_text()
    return [torch.load(folder / f"{i}.pt", weights_only=False) for i in range(3)]


@pytest.mark.parametrize("grad_accum_steps", [1, 2])
def test_the_gradient_is_the_same_on_one_rank_and_on_two(
    probes: list[dict[str, Any]], grad_accum_steps: int
) -> None:
    expected = probes[0]["gradient_1"]
    largest = max(float(value.abs().max()) for value in expected.values())
    assert largest > 1e-3
    for probe_of_rank in probes:
        for name, value in probe_of_rank[f"gradient_{grad_accum_steps}"].items():
            torch.testing.assert_close(
                value, expected[name], rtol=1e-6, atol=1e-9 * largest, msg=name
            )


def test_running_statistics_are_the_mean_of_both_ranks_and_equal_on_both(
    probes: list[dict[str, Any]],
) -> None:
    first, second = (found["statistics"] for found in probes[1:])
    for name, value in first["alone"].items():
        assert not torch.allclose(value, second["alone"][name])
        mean = (value + second["alone"][name]) / 2
        torch.testing.assert_close(first["network"][name], mean, rtol=1e-5, atol=1e-7)
        assert torch.equal(first["network"][name], second["network"][name])
        assert torch.equal(first["average"][name], second["average"][name])


def test_two_ranks_test_each_image_once_and_find_exactly_what_one_rank_finds(
    probes: list[dict[str, Any]],
) -> None:
    one, *ranks = (found["evaluation"] for found in probes)
    # odd: no image twice
    assert one.pop("shares") == sum(rank.pop("shares") for rank in ranks) == 7
    assert 0.1 < one["map_50"] < 0.99
    loss = one.pop("validation_loss")  # a mean over batches, which are others on two ranks
    for rank in ranks:
        assert rank.pop("validation_loss") == pytest.approx(loss, rel=0.2)
        torch.testing.assert_close(rank, one, rtol=0, atol=0, equal_nan=True)


def train_on_two_ranks(
    config: Path, run_dir: Path, *flags: str, hooks: tuple[Any, Any] = (None, None)
) -> tuple[list[int | None], str]:
    """Train on two ranks as torchrun would start them; return exit codes and output."""
    port = free_port()
    logs = [run_dir.with_suffix(f".{rank}.log") for rank in range(2)]
    argv = ["--config", str(config), "--out-dir", str(run_dir), *flags]
    ranks = [
        start_training(argv, logs[rank], hook=hooks[rank], env=rank_env(rank, 2, port))
        for rank in range(2)
    ]
    for rank in ranks:
        rank.join(300)
    return [rank.exitcode for rank in ranks], logs[0].read_text() + logs[1].read_text()


@pytest.fixture(scope="module")
def two_ranks(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an uninterrupted training on two ranks."""
    run_dir = tmp_path_factory.mktemp("two") / "run"
    codes, output = train_on_two_ranks(tiny_config, run_dir)
    assert codes == [0, 0], output
    assert output.count("2 process(es)") == 1  # only rank 0 speaks
    return run_dir


def test_a_signal_to_one_rank_alone_stops_both_and_the_resume_is_exact(
    tiny_config: Path, two_ranks: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    stop_rank_1 = (None, partial(faults.signal_after_step, 3, signal.SIGTERM))
    codes, output = train_on_two_ranks(
        tiny_config, run_dir, "--save-every", "10m", hooks=stop_rank_1
    )
    assert codes == [143, 143], output
    assert saved_steps(run_dir) == ["epoch000-step000003"]
    codes, output = train_on_two_ranks(tiny_config, run_dir, "--resume", "auto")
    assert codes == [0, 0], output
    assert weights_digest(run_dir) == weights_digest(two_ranks)
    assert metrics(run_dir) == metrics(two_ranks)


def test_a_rank_that_answers_no_more_stops_the_other_within_the_time_limit(
    tiny_config: Path, tmp_path: Path
) -> None:
    port, log = free_port(), tmp_path / "0.log"
    argv = ["--config", str(tiny_config), "--out-dir", str(tmp_path / "run")]
    hooks = (faults.wait_two_seconds_for_other_ranks, partial(faults.stop_answering_after_step, 4))
    ranks = [
        start_training(argv, log.with_stem(str(rank)), hook=hook, env=rank_env(rank, 2, port))
        for rank, hook in enumerate(hooks)
    ]
    try:
        ranks[0].join(100)
        assert ranks[0].exitcode == 1, log.read_text()
    finally:
        for rank in ranks:
            rank.kill()
    (line,) = [line for line in log.read_text().splitlines() if line.startswith("error:")]
    assert "another rank ended, or did not answer for" in line and "--resume auto" in line
    assert "Traceback" not in log.read_text()


def test_the_same_batch_goes_on_with_another_number_of_ranks_and_says_so(
    tiny_config: Path, two_ranks: Path, tmp_path: Path
) -> None:
    middle = list_checkpoints(two_ranks / "checkpoints")[2]
    argv = [
        "--config",
        str(tiny_config),
        "--resume",
        str(middle),
        "--out-dir",
        str(tmp_path / "one"),
    ]
    log = tmp_path / "one.log"
    process = start_training(argv, log)
    process.join(300)
    assert process.exitcode == 0, log.read_text()
    assert "results may differ in the last bits" in log.read_text()
    assert read_schedule(tmp_path / "one" / "schedule.txt") == read_schedule(
        two_ranks / "schedule.txt"
    )


def test_two_ranks_end_with_the_same_statistics_however_often_they_save(
    tiny_config: Path, two_ranks: Path, tmp_path: Path
) -> None:
    codes, output = train_on_two_ranks(tiny_config, tmp_path / "run", "--save-every", "5")
    assert codes == [0, 0], output
    assert saved_steps(tmp_path / "run") != saved_steps(two_ranks)
    assert weights_digest(tmp_path / "run") == weights_digest(two_ranks)


def torchrun(*words: str, **env: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", *words]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **env}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.mark.slow  # eight starts of Python with torch
def test_torchrun_restarts_after_a_killed_rank_and_ends_as_if_nothing_had_happened(
    tiny_config: Path, two_ranks: Path, tmp_path: Path
) -> None:
    script = tmp_path / "train_until_killed.py"
    script.write_text(
        "import os, faults, train\n"
        "from yolo import cli\n"
        "if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' and os.environ['RANK'] == '1':\n"
        "    faults.kill_after_step(7)\n"
        "cli.run(train.main)\n"
    )
    flags = ["--config", str(tiny_config), "--out-dir", str(tmp_path / "run")]
    agent = torchrun("--standalone", "--nproc_per_node=2", "--max-restarts=1", str(script), *flags)
    output, _ = agent.communicate(timeout=400)
    assert agent.returncode == 0, output
    assert "2 process(es)" in output
    assert "resumed from" in output and "step 6 of 12" in output
    assert read_schedule(tmp_path / "run" / "schedule.txt").ranks == 2
    assert weights_digest(tmp_path / "run") == weights_digest(two_ranks)
    assert metrics(tmp_path / "run") == metrics(two_ranks)


def agent(endpoint: str, argv: list[str]) -> None:
    """What `torchrun --nnodes=2 --nproc_per_node=1 --rdzv_backend=c10d` does on one node."""
    config = LaunchConfig(
        min_nodes=2,
        max_nodes=2,
        nproc_per_node=1,
        run_id="test",
        rdzv_backend="c10d",
        rdzv_endpoint=endpoint,
        local_addr="127.0.0.1",
        max_restarts=0,
        start_method="fork",
    )
    elastic_launch(config, script.main)(argv)


def test_two_agents_form_one_world_over_the_network(tiny_config: Path, tmp_path: Path) -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    argv = ["--config", str(tiny_config), "--out-dir", str(tmp_path / "run"), "--max-steps", "2"]
    logs = [tmp_path / f"{node}.log" for node in range(2)]
    agents = [start_process(partial(agent, endpoint, argv), log) for log in logs]
    for node in agents:
        node.join(300)
    output = "".join(log.read_text() for log in logs)
    assert [node.exitcode for node in agents] == [0, 0], output
    assert "2 process(es)" in output
    assert read_schedule(tmp_path / "run" / "schedule.txt").ranks == 2
