"""PASCAL VOC: XML annotations in the layout of the devkit, or in one folder of any classes.

A devkit holds `VOC2007/`, `VOC2012/`, ... (each with `Annotations/`, `JPEGImages/`,
`ImageSets/Main/<split>.txt`) and its splits are written `2007:trainval+2012:trainval`. A single
folder holds those three itself: `trainval`. Elsewhere a split is a folder of XML files, by its
path, whose images lie beside them or in a folder beside: so do labelImg, Roboflow and Kaggle's
sets. VOC counts pixels from 1 and includes the last one; here, and nowhere else, they become
0-based and exclusive.
"""

from collections.abc import Sequence
from os.path import exists, isdir, isfile  # of a name that no file can have they say no
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError, fromstring

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring as defused_fromstring

from yolo.data.dataset import (
    DetectionDataset,
    RawAnnotation,
    RawBox,
    assemble,
    find_image,
    header_size,
)
from yolo.errors import UserError
from yolo.files import check_regular, read_text

MAX_XML = 1 << 24  # bytes of one annotation


def read_voc(
    root: Path, split: str, class_names: Sequence[str] | None, skip_bad: bool = False
) -> DetectionDataset:
    """Read one split, or several joined by +, of a VOC-XML data set.

    Args:
        root: A devkit, the folder above one, or a single VOC-XML folder.
        split: As in `2007:trainval+2012:trainval`, or `trainval` for a single folder.
        class_names: In the order of their labels; None for those found, sorted.
        skip_bad: Leave out what is broken, and list it in `.skipped`.

    Raises:
        UserError: naming what was looked for and where.
    """
    xml_of: dict[str, Path] = {}
    for part in map(str.strip, split.split("+")):
        xml_of |= _xml_folder(root, part) or _xml_of_list(root, part)
    return assemble(
        f"VOC {split} in {root}",
        list(xml_of),
        lambda image_id: _read_xml(xml_of[image_id], image_id),
        class_names,
        skip_bad,
        in_processes=True,
    )


def _xml_of_list(root: Path, part: str) -> dict[str, Path]:
    """Return the annotation files that `ImageSets/Main/<split>.txt` lists, by image id."""
    folder, subset = _locate(root, part)
    ids = _read_ids(folder, subset)
    return {image_id: folder / "Annotations" / f"{image_id}.xml" for image_id in ids}


def _xml_folder(root: Path, part: str) -> dict[str, Path]:
    """Return the annotation files of a folder that a split names by path; none if it does not."""
    listed = isfile(root / "ImageSets" / "Main" / f"{part}.txt")
    if ":" in part or listed or not isdir(root / part):
        return {}
    prefix = "" if part in ("", ".", "Annotations") else f"{part}/"
    files = sorted((root / part).glob("*.xml"))
    return {f"{prefix}{path.stem}": path for path in files}


def year_folders(root: Path, year: str) -> list[Path]:
    """Return where a year may lie: in a devkit, in one below, or right here."""
    folders = [root / f"VOC{year}", root / "VOCdevkit" / f"VOC{year}"]
    return [*folders, root] if root.name == f"VOC{year}" else folders


def _locate(root: Path, part: str) -> tuple[Path, str]:
    """Return the folder with `Annotations/` and the name of the split inside it."""
    year, _, subset = part.rpartition(":")
    folders = year_folders(root, year) if year else [root]
    for folder in folders:
        if isdir(folder / "Annotations"):
            return folder, subset
    raise UserError(_nothing_found(root, part, folders))


def _nothing_found(root: Path, part: str, folders: list[Path]) -> str:
    looked = " or ".join(str(folder / "Annotations") for folder in folders)
    if not isdir(root):
        return (
            f"no data set at {root} (looked for {looked}): name --data-root; train.py --download "
            "fetches VOC"
        )
    years = sorted(folder.name[3:] for folder in root.glob("VOC[0-9]*"))
    if years:
        held, example = f"{root} holds the years {', '.join(years)}", f"{years[0]}:trainval"
        return f"split '{part}': {held}; name one, as in {example}"
    if isdir(root / "Annotations"):
        return (
            f"split '{part}': {root} is one folder of VOC files without years: name its splits "
            f"({_listed_splits(root)}) with --train-split and --split"
        )
    return (
        f"split '{part}': no folder {looked}; a devkit has VOC<year>/Annotations, other data has "
        "Annotations"
    )


