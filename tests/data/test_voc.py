"""VOC XML: what is read, in which order and coordinates, and one line for what can be wrong."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from torch.utils.data import DataLoader

from yolo.config import Config
from yolo.data.class_names import VOC_CLASSES
from yolo.data.dataset import DetectionDataset, NothingUsableError
from yolo.data.samplers import SampleKey
from yolo.data.samples import MAX_REPLACEMENTS, EvalSamples, TrainSamples, plain_collate
from yolo.data.sources import open_datasets
from yolo.data.voc import read_voc
from yolo.errors import UserError


def thing(name: str = "cat", box: tuple[float, ...] = (1, 2, 30, 40), difficult: int = 0) -> str:
    corners = "".join(
        f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    flag = f"<difficult>{difficult}</difficult>"
    return f"<object><name>{name}</name>{flag}<bndbox>{corners}</bndbox></object>"


def write_image(
    root: Path, image_id: str, objects: str | None = None, size: tuple[int, int] = (48, 64)
) -> None:
    """Add one image of `size` (height, width) and its annotation to a single VOC folder."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(image_id)).integers(0, 255, (*size, 3), np.uint8)
    cv2.imwrite(str(root / "JPEGImages" / f"{image_id}.jpg"), pixels)
    body = thing() if objects is None else objects
    (root / "Annotations" / f"{image_id}.xml").write_text(
        f"<annotation><size><width>{size[1]}</width><height>{size[0]}</height></size>"
        f"{body}</annotation>"
    )
    with (root / "ImageSets" / "Main" / "train.txt").open("a") as file:
        file.write(f"{image_id}\n")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_image(tmp_path, "good")
    return tmp_path


def refusal(root: Path, split: str = "train", classes: tuple[str, ...] | None = None) -> str:
    with pytest.raises(UserError) as caught:
        read_voc(root, split, classes)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_boxes_become_zero_based_with_the_far_edge_excluded(root: Path):
    write_image(root, "two", thing(box=(1, 1, 64, 48)) + thing("dog", (2.5, 3, 9, 10), difficult=1))
    dataset = read_voc(root, "train", None)
    annotation = dataset.annotation(1)
    assert dataset.class_names == ("cat", "dog")
    np.testing.assert_array_equal(
        annotation.boxes, np.array([[0, 0, 64, 48], [1.5, 2, 9, 10]], np.float32)
    )
    assert annotation.labels.tolist() == [0, 1] and annotation.difficult.tolist() == [False, True]
    assert (annotation.height, annotation.width) == dataset.image(1).shape[:2] == (48, 64)


def test_an_image_without_objects_is_background(root: Path):
    write_image(root, "empty", "")
    annotation = read_voc(root, "train", None).annotation(1)
    assert annotation.boxes.shape == (0, 4) and annotation.labels.shape == (0,)


def test_boxes_up_to_two_pixels_outside_are_clipped(root: Path):
    write_image(root, "edge", thing(box=(0, 0, 66, 49)))
    np.testing.assert_array_equal(
        read_voc(root, "train", None).annotation(1).boxes, [[0, 0, 64, 48]]
    )


@pytest.mark.parametrize(
    ("objects", "words"),
    [
        (thing("unicorn"), "unicorn"),
        (thing(box=(10, 10, 10, 10)), "no size"),
        (thing(box=(-1, 10, 1, 40)), "no size inside"),
        (thing(box=(30, 10, 10, 40)), "no size"),
        (thing(box=(10, 10, 90, 40)), "outside"),
        (thing(box=("nan", 10, 20, 40)), "no number"),  # type: ignore[arg-type]
        ("<object><name>cat</name></object>", "lacks"),
        ("<object><name>cat", "XML"),
    ],
)
def test_a_broken_annotation_names_its_file_and_skip_bad_leaves_it_out(
    root: Path, objects: str, words: str
):
    write_image(root, "broken", objects)
    message = refusal(root, classes=("cat",))
    assert "broken.xml" in message and words in message and "--skip-bad" in message
    dataset = read_voc(root, "train", ("cat",), skip_bad=True)
    assert len(dataset.skipped) == 1 and "broken.xml" in dataset.skipped[0]
    assert sum(len(annotation.labels) for annotation in dataset.annotations) == 1


def test_what_other_programs_write_differently_is_read(root: Path):
    write_image(root, "IMG (1)")
    write_image(root, "flagged")
    write_image(root, "named")
    split = root / "ImageSets" / "Main" / "train.txt"
    split.write_text("IMG (1)\nflagged  -1\nnamed\n")
    path = root / "Annotations" / "named.xml"
    path.write_text(path.read_text().replace("<annotation>", '<annotation xmlns="http://x.y">'))
    (root / "JPEGImages" / "named.jpg").rename(root / "JPEGImages" / "named.Jpg")
    dataset = read_voc(root, "train", None)
    assert dataset.image_ids == ["IMG (1)", "flagged", "named"]
    assert [len(annotation.labels) for annotation in dataset.annotations] == [1, 1, 1]


