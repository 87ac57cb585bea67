"""The layouts of data that are known: how each is recognised by its files, and which reader it has.

A new one is a `find_*` and a row of `LAYOUTS` here, a reader such as coco.py, and its name in
`--dataset` (config.py, evaluate.py). Whoever gives `--data-root` alone need not know what a layout
is called. Recognising looks at names, and into few small files; it is quick, and imports nothing
that decodes pictures.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from os.path import exists  # of a name that no file can have it says no, where `Path` raises
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from yolo.data.archives import archive_names, is_archive, is_image, swap_last, unpacked, walk
from yolo.data.class_names import CLASS_FILES, VOC_CLASSES, load_yaml
from yolo.data.splits import draw
from yolo.errors import UserError
from yolo.files import read_text

if TYPE_CHECKING:
    from yolo.data.dataset import DetectionDataset

OWN, VOC, CLASSIFIER = "configs/own.yaml", "configs/voc_lite.yaml", "configs/cifar10.yaml"
ROLES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
ORDER: tuple[str, ...] = ("train", "val", "test")
LOOKED_INTO = 20  # files of a kind, to tell whose they are
ANNOTATION = re.compile(r"<(\w+:)?annotation[\s>]")
IN_PASSING = re.compile(r"[._]|readme|licen[cs]e", re.IGNORECASE)  # beside a data set
MEANT = re.compile(r"VOC\d{4}|Annotations|images|train|valid?|test", re.IGNORECASE)  # part of it
COCO_KEYS = ('"images"', '"annotations"', '"categories"')


@dataclass(frozen=True)
class Reading:
    """One way to read the data: what the flags `--dataset`, `--train-split` and so on would say."""

    dataset: str
    title: str
    root: Path
    splits: dict[str, str]  # by role: train, val, test
    evidence: str
    classes: str = "auto"
    config: str = OWN  # that suits it, when no --config is given

    def settings(self, val_fraction: float, train_split: str | None = None) -> dict[str, Any]:
        """Return the settings that the reading stands for.

        Args:
            val_fraction: The share of the training pictures that is drawn where there is no val.
            train_split: What `--train-split` says, if it does.

        Raises:
            UserError: if nothing is there to train on.
        """
        train, val, test = (self.splits.get(role) for role in ("train", "val", "test"))
        train = train_split or train
        if train is None:
            raise UserError(
                f"{self.root}: {self.title} with {', '.join(self.splits)} alone: nothing to train "
                "on; name it with --train-split"
            )
        if val in (None, train) and (test is None or self.config == OWN):
            train, val = draw(train, val_fraction)
        return {
            "dataset": self.dataset,
            "classes": self.classes,
            "train_split": train,
            "val_split": val if test else None,
            "split": test or val,
        }

    def __str__(self) -> str:
        parts = ", ".join(f"{role} {split}" for role, split in self.splits.items())
        return f"{self.title} in {self.root} ({parts})"


@dataclass(frozen=True)
class Listing:
    """The files of a data set, as paths below its root."""

    root: Path
    files: tuple[PurePosixPath, ...]
    known: frozenset[PurePosixPath] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "known", frozenset(self.files))

    @classmethod
    def of(cls, root: Path) -> "Listing":
        """List a folder, or the only folder in it (as in `archive.zip/flowers/...`)."""
        while True:
            entries = [path for path in root.iterdir() if not IN_PASSING.match(path.name)]
            if len(entries) != 1 or not entries[0].is_dir() or MEANT.fullmatch(entries[0].name):
                break
            root = entries[0]
        files = (PurePosixPath(path.relative_to(root).as_posix()) for path in walk(root))
        return cls(root, tuple(files))

    def with_suffix(self, *suffixes: str) -> list[PurePosixPath]:
        """Return the files of some kinds."""
        return [path for path in self.files if path.suffix.lower() in suffixes]

    @cached_property
    def images(self) -> list[PurePosixPath]:
        """The pictures."""
        return [path for path in self.files if is_image(path)]

    def locate(self, word: str) -> str | None:
        """Return what a path written elsewhere means here: its longest end that is there."""
        parts = PurePosixPath(word.replace("\\", "/")).parts
        ends = (PurePosixPath(*parts[start:]) for start in range(len(parts)))
        return next((str(end) for end in ends if exists(self.root / end)), None)


def recognise(root: Path, dataset: str | None = None) -> Reading:
    """Return how the data in a folder, an archive, a `data.yaml` or the like are to be read.

    Args:
        root: What `--data-root` names.
        dataset: The one layout that counts, if `--dataset` names it.

    Raises:
        UserError: if no reading, or more than one, is possible; with what was found.
    """
    if not exists(root):
        raise UserError(f"--data-root {root}: does not exist")
    if root.is_file() and is_archive(root):
        names = tuple(archive_names(root))
        classes = [*find_class_folders(Listing(root, names))] if names else []
        if classes and dataset in (None, "images"):
            return classes[0]
        root = unpacked(root)
    if root.is_file():
        return _named_by_file(root)
    listing = Listing.of(root)
    known = [name for name in LAYOUTS if dataset in (None, name)]
    found = [reading for name in known for reading in LAYOUTS[name].recognise(listing)]
    if not found:
        raise UserError(_nothing_recognised(root, listing))
    if len(found) > 1:
        ways = "; or ".join(
            f"{one.title} ({one.evidence}): --dataset {one.dataset}" for one in found
        )
        raise UserError(f"--data-root {root}: can be read in more than one way: {ways}")
    return found[0]


def _named_by_file(file: Path) -> Reading:
    """Return the reading a file (`data.yaml`, `obj.data`, `train.txt`, COCO JSON) stands for."""
    root = file.parent
    if root.name == "annotations" and file.suffix.lower() == ".json":
        root = root.parent  # the pictures lie beside that folder
    name = PurePosixPath(file.relative_to(root).as_posix())
    listing = Listing(root, (name,))
    match file.suffix.lower():
        case ".yaml" | ".yml":
            found = [*_data_yaml(listing, [name])]
        case ".data":
            found = [*_darknet_data(listing, [name])]
        case ".txt":
            found = [*_lists(listing, {"train": name})]
        case ".json":
            found = [*_coco(listing, [name])]
        case _:
            found = []
    if not found:
        raise UserError(
            f"--data-root {file}: is none of the files that describe a data set (data.yaml, "
            "obj.data, a list of pictures, COCO JSON) and no zip or tar; name the folder that it "
            "lies in"
        )
    return found[0]


def _nothing_recognised(root: Path, listing: Listing) -> str:
    kinds = Counter(path.suffix.lower() or path.name for path in listing.files).most_common(5)
    held = ", ".join(f"{count} {kind}" for kind, count in kinds) or "nothing"
    why = "pictures, but no boxes that belong to them" if listing.images else "no pictures"
    return (
        f"--data-root {root}: holds {why} ({held}); docs/data.md shows the layouts that are read, "
        "--dataset and --train-split name one"
    )


def role_of(words: Iterable[str]) -> str | None:
    """Return the role that one of some words names: `train2017` is train."""
    for word in words:
        for part in re.split(r"[^a-z]+", word.lower()):
            if part in ROLES:
                return ROLES[part]
    return None


# ---- class number and box in shares: YOLO, Darknet, labelImg, the Kaggle copy of VOC


def find_yolo(listing: Listing) -> Iterator[Reading]:
    """Find label files of lines `class cx cy width height`; a file naming splits comes first."""
    yaml_files = [path for path in listing.with_suffix(".yaml", ".yml") if len(path.parts) == 1]
    yield from (
        [*_data_yaml(listing, yaml_files)]
        or [*_darknet_data(listing, listing.with_suffix(".data"))]
        or ([] if [*_kaggle_csv(listing)] else [*_yolo_folders(listing)])
        or [*_lists(listing, {})]
    )


def _data_yaml(listing: Listing, files: Sequence[PurePosixPath]) -> Iterator[Reading]:
    """Read `path`, `train`, `val`, `test` (paths or lists) of a file that has `names`, too."""
    for file in files:
        content = load_yaml(listing.root / file)
        if not isinstance(content, dict) or not content.get("names"):
            continue
        splits = {}
        for key, value in content.items():
            if str(key).lower() not in ROLES or not value:
                continue
            words = value if isinstance(value, list) else [value]
            parts = [
                _of_yaml(listing, str(content.get("path") or "."), str(word)) for word in words
            ]
            missing = [word for word, part in zip(words, parts, strict=True) if part is None]
            if missing and ROLES[str(key).lower()] == "train":
                raise UserError(
                    f"{listing.root / file}: `{key}: {missing[0]}` is not there; correct the path, "
                    "as seen from this file"
                )
            if not missing:
                splits[ROLES[str(key).lower()]] = "+".join(map(str, parts))
        if splits:
            evidence = f"{file} names {', '.join(splits)}"
            yield Reading("yolo", f"YOLO by {file}", listing.root, splits, evidence)
            return


def _of_yaml(listing: Listing, base: str, word: str) -> str | None:
    """Return a path of a `data.yaml`: below its `path`, or the file itself; absolute, its end."""
    if PurePosixPath(word).is_absolute():
        return listing.locate(word)
    # Roboflow's paths start one folder too high
    inside = PurePosixPath(*(part for part in PurePosixPath(word).parts if part != ".."))
    places = (PurePosixPath(base) / word, PurePosixPath(word), inside)
    return next((str(place) for place in places if exists(listing.root / place)), None)


def _darknet_data(listing: Listing, files: Sequence[PurePosixPath]) -> Iterator[Reading]:
    """Read `train = ...`, `valid = ...`, `names = ...` of Darknet's `obj.data`."""
    for file in files[:1]:
        lines = (line.partition("=") for line in read_text(listing.root / file).splitlines())
        values = {key.strip(): value.strip() for key, _, value in lines}
        lists = {
            ROLES[key]: place
            for key, value in values.items()
            if key in ROLES and (place := listing.locate(value))
        }
        names = listing.locate(values.get("names", ""))
        if lists:
            title, evidence = f"Darknet lists by {file}", f"{file} names {', '.join(lists)}"
            classes = str(listing.root / names) if names else "auto"
            yield Reading("yolo", title, listing.root, lists, evidence, classes)


