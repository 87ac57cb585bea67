"""Which pictures a split means: `train`, or a share of it that is drawn where there is no other.

`train[:20%]` is a fifth of the split, `train[20%:]` the rest. A hash of the file name decides, so a
picture stays where it is when others join it, and so do the copies that Roboflow makes of one
(`a_jpg.rf.0123.jpg`, `a_jpg.rf.4567.jpg`): their names are compared up to `.rf.`.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import NamedTuple

from yolo.errors import UserError

DRAWN = re.compile(r"(?P<base>.+)\[(?P<first>:?)(?P<percent>\d+(\.\d+)?)%(?P<rest>:?)\]")


class Share(NamedTuple):
    """A part of a split: the first `fraction` of it, or what comes after."""

    fraction: float
    first: bool


def draw(split: str, fraction: float) -> tuple[str, str]:
    """Return a split without a share of it, and that share, as in `train[20%:]`, `train[:20%]`."""
    percent = f"{100 * fraction:g}%"
    return f"{split}[{percent}:]", f"{split}[:{percent}]"


def parse_split(split: str) -> tuple[str, Share | None]:
    """Return the split as the data set knows it, and the share of it meant; None for all."""
    match = DRAWN.fullmatch(split)
    if match is None or bool(match["first"]) == bool(match["rest"]):
        return split, None
    return match["base"], Share(float(match["percent"]) / 100, bool(match["first"]))


def drawn(names: Sequence[str], share: Share | None) -> list[int]:
    """Return the places of the files that belong to a share; each side has one at least.

    Raises:
        UserError: if all of them are one picture, which cannot be divided.
    """
    if share is None:
        return list(range(len(names)))
    places = {_key(name): _place(_key(name)) for name in names}
    order = sorted(places, key=lambda key: places[key])
    if len(order) < 2:
        raise UserError(
            f"{names[0] if names else 'no picture'}: is all that the split holds: it cannot be "
            "divided into training and validation; add pictures, or name a --val-split"
        )
    first = sum(place < share.fraction for place in places.values())
    first_keys = set(order[: min(max(first, 1), len(order) - 1)])
    return [i for i, name in enumerate(names) if (_key(name) in first_keys) == share.first]


def _key(name: str) -> str:
    file = PurePath(name).name
    return file.split(".rf.")[0] if ".rf." in file else PurePath(file).stem


def _place(key: str) -> float:
    """Return a number in [0, 1) that follows from the key alone, evenly spread."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
