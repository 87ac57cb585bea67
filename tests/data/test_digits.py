"""The embedded data set: equal bytes for equal seeds, splits apart, all or nothing."""

from pathlib import Path

import numpy as np
import pytest

from yolo.data import digits
from yolo.data.digits import ensure_digits, load_material, make_scene, write_digits
from yolo.data.voc import read_voc
from yolo.errors import UserError

FEW = {"train": 6, "test": 4}


def contents(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


def test_equal_seeds_give_equal_bytes_and_others_do_not(tmp_path: Path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_digits(tmp_path / name, seed, FEW)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert a != c


def test_the_splits_share_no_digit_and_no_photo_region():
    train, test = load_material("train"), load_material("test")
    assert len(train.labels) + len(test.labels) == 1797
    assert set(train.labels) == set(test.labels) == set(range(10))
    assert 0.18 < len(test.labels) / 1797 < 0.22
    for left, right in zip(train.photos, test.photos, strict=True):
        assert left.shape[1] + right.shape[1] == 640


def test_scenes_hold_one_to_eight_digits_that_do_not_overlap_and_have_varied_shapes():
    material = load_material("train")
    scenes = [make_scene(material, np.random.default_rng(number)) for number in range(100)]
    shapes = np.array([scene.image.shape[:2] for scene in scenes])
    counts = [len(scene.boxes) for scene in scenes]
    assert shapes.min() >= 160 and shapes.max() <= 320 and len(np.unique(shapes)) > 50
    assert set(counts) == set(range(1, 9))
    for scene in scenes:
        taken = np.zeros(scene.image.shape[:2], int)
        for left, top, right, bottom in scene.boxes:
            assert (
                0 <= left < right <= scene.image.shape[1]
                and 0 <= top < bottom <= scene.image.shape[0]
            )
            taken[top:bottom, left:right] += 1
        assert taken.max() == 1


def test_a_digit_reaches_all_four_sides_of_its_box_and_stands_out():
    material = load_material("test")
    for number in range(20):
        scene = make_scene(material, np.random.default_rng(number))
        for left, top, right, bottom in scene.boxes:
            region = scene.image[top:bottom, left:right].astype(int)
            assert region.max() - region.min() > 60


def test_it_is_read_back_as_it_was_made(tiny_digits: Path):
    dataset = read_voc(tiny_digits, "train", None)
    scene = make_scene(load_material("train"), np.random.default_rng([0, 0, 3]))
    np.testing.assert_array_equal(dataset.annotation(3).boxes, scene.boxes)
    assert [
        int(dataset.class_names[label]) for label in dataset.annotation(3).labels
    ] == scene.labels
    assert np.abs(dataset.image(3).astype(int) - scene.image).mean() < 5


def test_a_kill_halfway_leaves_nothing_that_looks_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(digits, "NUM_SCENES", FEW)
    monkeypatch.setattr(digits, "_write_scene", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ensure_digits(tmp_path / "digits", progress=False)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    monkeypatch.setattr(digits, "NUM_SCENES", FEW)
    (tmp_path / ".digits-left-by-a-kill").mkdir()
    assert len(read_voc(ensure_digits(tmp_path / "digits", progress=False), "train", None)) == 6


def test_an_existing_data_set_is_used_and_another_folder_is_not_touched(
    tiny_digits: Path, tmp_path: Path
):
    before = contents(tiny_digits)
    assert ensure_digits(tiny_digits) == tiny_digits
    assert contents(tiny_digits) == before
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="move it away"):
        ensure_digits(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_of_two_processes_the_second_uses_the_result_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def slow_write(root: Path, *_: object, **__: object) -> None:
        write_digits(tmp_path / "digits", 0, FEW)  # meanwhile the other one has finished
        write_digits(root, 0, FEW)

    monkeypatch.setattr(digits, "write_digits", slow_write)
    assert len(read_voc(ensure_digits(tmp_path / "digits", progress=False), "test", None)) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]