def _lists(listing: Listing, lists: dict[str, PurePosixPath]) -> Iterator[Reading]:
    """Find `train.txt`, `val.txt`, `test.txt`: a path of a picture on each line."""
    for path in listing.with_suffix(".txt") if not lists else ():
        if len(path.parts) == 1 and path.stem in ROLES:
            lists[ROLES[path.stem]] = path
    for path in lists.values():
        first = read_text(listing.root / path).strip().split("\n")[0].strip()
        if not is_image(PurePosixPath(first)):
            return
    if lists:
        splits = {role: str(path) for role, path in lists.items()}
        yield Reading("yolo", "lists of pictures", listing.root, splits, ", ".join(splits.values()))


def _kaggle_csv(listing: Listing) -> Iterator[Reading]:
    """Find `train.csv` beside `images/` and `labels/`; without names it is the copy of VOC."""
    lists = {
        ROLES[path.stem]: path.stem
        for path in listing.with_suffix(".csv")
        if len(path.parts) == 1 and path.stem in ROLES
    }
    folders = {path.parts[0] for path in listing.files}
    if "train" in lists and {"images", "labels"} <= folders:
        named = any(PurePosixPath(name) in listing.known for name in CLASS_FILES)
        classes, config = ("auto", OWN) if named else ("voc", VOC)
        evidence = f"train.csv lists files of images and labels, as in {listing.images[0]}"
        title = "CSV of pictures and label files" + ("" if named else " (the copy of VOC)")
        yield Reading("csv", title, listing.root, lists, evidence, classes, config)


