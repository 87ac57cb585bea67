"""How each script reads its flags (`--config FILE.yaml`, flags over it) and how it ends.

Exit codes: 0 done, 1 failed, 2 bad arguments, 143 / 130 stopped by SIGTERM / SIGINT after saving.
"""

import argparse
import dataclasses
import difflib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
import yaml

from yolo.errors import UsageError, UserError, one_line
from yolo.files import find, parse_yaml, read_text

Args = TypeVar("Args")
# Not stored with a run: in a file they would hold for its first start but not its resume.
OF_ONE_START = frozenset({"config", "out_dir", "resume", "replan", "mirror", "max_time"})
WORKER_LOST = (
    "a worker that is killed mostly lacks memory: use fewer --workers or --cache none; a training "
    "goes on with --resume auto"
)
WITHOUT_LIBGL = "pip install --force-reinstall --no-deps opencv-python-headless"


def parse(
    args_class: type[Args],
    argv: Sequence[str] | None,
    description: str,
    config_file: str | Path | None = None,
    found: Mapping[str, Any] | None = None,
) -> Args:
    """Parse flags into `args_class`, over a YAML file whose keys are the flags with underscores.

    What was `found` out about the data goes over the file, and under the flags.

    Raises:
        UsageError: for an unreadable file or an unknown key, naming the nearest one.
        SystemExit: with 2 for flags that do not parse, with 0 after `--help`.
    """
    argv = command_line(argv)
    # tyro joins the lines of a paragraph
    description = re.sub(r"(?<!\n)\n(?!\n)", "\n\n", description)
    if config_file is None:
        return tyro.cli(args_class, args=argv, description=description)
    default: Any = _from_yaml(args_class, Path(config_file))
    default = dataclasses.replace(default, **found or {})
    return tyro.cli(args_class, args=argv, default=default, description=description)


def command_line(argv: Sequence[str] | None) -> list[str]:
    """Return the arguments of the command line, unless a caller gives its own."""
    return list(sys.argv[1:] if argv is None else argv)


def run(main: Callable[[Sequence[str] | None], int]) -> None:
    """Run a script's `main` and exit with its code; errors of user and machine are one line."""
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
        print(f"error: {one_line(str(error))} (--debug shows where)", file=sys.stderr, flush=True)
        code = 1
    except RuntimeError as error:  # torch has no type of its own for it
        if debug or "DataLoader worker" not in str(error):
            raise
        print(f"error: {error}; {WORKER_LOST}", file=sys.stderr, flush=True)
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
        values = parse_yaml(read_text(find(path), may_be_pipe=True))  # as in `--config <(...)`
    except OSError as error:
        raise UsageError(f"--config {path}: cannot be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise UsageError(f"--config {path}{line}: is not valid YAML") from None
    if not isinstance(values, dict):
        raise UsageError(f"--config {path}: must hold `key: value` lines")
    return values


def value_of(flag: str, argv: Sequence[str]) -> str | None:
    """Return what the last `flag` of a command line says, before it is parsed; None without."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(flag, "--" + flag[2:].replace("-", "_"), dest="value", nargs="?")
    return parser.parse_known_args(argv)[0].value


def given(argv: Sequence[str]) -> set[str]:
    """Return the keys that the flags of a command line set."""
    flags = {word.partition("=")[0][2:].replace("-", "_") for word in argv if word[:2] == "--"}
    return flags | {flag.removeprefix("no_") for flag in flags}


def _from_yaml(args_class: type[Args], path: Path) -> Args:
    types = get_type_hints(args_class)
    values: dict[str, Any] = {}
    for key, value in read_yaml(path).items():
        if key in OF_ONE_START:
            raise UsageError(
                f"--config {path}: '{key}' is of one start alone: write it on the command line"
            )
        if key not in types:
            near = difflib.get_close_matches(str(key), types, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise UsageError(f"--config {path}: unknown key '{key}'{hint}")
        values[key] = setting(path, key, types[key], value)
    return args_class(**values)


def setting(path: str | Path, key: str, kind: Any, value: Any) -> Any:
    """Return the value of a key in a YAML file as the type of its field.

    Raises:
        UsageError: naming file, key and value, if it is none.
    """
    try:
        return as_type(kind, value)
    except ValueError:
        raise UsageError(
            f"--config {path}: '{key}: {value}' has a value of the wrong type"
        ) from None


def as_type(kind: Any, value: Any) -> Any:
    """Return a value of a YAML file as the type of its field, or raise ValueError.

    Numbers may be text (YAML reads `2e-3` as text), and text may be a number or a list.
    """
    parts = get_args(kind)
    for part in parts if get_origin(kind) in (Union, UnionType) else ():
        with suppress(ValueError):
            return as_type(part, value)
    if (get_origin(kind) is Literal and value in parts) or (
        kind in (bool, NoneType) and type(value) is kind
    ):
        return value
    if get_origin(kind) is tuple:
        items = value if isinstance(value, list) else str(value).split(",")
        return tuple(as_type(parts[0], item) for item in items)
    if kind in (int, float):
        return kind(str(value))
    if kind is str and not isinstance(value, bool | None):
        return ",".join(map(str, value)) if isinstance(value, list) else str(value)
    raise ValueError(f"{value} is no {kind}")
