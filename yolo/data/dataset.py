"""The detection data set that every source becomes, and the one place where its defects are found.

A source (the readers of layouts.py) only says what its files contain, as `RawAnnotation`;
`assemble` checks headers, boxes and class names, and `read_rgb` decodes pixels.
"""

import glob
import hashlib
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from os.path import exists
from pathlib import Path, PurePath
from typing import NamedTuple, Protocol

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from yolo.data.archives import IMAGE_SUFFIXES, is_image
from yolo.data.processes import map_in_processes
from yolo.errors import UserError, one_line
from yolo.files import check_regular

JPEG_START = b"\xff\xd8"
END_MARKS = {
    JPEG_START: b"\xff\xd9",
    b"\x89P": b"IEND\xaeB`\x82",
}  # of JPEG and PNG, by their start
# decoded in several workers at once, more than this fills the memory of a small machine
MAX_PIXELS = 64_000_000
MAX_FILE = 1 << 30  # bytes of an image file: uncompressed, 64 million pixels are at most 512 MB
TOO_LARGE = f"over {MAX_PIXELS // 10**6} million pixels"
# pixels; must be exceeded. In VOC's inclusive pixels a box with xmin = xmax is one pixel wide
MIN_BOX_SIDE = 1.0
# pixels: 0-based tools and rounding put boxes this far outside; they are clipped in silence
EDGE_TOLERANCE = 2.0
_DECODE_FLAGS = {
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}

# What is broken or too large is one clear line of ours, not several of OpenCV's and Pillow's.
(cv2.utils.logging if hasattr(cv2.utils, "logging") else cv2).setLogLevel(
    0
)  # before OpenCV 5 it was in cv2
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")


class Annotation(NamedTuple):
    """The objects of one image, in its original pixels."""

    boxes: np.ndarray  # [M, 4] float32 xyxy, 0-based, right and bottom exclusive
    labels: np.ndarray  # [M] int64
    difficult: np.ndarray  # [M] bool
    height: int
    width: int


class RawBox(NamedTuple):
    """One object as its file states it, in 0-based exclusive pixels but not yet checked."""

    name: str
    box: tuple[float, float, float, float]
    difficult: bool = False


class RawAnnotation(NamedTuple):
    """One image as its annotation file states it, not yet checked."""

    image_id: str
    image: Path
    source: Path  # the file that errors name
    height: int
    width: int
    objects: list[RawBox]


# what libjpeg says of bytes lost in the middle; the image decodes all the same, in part grey
CORRUPT = re.compile("Corrupt JPEG|Premature end of JPEG")
Remarks = defaultdict[str, list[str]]  # where something was not used as it stands, by what it was


class ImageCache(Protocol):
    """Holds decoded images; see `yolo.data.cache`."""

    def __getitem__(self, index: int) -> np.ndarray: ...


@dataclass
class DetectionDataset:
    """Images with boxes. Picklable, for workers that are spawned; holds no pixels unless cached."""

    name: str
    class_names: tuple[str, ...]
    image_ids: list[str]
    paths: list[Path]
    annotations: list[Annotation] = field(repr=False)
    skipped: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)  # what was given and is not used as it stands
    follow_exif: bool = False
    cache: ImageCache | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.image_ids)

    def annotation(self, index: int) -> Annotation:
        """Return the boxes of image `index`, in its original pixels."""
        return self.annotations[index]

    def image(self, index: int, min_side: int | None = None) -> np.ndarray:
        """Decode image `index`.

        Args:
            index: Position in `image_ids`.
            min_side: Longest side that the caller needs, in pixels. A JPEG may then be decoded at a
                half, a quarter or an eighth of its size, which costs less; a cached image may be
                smaller than the original, too.

        Returns:
            [H, W, 3] uint8 RGB. A pixel of it is `annotation.width / W` original pixels wide.

        Raises:
            UserError: naming the file, if it is missing, broken, or of another size than annotated.
        """
        if self.cache is not None:
            return self.cache[index]
        annotation = self.annotations[index]
        return read_rgb(
            self.paths[index], (annotation.height, annotation.width), min_side, self.follow_exif
        )

    def keep(self, indices: Sequence[int]) -> None:
        """Leave out all images but these."""
        self.image_ids = [self.image_ids[index] for index in indices]
        self.paths = [self.paths[index] for index in indices]
        self.annotations = [self.annotations[index] for index in indices]

    def digest(self) -> str:
        """Return a SHA-256 over class names, image ids, sizes and boxes."""
        state = hashlib.sha256(repr(self.class_names).encode())
        for image_id, annotation in zip(self.image_ids, self.annotations, strict=True):
            size = f"{annotation.height} {annotation.width}"
            state.update(f"{image_id} {size} {len(annotation.labels)}".encode())
            for array in (annotation.boxes, annotation.labels, annotation.difficult):
                state.update(array.tobytes())
        return state.hexdigest()


