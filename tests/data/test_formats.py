"""YOLO folders and the CSV copy of VOC."""

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from yolo.config import Config
from yolo.data import yolo
from yolo.data.class_names import VOC_CLASSES, named_classes, read_class_names
from yolo.data.sources import open_dataset, open_datasets
from yolo.data.yolo import read_csv_layout, read_yolo_folder
from yolo.errors import UsageError, UserError


def write_pair(
    image: Path, labels: Path, text: str | None, size: tuple[int, int] = (40, 80)
) -> None:
    image.parent.mkdir(parents=True, exist_ok=True)
    labels.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(image), np.full((*size, 3), 90, np.uint8))
    if text is not None:
        labels.write_text(text)


@pytest.fixture
def kaggle(tmp_path: Path) -> Path:
    texts = {"000007": "6 0.5 0.5 0.25 0.5\n", "000009": "14 0.2 0.5 0.4 1\n11 0.9 0.9 0.2 0.2\n"}
    for name, text in texts.items():
        write_pair(tmp_path / "images" / f"{name}.jpg", tmp_path / "labels" / f"{name}.txt", text)
    (tmp_path / "train.csv").write_text("img,label\n000007.jpg,000007.txt\n000009.jpg,000009.txt\n")
    (tmp_path / "test.csv").write_text("000009.jpg,000009.txt\n")
    return tmp_path


@pytest.fixture(params=["images/train", "train/images"])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    for split in ("train", "test"):
        images = tmp_path / request.param.replace("train", split)
        labels = tmp_path / request.param.replace("train", split).replace("images", "labels")
        write_pair(images / "a.png", labels / "a.txt", "1 0.5 0.5 0.25 0.5")
        write_pair(images / "b.jpg", labels / "b.txt", None)
    (tmp_path / "data.yaml").write_text("names: [cup, spoon]\n")
    return tmp_path


def test_the_csv_layout_reads_its_pairs_with_or_without_a_header(kaggle: Path):
    cfg = Config(dataset="csv", data_root=str(kaggle), classes="voc")
    train_set, test_set = open_datasets(cfg)
    assert (len(train_set), len(test_set)) == (2, 1)
    assert train_set.class_names == VOC_CLASSES
    annotation = train_set.annotation(0)
    np.testing.assert_allclose(annotation.boxes, [[30, 10, 50, 30]])
    assert VOC_CLASSES[annotation.labels[0]] == "car"
    assert train_set.annotation(1).labels.tolist() == [14, 11]


def test_class_numbers_without_names_are_an_error_that_says_how_to_name_them(kaggle: Path):
    with pytest.raises(UserError, match=r"classes\.txt.*--classes voc"):
        read_csv_layout(kaggle, "train", None)
    (kaggle / "classes.txt").write_text("\n".join(VOC_CLASSES))
    assert read_csv_layout(kaggle, "train", None).class_names == VOC_CLASSES


def test_a_line_of_a_csv_that_names_no_pair_or_no_image_is_an_error(kaggle: Path):
    with (kaggle / "train.csv").open("a") as file:
        file.write("\n000011,000011.txt\n")
    with pytest.raises(UserError, match="images/000011: no such image"):
        read_csv_layout(kaggle, "train", VOC_CLASSES)
    assert len(read_csv_layout(kaggle, "train", VOC_CLASSES, skip_bad=True).skipped) == 1
    (kaggle / "train.csv").write_text("000007.jpg,000007.txt\n000009.jpg\n")
    with pytest.raises(UserError, match=r"train\.csv, line 2: '000009\.jpg' is not"):
        read_csv_layout(kaggle, "train", VOC_CLASSES)


def test_a_missing_csv_names_those_that_exist(kaggle: Path):
    with pytest.raises(UserError, match=r"val\.csv; there are: test\.csv, train\.csv"):
        read_csv_layout(kaggle, "val", VOC_CLASSES)


def test_a_yolo_folder_reads_names_boxes_and_background(folder: Path):
    train_set, test_set = open_datasets(Config(dataset="yolo", data_root=str(folder)))
    assert train_set.class_names == test_set.class_names == ("cup", "spoon")
    assert [len(annotation.labels) for annotation in train_set.annotations] == [1, 0]
    np.testing.assert_allclose(train_set.annotation(0).boxes, [[30, 10, 50, 30]])
    assert train_set.annotation(0).labels.tolist() == [1]


