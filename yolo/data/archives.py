"""Read the files of a folder, a tar of any compression or a zip, without unpacking it."""

import hashlib
import lzma
import os
import shutil
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from yolo.errors import UserError, reason
from yolo.files import check_regular

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff",
)  # fmt: skip
Wanted = Callable[[PurePosixPath], bool]
Members = Iterator[
    tuple[PurePosixPath, Callable[[], bytes]]
]  # a path, and how it is read, then and there

MAX_MEMBER = 1 << 28  # bytes of one file, unpacked
MAX_MEMBERS = 5_000_000
MOST_UNPACKED = 200  # times the archive, beyond what is free: photographs are packed already
FREE_UNPACKED = 10**9  # bytes
DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    lzma.LZMAError,
    zlib.error,
    EOFError,
    NotImplementedError,  # a compression or an encryption that `zipfile` does not know
    RuntimeError,  # a password
    ValueError,
    OverflowError,
    MemoryError,
    struct.error,
)


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
    """Yield the wanted files of a folder, a tar (any compression) or a zip, and how each is read.

    Hidden files are left out. A file has to be read before the next one is asked for; reading
    raises `UserError` for one that is damaged, locked, too large, a pipe or a device.

    Raises:
        UserError: if `root` is none of them, ends too early, or unpacks to what no archive of
            pictures does.
    """
    try:
        check_regular(root)
        if root.is_dir():
            yield from _folder_members(root, wanted)
        elif zipfile.is_zipfile(root):
            yield from _zip_members(root, wanted)
        elif tarfile.is_tarfile(root):
            yield from _tar_members(root, wanted)
        else:
            raise UserError(f"--data-root {root}: is neither a folder nor a readable tar or zip")
    except DAMAGED as error:
        raise UserError(f"{root}: is damaged or truncated ({error}); fetch it again") from None
    except OSError as error:
        raise UserError(f"--data-root {root}: cannot be read ({error.strerror or error})") from None


def is_archive(path: Path) -> bool:
    """Return whether a file is a zip or a tar of any compression, be it a damaged one."""
    try:
        return zipfile.is_zipfile(path) or tarfile.is_tarfile(path)
    except DAMAGED:  # a size in it that no file has; its reader says so
        return True


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
        for inside, read in read_members(archive, lambda path: True):
            if inside.is_absolute() or ".." in inside.parts:
                raise UserError(f"{archive}: {inside} would be written outside of its folder")
            _write_member(archive, inside, part / inside, read)
        part.chmod(0o755)
        part.rename(place / name)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if not (isinstance(error, OSError) and (place / name).is_dir()):  # another rank was first
            raise
    return place / name


def _write_member(
    archive: Path, inside: PurePosixPath, file: Path, read: Callable[[], bytes]
) -> None:
    """Write one file of an archive; what fails names both."""
    try:
        content = read()
    except UserError as error:
        raise UserError(f"{archive}: {error}") from None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{archive}: {inside} cannot be written ({reason(error)}); unpack the archive "
            "yourself, and name its folder"
        ) from None


def _folder_members(root: Path, wanted: Wanted) -> Members:
    for path in walk(root):
        inside = PurePosixPath(path.relative_to(root).as_posix())
        if wanted(inside):
            yield inside, partial(_read_file, path)


def _read_file(path: Path) -> bytes:
    try:
        check_regular(path, MAX_MEMBER)
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _zip_members(root: Path, wanted: Wanted) -> Members:
    with zipfile.ZipFile(root) as archive:
        limit = _Limit(root)
        for info in archive.infolist():
            limit.count(info.file_size)
        for info in archive.infolist():
            inside = PurePosixPath(info.filename)
            if not info.is_dir() and not is_hidden(inside) and wanted(inside):
                yield inside, partial(_unpack, inside, info.file_size, partial(archive.read, info))


def _tar_members(root: Path, wanted: Wanted) -> Members:
    with tarfile.open(
        root, "r|*"
    ) as archive:  # as a stream: seeking in a compressed tar starts over
        limit = _Limit(root)
        for member in archive:
            inside = PurePosixPath(member.name)
            limit.count(member.size)  # of a stream all is unpacked, wanted or not
            if member.isfile() and not is_hidden(inside) and wanted(inside):
                content = archive.extractfile(member)
                if content is not None:
                    yield inside, partial(_unpack, inside, member.size, content.read)
        stream: Any = archive.fileobj
        if (
            stream.tell() < archive.offset + tarfile.BLOCKSIZE
        ):  # tarfile takes such a cut for the end
            raise EOFError("it has no end mark")


def _unpack(inside: PurePosixPath, size: int, read: Callable[[], bytes]) -> bytes:
    if size > MAX_MEMBER:
        raise UserError(f"{inside}: has {size / 1e6:.0f} MB; no picture is as large")
    try:
        return read()
    except (*DAMAGED, OSError) as error:
        raise UserError(
            f"{inside}: cannot be unpacked ({error}): the archive is damaged, truncated or locked"
        ) from None


class _Limit:
    """Stops at an archive that unpacks to more than any data set does: a bomb."""

    def __init__(self, root: Path) -> None:
        self.root, self.members, self.unpacked = root, 0, 0
        self.most = FREE_UNPACKED + MOST_UNPACKED * root.stat().st_size

    def count(self, size: int) -> None:
        self.members += 1
        self.unpacked += size
        if self.members > MAX_MEMBERS or self.unpacked > self.most:
            raise UserError(
                f"{self.root}: is refused: {self.members:,} files of {self.unpacked / 1e9:.1f} GB "
                f"and more in an archive of {self.root.stat().st_size / 1e6:.1f} MB; unpack it "
                "yourself if you trust it"
            )
