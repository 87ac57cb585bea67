"""The classifier's data, whatever it is packed in, its augmentations and its metrics."""

import dataclasses
import os
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_confusion_matrix,
)

from yolo.config import AugmentConfig, DataConfig
from yolo.data import archives, classifier_images
from yolo.data.archives import read_members
from yolo.data.classifier_images import open_dataset, open_datasets
from yolo.data.classifier_samples import EvalImages, TrainImages, collate_images
from yolo.data.samplers import SampleKey
from yolo.errors import UsageError, UserError
from yolo.metrics.classification import ClassificationMetrics

RNG = np.random.default_rng(0)


def _random_image(height: int = 32, width: int = 32) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def class_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folders")
    for split, count in (("train", 4), ("test", 2)):
        for name in ("dog", "cat"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                cv2.imwrite(str(folder / f"{i}.png"), _random_image())
    return root


def _as_folder(root: Path, tmp_path: Path) -> Path:
    return root


def _as_tar_xz(root: Path, tmp_path: Path) -> Path:
    with tarfile.open(tmp_path / "images.tar.xz", "w:xz") as archive:
        for path in reversed(sorted(root.rglob("*.png"))):  # an order of its own
            archive.add(path, f"leading/{path.relative_to(root)}")
    return tmp_path / "images.tar.xz"


def _as_zip(root: Path, tmp_path: Path) -> Path:
    return Path(shutil.make_archive(str(tmp_path / "images"), "zip", root))


def _images(root: Path, **changes: object) -> DataConfig:
    given: dict[str, Any] = {"task": "classification", "dataset": "images", **changes}
    return DataConfig(data_root=str(root), **given)


@pytest.mark.parametrize("pack", [_as_folder, _as_tar_xz, _as_zip])
def test_class_folders_give_the_same_arrays_however_they_are_packed(
    class_folders: Path, tmp_path: Path, pack: Callable[[Path, Path], Path]
) -> None:
    train, test = open_datasets(_images(pack(class_folders, tmp_path)))
    assert train.class_names == test.class_names == ("cat", "dog")
    assert train.labels.tolist() == [0] * 4 + [1] * 4
    assert test.images.shape == (4, 32, 32, 3) and test.images.dtype == np.uint8
    first = cv2.imread(str(class_folders / "train/cat/0.png"), cv2.IMREAD_COLOR_RGB)
    assert (train.image(0) == first).all()
    assert train.digest() == open_datasets(_images(class_folders))[0].digest() != test.digest()


def test_linked_folders_and_sub_folders_of_classes_are_read_and_hidden_ones_are_not(
    class_folders: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(class_folders, tmp_path / "copy"))
    shutil.move(root / "train/cat", tmp_path / "cats")
    (root / "train/cat").symlink_to(tmp_path / "cats")
    (tmp_path / "cats/up").symlink_to(root)  # has no end
    (root / "train/dog/day1").mkdir()
    shutil.move(root / "train/dog/0.png", root / "train/dog/day1/0.png")
    (root / "train/.ipynb_checkpoints").mkdir()
    shutil.copy(tmp_path / "cats/1.png", root / "train/.ipynb_checkpoints/1.png")
    train, test = open_datasets(_images(root))
    assert train.class_names == ("cat", "dog") and train.labels.tolist() == [0] * 4 + [1] * 4
    assert "dog/day1/0.png" in train.image_ids and train.notices == test.notices == []


def test_files_of_a_split_that_are_not_used_are_counted(
    class_folders: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(class_folders, tmp_path / "copy"))
    (root / "train/cat/a.heic").write_bytes(b"")
    shutil.copy(root / "train/cat/0.png", root / "train/loose.png")
    (notice,) = open_datasets(_images(root))[0].notices
    assert notice.startswith("2 files are") and notice.endswith("the first: train/cat/a.heic")


def test_images_of_other_sizes_become_32_pixels(tmp_path: Path) -> None:
    folder = tmp_path / "test" / "wide"
    folder.mkdir(parents=True)
    cv2.imwrite(str(folder / "0.png"), _random_image(40, 90))
    cv2.imwrite(str(folder / "1.png"), _random_image(8, 8))
    assert open_dataset(_images(tmp_path), "test", ["wide"]).images.shape == (2, 32, 32, 3)


def test_unreadable_images_stop_or_are_listed(class_folders: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(class_folders, root)
    (root / "train/cat/0.png").write_bytes(b"no image")
    (root / "train/cat/1.png").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"train/cat/[01]\.png: is truncated or no image.*--skip-bad"
    ):
        open_datasets(_images(root))
    train, _ = open_datasets(_images(root, skip_bad=True))
    assert len(train) == 6 and len(train.skipped) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "val"}, "no images under val/"),
        ({"classes": "cat"}, "'dog', which is not among cat"),
        ({"data_root": "/nowhere"}, "/nowhere: cannot be read .No such file"),
        ({"dataset": "voc"}, "--dataset voc: classification takes"),
        ({"dataset": "digits", "split": "val"}, "'val': this data set has train and test"),
    ],
)
def test_wrong_settings_are_answered_in_one_line(
    class_folders: Path, changes: dict[str, str], message: str
) -> None:
    cfg = DataConfig(
        **{"task": "classification", "dataset": "images", "data_root": str(class_folders)} | changes
    )  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        open_datasets(cfg)