def test_names_may_be_numbered_in_the_yaml(folder: Path):
    (folder / "data.yaml").write_text("names:\n  0: fork\n  1: knife\n")
    assert read_yolo_folder(folder, "train", None).class_names == ("fork", "knife")
    (folder / "data.yaml").write_text("names: {1: knife, 0: fork}\n")
    assert read_yolo_folder(folder, "train", None).class_names == ("fork", "knife")
    for text in ("nc: 2\n", "names: [[fork]]\n", "names: {fork: 0}", "names: [a]\nnames: [b]"):
        (folder / "data.yaml").write_text(text)
        with pytest.raises(UserError, match="no readable `names:`"):
            read_yolo_folder(folder, "train", None)


@pytest.mark.parametrize(
    ("file", "text", "names"),
    [
        (
            "data.yaml",
            "names: {'0': a, '1': b, '10': c, '2': d}",
            {0: "a", 1: "b", 2: "d", 10: "c"},
        ),
        ("data.yaml", "names: cat, dog\nnc: 2", {0: "cat", 1: "dog"}),
        ("data.yaml", "names: [yes, no, 3]", {0: "yes", 1: "no", 2: "3"}),
        ("data.yaml", "names: {1: a, 3: b}\nnc: 2", {1: "a", 3: "b"}),
        ("obj.names", "cat \ndog\n\n", {0: "cat", 1: "dog"}),
    ],
)
def test_class_names_are_read_as_they_are_written(
    tmp_path: Path, file: str, text: str, names: dict[int, str]
):
    (tmp_path / file).write_text(text)
    assert read_class_names(tmp_path / file) == names


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("data.yaml", "names: [cat, dog]\nnc: 3", "nc: 3, but its `names:` go up to class 1, dog"),
        ("data.yaml", "names: [cat, cat]", "classes 0 and 1 have the same name, cat"),
        ("data.yaml", "names:", "class 0 has no name"),
        ("classes.txt", "cat\n\ndog", "class 1 has no name"),
        ("classes.txt", "", "holds no class names"),
    ],
)
def test_class_names_that_cannot_be_right_stop(tmp_path: Path, file: str, text: str, words: str):
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=f"{file}.*{words}"):
        read_class_names(tmp_path / file)


def test_the_flag_of_classes_takes_names_or_a_file_of_them(tmp_path: Path):
    (tmp_path / "obj.names").write_text("cat\ndog\n")
    assert named_classes(Config(classes=str(tmp_path / "obj.names"))) == ("cat", "dog")
    assert named_classes(Config(classes="cat, dog,")) == ("cat", "dog")
    assert named_classes(Config()) is None


def test_labels_beside_their_images_are_read(folder: Path):
    for label in [*folder.rglob("a.txt")]:
        label.rename(folder / str(label.relative_to(folder)).replace("labels", "images"))
    dataset = read_yolo_folder(folder, "train", None)
    assert [len(annotation.labels) for annotation in dataset.annotations] == [1, 0]


def test_a_split_in_which_no_image_finds_its_labels_stops(folder: Path):
    for path in folder.rglob("a.txt"):
        path.rename(path.with_name("other.txt"))
    with pytest.raises(
        UserError, match=r"none of the 2 images has a label file \(looked for .*a\.txt"
    ):
        read_yolo_folder(folder, "train", None)


def test_sub_folders_are_read_with_their_labels(folder: Path):
    for path in [*folder.rglob("a.png"), *folder.rglob("a.txt")]:
        (path.parent / "video").mkdir()
        path.rename(path.parent / "video" / path.name)
    dataset = read_yolo_folder(folder, "train", None)
    assert dataset.image_ids == ["b.jpg", "video/a.png"]
    assert [len(annotation.labels) for annotation in dataset.annotations] == [0, 1]


def test_what_is_given_and_not_used_is_counted_with_its_first_name(folder: Path):
    label = next(path for path in folder.rglob("a.txt") if "train" in path.parts)
    label.write_text("1 0.5 0.5 0.25 0.5\n" * 2 + "0 0.1 0.1 0.5 0.1 0.5 0.5\n")
    (label.parent / "c.txt").write_text("")
    image = next(path for path in folder.rglob("b.jpg") if "train" in path.parts)
    (image.parent / "d.heic").write_bytes(b"")
    dataset = read_yolo_folder(folder, "train", None)
    assert [len(annotation.labels) for annotation in dataset.annotations] == [2, 0]
    np.testing.assert_allclose(dataset.annotation(0).boxes[1], [8, 4, 40, 20], rtol=1e-5)
    notices = "\n".join(dataset.notices)
    for words in (
        "c.txt",
        "d.heic",
        "b.jpg",
        "stand twice.*a.txt, line 2",
        "polygons.*a.txt, line 3",
    ):
        assert re.search(f"1 .*; the first: .*{words}|1 .*{words}", notices), words


