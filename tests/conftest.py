"""Where the tests find real data, and the thread count that makes their results repeatable."""

import os
from pathlib import Path

# Two tests at once share the cores: threads that spin for one another would take all of them.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

torch.set_num_threads(1)


def _real_data(variable: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set")
    path = Path(value)
    if not path.exists():
        pytest.skip(f"{variable}={value} does not exist")
    return path


@pytest.fixture(scope="session")
def voc_root() -> Path:
    """The VOCdevkit folder that VOC_ROOT names."""
    return _real_data("VOC_ROOT")


@pytest.fixture(scope="session")
def cifar10_root() -> Path:
    """Folder of the official binary CIFAR-10 (`cifar-10-batches-bin/`) that CIFAR10_ROOT names."""
    return _real_data("CIFAR10_ROOT")


@pytest.fixture(scope="session")
def tiny_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded data set in small: 24 training and 8 test scenes, VOC layout."""
    from yolo.data.digits import write_digits

    root = tmp_path_factory.mktemp("data") / "digits"
    write_digits(root, num_scenes={"train": 24, "test": 8})
    return root


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration of 12 steps that take a second: 24 small digit scenes, a narrow network."""
    from yolo.data.digits import write_digits

    folder = tmp_path_factory.mktemp("tiny")
    write_digits(folder / "digits", num_scenes={"train": 24, "test": 7})
    config = folder / "tiny.yaml"
    config.write_text(
        f"""
dataset: digits
data_root: {folder / "digits"}
width: 0.05
batch_size: 4
epochs: 2
img_sizes: [32, 64]
workers: 0
threads: 1
precision: 32-true
accelerator: cpu
log_every: 2
save_every: "3"
max_lr: 0.01
"""
    )
    return config