def test_of_several_boxes_or_edges_of_an_object_the_first_counts(root: Path):
    box = thing(box=(1, 2, 30, 40))
    write_image(root, "edges", box.replace("</bndbox>", "<xmin>9</xmin></bndbox>"))
    second = thing(box=(5, 6, 7, 8)).partition("<bndbox>")[2].partition("</bndbox>")[0]
    write_image(root, "boxes", box.replace("</object>", f"<bndbox>{second}</bndbox></object>"))
    data = read_voc(root, "train", None)
    for image_id in ("edges", "boxes"):
        found = data.annotation(data.image_ids.index(image_id)).boxes
        assert found.tolist() == [[0, 1, 30, 40]]


def test_a_single_folder_asks_for_the_names_of_its_splits(root: Path):
    message = refusal(root, "2007:trainval")
    assert "(train) with --train-split and --split" in message


def test_a_truncated_image_is_a_defect_before_training(root: Path):
    write_image(root, "cut")
    path = root / "JPEGImages" / "cut.jpg"
    path.write_bytes(path.read_bytes()[:-60])
    assert "cut.jpg: is truncated" in refusal(root) and "--skip-bad" in refusal(root)


def test_a_split_in_which_all_is_defective_names_the_first_defect(root: Path):
    (root / "Annotations" / "good.xml").write_text("<annotation>")
    with pytest.raises(NothingUsableError, match=r"none of the images.*good\.xml") as caught:
        read_voc(root, "train", None, skip_bad=True)
    assert len(caught.value.defects) == 1


def test_several_defects_are_counted(root: Path):
    write_image(root, "a", thing(box=(5, 5, 5, 5)))
    write_image(root, "b", thing(box=(6, 6, 6, 6)))
    assert "first of 2 defects" in refusal(root)
    assert len(read_voc(root, "train", None, skip_bad=True).skipped) == 2


def test_a_missing_image_and_a_size_that_disagrees_name_their_files(root: Path):
    write_image(root, "lost")
    (root / "JPEGImages" / "lost.jpg").unlink()
    assert "lost.jpg" in refusal(root)
    write_image(root, "lost", size=(60, 80))
    path = root / "Annotations" / "lost.xml"
    path.write_text(path.read_text().replace("<width>80<", "<width>70<"))
    assert "lost.xml: says 70x60" in refusal(root) and "is 80x60" in refusal(root)


def test_a_text_file_named_jpg_is_found_before_training(root: Path):
    write_image(root, "text")
    (root / "JPEGImages" / "text.jpg").write_text("no image")
    assert "text.jpg: is no image" in refusal(root)


def test_an_entity_bomb_is_refused(root: Path):
    write_image(root, "bomb")
    (root / "Annotations" / "bomb.xml").write_text(
        '<!DOCTYPE a [<!ENTITY x "ha"><!ENTITY y "&x;&x;">]><annotation>&y;</annotation>'
    )
    assert "bomb.xml: is no valid XML" in refusal(root)


@pytest.mark.parametrize("encoding", ["klingon", "utf-7"])
def test_xml_in_an_encoding_that_nobody_knows_is_a_defect(root: Path, encoding: str):
    write_image(root, "other")
    path = root / "Annotations" / "other.xml"
    path.write_text(f'<?xml version="1.0" encoding="{encoding}"?>{path.read_text()}')
    assert "other.xml: is no valid XML" in refusal(root)
    assert len(read_voc(root, "train", None, skip_bad=True)) == 1


def test_a_line_of_a_split_that_no_file_can_be_named_like_is_a_defect(root: Path):
    with (root / "ImageSets/Main/train.txt").open("a") as file:
        file.write("x" * 5000 + "\na\0b\n")
    dataset = read_voc(root, "train", None, skip_bad=True)
    assert (len(dataset), len(dataset.skipped)) == (1, 2)


def test_missing_data_says_what_was_looked_for_and_how_to_get_it(root: Path, tmp_path: Path):
    message = refusal(tmp_path / "nowhere", "2007:trainval")
    assert "nowhere" in message and "VOC2007/Annotations" in message
    assert "--data-root" in message and "--download" in message
    assert "there are: train" in refusal(root, "test")
    (root / "ImageSets" / "Main" / "test.txt").write_text("\n")
    assert "lists no images" in refusal(root, "test")


def test_several_years_are_joined_and_a_missing_year_is_named(tmp_path: Path):
    write_image(tmp_path / "VOC2007", "000001")
    write_image(tmp_path / "VOC2012", "2008_000001", thing("dog"))
    dataset = read_voc(tmp_path, "2007:train+2012:train", VOC_CLASSES)
    assert dataset.image_ids == ["000001", "2008_000001"]
    assert [VOC_CLASSES[annotation.labels[0]] for annotation in dataset.annotations] == [
        "cat",
        "dog",
    ]
    assert "holds the years 2007, 2012" in refusal(tmp_path, "train")
    assert "holds the years 2007, 2012" in refusal(tmp_path, "2010:train")