def test_a_file_of_another_suffix_with_labels_is_read_or_named(folder: Path):
    image = next(path for path in folder.rglob("a.png") if "train" in path.parts)
    image = image.rename(image.with_suffix(".heic"))
    image.with_suffix(".json").write_text("{}")  # of another program
    dataset = read_yolo_folder(folder, "train", None)
    assert dataset.image_ids[0] == "a.heic" and len(dataset.annotation(0).labels) == 1
    image.write_bytes(b"ftypheic")
    with pytest.raises(UserError, match=r"a\.heic: is no image that can be read"):
        read_yolo_folder(folder, "train", None)


def test_class_names_beside_the_labels_are_found_and_others_are_mentioned(folder: Path):
    label = next(path for path in folder.rglob("a.txt") if "train" in path.parts)
    (label.parent / "classes.txt").write_text("fork\nknife\n")
    assert "1 files name other classes" in read_yolo_folder(folder, "train", None).notices[0]
    (folder / "data.yaml").unlink()
    assert read_yolo_folder(folder, "train", None).class_names == ("fork", "knife")


def test_a_list_of_images_as_cvat_writes_it_is_read(tmp_path: Path):
    write_pair(
        tmp_path / "obj_train_data/a.jpg", tmp_path / "obj_train_data/a.txt", "1 0.5 0.5 1 1"
    )
    (tmp_path / "obj.names").write_text("cat\ndog\n")
    (tmp_path / "train.txt").write_text("data/obj_train_data/a.jpg\n")
    dataset = read_yolo_folder(tmp_path, "train", None)
    assert dataset.annotation(0).labels.tolist() == [1]


def test_a_line_of_a_list_that_no_file_can_be_named_is_a_defect_like_any_other(tmp_path: Path):
    write_pair(tmp_path / "a.jpg", tmp_path / "a.txt", "0 0.5 0.5 1 1")
    (tmp_path / "data.yaml").write_text("names: [cat]\n")
    (tmp_path / "train.txt").write_text("a.jpg\n" + "b" * 300 + "/c.jpg\n")
    assert len(read_yolo_folder(tmp_path, "train", None, skip_bad=True)) == 1
    with pytest.raises(UserError, match=r"c\.jpg"):
        read_yolo_folder(tmp_path, "train", None)


def test_a_line_of_a_list_that_is_the_root_folder_is_a_defect_like_any_other(tmp_path: Path):
    write_pair(tmp_path / "a.jpg", tmp_path / "a.txt", "0 0.5 0.5 1 1")
    (tmp_path / "data.yaml").write_text("names: [cat]\n")
    (tmp_path / "train.txt").write_text("a.jpg\n/\n")
    with pytest.raises(UserError, match=r"^/: is no image"):
        read_yolo_folder(tmp_path, "train", None)
    assert len(read_yolo_folder(tmp_path, "train", None, skip_bad=True).skipped) == 1
    (tmp_path / "train.txt").write_text("/\n")
    with pytest.raises(UserError, match="none of the 1 images has a label file"):
        read_yolo_folder(tmp_path, "train", None)


def test_a_file_as_data_root_is_an_error_that_asks_for_its_folder(folder: Path):
    cfg = Config(dataset="yolo", data_root=str(folder / "data.yaml"))
    with pytest.raises(UserError, match="is a file; name the folder"):
        open_dataset(cfg, "train", None)


def test_a_label_file_that_the_csv_names_and_that_is_missing_is_a_defect(kaggle: Path):
    (kaggle / "labels" / "000009.txt").unlink()
    with pytest.raises(UserError, match=r"000009\.txt: no such label file"):
        read_csv_layout(kaggle, "train", VOC_CLASSES)