class NothingUsableError(UserError):
    """All that a split holds is defective; `defects` lists it."""

    def __init__(self, name: str, defects: list[str]) -> None:
        super().__init__(f"{name}: none of the images can be used; the first: {defects[0]}")
        self.defects = defects


class Defects:
    """Collects what is wrong with a data set: in the end an error, or what `skip` left out."""

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.found: list[str] = []

    def add(self, defect: str) -> None:
        """Remember one defect: file, what is wrong, value."""
        self.found.append(defect)

    def settle(self, where: str) -> list[str]:
        """Return the defects when they may be skipped.

        Raises:
            UserError: with the first defect, when there are any and they may not be skipped.
        """
        if self.found and not self.skip:
            more = (
                f" (the first of {len(self.found)} defects in {where})"
                if len(self.found) > 1
                else ""
            )
            raise UserError(
                f"{self.found[0]}{more}; --skip-bad leaves them out, --check-data lists them all"
            )
        return self.found


def notice(what: str, things: Sequence[object]) -> list[str]:
    """Return the line that says how many things there are and which is the first, if any."""
    return [f"{len(things)} {what}; the first: {one_line(str(things[0]))}"] if things else []


def assemble(
    name: str,
    image_ids: Sequence[str],
    read: Callable[[str], RawAnnotation],
    class_names: Sequence[str] | None,
    skip_bad: bool,
    follow_exif: bool = False,
    in_processes: bool = False,
) -> DetectionDataset:
    """Read and check every annotation and every image header of a split.

    Args:
        name: What errors call the data set: source, split and root.
        image_ids: Images of the split.
        read: Returns one image's annotation; raises `UserError` for a file that cannot be read.
        class_names: The classes in the order of their labels; None for those that occur, sorted.
        skip_bad: Leave out what is broken and list it in `.skipped`, instead of raising.
        follow_exif: See `read_rgb`.
        in_processes: `read` only returns, and changes nothing: it may run on all cores.

    Raises:
        UserError: if the split is empty, or for the first defect.
    """
    defects = Defects(skip_bad)
    remarks: Remarks = defaultdict(list)
    every_map = map_in_processes if in_processes else map
    images = []
    for found in every_map(partial(_checked_image, read, follow_exif), image_ids):
        if isinstance(found, str):
            defects.add(found)
            continue
        image, remarks_on_it = found
        images.append(image)
        for what in remarks_on_it:
            remarks[what].append(str(image.image))
    if class_names is None:
        class_names = sorted({thing.name for image in images for thing in image.objects})
    label_of = {class_name: label for label, class_name in enumerate(class_names)}
    annotations = [_annotation(image, label_of, defects) for image in images]
    skipped = defects.settle(name)
    if not images and skipped:
        raise NothingUsableError(name, skipped)
    if not images:
        raise UserError(f"{name}: holds no images; check the split and --data-root")
    if not class_names:
        raise UserError(
            f"{name}: no image has a box, so there are no classes to learn; --classes names them"
        )
    return DetectionDataset(
        name=name,
        class_names=tuple(class_names),
        image_ids=[image.image_id for image in images],
        paths=[image.image for image in images],
        annotations=annotations,
        skipped=skipped,
        notices=[line for what, places in remarks.items() for line in notice(what, places)],
        follow_exif=follow_exif,
    )


def drop_unreadable(dataset: DetectionDataset) -> None:
    """Decode every image once and leave out those that fail, listing them in `.skipped`.

    Raises:
        UserError: if none is left.
    """

    def defect(index: int) -> str | None:
        try:
            dataset.image(index)
        except UserError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(defect, range(len(dataset))))
    good = [index for index, message in enumerate(found) if message is None]
    if not good:
        raise UserError(f"{dataset.name}: no image can be decoded; the first: {found[0]}")
    dataset.skipped += [message for message in found if message is not None]
    dataset.keep(good)