def _yolo_folders(listing: Listing) -> Iterator[Reading]:
    """Find pictures with a label file beside them, or in `labels/` as they are in `images/`."""
    bases: dict[str, dict[str, int]] = {}  # pictures by role and folder
    labelled, example = 0, None
    for image in listing.images:
        label = image.with_suffix(".txt")
        swapped = PurePosixPath(*swap_last(label.parts, "images", "labels"))
        base = _base_folder(image.parent.parts)
        role = role_of(PurePosixPath(base).parts) or ""
        bases.setdefault(role, {}).setdefault(base, 0)
        bases[role][base] += 1
        if found := next((path for path in (swapped, label) if path in listing.known), None):
            labelled, example = labelled + 1, example or found
    if not labelled:
        return
    if {*bases} - {""}:
        bases.pop("", None)
    else:
        bases = {"train": bases[""]}
    for role, folders in bases.items():
        if len(folders) > 1 and role:
            yield from (
                Reading(
                    "yolo", f"YOLO with {role} in {name}", listing.root, {}, f"{count} pictures"
                )
                for name, count in folders.items()
            )
            return
    splits = {role: next(iter(bases[role])) for role in ORDER if role in bases}
    beside = example is not None and "labels" not in example.parts
    title = "pictures and YOLO labels side by side" if beside else "YOLO folders"
    evidence = f"{labelled} label files, as in {example}"
    yield Reading("yolo", title, listing.root, splits, evidence)


