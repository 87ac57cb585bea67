"""Read the files of a folder, a tar of any compression or a zip, without unpacking it."""

import hashlib
import lzma
import os
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from yolo.errors import UserError

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff",
)  # fmt: skip
Wanted = Callable[[PurePosixPath], bool]
Members = Iterator[tuple[PurePosixPath, bytes]]


def is_image(path: PurePath) -> bool:
    """Return whether a file's name says that it is an image of a kind that can be read."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def swap_last(parts: Sequence[str], old: str, new: str) -> tuple[str, ...]:
    """Return the parts of a path with `new` in place of the last `old`: `images` to `labels`."""
    if old not in parts:
        return tuple(parts)
    place = len(parts) - 1 - list(reversed(parts)).index(old)
    return (*parts[:place], new, *parts[place + 1 :])


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


def is_archive(path: Path) -> bool:
    """Return whether a file can be read as a zip or a tar of any compression."""
    return zipfile.is_zipfile(path) or tarfile.is_tarfile(path)


def archive_names(path: Path) -> list[PurePosixPath]:
    """Return the paths of the files in an archive; raises as `read_members`."""
    names: list[PurePosixPath] = []

    def note(name: PurePosixPath) -> bool:
        names.append(name)
        return False

    for _ in read_members(path, note):
        pass
    return names


def unpacked(archive: Path) -> Path:
    """Return the folder `<name>-<digest>` that holds the files of an archive; unpack it once.

    It lies beside the archive or, where nothing can be written, in `data/`. The digest is of the
    archive's size and time: another archive of the same name gets a folder of its own.

    Raises:
        UserError: if the archive is damaged, or a member would land outside of the folder.
    """
    stat = archive.stat()
    digest = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:8]
    name = f"{archive.name.split('.')[0]}-{digest}"
    target = next(
        (place / name for place in (archive.parent, Path("data")) if (place / name).is_dir()), None
    )
    if target is not None:
        return target
    place = archive.parent if os.access(archive.parent, os.W_OK) else Path("data")
    place.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=place))
    try:
        for inside, content in read_members(archive, lambda path: True):
            if inside.is_absolute() or ".." in inside.parts:
                raise UserError(f"{archive}: {inside} would be written outside of its folder")
            file = part / inside
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        part.chmod(0o755)
        part.rename(place / name)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if not (isinstance(error, OSError) and (place / name).is_dir()):  # another rank was first
            raise
    return place / name


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
