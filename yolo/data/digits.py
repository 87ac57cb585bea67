"""The embedded detection data set: scikit-learn's handwritten digits on its two photographs.

Made on first use, in the layout of PASCAL VOC, without a network. Training and test scenes share
neither a digit instance nor a region of a photograph: a fifth of each class's instances, and the
right third of each photograph, are kept for the test.
"""

import os
import shutil
import tempfile
from dataclasses import dataclass
from os.path import exists, isdir
from pathlib import Path
from xml.sax.saxutils import escape

import cv2
import numpy as np
from tqdm import tqdm

from yolo.errors import UserError, reason

NUM_SCENES = {"train": 2000, "test": 500}
SCENE_SIDES = (160, 320)  # shortest and longest side of a scene, pixels
DIGIT_SCALES = (2.0, 8.0)  # an original digit has 8 x 8 pixels
MAX_DIGITS = 8
TEST_SHARE = 0.2  # of the instances of each class
PHOTO_SPLIT = 0.64  # of the photographs' width: left of it training, right of it test
MIN_CONTRAST = 90  # grey levels between a digit's ink and the mean of what it covers
CLASS_NAMES = tuple("0123456789")


@dataclass(frozen=True)
class Material:
    """What the scenes of one split are made from."""

    digits: np.ndarray  # [N, 8, 8] float32 ink, 0-1
    labels: np.ndarray  # [N]
    photos: list[np.ndarray]  # [H, W, 3] uint8 RGB


@dataclass(frozen=True)
class Scene:
    """One finished image and what is on it."""

    image: np.ndarray  # [H, W, 3] uint8 RGB
    boxes: list[tuple[int, int, int, int]]  # xyxy, 0-based, exclusive
    labels: list[int]


def ensure_digits(root: Path, seed: int = 0, progress: bool = True) -> Path:
    """Generate the data set in `root` unless it is there already.

    The folder appears under its name only when it is complete, so that a kill halfway leaves
    nothing to mistake for it; of several processes that start together, one wins and the others use
    its result.

    Returns:
        `root`: one VOC-XML folder with the splits `train` and `test`.
    """
    if isdir(root / "ImageSets"):
        return root
    if exists(root) and any(root.iterdir()):
        raise UserError(
            f"{root} exists but holds no digits data set: move it away, or name another --data-root"
        )
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    except (OSError, ValueError) as error:
        raise UserError(
            f"--data-root {root}: cannot be made ({reason(error)}); name another folder"
        ) from None
    try:
        write_digits(unfinished, seed, progress=progress)
        unfinished.chmod(0o755)  # mkdtemp keeps other users out
        _rename_unless_there(unfinished, root)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return root


