"""Fetches PASCAL VOC's official tar files: resumes, checks the digest, unpacks safely."""

import contextlib
import hashlib
import os
import tarfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError

from tqdm import tqdm

from yolo.data.voc import year_folders
from yolo.errors import UserError

CHUNK = 1 << 20
TIMEOUT = 30  # seconds without a byte
RANGE_NOT_SATISFIABLE = 416


@dataclass(frozen=True)
class Archive:
    """A tar file on the network; what it unpacks lies under `VOCdevkit/`."""

    url: str
    md5: str

    @property
    def filename(self) -> str:
        """Name of the file that is stored while it is needed."""
        return self.url.rsplit("/", 1)[-1]


# Addresses and digests as in torchvision.datasets.voc.
_SERVER = "https://thor.robots.ox.ac.uk/pascal/VOC"
VOC_2007_TRAINVAL = Archive(
    f"{_SERVER}/voc2007/VOCtrainval_06-Nov-2007.tar", "c52e279531787c972589f7e41ab4ae64"
)
VOC_2007_TEST = Archive(
    f"{_SERVER}/voc2007/VOCtest_06-Nov-2007.tar", "b6e924de25625d8de591ea690078ad9f"
)
VOC_2012_TRAINVAL = Archive(
    f"{_SERVER}/voc2012/VOCtrainval_11-May-2012.tar", "6cd6e144f989b92b3379bac3b3de84fd"
)
VOC_ARCHIVES = {
    **{f"2007:{subset}": VOC_2007_TRAINVAL for subset in ("train", "val", "trainval")},
    "2007:test": VOC_2007_TEST,
    **{f"2012:{subset}": VOC_2012_TRAINVAL for subset in ("train", "val", "trainval")},
}


def ensure_voc(root: Path, split: str) -> None:
    """Fetch and unpack what `split` needs into the devkit folder `root`, unless it is there.

    An archive is deleted once it is unpacked; so one that still lies there marks an unpacking that
    was cut short.

    Args:
        root: The devkit folder, made when missing.
        split: As in `2007:trainval+2012:trainval`.

    Raises:
        UserError: for a split that is not public, or a failure that says what to do.
    """
    for part in split.split("+"):
        archive = VOC_ARCHIVES.get(part.strip())
        if archive is None:
            raise UserError(
                f"--download: no public archive holds '{part}'; there are {', '.join(VOC_ARCHIVES)}"
            )
        year, subset = part.strip().split(":")
        splits = [
            folder / "ImageSets" / "Main" / f"{subset}.txt" for folder in year_folders(root, year)
        ]
        stored = root / archive.filename
        if any(split.exists() for split in splits) and not stored.exists():
            continue
        download(archive.url, stored, archive.md5)
        unpack(stored, root)
        stored.unlink()


def download(url: str, target: Path, md5: str) -> None:
    """Fetch `url` to `target` from where an earlier attempt broke off, unless it is complete.

    Raises:
        UserError: if the server cannot be reached, breaks off, or sends something of another
            digest.
    """
    if target.exists() and _md5(target) == md5:
        return
    partial = target.with_name(target.name + ".part")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        _fetch(url, partial)
    except OSError as error:  # URLError, timeouts and a full disk alike
        raise UserError(
            f"cannot fetch {url}: {error}; start again to go on from {partial}"
        ) from None
    if _md5(partial) != md5:
        partial.unlink()
        raise UserError(
            f"{url}: what arrived has not the digest {md5}; it was deleted: start again"
        )
    os.replace(partial, target)


def unpack(archive: Path, root: Path) -> None:
    """Unpack the files under `VOCdevkit/` of a tar file into `root`.

    Raises:
        UserError: for a member that would land outside `root`, a link to there, a device; or a
            damaged archive.
    """

    def strip_devkit(member: tarfile.TarInfo, destination: str) -> tarfile.TarInfo | None:
        path = PurePosixPath(member.name)
        if path.parts[:1] == ("VOCdevkit",):
            if len(path.parts) == 1:
                return None
            member = member.replace(name=str(path.relative_to("VOCdevkit")), deep=False)
        return tarfile.data_filter(member, destination)

    try:
        with tarfile.open(archive) as tar:
            members = tqdm(tar, f"unpack {archive.name}", unit="file", disable=None)
            tar.extractall(root, members, filter=strip_devkit)
    except tarfile.FilterError as error:
        raise UserError(f"{archive}: refused, because {error}") from None
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{archive}: is damaged ({error}); delete it and start again") from None


def _fetch(url: str, partial: Path) -> None:
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == RANGE_NOT_SATISFIABLE:  # nothing is missing; the digest will tell
            return
        raise
    with contextlib.closing(response):
        resumed = response.status == 206  # otherwise the server sends everything anew
        missing = int(response.headers.get("Content-Length") or 0)
        done = have if resumed else 0
        bar = tqdm(
            total=done + missing or None, initial=done, unit="B", unit_scale=True, desc=partial.stem
        )
        with bar, partial.open("ab" if resumed else "wb") as file:
            for chunk in _chunks(response):
                file.write(chunk)
                bar.update(len(chunk))
                missing -= len(chunk)
    if missing > 0:
        raise OSError(f"the connection broke with {missing} bytes missing")


def _chunks(response: object) -> Iterator[bytes]:
    while chunk := response.read(CHUNK):  # type: ignore[attr-defined]
        yield chunk


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