def read_rgb(
    path: Path,
    size: tuple[int, int] | None = None,
    min_side: int | None = None,
    follow_exif: bool = True,
) -> np.ndarray:
    """Decode an image file: grey, CMYK, palette, 16-bit and transparent images become 8-bit RGB.

    Args:
        path: Image file.
        size: (height, width) as annotated, if known.
        min_side: See `DetectionDataset.image`; needs `size`.
        follow_exif: Turn the image as its EXIF tag says. VOC's boxes were drawn on the pixels as
            stored; but where its annotation has the sides of the stored image exchanged, the tag is
            followed after all.

    Returns:
        [H, W, 3] uint8 RGB.

    Raises:
        UserError: naming the file.
    """
    try:
        if size is None:  # nobody has looked at it yet
            check_regular(path, MAX_FILE)
        encoded = np.fromfile(path, np.uint8)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if size is None:
        check_pixels(path, encoded.tobytes())
        return decode_rgb(path, encoded, 1, follow_exif)
    is_jpeg = encoded[:2].tobytes() == JPEG_START  # whatever its name says
    shrink = _shrink(size, min_side) if is_jpeg else 1
    for turn in (follow_exif, True):
        image = decode_rgb(path, encoded, shrink, turn)
        if image.shape[:2] == _shrunk(size, shrink):
            return image
    height, width = decode_rgb(path, encoded, 1, follow_exif).shape[:2]
    raise UserError(
        f"{path}: the image is {width}x{height}, but its annotation says {size[1]}x{size[0]}"
    )


def header_size(path: Path, follow_exif: bool = False) -> tuple[int, int]:
    """Return (height, width) from an image's header, as stored or as its EXIF tag turns it.

    Raises:
        UserError: naming the file, if it is missing or no image.
    """
    header = _header_of(path)
    return header.turned if follow_exif else (header.height, header.width)


class _Header(NamedTuple):
    """What an image file says of itself before its pixels."""

    height: int  # as stored
    width: int
    orientation: int  # of EXIF; 5-8 exchange the sides
    is_deep: bool  # 16 bits a channel

    @property
    def turned(self) -> tuple[int, int]:
        """(height, width) as the EXIF tag turns the image."""
        exchanged = self.orientation >= 5
        return (self.width, self.height) if exchanged else (self.height, self.width)


def _header_of(path: Path) -> _Header:
    try:
        check_regular(path, MAX_FILE)
        return _read_header(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such image") from None
    except Image.DecompressionBombError:
        raise UserError(f"{path}: is {TOO_LARGE}; scale it down") from None
    except OSError as error:
        reason = f" ({error.strerror})" if error.strerror else ""
        raise UserError(f"{path}: is no image that can be read{reason}") from None


def check_pixels(path: PurePath, encoded: bytes) -> None:
    """Refuse an image file by its header, before memory is taken for its pixels.

    Raises:
        UserError: naming `path`, if it has more than `MAX_PIXELS`.
    """
    try:
        header = _read_header(BytesIO(encoded))
    except Image.DecompressionBombError:
        raise UserError(f"{path}: is {TOO_LARGE}; scale it down") from None
    except OSError:
        return  # the decoder may know better
    if header.height * header.width > MAX_PIXELS:
        raise UserError(f"{path}: {header.width}x{header.height} is {TOO_LARGE}; scale it down")


def _read_header(file: Path | BytesIO) -> _Header:
    """Read the header of an image.

    Raises:
        OSError: if it is of no image.
        DecompressionBombError: if it is over Pillow's limit.
    """
    try:
        with Image.open(file) as image:
            width, height = image.size
            is_deep = ";16" in str(image.tile[:1])
            return _Header(height, width, _orientation(image), is_deep)
    except (OSError, Image.DecompressionBombError):
        raise
    except Exception:  # on damaged headers Pillow raises nearly everything
        raise UnidentifiedImageError from None


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # a damaged tag is no tag, as for OpenCV
        return 1


def find_image(folder: Path, stem: str) -> Path:
    """Return the image `stem` in `folder`, whatever its suffix; its JPEG name if there is none."""
    for suffix in IMAGE_SUFFIXES:
        for candidate in (folder / f"{stem}{suffix}", folder / f"{stem}{suffix.upper()}"):
            if exists(candidate):
                return candidate
    if "\0" in stem:
        return folder / f"{stem}.jpg"
    others = sorted(folder.glob(f"{glob.escape(stem)}.*"))  # reads the folder: only for mixed case
    named = (path for path in others if path.stem == Path(stem).name)
    return next(filter(is_image, named), folder / f"{stem}.jpg")


def decode_rgb(
    path: PurePath, encoded: np.ndarray, shrink: int = 1, follow_exif: bool = True
) -> np.ndarray:
    """Decode an image file's bytes [N] to uint8 RGB [H, W, 3], 1, 2, 4 or 8 times smaller.

    Raises:
        UserError: naming `path`.
    """
    flags = _DECODE_FLAGS[shrink] | (0 if follow_exif else cv2.IMREAD_IGNORE_ORIENTATION)
    try:
        image = cv2.imdecode(encoded, flags)
    except cv2.error:
        image = None
    if image is None or image.dtype != np.uint8:
        raise UserError(f"{path}: is truncated or no image")
    if image.ndim == 2:  # of the kinds that OpenCV leaves grey
        return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    if shrink > 1:
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)  # reduced decoding knows only BGR
    is_jpeg = encoded[:2].tobytes() == JPEG_START
    if not is_jpeg and image.max() <= 16 and holds_12_bits(encoded):
        deep = np.asarray(cv2.imdecode(encoded, flags | cv2.IMREAD_ANYDEPTH))
        return (deep >> 4).astype(np.uint8)
    return image


