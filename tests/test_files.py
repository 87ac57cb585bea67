"""Strangers' files: what would never end or fit is refused, and no error hurts a terminal."""

import os
from pathlib import Path

import pytest
import yaml

from yolo import files
from yolo.data.class_names import read_class_names
from yolo.data.images import letterboxed
from yolo.data.voc import parse_xml
from yolo.errors import LONGEST_LINE, UserError
from yolo.files import check_regular, parse_yaml, read_text

DOUBLED = "a: &a [x, x]\n" + "".join(
    f"{name}: &{name} [*{past}, *{past}, *{past}, *{past}]\n"
    for past, name in zip("abcdefghijkl", "bcdefghijklm", strict=True)
)


@pytest.mark.parametrize("name", ["x.jpg", "x.xml", "x.txt", "data.yaml"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    read = {".jpg": lambda path: letterboxed(path, 64), ".xml": parse_xml, ".txt": read_text}
    with pytest.raises(UserError, match=f"{name}: is a pipe or a device"):
        read.get((tmp_path / name).suffix, read_class_names)(tmp_path / name)


def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\\x00b: no file can have this name"):
        check_regular(tmp_path / "a\0b")


def test_a_text_file_has_a_largest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "list.txt").write_text("x" * 3_000_000)
    with pytest.raises(UserError, match=r"list.txt: has 3 MB; at most 2 MB are read"):
        read_text(tmp_path / "list.txt", 2_000_000)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (DOUBLED, "too many parts"),
        ("&a [*a]", "contains itself"),
        ("[" * 30_000, "nested too deeply"),
        ("a: 2001-99-99", "month must be in"),
        ("a: " + "9" * 5000, "integer string"),
        ("!!python/object/apply:os.system [id]", "could not determine a constructor"),
    ],
)
def test_yaml_that_grows_nests_or_cannot_be_a_value_is_an_error(text: str, problem: str) -> None:
    with pytest.raises(yaml.MarkedYAMLError) as raised:
        parse_yaml(text)
    assert problem in str(raised.value.problem)


def test_yaml_with_an_alias_is_read() -> None:
    assert parse_yaml("a: &a {x: 1}\nb: *a\n") == {"a": {"x": 1}, "b": {"x": 1}}
    assert parse_yaml("") is None
    assert files.MAX_YAML_PARTS > 10_000


def test_an_error_is_one_line_whatever_stands_in_the_name_of_a_file() -> None:
    assert str(UserError("a\nb\x1b[31m\udcffc: is wrong")) == r"a\nb\x1b[31m\udcffc: is wrong"
    shown = str(UserError("x" * 200_000 + ": is wrong; do this"))
    assert len(shown) <= LONGEST_LINE + 10
    assert shown.endswith(": is wrong; do this")
    assert str(UserError("größer 写真 ½")) == "größer 写真 ½"