def _base_folder(parts: Sequence[str]) -> str:
    """Return the folder of a split that a picture lies in, below which sub-folders do not count."""
    if "images" in parts:
        end = len(parts) - list(reversed(parts)).index("images")
        return "/".join(parts[: end + (role_of(parts[end : end + 1]) is not None)])
    return parts[0] if parts and role_of(parts[:1]) else "."


# ---- VOC XML


def find_voc(listing: Listing) -> Iterator[Reading]:
    """Find the devkit, or XML files of VOC's kind in any folder."""
    files = listing.with_suffix(".xml")
    heads = [(path, _head(listing, path)) for path in files[:LOOKED_INTO]]
    if not any(ANNOTATION.search(head) for _, head in heads):
        return
    evidence = f"{len(files)} XML files, as in {files[0]}"
    years = sorted({p for path in files for p in path.parts[:-2] if re.fullmatch(r"VOC\d{4}", p)})
    names = {name for _, head in heads for name in re.findall(r"<name>\s*([^<]*?)\s*</name>", head)}
    if years:
        yield _devkit(listing, years, evidence, is_voc=names <= {*VOC_CLASSES, *PARTS_OF_PERSONS})
        return
    lists = {
        path.stem
        for path in listing.with_suffix(".txt")
        if path.parts[:-1] == ("ImageSets", "Main")
    }
    if lists & {"train", "trainval"}:
        train = "train" if "train" in lists and lists & {"val", "test"} else "trainval"
        train = train if train in lists else "train"
        splits = {"train": train} | {role: role for role in ("val", "test") if role in lists}
        if train == "trainval":
            splits.pop("val", None)
        yield Reading("voc", "VOC XML in one folder", listing.root, splits, evidence)
        return
    folders = Counter(str(path.parent) for path in files)
    by_role: dict[str, list[str]] = {}
    for folder in folders:
        by_role.setdefault(role_of(PurePosixPath(folder).parts) or "train", []).append(folder)
    splits = {role: "+".join(by_role[role]) for role in ORDER if role in by_role}
    yield Reading("voc", "VOC XML files", listing.root, splits, evidence)


PARTS_OF_PERSONS = ("head", "hand", "foot")


def _head(listing: Listing, path: PurePosixPath) -> str:
    try:
        with (listing.root / path).open("rb") as file:
            return file.read(1 << 16).decode("utf-8", "replace")
    except OSError:
        return ""  # the reader says why


def _devkit(listing: Listing, years: list[str], evidence: str, *, is_voc: bool) -> Reading:
    """Return a devkit's official reading: trainval of all years, test of those that have one."""

    def with_list(subset: str) -> str | None:
        main = [path for path in listing.with_suffix(".txt") if path.stem == subset]
        has = {p for path in main if path.parent.name == "Main" for p in path.parts}
        return "+".join(f"{year[3:]}:{subset}" for year in years if year in has) or None

    trainval, test = with_list("trainval"), with_list("test")
    if test or not with_list("val"):
        splits = {"train": trainval or with_list("train"), "test": test}
    else:
        splits = {"train": with_list("train"), "test" if is_voc else "val": with_list("val")}
    found = {role: split for role, split in splits.items() if split}
    root = listing.root
    if is_voc:
        return Reading("voc", "PASCAL VOC devkit", root, found, evidence, "voc", VOC)
    return Reading("voc", "VOC devkit of other classes", root, found, evidence)


