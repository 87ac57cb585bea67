"""The shared cache: the same images, one copy, and a refusal before memory runs out."""

from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest

from yolo.config import Config
from yolo.data import cache as caching
from yolo.data.cache import ImageCache, cache_images, free_memory
from yolo.data.sources import open_datasets
from yolo.data.voc import read_voc
from yolo.errors import UserError


def test_cached_images_are_those_of_the_files(tiny_digits: Path):
    dataset = read_voc(tiny_digits, "test", None)
    originals = [dataset.image(index) for index in range(len(dataset))]
    cache_images(dataset, 320, progress=False)
    for index, original in enumerate(originals):
        np.testing.assert_array_equal(dataset.image(index, 32), original)
        assert not dataset.image(index).flags.writeable


def test_large_images_are_kept_at_the_largest_size_shown(tiny_digits: Path):
    dataset = read_voc(tiny_digits, "test", None)
    cache_images(dataset, 64, progress=False)
    for index, annotation in enumerate(dataset.annotations):
        height, width = dataset.image(index).shape[:2]
        assert max(height, width) == 64
        assert height / width == pytest.approx(annotation.height / annotation.width, rel=0.05)


def test_the_pixels_lie_in_shared_memory_and_travel_to_a_worker_as_a_handle():
    cache = ImageCache(np.array([[1000, 1000]]))
    assert cache.pixels.is_shared()
    cache[0] = np.full((1000, 1000, 3), 7, np.uint8)
    assert len(ForkingPickler.dumps(cache)) < 10_000


def test_too_little_memory_is_refused_before_anything_is_decoded(
    tiny_digits: Path, monkeypatch: pytest.MonkeyPatch
):
    dataset = read_voc(tiny_digits, "train", None)
    need = sum(annotation.height * annotation.width * 3 for annotation in dataset.annotations)
    monkeypatch.setattr(caching, "free_memory", lambda: int(need / 0.8) + 100)
    monkeypatch.setattr(dataset, "image", lambda *_: pytest.fail("decoded"))
    with pytest.raises(
        UserError, match=r"--cache ram: the 24 images .* each of 2 processes.*--cache none"
    ):
        cache_images(dataset, 320, copies=2, progress=False)


def test_free_memory_is_that_of_the_narrowest_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    assert 0 < free_memory() < 2**50
    monkeypatch.setattr(caching, "_container_memory", lambda: [12345])
    assert free_memory() == 12345


def test_a_container_limit_counts_cached_files_as_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, text in (
        ("memory.max", "1000"),
        ("memory.current", "900"),
        ("memory.stat", "anon 600\ninactive_file 200\nactive_file 100\n"),
    ):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(caching, "CONTROL_GROUP", tmp_path)
    assert caching._container_memory() == [400]
    (tmp_path / "memory.max").write_text("max\n")
    assert caching._container_memory() == []


def test_the_configuration_turns_the_cache_on_for_both_sets(tiny_digits: Path):
    cfg = Config(dataset="digits", data_root=str(tiny_digits), cache="ram", img_sizes=(64,))
    train_set, test_set = open_datasets(cfg)
    assert train_set.cache is not None and test_set.cache is not None
    assert max(train_set.image(0).shape) == 64
