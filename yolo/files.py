"""Files that appear whole or not at all, text from any editor, and files that come with the package."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from yolo.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what is written there becomes `path` when the block ends well.

    After any error the temporary file is gone and an older `path` is untouched. A kill can leave the
    temporary file behind (`NAME.part`): nothing reads it, and the next write of that name replaces it.
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


def flush_to_disk(path: Path) -> None:
    """Wait until the file or folder is on the disk: renamed earlier, it can survive a crash empty."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_text(path: Path) -> str:
    """Read UTF-8 with or without the byte order mark that Windows programs put first.

    Raises:
        UserError: if it is another encoding.
        OSError: if the file cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None


def bundled(name: str) -> Path:
    """Return where a script, `configs`, `weights` or `samples` that comes with this package is.

    In a checkout and in a Space that is beside `yolo/`, in an installed wheel in `yolo/bundled/`.
    """
    package = Path(__file__).parent
    installed = package / "bundled"
    return (installed if installed.is_dir() else package.parent) / name


def find(path: Path) -> Path:
    """Return `path`; where it is `configs/voc.yaml` or the like and not in this folder, the bundled file."""
    if path.parts[:1] in [("configs",), ("weights",), ("samples",)] and not path.exists():
        found = bundled(str(path))
        return found if found.exists() else path
    return path
