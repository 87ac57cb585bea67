"""Files that appear whole or not at all, text from any editor, and the package's own files."""

import json
import math
import os
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from itertools import chain, count
from os.path import exists  # of a name that no file can have it says no, where `Path` raises
from pathlib import Path
from typing import Any

import yaml

from yolo.errors import UserError

MAX_TEXT = 1 << 28  # bytes: lists of millions of pictures are shorter
MAX_YAML_PARTS = 1_000_000


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what it holds becomes `path` if the block ends well.

    After any error the temporary file is gone and an older `path` is untouched. A kill can leave
    the temporary file behind (`NAME.part`): nothing reads it, and the next write of that name
    replaces it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    try:
        yield temporary
        flush_to_disk(temporary)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    with suppress(OSError):  # the rename itself; some file systems cannot flush a folder
        flush_to_disk(path.parent)


def write_json(path: Path, content: Any) -> None:
    """Write plain types as JSON: whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1))


def free_path(
    wanted: Path, log: Callable[[str], None] = print, taken: Collection[Path] = ()
) -> Path:
    """Return `wanted` or the first free of `NAME-2.SUFFIX`, `NAME-3.SUFFIX` ..., and `log` that.

    Args:
        wanted: a file or folder to be written, which shall replace nothing.
        log: prints a line for the person.
        taken: further paths that are not free.
    """
    numbered = (wanted.with_name(f"{wanted.stem}-{number}{wanted.suffix}") for number in count(2))
    paths = chain([wanted], numbered)
    path = next(path for path in paths if path not in taken and not path.exists())
    if path != wanted:
        log(f"note: {wanted} is there already: written to {path}")
    return path


def flush_to_disk(path: Path) -> None:
    """Wait until the file or folder is on disk: renamed earlier, it can survive a crash empty."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_regular(path: Path, limit: int | None = None) -> None:
    """Refuse what would be waited on for ever, a pipe or a device, and what is larger than `limit`.

    Raises:
        UserError: if it is one of these, or no file can have such a name.
        OSError: if it is not there.
    """
    try:
        found = path.stat()
    except ValueError:
        raise UserError(f"{path}: no file can have this name") from None
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        raise UserError(f"{path}: is a pipe or a device, and no file")
    if limit is not None and found.st_size > limit:
        raise UserError(
            f"{path}: has {found.st_size / 1e6:.0f} MB; at most {limit / 1e6:.0f} MB are read of "
            "such a file"
        )


def read_text(path: Path, limit: int | None = MAX_TEXT, *, may_be_pipe: bool = False) -> str:
    """Read UTF-8 with or without the byte order mark that Windows programs put first.

    Raises:
        UserError: if it is another encoding, a pipe or a device, or has more than `limit` bytes.
        OSError: if the file cannot be read.
    """
    if not may_be_pipe:
        check_regular(path, limit)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None


def parse_yaml(text: str, loader: type[Any] = yaml.SafeLoader) -> Any:
    """Return what YAML says; few aliases can make a little text larger than any memory.

    Raises:
        yaml.YAMLError: also for a value that no type can hold, for what is nested too deeply,
            contains itself, or has too many parts once its aliases are followed.
    """
    reader = loader(text)
    try:
        node = reader.get_single_node()
        if node is None:
            return None
        if _parts_of(node, {}) > MAX_YAML_PARTS:
            raise yaml.MarkedYAMLError(problem="it has too many parts, or contains itself")
        return reader.construct_document(node)
    except RecursionError:
        raise yaml.MarkedYAMLError(problem="it is nested too deeply") from None
    except (ValueError, OverflowError) as error:
        raise yaml.MarkedYAMLError(problem=str(error)) from None
    finally:
        reader.dispose()


def _parts_of(node: yaml.Node, known: dict[int, float]) -> float:
    if id(node) not in known:
        known[id(node)] = math.inf  # until it is known: it may come again inside of itself
        is_mapping = isinstance(node, yaml.MappingNode)
        inner = [part for pair in node.value for part in pair] if is_mapping else node.value
        is_scalar = isinstance(node, yaml.ScalarNode)
        known[id(node)] = 1 + (0 if is_scalar else sum(_parts_of(part, known) for part in inner))
    return known[id(node)]


def bundled(name: str) -> Path:
    """Return where a script, `configs`, `weights` or `samples` that comes with this package is.

    In a checkout and in a Space that is beside `yolo/`, in an installed wheel in `yolo/bundled/`.
    """
    package = Path(__file__).parent
    installed = package / "bundled"
    return (installed if installed.is_dir() else package.parent) / name


def find(path: Path) -> Path:
    """Return `path`, or the bundled file for `configs/voc.yaml` and such not in this folder."""
    if path.parts[:1] in [("configs",), ("weights",), ("samples",)] and not exists(path):
        found = bundled(str(path))
        return found if exists(found) else path
    return path