def holds_12_bits(encoded: np.ndarray) -> bool:
    """Return whether an image file for 16 bits holds 12, as of many cameras: else it is black."""
    image = cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED)
    return image is not None and image.dtype == np.uint16 and 255 < image.max() <= 4095


def _shrink(size: tuple[int, int], min_side: int | None) -> int:
    """Return the decoder's largest reduction (1, 2, 4, 8) that leaves a side of `min_side`."""
    if min_side is None:
        return 1
    return max(shrink for shrink in _DECODE_FLAGS if shrink == 1 or max(size) >= shrink * min_side)


def _shrunk(size: tuple[int, int], shrink: int) -> tuple[int, int]:
    return (-(-size[0] // shrink), -(-size[1] // shrink))


def _checked_image(
    read: Callable[[str], RawAnnotation], follow_exif: bool, image_id: str
) -> tuple[RawAnnotation, list[str]] | str:
    """Return an annotation and what is remarkable about its image; or its defect."""
    try:
        image = read(image_id)
        header = _header_of(image.image)
        _check_header(image, header)
        _check_end(image.image)
        return image, list(_remarks_on(image, header, follow_exif))
    except UserError as error:
        return str(error)


def _remarks_on(image: RawAnnotation, header: _Header, follow_exif: bool) -> Iterator[str]:
    is_turned = follow_exif or (image.height, image.width) != (header.height, header.width)
    if 1 < header.orientation <= 8:
        if is_turned:
            yield "pictures are turned as their EXIF tag says"
        else:
            yield (
                "pictures have an EXIF tag that turns them, but are read as stored, as VOC's boxes "
                "are"
            )
    if header.is_deep and holds_12_bits(np.fromfile(image.image, np.uint8)):
        yield "pictures hold 12 bits in a file for 16 and are read so"


def _check_header(image: RawAnnotation, header: _Header) -> None:
    stored = (header.height, header.width)
    if (image.height, image.width) not in (stored, header.turned):
        raise UserError(
            f"{image.source}: says {image.width}x{image.height}, but {image.image} is "
            f"{header.width}x{header.height}"
        )
    if image.height * image.width > MAX_PIXELS:
        raise UserError(
            f"{image.image}: {image.width}x{image.height} is {TOO_LARGE}; scale the image and its "
            "boxes down"
        )


def _check_end(path: Path) -> None:
    """Decode an image that does not end as its kind does: now, and not amid an epoch."""
    with path.open("rb") as file:
        start = file.read(2)
        file.seek(max(0, path.stat().st_size - 64))
        if END_MARKS.get(start, b"") not in file.read():
            read_rgb(path)


def _annotation(image: RawAnnotation, label_of: dict[str, int], defects: Defects) -> Annotation:
    limit = np.array([image.width, image.height] * 2, np.float32)
    boxes, labels, difficult = [], [], []
    for number, thing in enumerate(image.objects, start=1):
        problem = _object_defect(thing, image, label_of)
        if problem:
            defects.add(f"{image.source}: object {number} ({thing.name}) {problem}")
            continue
        boxes.append(thing.box)
        labels.append(label_of[thing.name])
        difficult.append(thing.difficult)
    return Annotation(
        boxes=np.clip(np.array(boxes, np.float32).reshape(-1, 4), 0, limit),
        labels=np.array(labels, np.int64),
        difficult=np.array(difficult, bool),
        height=image.height,
        width=image.width,
    )


def _object_defect(thing: RawBox, image: RawAnnotation, label_of: dict[str, int]) -> str | None:
    """Return what is wrong with an object, or None."""
    left, top, right, bottom = thing.box
    shown = ", ".join(f"{value:g}" for value in thing.box)
    if thing.name not in label_of:
        known = ", ".join(label_of)
        return f"is of none of the classes {known} (--classes of a training can name it as well)"
    if not np.isfinite(thing.box).all():
        return f"has a box that is no number: {shown}"
    if min(right - left, bottom - top) <= MIN_BOX_SIDE:
        return f"has a box of no size: {shown} (0-based pixels)"
    beyond = max(-left, -top, right - image.width, bottom - image.height)
    if beyond > EDGE_TOLERANCE:
        return f"reaches {beyond:g} pixels outside the {image.width}x{image.height} image: {shown}"
    inside = min(right, image.width) - max(left, 0), min(bottom, image.height) - max(top, 0)
    if min(inside) <= MIN_BOX_SIDE:
        return f"has a box of no size inside the {image.width}x{image.height} image: {shown}"
    return None