def test_numbers_mean_what_the_folder_says_whatever_order_a_checkpoint_has(folder: Path):
    dataset = read_yolo_folder(folder, "train", ("spoon", "plate", "cup"))
    assert dataset.class_names == ("spoon", "plate", "cup")
    assert dataset.annotation(0).labels.tolist() == [0]
    with pytest.raises(UserError, match=r"spoon.*is of none of the classes cup"):
        read_yolo_folder(folder, "train", ("cup",))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("2 0.5 0.5 0.1 0.1", "class 2"),
        ("0 0.5 0.5 0.1", "line 1.*is not `class cx cy width height`"),
        ("0 0.5 0.5 0.1 x", "is not `class"),
        ("0.7 0.5 0.5 0.1 0.1", "is not `class"),
        ("nan 0.5 0.5 0.1 0.1", "is not `class"),
        ("inf 0.5 0.5 0.1 0.1", "is not `class"),
        ("0 0.9 0.5 0.4 0.2", "outside"),
        ("0 0.5 0.5 0 0", "no size"),
    ],
)
def test_a_broken_label_names_its_file(folder: Path, line: str, words: str):
    path = next(folder.rglob("train/**/a.txt"), None) or next(folder.rglob("train/a.txt"))
    path.write_text(line)
    with pytest.raises(UserError, match=rf"a\.txt.*{words}"):
        read_yolo_folder(folder, "train", None)


def test_files_saved_by_windows_programs_are_read_or_refused_in_one_line(kaggle: Path):
    """Excel and Notepad put a byte order mark first; PowerShell's `>` writes UTF-16."""
    expected = read_csv_layout(kaggle, "train", VOC_CLASSES)
    for file in (kaggle / "train.csv", kaggle / "classes.txt"):
        text = file.read_text() if file.exists() else "\n".join(VOC_CLASSES)
        file.write_text(text, encoding="utf-8-sig")
    read = read_csv_layout(kaggle, "train", None)
    assert (read.image_ids, read.class_names) == (expected.image_ids, expected.class_names)
    label = kaggle / "labels" / "000007.txt"
    label.write_text(label.read_text(), encoding="utf-16")
    with pytest.raises(UserError, match=r"000007\.txt: is not UTF-8 text"):
        read_csv_layout(kaggle, "train", None)
    assert len(read_csv_layout(kaggle, "train", None, skip_bad=True)) == 1


def test_a_label_file_of_a_million_lines_is_a_defect(kaggle: Path, monkeypatch):
    monkeypatch.setattr(yolo, "MAX_LINES", 1000)
    (kaggle / "labels/000007.txt").write_text("0 0.5 0.5 0.1 0.1\n" * 1001)
    message = r"000007\.txt: has 1001 lines; no image has more than 1000 objects"
    with pytest.raises(UserError, match=message):
        read_csv_layout(kaggle, "train", VOC_CLASSES)
    assert len(read_csv_layout(kaggle, "train", VOC_CLASSES, skip_bad=True).skipped) == 1


def test_a_csv_that_is_none_is_one_line(kaggle: Path):
    (kaggle / "train.csv").write_text(f'000007.jpg,"{"x" * 200_000}"\n')
    with pytest.raises(UserError, match=r"train\.csv: is no readable CSV \(field larger than"):
        read_csv_layout(kaggle, "train", VOC_CLASSES)
    (kaggle / "train.csv").write_text(f"{'x' * 9000}.jpg,y.txt\na\0.jpg,b.txt\n")
    with pytest.raises(UserError, match="none of the images can be used"):
        read_csv_layout(kaggle, "train", VOC_CLASSES, skip_bad=True)


def test_a_missing_split_names_what_is_there(folder: Path):
    with pytest.raises(UserError, match=r"split 'valid'.*data\.yaml"):
        read_yolo_folder(folder, "valid", None)


def test_photos_are_turned_by_their_exif_tag_as_annotation_tools_show_them(tmp_path: Path):
    write_pair(
        tmp_path / "images/train/a.jpg", tmp_path / "labels/train/a.txt", "0 0.5 0.25 0.5 0.5"
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((40, 80, 3), np.uint8)).save(
        tmp_path / "images/train/a.jpg", exif=exif
    )
    dataset = read_yolo_folder(tmp_path, "train", ("cup",))
    annotation = dataset.annotation(0)
    assert (annotation.height, annotation.width) == dataset.image(0).shape[:2] == (80, 40)
    np.testing.assert_allclose(annotation.boxes, [[10, 0, 30, 40]])


def test_a_data_set_without_boxes_is_a_usage_error():
    with pytest.raises(UsageError, match="no boxes to detect"):
        open_dataset(Config(dataset="cifar10"), "train", None)