def write_digits(
    root: Path, seed: int = 0, num_scenes: dict[str, int] | None = None, progress: bool = False
) -> None:
    """Write all scenes of both splits into the empty `root`; equal seeds give equal bytes."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for split, count in (num_scenes or NUM_SCENES).items():
        material = load_material(split, seed)
        ids = [f"{split}_{number:04d}" for number in range(count)]
        for number, image_id in enumerate(
            tqdm(ids, f"digits {split}", unit="scene", disable=None if progress else True)
        ):
            rng = np.random.default_rng([seed, ("train", "test").index(split), number])
            _write_scene(root, image_id, make_scene(material, rng))
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(ids) + "\n")


def load_material(split: str, seed: int = 0) -> Material:
    """Return the digits and the photo regions that belong to `split` alone."""
    from sklearn.datasets import load_digits, load_sample_images  # a second of imports, needed once

    bunch = load_digits()
    held_out = np.zeros(len(bunch.target), bool)
    rng = np.random.default_rng(seed)
    for label in range(10):
        members = rng.permutation(np.flatnonzero(bunch.target == label))
        held_out[members[: round(len(members) * TEST_SHARE)]] = True
    mine = held_out == (split == "test")
    photos = []
    for photo in load_sample_images().images:
        edge = int(photo.shape[1] * PHOTO_SPLIT)
        photos.append(photo[:, edge:] if split == "test" else photo[:, :edge])
    return Material(bunch.images[mine].astype(np.float32) / 16, bunch.target[mine], photos)


def make_scene(material: Material, rng: np.random.Generator) -> Scene:
    """Compose one scene: a crop of a photograph with one to eight digits that do not touch."""
    height, width = (int(side) for side in rng.integers(SCENE_SIDES[0], SCENE_SIDES[1] + 1, size=2))
    image = _background(material.photos, height, width, rng)
    scene = Scene(image, [], [])
    for _ in range(rng.integers(1, MAX_DIGITS + 1)):
        index = int(rng.integers(len(material.labels)))
        ink = _enlarge(material.digits[index], rng)
        place = _free_place(scene.boxes, ink.shape, (height, width), rng)
        if place is not None:
            _paint(image, ink, place, rng)
            scene.boxes.append(
                (place[0], place[1], place[0] + ink.shape[1], place[1] + ink.shape[0])
            )
            scene.labels.append(int(material.labels[index]))
    return scene


def _background(
    photos: list[np.ndarray], height: int, width: int, rng: np.random.Generator
) -> np.ndarray:
    """Return a random crop of a random photograph, often mirrored, resized to the scene."""
    photo = photos[rng.integers(len(photos))]
    largest = min(photo.shape[0] / height, photo.shape[1] / width)
    zoom = rng.uniform(0.5, 1.0) * largest
    crop_height, crop_width = max(1, int(height * zoom)), max(1, int(width * zoom))
    top = rng.integers(photo.shape[0] - crop_height + 1)
    left = rng.integers(photo.shape[1] - crop_width + 1)
    crop = photo[top : top + crop_height, left : left + crop_width]
    crop = crop[:, ::-1] if rng.random() < 0.5 else crop
    return cv2.resize(np.ascontiguousarray(crop), (width, height), interpolation=cv2.INTER_LINEAR)


def _enlarge(digit: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Scale a digit's ink [8, 8] up, and cut it to what shows: its shape is its box."""
    side = round(8 * float(np.exp(rng.uniform(*np.log(DIGIT_SCALES)))))
    ink = np.clip(cv2.resize(digit, (side, side), interpolation=cv2.INTER_CUBIC), 0, 1)
    rows, columns = np.flatnonzero(ink.max(axis=1) > 0.2), np.flatnonzero(ink.max(axis=0) > 0.2)
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _free_place(
    taken: list[tuple[int, int, int, int]],
    shape: tuple[int, ...],
    scene: tuple[int, int],
    rng: np.random.Generator,
) -> tuple[int, int] | None:
    """Return (left, top) where a digit overlaps no other, or None after thirty tries."""
    for _ in range(30):
        left = int(rng.integers(scene[1] - shape[1] + 1))
        top = int(rng.integers(scene[0] - shape[0] + 1))
        right, bottom = left + shape[1], top + shape[0]
        if all(left >= r or right <= x or top >= b or bottom <= y for x, y, r, b in taken):
            return left, top
    return None


def _paint(
    image: np.ndarray, ink: np.ndarray, place: tuple[int, int], rng: np.random.Generator
) -> None:
    """Blend a digit in a random tint that stands out from what it covers."""
    left, top = place
    region = image[top : top + ink.shape[0], left : left + ink.shape[1]]
    tint = _tint(float(region.mean()), rng)
    region[:] = np.rint(region + ink[..., None] * (tint - region)).astype(np.uint8)


def _tint(covered: float, rng: np.random.Generator) -> np.ndarray:
    """Return an RGB colour whose mean differs from `covered` by `MIN_CONTRAST` or more."""
    while True:
        tint = rng.uniform(0, 255, size=3)
        if abs(tint.mean() - covered) >= MIN_CONTRAST:
            return tint


def _write_scene(root: Path, image_id: str, scene: Scene) -> None:
    path = root / "JPEGImages" / f"{image_id}.jpg"
    encoded = cv2.imencode(".jpg", scene.image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])[1]
    path.write_bytes(encoded.tobytes())
    objects = "".join(
        f"<object><name>{escape(CLASS_NAMES[label])}</name><difficult>0</difficult><bndbox>"
        f"<xmin>{left + 1}</xmin><ymin>{top + 1}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax>"
        "</bndbox></object>"
        for (left, top, right, bottom), label in zip(scene.boxes, scene.labels, strict=True)
    )
    height, width = scene.image.shape[:2]
    (root / "Annotations" / f"{image_id}.xml").write_text(
        f"<annotation><filename>{path.name}</filename>"
        f"<size><width>{width}</width><height>{height}</height>"
        f"<depth>3</depth></size>{objects}</annotation>\n"
    )


def _rename_unless_there(source: Path, target: Path) -> None:
    try:
        os.replace(source, target)
    except OSError:
        if not (
            target / "ImageSets"
        ).is_dir():  # not lost to another process that made the same: a real failure
            raise
