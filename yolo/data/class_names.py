"""The one reader of class names: `--classes`, `data.yaml`, or a file of a name on each line."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from yolo.config import DataConfig
from yolo.errors import UserError
from yolo.files import parse_yaml, read_text

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip


CLASS_FILES = ("data.yaml", "data.yml", "classes.txt", "obj.names", "labels/classes.txt")


class _Text(yaml.BaseLoader):
    """Reads every scalar as the text it is (`yes` is no truth value) and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            raise yaml.constructor.ConstructorError(problem="a key stands twice")
        return mapping


def named_classes(cfg: DataConfig) -> tuple[str, ...] | None:
    """Return the classes that `--classes` names, itself or in a file; None for `auto`."""
    if cfg.classes == "auto":
        return None
    if cfg.classes == "voc":
        return VOC_CLASSES
    if os.path.isfile(cfg.classes):
        return tuple(read_class_names(Path(cfg.classes)).values())
    names = [name for name in cfg.classes.split(",") if name.strip()]
    return tuple(_checked("--classes", enumerate(names)).values())


def load_yaml(path: Path) -> Any:
    """Return what a YAML file holds, every scalar as the text it is.

    Raises:
        UserError: if it is no YAML.
    """
    try:
        return parse_yaml(read_text(path), _Text)
    except yaml.YAMLError as error:
        why = getattr(error, "problem", None) or "cannot be parsed"
        raise UserError(f"{path}: is no readable YAML ({why})") from None


def has_names(path: Path) -> bool:
    """Return whether a YAML file names classes."""
    content = load_yaml(path)
    return isinstance(content, dict) and "names" in content


def read_class_names(path: Path) -> dict[int, str]:
    """Return the class names of a file by their numbers.

    Args:
        path: A YAML file with `names:` (a list, a mapping from numbers, or text with commas; `nc`,
            if given, must agree), or a text file whose line 1 names class 0.

    Raises:
        UserError: naming the file and what is wrong in it.
    """
    try:
        text = read_text(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if path.suffix.lower() in (".yaml", ".yml"):
        return _yaml_names(path, text)
    return _checked(path, enumerate(text.rstrip().splitlines()))


def _yaml_names(path: Path, text: str) -> dict[int, str]:
    try:
        content = parse_yaml(text, _Text)
        names = content["names"]
        if isinstance(names, str):
            names = names.split(",")
        pairs = names.items() if isinstance(names, dict) else enumerate(names)
        found = _checked(path, sorted((int(number), name) for number, name in pairs))
        count = int(content.get("nc") or max(found) + 1)
    except (
        yaml.YAMLError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        OverflowError,
    ) as error:
        why = getattr(error, "problem", None) or "want a list, or a mapping from class numbers"
        raise UserError(f"{path}: has no readable `names:` ({why})") from None
    if count not in (len(found), max(found) + 1):
        raise UserError(
            f"{path}: says nc: {count}, but its `names:` go up to class {max(found)}, "
            f"{found[max(found)]}; a forgotten name shifts all that follow: correct one of them"
        )
    return found


def _checked(path: Path | str, pairs: Iterable[tuple[int, str]]) -> dict[int, str]:
    """Return the names by number; an error for one that is empty, or that two numbers have."""
    found = {number: name.strip() for number, name in pairs}
    for number, name in found.items():
        if not name:
            raise UserError(f"{path}: class {number} has no name (an empty line or entry)")
        if (first := next(other for other in found if found[other] == name)) != number:
            raise UserError(f"{path}: classes {first} and {number} have the same name, {name}")
    if not found:
        raise UserError(f"{path}: holds no class names")
    return found
