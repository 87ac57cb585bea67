"""Text files that people bring along, from any editor."""

from pathlib import Path

from yolo.errors import UserError


def read_text(path: Path) -> str:
    """Read UTF-8 with or without the byte order mark that Windows programs put first.

    Raises:
        UserError: if it is another encoding.
        OSError: if the file cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