def _listed_splits(folder: Path) -> str:
    lists = (folder / "ImageSets" / "Main").glob("*.txt")
    return ", ".join(sorted(path.stem for path in lists)) or "none"


def _read_ids(folder: Path, subset: str) -> list[str]:
    path = folder / "ImageSets" / "Main" / f"{subset}.txt"
    try:
        lines = read_text(path).splitlines()
    except OSError:
        raise UserError(f"no split file {path}; there are: {_listed_splits(folder)}") from None
    ids = [_image_id(folder, line.strip()) for line in lines if line.strip()]
    if not ids:
        raise UserError(f"{path} lists no images; name another split")
    return ids


def _image_id(folder: Path, line: str) -> str:
    """Return the image of a line, whose second column may be a flag of one class: -1, 0 or 1."""
    image_id, flag = [*line.rsplit(maxsplit=1), ""][:2]
    is_flag = flag in ("-1", "0", "1") and not exists(folder / "Annotations" / f"{line}.xml")
    return image_id if is_flag else line


def parse_xml(path: Path) -> Element:
    """Return the root of an annotation file; raises `UserError`, naming the file."""
    try:
        check_regular(path, MAX_XML)
        content = path.read_bytes()
        # Without a declaration there is nothing to defuse, and the C parser is five times as fast.
        is_plain = b"<!" not in content and b"\0" not in content
        root = (fromstring if is_plain else defused_fromstring)(content)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ParseError, DefusedXmlException, ValueError, LookupError) as error:
        raise UserError(f"{path}: is no valid XML ({error})") from None
    for node in root.iter():
        node.tag = node.tag.rpartition("}")[2]  # names mean the same in any namespace
    return root


def _read_xml(path: Path, image_id: str) -> RawAnnotation:
    root = parse_xml(path)
    image = _image_of(path)
    try:
        height, width = annotated_size(root) or header_size(image)
        objects = [_object(node) for node in root.iter("object")]
    except (ValueError, TypeError, AttributeError, KeyError):
        raise UserError(
            f"{path}: an object lacks a name or a box of four numbers, or the size is no number"
        ) from None
    return RawAnnotation(image_id, image, path, height, width, objects)


def _image_of(path: Path) -> Path:
    """Return the image of an annotation file: in `JPEGImages/` or `images/`, or beside it."""
    above = path.parents[1]
    places = [above / "JPEGImages", path.parent, above / "images", above]
    if role_folder := path.parent.name if above.name.lower() == "annotations" else "":
        places += [above.parent / name / role_folder for name in ("JPEGImages", "images")]
    found = (find_image(place, path.stem) for place in places)
    return next(filter(exists, found), None) or find_image(places[0], path.stem)


def annotated_size(root: Element) -> tuple[int, int] | None:
    """Return (height, width), None where the tool left it out; `ValueError` if no numbers."""
    height, width = root.findtext("size/height"), root.findtext("size/width")
    if not height or not width or int(height) == 0 or int(width) == 0:
        return None
    return int(height), int(width)


def _object(node: Element) -> RawBox:
    edges: dict[str, str] = {}
    for edge in node.iterfind("bndbox/*"):
        edges.setdefault(edge.tag, edge.text or "")  # of several the first counts
    left, top, right, bottom = (float(edges[key]) for key in ("xmin", "ymin", "xmax", "ymax"))
    name = node.findtext("name", "").strip()
    if not name:
        raise ValueError("no name")
    return RawBox(
        name, (left - 1, top - 1, right, bottom), node.findtext("difficult", "0").strip() == "1"
    )
