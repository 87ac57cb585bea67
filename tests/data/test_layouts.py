"""Each layout is recognised from its files alone, and read as its own tool means it."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import layouts
import numpy as np
import pytest

import train
from yolo.config import Config
from yolo.data import archives, classifier_images
from yolo.data.class_names import VOC_CLASSES
from yolo.data.images import list_pictures
from yolo.data.layouts import Reading, recognise
from yolo.data.sources import open_dataset, open_datasets
from yolo.data.splits import drawn, parse_split
from yolo.errors import UserError, one_line
from yolo.files import find

FOUND = {  # splits by role, pictures to train on / to choose by / to test on, and the configuration
    "voc folder": ("voc", {"train": "train", "val": "val", "test": "test"}, (10, 4, 3)),
    "voc xml and images": ("voc", {"train": "annotations"}, (None, None, None)),
    "voc xml side by side": ("voc", {"train": "train", "val": "valid"}, (10, 4, 4)),
    "yolo images/train": (
        "yolo",
        {"train": "images/train", "val": "images/val", "test": "images/test"},
        (10, 4, 3),
    ),
    "yolo train/images": (
        "yolo",
        {"train": "train/images", "val": "valid/images", "test": "test/images"},
        (10, 4, 3),
    ),
    "yolo by a yaml": (
        "yolo",
        {"train": "images/train+more/images", "val": "images/val"},
        (20, 4, 4),
    ),
    "darknet lists": ("yolo", {"train": "train.txt", "val": "valid.txt"}, (10, 4, 4)),
    "darknet: train.txt itself": ("yolo", {"train": "train.txt"}, (None, None, None)),
    "labelImg": ("yolo", {"train": "."}, (None, None, None)),
    "coco": (
        "coco",
        {
            "train": "annotations/instances_train2017.json",
            "val": "annotations/instances_val2017.json",
        },
        (10, 4, 4),
    ),
    "coco: the json itself": (
        "coco",
        {"train": "annotations/instances_train2017.json"},
        (None, None, None),
    ),
    "roboflow coco zip": (
        "coco",
        {
            "train": "train/_annotations.coco.json",
            "val": "valid/_annotations.coco.json",
            "test": "test/_annotations.coco.json",
        },
        (10, 4, 3),
    ),
    "kaggle csv": ("csv", {"train": "train", "test": "test"}, (10, 3, 3)),
    "voc devkit": ("voc", {"train": "2007:trainval", "test": "2007:test"}, (14, 3, 3)),
}
SAME = {
    "yolo: the yaml itself": "yolo by a yaml",
    "darknet: obj.data itself": "darknet lists",
    "roboflow yolo zip": "yolo train/images",
    "cvat yolo zip": "darknet lists",
    "cvat coco zip": "coco",
    "cvat voc zip": "voc folder",
}


def config_of(found: Reading) -> Config:
    return Config(data_root=str(found.root), **found.settings(0.2))


@pytest.mark.parametrize("name", [*FOUND, *SAME])
def test_a_layout_with_boxes_is_recognised_and_read(name: str, tmp_path: Path):
    dataset, splits, counts = FOUND[SAME.get(name, name)]
    found = recognise(layouts.make(name, tmp_path / "data"))
    assert (found.dataset, found.splits) == (dataset, splits)
    config = config_of(found)
    train_set, chosen = open_datasets(config)
    if found.config.endswith("voc_lite.yaml"):
        assert train_set.class_names == VOC_CLASSES
    else:
        assert {*train_set.class_names} == {*layouts.NAMES}
    test_set = open_dataset(config, config.split, train_set.class_names)
    if counts[0] is not None:
        assert (len(train_set), len(chosen), len(test_set)) == counts
    total = len(train_set) + len(chosen) if counts[0] is None else sum({*counts})
    assert total >= 10
    boxes = [annotation for annotation in train_set.annotations if len(annotation.labels) == 2]
    assert len(boxes) == len(train_set)


@pytest.mark.parametrize("name", ["yolo images/train", "voc folder", "coco", "darknet lists"])
def test_every_layout_reads_the_same_boxes(name: str, tmp_path: Path):
    config = config_of(recognise(layouts.make(name, tmp_path / "data")))
    dataset = open_dataset(config, config.train_split, layouts.NAMES)
    for image_id, annotation in zip(dataset.image_ids, dataset.annotations, strict=True):
        number = int(image_id) if name == "coco" else int(Path(image_id).stem.removeprefix("train"))
        objects = sorted(layouts.scene(number)[1], key=lambda pair: pair[1])
        order = np.lexsort(annotation.boxes.T[::-1])
        np.testing.assert_allclose(annotation.boxes[order], [box for _, box in objects], atol=1e-3)
        assert annotation.labels[order].tolist() == [label for label, _ in objects]


def test_polygons_of_coco_become_their_boxes_and_crowds_are_left_out_with_a_line(tmp_path: Path):
    config = config_of(recognise(layouts.make("coco", tmp_path)))
    train_set, _ = open_datasets(config)
    assert [line.split(";")[0] for line in train_set.notices] == [
        "1 regions of crowds are left out: annotation",
        "1 polygons have no box and are read as theirs: annotation",
    ]
    assert train_set.class_names == layouts.NAMES  # not Roboflow's name of the whole


def test_a_coco_picture_without_end_is_one_line(tmp_path: Path):
    config = config_of(recognise(layouts.make("coco", tmp_path)))
    for file in tmp_path.rglob("*.json"):
        content = json.loads(file.read_text())
        content["images"][0]["height"] = float("inf")
        file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="has no height and width"):
        open_datasets(config)


@pytest.mark.parametrize(
    "name", ["class folders", "class folders without splits", "class folders zip"]
)
def test_class_folders_are_recognised_and_read(name: str, tmp_path: Path):
    found = recognise(layouts.make(name, tmp_path / "data"))
    assert (found.dataset, Path(found.config).stem) == ("images", "cifar10")
    train_set, test_set = classifier_images.open_datasets(config_of(found))
    assert {*train_set.class_names} == {*layouts.NAMES}
    if "without" not in name:
        assert (len(train_set), len(test_set)) == (10, 3)
    assert len(train_set) + len(test_set) in (10, 13)
    assert not {*train_set.image_ids} & {*test_set.image_ids}


def test_an_archive_is_unpacked_once_beside_itself(tmp_path: Path):
    archive = layouts.make("roboflow yolo zip", tmp_path / "data")
    first = recognise(archive).root
    assert first.parent == archive.parent and first.name.startswith("export-")
    before = first.stat().st_mtime_ns
    assert recognise(archive).root == first and first.stat().st_mtime_ns == before
    assert not [path for path in archive.parent.iterdir() if path.name.startswith(".")]


LONG = "n" * 300


@pytest.mark.parametrize("member", ["a\0b.jpg", f"{LONG}.jpg", "images/a.jpg/b.jpg", "."])
def test_a_member_that_no_file_can_be_named_like_is_one_line(tmp_path: Path, member: str):
    path = tmp_path / "cups.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("images/a.jpg", member):
            entry = tarfile.TarInfo("pax" if "\0" in name else name)
            entry.pax_headers = {"path": name} if "\0" in name else {}
            tar.addfile(entry)
    with pytest.raises(UserError, match=r"cups\.tar: .* cannot be written \(") as caught:
        recognise(path)
    assert one_line(member) in str(caught.value)
    assert [*tmp_path.iterdir()] == [path]


def test_a_tar_whose_first_size_no_file_has_is_one_line(tmp_path: Path):
    path = tmp_path / "cups.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo(LONG))  # starts with a header that holds the long name
    packed = bytearray(path.read_bytes())
    packed[124:136] = b"\x80" + b"\0" * 3 + b"\x7f" * 8
    packed[148:156] = b" " * 8
    packed[148:156] = b"%06o\0 " % sum(packed[:512])
    path.write_bytes(packed)
    with pytest.raises(UserError, match=r"cups\.tar: is damaged or truncated"):
        recognise(path)


def test_a_damaged_member_is_named_with_its_archive(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_MEMBER", 3)
    with zipfile.ZipFile(tmp_path / "cups.zip", "w") as packed:
        packed.writestr("a.txt", b"more")
    with pytest.raises(UserError, match=r"cups\.zip: a\.txt: has"):
        recognise(tmp_path / "cups.zip")


@pytest.mark.parametrize("dataset", ["voc", "yolo", "coco", "csv", "digits"])
@pytest.mark.parametrize("split", ["train", LONG, f"1:{LONG}"])
def test_a_setting_that_no_file_can_be_named_like_is_the_usual_line(
    tmp_path: Path, dataset: str, split: str
):
    root = layouts.make("voc folder", tmp_path) if LONG in split else Path(LONG)
    cfg = Config(data_root=str(root), dataset=dataset)
    with pytest.raises(UserError, match=LONG):
        open_dataset(cfg, split, None)


def test_what_no_file_can_be_named_like_is_not_there():
    for name in (LONG, f"configs/{LONG}", f"{LONG}/voc_small_yolov3.safetensors"):
        assert find(Path(name)) == Path(name)
    with pytest.raises(UserError, match="does not exist"):
        recognise(Path(LONG))
    with pytest.raises(UserError, match="names no images"):
        list_pictures(LONG)


def test_two_possible_readings_are_an_error_that_shows_both(tmp_path: Path):
    layouts.make("yolo images/train", tmp_path)
    layouts.make("voc folder", tmp_path)
    with pytest.raises(UserError, match=r"more than one way.*--dataset voc.*--dataset yolo"):
        recognise(tmp_path)
    assert recognise(tmp_path, "voc").dataset == "voc"
    assert recognise(tmp_path, "yolo").splits["train"] == "images/train"


def test_two_folders_of_the_same_split_are_two_readings(tmp_path: Path):
    layouts.make("yolo images/train", tmp_path)
    layouts.pairs(tmp_path, "train/images", "train/labels", {"train": 2})
    with pytest.raises(UserError, match=r"train in images/train .*train in train/images"):
        recognise(tmp_path)


def test_pictures_without_boxes_and_folders_without_pictures_are_named(tmp_path: Path):
    with pytest.raises(UserError, match="does not exist"):
        recognise(tmp_path / "nowhere")
    (tmp_path / "notes.docx").write_text("")
    with pytest.raises(UserError, match=r"holds no pictures \(1 \.docx\)"):
        recognise(tmp_path)
    layouts.write_image(tmp_path / "a.jpg", layouts.scene(0)[0])
    with pytest.raises(UserError, match="pictures, but no boxes"):
        recognise(tmp_path)
    with pytest.raises(UserError, match="none of the files that describe a data set"):
        recognise(tmp_path / "notes.docx")


def test_a_yaml_whose_training_pictures_are_not_there_names_the_path(tmp_path: Path):
    layouts.make("yolo by a yaml", tmp_path)
    shutil.rmtree(tmp_path / "more")
    with pytest.raises(UserError, match=r"flowers\.yaml: `train: more/images` is not there"):
        recognise(tmp_path)


def test_a_drawn_share_follows_the_names_alone_and_keeps_copies_together():
    names = [f"{i}_jpg.rf.{copy}.jpg" for i in range(200) for copy in "ab"]
    base, first = parse_split("train[:20%]")
    rest = parse_split("train[20%:]")[1]
    assert base == "train" and parse_split("2007:test") == ("2007:test", None)
    held, kept = drawn(names, first), drawn(names, rest)
    assert sorted([*held, *kept]) == list(range(400))
    assert 0.12 < len(held) / 400 < 0.28
    assert all((i ^ 1) in held for i in held)
    more = [*names, *(f"{i}.png" for i in range(1000, 1100))]
    assert drawn(more, first)[: len(held)] == held


@pytest.mark.parametrize("count", [2, 3, 5])
def test_each_side_of_a_drawn_split_has_a_picture(count: int):
    for seed in range(20):
        names = [f"{seed}-{i}.jpg" for i in range(count)]
        held = drawn(names, parse_split("train[:20%]")[1])
        assert 1 <= len(held) < count
    with pytest.raises(UserError, match="cannot be divided"):
        drawn(["a.jpg"], parse_split("train[:20%]")[1])


def test_errors_are_found_in_half_a_second_without_torch(tmp_path: Path):
    layouts.make("yolo images/train", tmp_path)
    layouts.make("voc folder", tmp_path)
    script = (
        "import sys, time, train\n"
        "from yolo.errors import UserError\n"
        f"try: train.main(['--data-root', {str(tmp_path)!r}])\n"
        "except UserError as error: print(error)\n"
        "assert not {'torch', 'cv2', 'numpy'} & {*sys.modules}, 'imports too much'\n"
    )
    root = Path(train.__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, env={**os.environ}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "more than one way" in done.stdout
