"""The pictures that `--images` names."""

import glob
from pathlib import Path

from yolo.data.dataset import IMAGE_SUFFIXES
from yolo.errors import UsageError


def list_pictures(pattern: str) -> list[Path]:
    """Return the image files that a path, a folder (without its subfolders) or a glob names, sorted.

    Raises:
        UsageError: if there are none.
    """
    path = Path(pattern)
    if path.is_file():
        return [path]
    found = path.iterdir() if path.is_dir() else map(Path, glob.glob(pattern, recursive=True))
    pictures = sorted(file for file in found if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    if not pictures:
        what = "holds no images" if path.is_dir() else "names no images"
        raise UsageError(f"--images {pattern}: {what} ({', '.join(IMAGE_SUFFIXES)})")
    return pictures
