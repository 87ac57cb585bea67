"""How each script reads its flags (`--config FILE.yaml`, flags over it) and how it ends.

Exit codes: 0 done, 1 failed, 2 bad arguments, 143 / 130 stopped by SIGTERM / SIGINT after saving.
"""

import dataclasses
import difflib
import re
import sys
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from yolo.errors import UsageError, UserError
from yolo.files import find, read_text

Args = TypeVar("Args")
# Not stored with a run: in a file they would hold for its first start and be forgotten by its resume.
OF_ONE_START = frozenset({"config", "out_dir", "resume", "replan", "mirror", "max_time"})
WITHOUT_LIBGL = "pip install --force-reinstall --no-deps opencv-python-headless"


def parse(
    args_class: type[Args],
    argv: Sequence[str] | None,
    description: str,
    config_file: str | Path | None = None,
) -> Args:
    """Parse flags into `args_class`, over a YAML file whose keys are the flags with underscores.

    Raises:
        UsageError: for an unreadable file or an unknown key, naming the nearest one.
        SystemExit: with 2 for flags that do not parse, with 0 after `--help`.
    """
    words = command_line(argv)
    description = re.sub(r"(?<!\n)\n(?!\n)", "\n\n", description)  # tyro joins the lines of a paragraph
    if config_file is None:
        return tyro.cli(args_class, args=words, description=description)
    default = _from_yaml(args_class, Path(config_file))
    return tyro.cli(args_class, args=words, default=default, description=description)


def command_line(argv: Sequence[str] | None) -> list[str]:
    """Return the words of the command line, unless a caller gives its own."""
    return list(sys.argv[1:] if argv is None else argv)


def run(main: Callable[[Sequence[str] | None], int]) -> None:
    """Run a script's `main` and exit with its code; errors of the user and the machine are one line."""
    debug = "--debug" in sys.argv
    try:
        code = main(None)
    except UserError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = 2 if isinstance(error, UsageError) else 1
    except OSError as error:  # a full or unwritable disk
        if debug:
            raise
        print(f"error: {error} (--debug shows where)", file=sys.stderr, flush=True)
        code = 1
    except ImportError as error:
        if debug or "libGL" not in str(error):
            raise
        print(f"error: OpenCV needs {error.msg}: {WITHOUT_LIBGL}", file=sys.stderr, flush=True)
        code = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = 130
    sys.exit(code)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        UsageError: if the file is missing, is no YAML, or is no mapping.
    """
    try:
        values = yaml.safe_load(read_text(find(path)))
    except OSError as error:
        raise UsageError(f"--config {path}: cannot be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise UsageError(f"--config {path}{line}: is not valid YAML") from None
    if not isinstance(values, dict):
        raise UsageError(f"--config {path}: must hold `key: value` lines")
    return values


def _from_yaml(args_class: type[Args], path: Path) -> Args:
    values = read_yaml(path)
    known = {field.name for field in dataclasses.fields(args_class)}  # type: ignore[arg-type]
    words: list[str] = []
    for key, value in values.items():
        if key in OF_ONE_START:
            raise UsageError(f"--config {path}: '{key}' is of one start alone: write it on the command line")
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise UsageError(f"--config {path}: unknown key '{key}'{hint}")
        words += _as_flag(key, value)
    try:
        return tyro.cli(args_class, args=words, console_outputs=False)
    except SystemExit:
        raise UsageError(
            f"--config {path}: {_first_bad_key(args_class, values)} has a value of the wrong type"
        ) from None


def _as_flag(key: str, value: Any) -> list[str]:
    flag = key.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return [f"--{flag}", text]


def _first_bad_key(args_class: type, values: dict[str, Any]) -> str:
    for key, value in values.items():
        try:
            tyro.cli(args_class, args=_as_flag(key, value), console_outputs=False)
        except SystemExit:
            return f"'{key}: {value}'"
    return "a key"


def value_of(flag: str, words: Sequence[str]) -> str | None:
    """Return what the last `flag` in a command line that is not parsed yet says; None without it."""
    found = None
    for word, following in zip_longest(words, words[1:]):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") == flag:
            found = value if equals else following
    return found
