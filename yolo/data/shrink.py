"""Shrink a VOC-XML data set, images and boxes, to the size that training needs.

    python -m yolo.data.shrink VOCdevkit VOCdevkit416 --size 416 --quality 90

A network of 416 pixels never sees more of a larger photograph, but every epoch reads and decodes
all of it, and every machine has to be sent it. SOURCE is a devkit (with `VOC2007/`, `VOC2012/`),
the folder above one, or a single folder with `Annotations/`, `JPEGImages/` and `ImageSets/Main/`;
TARGET gets the same layout. Boxes stay whole, 1-based, inclusive pixels. Masks are not copied.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from xml.etree.ElementTree import Element, ElementTree

import cv2
from tqdm import tqdm

from yolo.data.dataset import MIN_BOX_SIDE, find_image, read_rgb
from yolo.data.voc import annotated_size, parse_xml
from yolo.errors import UserError


def shrink_dataset(source: Path, target: Path, size: int = 416, quality: int = 90) -> int:
    """Copy a data set, every image shrunk until its longer side is at most `size`, none enlarged.

    `target` appears under its name only when it is complete: until then it is `TARGET.part`, which
    an error removes and a kill leaves behind.

    Args:
        source: A devkit, the folder above one, or a single VOC-XML folder.
        target: A folder that is empty or not there yet.
        size: Longest side that is left, pixels. Smaller images are copied unchanged.
        quality: Of the JPEGs that are written, 1-100.

    Returns:
        The number of images.

    Raises:
        UserError: if `target` is taken; or naming a file of `source` that is missing or broken.
    """
    target = target.absolute()
    part = target.with_name(f"{target.name}.part")
    if part.exists():
        raise UserError(f"{part}: is of a run that was interrupted or still runs; remove it")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: is not an empty folder; name a new one")
    folders = _voc_folders(source)
    pairs = [
        (path, part / folder.relative_to(source))
        for folder in folders
        for path in sorted((folder / "Annotations").glob("*.xml"))
    ]
    if not pairs:
        raise UserError(f"{source}: holds no Annotations/*.xml, or VOC<year>/Annotations/*.xml")
    try:
        for folder in folders:
            _make_folder(folder, part / folder.relative_to(source))
        with ThreadPoolExecutor() as pool:  # OpenCV works outside the interpreter's lock
            shrink = partial(_shrink_image, size=size, quality=quality)
            done = pool.map(shrink, *zip(*pairs, strict=True))
            for _ in tqdm(done, "shrink", len(pairs), unit="image", disable=None):
                pass
        if target.exists():
            target.rmdir()
        part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return len(pairs)


def scale_edges(first: float, last: float, scale: float, limit: int) -> tuple[int, int]:
    """Return where one side of a box comes to lie when its image becomes `scale` times as large.

    A box that training accepts stays one: it keeps two pixels.

    Args:
        first: First pixel of the box along one axis, 1-based.
        last: Last pixel, inclusive.
        scale: New side of the image / old side.
        limit: New side of the image, pixels.
    """
    low, high = round((first - 1) * scale), round(last * scale)  # as 0-based, exclusive edges
    if high - low <= MIN_BOX_SIDE < last - first + 1:
        low = max(min(round((first - 1 + last) / 2 * scale) - 1, limit - 2), 0)
        high = low + 2
    return low + 1, high


def _voc_folders(source: Path) -> list[Path]:
    if (source / "Annotations").is_dir():
        return [source]
    devkits = (source, source / "VOCdevkit")
    years = [year for devkit in devkits for year in sorted(devkit.glob("VOC[0-9]*"))]
    return [year for year in years if (year / "Annotations").is_dir()]


def _make_folder(folder: Path, target: Path) -> None:
    """Make the folders of `target` and copy the lists of the splits."""
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (target / name).mkdir(parents=True)
    for split in (folder / "ImageSets" / "Main").glob("*.txt"):
        shutil.copyfile(split, target / "ImageSets" / "Main" / split.name)


def _shrink_image(annotation: Path, target: Path, size: int, quality: int) -> None:
    root = parse_xml(annotation)
    path = find_image(annotation.parents[1] / "JPEGImages", annotation.stem)
    try:
        annotated = annotated_size(root)
    except ValueError:
        raise UserError(f"{annotation}: its size is no number") from None
    image = read_rgb(path, annotated, follow_exif=False)
    height, width = image.shape[:2]
    if max(height, width) <= size:
        shutil.copyfile(path, target / "JPEGImages" / path.name)
        shutil.copyfile(annotation, target / "Annotations" / annotation.name)
        return
    scale = size / max(height, width)
    height, width = (max(1, round(side * scale)) for side in (height, width))
    name = f"{annotation.stem}.jpg"
    small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    jpeg = cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    (target / "JPEGImages" / name).write_bytes(jpeg.tobytes())
    try:
        _rescale(root, (height, width), image.shape[:2], name)
    except (ValueError, OverflowError):
        raise UserError(f"{annotation}: a box is not four numbers") from None
    ElementTree(root).write(target / "Annotations" / annotation.name, encoding="utf-8")


def _rescale(root: Element, size: tuple[int, int], old_size: tuple[int, int], name: str) -> None:
    """Write the new size, file name and boxes, those of parts (heads, hands) too, into `root`."""
    (height, width), (old_height, old_width) = size, old_size
    axes = (("xmin", "xmax", width, old_width), ("ymin", "ymax", height, old_height))
    for box in root.iter("bndbox"):
        for low, high, side, old_side in axes:
            first, last = float(box.findtext(low, "")), float(box.findtext(high, ""))
            edges = scale_edges(first, last, side / old_side, side)
            for key, edge in zip((low, high), edges, strict=True):
                box.find(key).text = str(edge)  # type: ignore[union-attr]
    for key, value in (("size/width", width), ("size/height", height), ("filename", name)):
        if (node := root.find(key)) is not None:
            node.text = str(value)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and shrink; exits 1 with one line for bad data, 2 for bad arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m yolo.data.shrink", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("source", type=Path, help="a devkit, or a single VOC-XML folder")
    parser.add_argument("target", type=Path, help="a folder that is empty or not there yet")
    parser.add_argument(
        "--size", type=int, default=416, help="longest side that is left, pixels (%(default)s)"
    )
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs, 1-100 (%(default)s)")
    args = parser.parse_args(argv)
    if args.size < 1 or not 1 <= args.quality <= 100:
        parser.error("--size must be 1 or more, and --quality from 1 to 100")
    try:
        count = shrink_dataset(args.source, args.target, args.size, args.quality)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    print(f"{args.target}: {count} images of at most {args.size} pixels")


if __name__ == "__main__":
    main()
