"""One rank's share of the data."""

import pytest

from yolo.config import Config
from yolo.engine.fabric import make_fabric
from yolo.engine.loaders import make_sampler
from yolo.errors import UsageError


def test_a_batch_that_cannot_be_shared_is_refused_by_its_flag():
    fabric, _ = make_fabric(Config(accelerator="cpu", precision="32-true"))
    with pytest.raises(UsageError, match="--batch-size 6"):
        make_sampler(fabric, Config(batch_size=6, grad_accum_steps=4), 100)
