"""One rank's share of the data."""

from types import SimpleNamespace

import pytest

from yolo.config import Config
from yolo.engine.fabric import make_fabric
from yolo.engine.loaders import check_shared_memory, make_sampler
from yolo.errors import UsageError, UserError


def test_a_batch_that_cannot_be_shared_is_refused_by_its_flag():
    fabric, _ = make_fabric(Config(accelerator="cpu", precision="32-true"))
    with pytest.raises(UsageError, match="--batch-size 6"):
        make_sampler(fabric, Config(batch_size=6, grad_accum_steps=4), 100)


def test_one_image_of_32_pixels_at_a_time_is_refused_as_batch_norm_would():
    fabric, _ = make_fabric(Config(accelerator="cpu", precision="32-true"))
    with pytest.raises(UsageError, match=r"--img-sizes 32 .*--grad-accum-steps"):
        make_sampler(fabric, Config(batch_size=4, grad_accum_steps=4, img_sizes=(32, 64)), 100)


def test_workers_whose_batches_do_not_fit_into_shared_memory_are_refused(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**6))
    with pytest.raises(UserError, match=r"/dev/shm has 1 MB.*2 workers need up to 5 MB.*--workers"):
        check_shared_memory(2, 10**6)
    check_shared_memory(1, 10**5)