def test_the_digest_follows_the_annotations(root: Path):
    before = read_voc(root, "train", None).digest()
    assert read_voc(root, "train", None).digest() == before
    write_image(root, "more")
    assert read_voc(root, "train", None).digest() != before


def truncate(root: Path, image_id: str) -> None:
    path = root / "JPEGImages" / f"{image_id}.jpg"
    path.write_bytes(path.read_bytes()[:-200])


def test_an_image_that_breaks_later_names_its_file_at_its_use(root: Path):
    write_image(root, "cut")
    dataset = read_voc(root, "train", None)
    truncate(root, "cut")
    with pytest.raises(UserError, match=r"cut\.jpg: is truncated"):
        dataset.image(1)


def test_an_error_in_a_worker_process_is_still_one_line(root: Path):
    dataset = read_voc(root, "train", None)
    truncate(root, "good")
    loader = DataLoader(EvalSamples(dataset, 64), collate_fn=plain_collate, num_workers=1)
    with pytest.raises(UserError) as caught:
        list(loader)
    assert str(caught.value) == f"{root / 'JPEGImages' / 'good.jpg'}: is truncated or no image"


def test_with_skip_bad_a_broken_training_image_is_replaced_deterministically(root: Path, capsys):
    for number in range(4):
        write_image(root, f"fine{number}")
    write_image(root, "cut")
    dataset = read_voc(root, "train", None)
    truncate(root, "cut")
    bad = dataset.image_ids.index("cut")
    strict = TrainSamples(dataset, Config(mosaic_prob=0.0), 0)
    with pytest.raises(UserError, match=r"cut\.jpg"):
        strict[SampleKey(0, bad, 64)]
    for mosaic_prob in (0.0, 0.75):
        samples = TrainSamples(dataset, Config(mosaic_prob=mosaic_prob, skip_bad=True), 0)
        again = TrainSamples(dataset, Config(mosaic_prob=mosaic_prob, skip_bad=True), 0)
        for index in range(len(dataset)):
            key = SampleKey(0, index, 64)
            assert bad not in [tile.index for tile in samples[key].tiles]
            assert samples[key].tiles == again[key].tiles
    assert "skipped:" in capsys.readouterr().err


def test_a_jpeg_that_lost_bytes_in_the_middle_is_named_in_training(root: Path, capfd):
    path = root / "JPEGImages/good.jpg"
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 200] = bytes(200)
    path.write_bytes(content)
    dataset = read_voc(root, "train", None)
    samples = TrainSamples(dataset, Config(mosaic_prob=0.0), 0)
    for _ in range(2):
        samples[SampleKey(0, 0, 64)]
    EvalSamples(dataset, 64)[0]
    assert capfd.readouterr().err == f"damaged: {path}: corrupt JPEG data\n"


def test_skip_bad_gives_up_where_everything_is_broken(root: Path):
    samples = TrainSamples(read_voc(root, "train", None), Config(skip_bad=True), 0)
    truncate(root, "good")
    with pytest.raises(UserError, match=r"good\.jpg"):
        samples[SampleKey(0, 0, 64)]
    assert MAX_REPLACEMENTS < 100


def test_with_skip_bad_a_broken_test_image_is_left_out_before_the_test(root: Path):
    write_image(root, "cut")
    truncate(root, "cut")
    cfg = Config(dataset="voc", data_root=str(root), split="train", skip_bad=True)
    _, test_set = open_datasets(cfg)
    assert test_set.image_ids == ["good"]
    assert "cut.jpg" in test_set.skipped[0]


def test_the_test_set_takes_the_classes_of_the_training_set(root: Path):
    write_image(root, "dog", thing("dog"))
    (root / "ImageSets" / "Main" / "test.txt").write_text("dog\n")
    (root / "ImageSets" / "Main" / "train.txt").write_text("good\ndog\n")
    train_set, test_set = open_datasets(Config(dataset="voc", data_root=str(root)))
    assert train_set.class_names == test_set.class_names == ("cat", "dog")
    assert test_set.annotation(0).labels.tolist() == [1]


def test_real_voc_counts(voc_root: Path):
    dataset: DetectionDataset = read_voc(voc_root, "2007:trainval", VOC_CLASSES)
    folder = voc_root / "VOC2007"
    ids = (folder / "ImageSets/Main/trainval.txt").read_text().split()
    texts = [(folder / f"Annotations/{image_id}.xml").read_text() for image_id in ids]
    assert len(dataset) == len(ids) > 5000 and not dataset.skipped
    assert sum(len(annotation.labels) for annotation in dataset.annotations) == sum(
        t.count("<object>") for t in texts
    )


def test_blood_cells_have_two_boxes_of_no_size(voc_root: Path):
    cells = voc_root.parent / "BCCD"
    if not cells.is_dir():
        pytest.skip("no BCCD beside VOC_ROOT")
    assert "BloodImage_00338.xml" in refusal(cells, "trainval")
    dataset = read_voc(cells, "trainval", None, skip_bad=True)
    assert dataset.class_names == ("Platelets", "RBC", "WBC") and len(dataset.skipped) == 2
