"""Shrinking a data set: boxes stay on their objects, half a copy is never taken for one."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from yolo.data.dataset import read_rgb
from yolo.data.shrink import main, scale_edges, shrink_dataset
from yolo.data.voc import read_voc
from yolo.errors import UserError

SQUARE = (120, 40, 319, 139)  # xmin, ymin, xmax, ymax: 1-based, inclusive


def write_image(
    folder: Path,
    image_id: str,
    size: tuple[int, int],
    box: tuple[object, ...],
    suffix: str = ".jpg",
) -> None:
    """Add an image of `size` (height, width), black but for a white box, to the split `train`."""
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    image = np.zeros((*size, 3), np.uint8)
    if all(isinstance(edge, int) for edge in box):
        left, top, right, bottom = box
        image[top - 1 : bottom, left - 1 : right] = 255  # type: ignore[operator]
    cv2.imwrite(str(folder / "JPEGImages" / f"{image_id}{suffix}"), image)
    keys = ("xmin", "ymin", "xmax", "ymax")
    edges = "".join(f"<{key}>{edge}</{key}>" for key, edge in zip(keys, box, strict=True))
    (folder / "Annotations" / f"{image_id}.xml").write_text(
        f"<annotation><filename>{image_id}{suffix}</filename><size><width>{size[1]}</width>"
        f"<height>{size[0]}</height></size><object><name>cat</name><difficult>1</difficult>"
        f"<bndbox>{edges}</bndbox><part><name>head</name><bndbox>{edges}</bndbox></part></object>"
        "</annotation>"
    )
    with (folder / "ImageSets" / "Main" / "train.txt").open("a") as file:
        file.write(f"{image_id}\n")


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    write_image(tmp_path / "VOCdevkit" / "VOC2007", "wide", (200, 400), SQUARE)
    write_image(tmp_path / "VOCdevkit" / "VOC2012", "tall", (400, 150), (1, 201, 100, 400), ".png")
    return tmp_path / "VOCdevkit"


def refusal(source: Path, target: Path) -> str:
    """Return why `source` is refused; nothing may be left of the target."""
    with pytest.raises(UserError) as caught:
        shrink_dataset(source, target)
    assert "\n" not in str(caught.value) and not target.exists()
    assert not target.with_name(f"{target.name}.part").exists()
    return str(caught.value)


@pytest.mark.parametrize("above", [False, True])
def test_training_reads_a_shrunk_devkit_and_its_boxes_fit_their_objects(devkit: Path, above: bool):
    target = devkit.with_name("small")
    assert shrink_dataset(devkit.parent if above else devkit, target, size=100) == 2
    dataset = read_voc(target, "2007:train+2012:train", None)
    assert [(annotation.height, annotation.width) for annotation in dataset.annotations] == [
        (50, 100),
        (100, 38),
    ]
    for index, annotation in enumerate(dataset.annotations):
        left, top, right, bottom = annotation.boxes[0].astype(int)
        white = dataset.image(index)[..., 0] > 127
        assert np.flatnonzero(white.any(axis=0))[[0, -1]].tolist() == [left, right - 1]
        assert np.flatnonzero(white.any(axis=1))[[0, -1]].tolist() == [top, bottom - 1]
        assert annotation.difficult.all()
    years = target / "VOCdevkit" if above else target
    wide = (years / "VOC2007" / "Annotations" / "wide.xml").read_text()
    tall = (years / "VOC2012" / "Annotations" / "tall.xml").read_text()
    assert wide.count("<xmin>31</xmin>") == 2  # of the object and of its part
    assert "<filename>tall.jpg</filename>" in tall


def test_small_images_are_copied_byte_for_byte_and_never_enlarged(tmp_path: Path):
    write_image(tmp_path / "own", "small", (60, 100), (5, 5, 40, 40), ".png")
    shrink_dataset(tmp_path / "own", tmp_path / "out", size=100)
    for file in ("JPEGImages/small.png", "Annotations/small.xml", "ImageSets/Main/train.txt"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "own" / file).read_bytes()


def test_edges_keep_the_first_and_the_last_pixel_of_the_image():
    for old, new in ((500, 416), (640, 416), (333, 277), (4000, 416)):
        assert scale_edges(1, old, new / old, new) == (1, new)


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        (500, 501, (50, 51)),  # two pixels are a box for training, and stay one
        (1, 2, (1, 2)),
        (999, 1000, (99, 100)),  # at the far edge
        (500, 500, (51, 50)),  # one pixel is none before, and none after
        (500, 490, (51, 49)),  # turned round stays turned round
    ],
)
def test_a_box_that_training_accepts_stays_one_and_a_bad_one_stays_bad(
    first: int, last: int, expected: tuple[int, int]
):
    assert scale_edges(first, last, 0.1, 100) == expected


def test_a_folder_with_files_is_refused_and_an_empty_one_is_filled(devkit: Path, tmp_path: Path):
    target = tmp_path / "target"
    target.mkdir()
    shrink_dataset(devkit, target, size=100)
    assert (target / "VOC2007").is_dir()
    with pytest.raises(UserError, match="not an empty folder"):
        shrink_dataset(devkit, target)
    assert (target / "VOC2007" / "JPEGImages" / "wide.jpg").exists()


def test_what_an_interrupted_run_left_is_seen(devkit: Path, tmp_path: Path):
    (tmp_path / "target.part").mkdir()
    with pytest.raises(UserError, match=r"target\.part: is of a run that was interrupted"):
        shrink_dataset(devkit, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_bad_input_is_one_line_that_names_the_file(devkit: Path, tmp_path: Path):
    target, folder = tmp_path / "target", devkit / "VOC2007"
    assert "holds no Annotations" in refusal(tmp_path / "nowhere", target)
    write_image(folder, "bad", (500, 500), ("one", 1, 9, 9))
    assert "bad.xml: a box is not four numbers" in refusal(devkit, target)
    write_image(folder, "bad", (500, 500), (1, 1, 9, 9))
    xml = folder / "Annotations" / "bad.xml"
    good = xml.read_text()
    xml.write_text(good.replace("<width>500", "<width>400"))
    assert "bad.jpg: the image is 500x500" in refusal(devkit, target)
    xml.write_text(good.replace("<width>500", "<width>wide"))
    assert "bad.xml: its size is no number" in refusal(devkit, target)
    xml.write_text(good[:-5])
    assert "bad.xml: is no valid XML" in refusal(devkit, target)
    xml.write_text(good)
    (folder / "JPEGImages" / "bad.jpg").write_bytes(b"no image")
    assert "bad.jpg: is truncated or no image" in refusal(devkit, target)
    (folder / "JPEGImages" / "bad.jpg").unlink()
    assert "bad.jpg: cannot be read" in refusal(devkit, target)


def test_the_command_line_shrinks_with_the_quality_it_is_given(devkit: Path, tmp_path: Path):
    sizes = []
    for quality in (30, 95):
        target = tmp_path / f"q{quality}"
        main([str(devkit), str(target), "--size", "100", "--quality", str(quality)])
        image = target / "VOC2007" / "JPEGImages" / "wide.jpg"
        assert max(read_rgb(image).shape) == 100
        sizes.append(image.stat().st_size)
    assert sizes[0] < sizes[1]
    with pytest.raises(SystemExit, match="2"):
        main([str(devkit), str(tmp_path / "q0"), "--quality", "0"])


def test_the_module_ends_with_one_line_and_exit_1_on_bad_data(tmp_path: Path):
    words = [
        sys.executable,
        "-m",
        "yolo.data.shrink",
        str(tmp_path / "none"),
        str(tmp_path / "target"),
    ]
    result = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
