"""How the processes of a run read their surroundings."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from yolo.config import Config
from yolo.engine import fabric as processes
from yolo.errors import UsageError

ROOT = Path(__file__).parent.parent.parent
ENVIRONMENT = ("LOCAL_WORLD_SIZE", "WORLD_SIZE", "SLURM_NTASKS_PER_NODE", "SLURM_NNODES")


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
    assert processes.world(Config(**flags)) == world


@pytest.mark.parametrize(
    ("wanted", "device", "picked"),
    [
        ("auto", "cuda", "16-mixed"),
        ("bf16-mixed", "cuda", "bf16-mixed"),
        ("32-true", "cpu", "32-true"),
    ],
)
def test_precision_follows_the_device_unless_it_is_given(wanted, device, picked):
    precision, why = processes.pick_precision(wanted, device)
    assert precision == picked
    assert why


def test_a_gpu_that_is_not_there_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="--accelerator cuda: no CUDA device"):
        processes.make_fabric(Config(accelerator="cuda"))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_not_given_back_to_the_system():
    program = """
import resource, torch
from yolo.engine.fabric import keep_freed_memory
keep_freed_memory()
for _ in range(4):  # small objects may settle in the first hole
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""  # in a process of its own: the heap of this one depends on the tests before
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 1000  # of 16,384 pages, 64 MiB


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_forked_worker_does_not_hold_the_memory_that_its_parent_keeps():
    program = """
import os, psutil, torch
from yolo.engine.fabric import keep_freed_memory
keep_freed_memory()
before = psutil.Process().memory_info().rss
blocks = [torch.ones(2**20) for _ in range(256)]  # 1 GB
del blocks
assert psutil.Process().memory_info().rss - before > 2**28  # kept
if not os.fork():
    print(psutil.Process().memory_info().rss - before)
os.wait()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert int(done.stdout.split()[0]) < 2**27
