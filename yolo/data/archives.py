"""Read the files of a folder, a tar of any compression or a zip, without unpacking it."""

import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from yolo.errors import UserError

Wanted = Callable[[PurePosixPath], bool]
Members = Iterator[tuple[PurePosixPath, bytes]]


def is_hidden(path: PurePath) -> bool:
    """Return whether a program keeps its own files there: `.ipynb_checkpoints`, `__MACOSX`."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def walk(root: Path) -> Iterator[Path]:
    """Yield the files below a folder, sorted by folder, but no hidden ones; follows links."""
    for folder, folders, names in os.walk(root, followlinks=True):
        here = Path(folder)
        folders[:] = sorted(
            name
            for name in folders
            if not is_hidden(PurePath(name)) and not _leads_upwards(here / name)
        )
        yield from (here / name for name in sorted(names) if not is_hidden(PurePath(name)))


def _leads_upwards(path: Path) -> bool:
    """Return whether a folder is a link to one that it is in: following it has no end."""
    return path.is_symlink() and any(path.samefile(above) for above in path.parents)


def read_members(root: Path, wanted: Wanted) -> Members:
    """Yield path and content of the wanted files of a folder, a tar (of any compression) or a zip.

    Hidden files are left out.

    Raises:
        UserError: if `root` is none of them, or ends too early.
    """
    try:
        if root.is_dir():
            yield from _folder_members(root, wanted)
        elif zipfile.is_zipfile(root):
            yield from _zip_members(root, wanted)
        elif tarfile.is_tarfile(root):
            yield from _tar_members(root, wanted)
        else:
            raise UserError(f"--data-root {root}: is neither a folder nor a readable tar or zip")
    except (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError) as error:
        raise UserError(f"{root}: is damaged or truncated ({error}); fetch it again") from None
    except OSError as error:
        raise UserError(f"--data-root {root}: cannot be read ({error.strerror or error})") from None


def _folder_members(root: Path, wanted: Wanted) -> Members:
    for path in walk(root):
        inside = PurePosixPath(path.relative_to(root).as_posix())
        if wanted(inside):
            yield inside, path.read_bytes()


def _zip_members(root: Path, wanted: Wanted) -> Members:
    with zipfile.ZipFile(root) as archive:
        for info in archive.infolist():
            inside = PurePosixPath(info.filename)
            if not info.is_dir() and not is_hidden(inside) and wanted(inside):
                yield inside, archive.read(info)


def _tar_members(root: Path, wanted: Wanted) -> Members:
    with tarfile.open(
        root, "r|*"
    ) as archive:  # as a stream: seeking in a compressed tar starts over
        for member in archive:
            inside = PurePosixPath(member.name)
            if member.isfile() and not is_hidden(inside) and wanted(inside):
                content = archive.extractfile(member)
                if content is not None:
                    yield inside, content.read()
        stream: Any = archive.fileobj
        if (
            stream.tell() < archive.offset + tarfile.BLOCKSIZE
        ):  # tarfile takes such a cut for the end
            raise EOFError("it has no end mark")
