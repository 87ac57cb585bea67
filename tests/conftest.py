"""Where the tests find real data, and the thread count that makes their results repeatable."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(2)


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
    """The CIFAR-10 folder or archive that CIFAR10_ROOT names."""
    return _real_data("CIFAR10_ROOT")