def test_a_tar_is_whole_or_named_as_truncated_wherever_it_was_cut(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.tar", tmp_path / "cut.tar"
    with tarfile.open(whole, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name in ("a", "b", "c"):
            (tmp_path / name).write_bytes(name.encode() * 700)
            archive.add(tmp_path / name, name)
    assert len(list(read_members(whole, lambda path: True))) == 3
    content = whole.read_bytes()
    end = 3 * (512 + 1024)
    for size in range(600, end + 512, 100):
        cut.write_bytes(content[:size])
        with pytest.raises(UserError, match=r"cut\.tar: is (damaged or truncated|neither)"):
            list(read_members(cut, lambda path: True))
    cut.write_bytes(content[: end + 512])
    assert len(list(read_members(cut, lambda path: True))) == 3


def test_a_truncated_archive_is_named(class_folders: Path, tmp_path: Path) -> None:
    archive = _as_tar_xz(class_folders, tmp_path)
    archive.write_bytes(archive.read_bytes()[:-4000])
    with pytest.raises(UserError, match=r"images\.tar\.xz: .* is damaged, truncated"):
        open_datasets(_images(archive))


def _zip_of(path: Path, **files: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for split in ("train", "test"):
            for name, content in files.items():
                archive.writestr(f"{split}/cat/{name}.png", content)
    return path


def _set_flags(path: Path, place: int, value: int) -> None:
    """Change a byte of each zip entry: at 8 the flags (1: encrypted), at 10 the compression."""
    content = bytearray(path.read_bytes())
    for found in re.finditer(b"PK\1\2", bytes(content)):
        content[found.start() + place] = value
    for found in re.finditer(b"PK\3\4", bytes(content)):
        content[found.start() + place - 2] = value
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(("place", "value"), [(8, 1), (10, 99)])
def test_a_locked_or_strangely_packed_member_is_named(
    tmp_path: Path, place: int, value: int
) -> None:
    path = _zip_of(tmp_path / "x.zip", a=b"never read")
    _set_flags(path, place, value)
    with pytest.raises(UserError, match=r"x\.zip: train/cat/a\.png: cannot be unpacked"):
        open_datasets(_images(path))


def test_an_archive_that_unpacks_to_far_more_than_pictures_do_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "FREE_UNPACKED", 10**6)
    path = _zip_of(tmp_path / "bomb.zip", **{str(i): bytes(3_000_000) for i in range(4)})
    with pytest.raises(UserError, match=r"bomb\.zip: is refused: .* GB and more in an archive of"):
        open_datasets(_images(path))


def test_pipes_and_huge_files_among_the_pictures_are_passed_over_and_counted(
    class_folders: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(class_folders, tmp_path / "copy")
    os.mkfifo(root / "train/cat/pipe.png")
    with (root / "train/cat/huge.png").open("wb") as file:
        file.truncate(archives.MAX_MEMBER + 1)
    with pytest.raises(
        UserError, match=r"(pipe\.png: is a pipe|huge\.png: has 268 MB).*--skip-bad"
    ):
        open_datasets(_images(root))
    train, _ = open_datasets(dataclasses.replace(_images(root), skip_bad=True))
    assert len(train.skipped) == 2


@pytest.fixture
def binary_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(classifier_images, "IMAGES_PER_BATCH_FILE", 7)
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name in (*classifier_images.BATCH_FILES["train"], *classifier_images.BATCH_FILES["test"]):
        records = RNG.integers(0, 10, (7, classifier_images.RECORD_BYTES), np.uint8)
        records[0] = np.r_[[6], [11] * 1024, [22] * 1024, [33] * 1024]  # a frog in one colour
        (folder / name).write_bytes(records.tobytes())
    return tmp_path


def _binary(root: Path) -> DataConfig:
    return DataConfig(task="classification", dataset="cifar10", data_root=str(root))


def test_the_binary_version_is_parsed_record_by_record(binary_root: Path) -> None:
    train, test = open_datasets(_binary(binary_root))
    assert (len(train), len(test)) == (35, 7)
    assert train.class_names[train.labels[0]] == "frog"
    assert (train.image(0) == (11, 22, 33)).all()
    raw = np.fromfile(binary_root / "cifar-10-batches-bin/data_batch_2.bin", np.uint8)
    assert train.image(8)[3, 5].tolist() == [
        raw[classifier_images.RECORD_BYTES + 1 + 1024 * c + 3 * 32 + 5] for c in range(3)
    ]
    assert train.image_ids[8] == "data_batch_2.bin:1"


def test_broken_binary_files_are_named(binary_root: Path) -> None:
    path = binary_root / "cifar-10-batches-bin/test_batch.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"test_batch\.bin has 21,510 bytes, not 21,511"):
        open_datasets(_binary(binary_root))
    path.unlink()
    with pytest.raises(UserError, match=r"holds no test_batch\.bin; --download"):
        open_datasets(_binary(binary_root))
    with pytest.raises(UserError, match="does not exist; --download"):
        open_datasets(_binary(binary_root / "nowhere"))


def test_an_archive_of_the_official_name_must_have_its_digest(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"cut short")
    with pytest.raises(UserError, match="MD5 differs"):
        open_datasets(_binary(tmp_path))


def test_digits_are_bundled_and_split_by_writer() -> None:
    train, test = open_datasets(DataConfig(task="classification", dataset="digits"))
    assert (len(train), len(test)) == (1437, 360)
    assert train.class_names == tuple("0123456789")
    assert np.bincount(test.labels).min() > 30


def _samples(cfg: AugmentConfig, seed: int = 0) -> TrainImages:
    train, _ = open_datasets(DataConfig(task="classification", dataset="digits"))
    return TrainImages(train, cfg, seed)


FULL = AugmentConfig(aug_crop=1.0, aug_flip=0.5, aug_cutout=0.5)


def test_a_sample_follows_from_seed_epoch_and_index_alone() -> None:
    samples, again = _samples(FULL), _samples(FULL)
    wanted = samples[SampleKey(3, 17, 32)][0]
    again[SampleKey(0, 5, 32)]  # another history
    assert (again[SampleKey(3, 17, 32)][0] == wanted).all()
    assert (samples[SampleKey(4, 17, 32)][0] != wanted).any()
    repeated, label = samples[SampleKey(3, 17 + len(samples), 32)]
    assert (repeated != wanted).any() and label == samples[SampleKey(3, 17, 32)][1]
    assert (_samples(FULL, seed=1)[SampleKey(3, 17, 32)][0] != wanted).any()


def test_the_augmentations_fire_independently_at_their_probabilities() -> None:
    train, _ = open_datasets(DataConfig(task="classification", dataset="digits"))
    ramp = np.broadcast_to(np.arange(32, dtype=np.uint8)[None, :, None], (32, 32, 3))
    images = np.stack([ramp] * 600)
    marked = TrainImages(
        classifier_images.ImageDataset(
            images, train.labels[:600], train.class_names, train.image_ids[:600], [], ""
        ),
        AugmentConfig(aug_crop=0.0, aug_flip=0.5, aug_cutout=0.5),
        seed=0,
    )
    out = np.stack([marked[SampleKey(0, i, 32)][0][..., 0] for i in range(600)]).astype(int)
    flipped = out[:, 0, 0] + out[:, 31, 0] > out[:, 0, 31] + out[:, 31, 31]
    expected = np.where(flipped[:, None, None], ramp[None, :, ::-1, 0], ramp[None, ..., 0])
    changed = (out != expected).sum((1, 2))
    assert set(np.unique(changed)) <= {
        0,
        56,
        64,
    }  # a hole over the mean column: 8 pixels keep their value
    holed = changed > 0
    both = [(flipped & holed).mean(), (flipped & ~holed).mean(), (~flipped & holed).mean()]
    assert all(0.19 < share < 0.31 for share in both)


def test_collate_keeps_bytes_and_test_images_are_plain() -> None:
    _, test = open_datasets(DataConfig(task="classification", dataset="digits"))
    images, labels = collate_images([EvalImages(test)[i] for i in range(5)])
    assert images.shape == (5, 3, 32, 32) and images.dtype == torch.uint8
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.dtype == torch.int64 and labels.tolist() == test.labels[:5].tolist()
    assert (images[2].permute(1, 2, 0).numpy() == test.image(2)).all()


def test_metrics_equal_torchmetrics_and_shards_merge() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(501, 4) * 2, torch.randint(0, 4, (501,))
    ranks = []
    for rank in range(2):
        metric = ClassificationMetrics("abcd")
        for batch in torch.arange(rank, 501, 2).split(40):
            metric.update(logits[batch], labels[batch])
        ranks.append(metric)
    ranks[0].merge([metric.state() for metric in ranks])
    assert ranks[0].state()["labels"].tolist() == labels.tolist()
    result = ranks[0].compute()
    per_class = multiclass_accuracy(logits, labels, 4, average=None)
    assert result["accuracy"] == pytest.approx(
        multiclass_accuracy(logits, labels, 4, average="micro").item()
    )
    assert result["mean_class_accuracy"] == pytest.approx(per_class.mean().item())
    assert [v["accuracy"] for v in result["per_class"].values()] == pytest.approx(
        per_class.tolist()
    )
    assert result["confusion_matrix"] == multiclass_confusion_matrix(logits, labels, 4).tolist()
    expected = multiclass_calibration_error(logits.softmax(-1), labels, 4, n_bins=15).item()
    assert result["calibration"]["expected_error"] == pytest.approx(expected, abs=1e-6)
    assert result["nll"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-6
    )


def test_the_most_confident_mistakes_come_first() -> None:
    metric = ClassificationMetrics("ab")
    assert metric.compute()["accuracy"] is None
    metric.update(torch.tensor([[3.0, 0], [0, 1], [9, 0], [0, 5]]), torch.tensor([1, 0, 0, 0]))
    assert metric.worst_mistakes(2).tolist() == [3, 0]


def test_the_official_files_have_50000_and_10000_images(cifar10_root: Path) -> None:
    train, test = open_datasets(
        DataConfig(task="classification", dataset="cifar10", data_root=str(cifar10_root))
    )
    assert (len(train), len(test)) == (50_000, 10_000)
    assert train.class_names == classifier_images.CIFAR10_CLASSES
    assert np.bincount(train.labels).tolist() == [5000] * 10


def test_a_missing_class_list_is_refused(class_folders: Path) -> None:
    with pytest.raises(UsageError, match="name every class in --classes"):
        open_dataset(_images(class_folders), "test", ["cat"])