# ---- COCO JSON


def find_coco(listing: Listing) -> Iterator[Reading]:
    """Find JSON files with images, annotations and categories."""
    counts = Counter(path.parent for path in listing.with_suffix(".json"))
    files = [
        path
        for path in listing.with_suffix(".json")
        if counts[path.parent] <= LOOKED_INTO and path.name != "package.json"
    ]
    yield from _coco(listing, files)


def _coco(listing: Listing, files: Sequence[PurePosixPath]) -> Iterator[Reading]:
    described = []
    for path in files:
        text = read_text(listing.root / path)
        if all(key in text for key in COCO_KEYS):
            described.append(path)
    instances = [path for path in described if path.name.startswith("instances")]
    by_role: dict[str, list[str]] = {}
    for path in instances or described:
        role = role_of([path.stem, *reversed(path.parts[:-1])]) or "train"
        by_role.setdefault(role, []).append(str(path))
    doubled = [paths for paths in by_role.values() if len(paths) > 1]
    if doubled:
        yield from (
            Reading("coco", f"COCO JSON by {path}", listing.root, {}, path) for path in doubled[0]
        )
    elif by_role:
        splits = {role: by_role[role][0] for role in ORDER if role in by_role}
        yield Reading("coco", "COCO JSON", listing.root, splits, ", ".join(splits.values()))


# ---- whole pictures


def find_class_folders(listing: Listing) -> Iterator[Reading]:
    """Find a folder of pictures per class, in `train/`, `test/` or without splits; no labels."""
    kinds = {path.suffix.lower() for path in listing.files}
    has_labels = any(path.with_suffix(".txt") in listing.known for path in listing.images)
    if (
        has_labels
        or kinds & {".xml", ".json"}
        or ("labels",) in {p.parts[:1] for p in listing.files}
    ):
        return
    classes: dict[str, set[str]] = {}
    for path in listing.images:
        folders = path.parts[:-1]
        place = next((i for i, part in enumerate(folders) if part.lower() in ROLES), None)
        split = "." if place is None else folders[place]
        below = folders if place is None else folders[place + 1 :]
        if not below or below[0] in ("images", "JPEGImages"):
            return
        classes.setdefault(split, set()).add(below[0])
    named = {ROLES[split.lower()]: split for split in classes if split != "."} or (
        {"train": "."} if classes else {}
    )
    if any(len(classes[split]) < 2 for split in named.values()) or not named:
        return
    evidence = f"a folder for each class, as in {listing.images[0].parent}"
    title = f"class folders ({len(classes[next(iter(named.values()))])} classes)"
    yield Reading("images", title, listing.root, named, evidence, config=CLASSIFIER)


def find_cifar10(listing: Listing) -> Iterator[Reading]:
    """Find the official binary CIFAR-10."""
    batches = [path for path in listing.files if path.name == "data_batch_1.bin"]
    if batches:
        splits = {"train": "train", "test": "test"}
        yield Reading(
            "cifar10", "CIFAR-10", listing.root, splits, str(batches[0]), config=CLASSIFIER
        )


# ---- the table


class Layout(NamedTuple):
    """How one value of `--dataset` is recognised, and the reader of its boxes."""

    recognise: Callable[[Listing], Iterator[Reading]]
    reader: str = ""  # module and function; imported when it is needed: it brings OpenCV

    def read(
        self, root: Path, split: str, class_names: Sequence[str] | None, skip_bad: bool
    ) -> "DetectionDataset":
        """Read one split; see the readers."""
        module, name = self.reader.rsplit(".", 1)
        return getattr(import_module(module), name)(root, split, class_names, skip_bad)


LAYOUTS = {
    "voc": Layout(find_voc, "yolo.data.voc.read_voc"),
    "csv": Layout(_kaggle_csv, "yolo.data.yolo.read_csv_layout"),
    "yolo": Layout(find_yolo, "yolo.data.yolo.read_yolo_folder"),
    "coco": Layout(find_coco, "yolo.data.coco.read_coco"),
    "images": Layout(find_class_folders),
    "cifar10": Layout(find_cifar10),
}
