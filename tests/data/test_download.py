"""Downloads from a server on loopback: resume, digest, archives that try to leave their folder."""

import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from yolo.data import download as downloading
from yolo.data.download import Archive, download, ensure_voc, unpack
from yolo.errors import UserError


@dataclass
class Server:
    url: str
    content: bytes = b""
    break_after: int | None = None
    knows_ranges: bool = True
    ranges: list[str | None] = field(default_factory=list)

    @property
    def md5(self) -> str:
        return hashlib.md5(self.content).hexdigest()


@pytest.fixture
def server() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            state.ranges.append(wanted)
            start = int(wanted[6:-1]) if wanted and state.knows_ranges else 0
            if start and start >= len(state.content):
                self.send_error(416)
                return
            body = state.content[start:]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: state.break_after])

        def log_message(self, *words: object) -> None:
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    state = Server(f"http://127.0.0.1:{httpd.server_port}/data.tar", bytes(range(256)) * 40)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
    thread.start()
    yield state
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def tar_of(members: dict[str, bytes], link: tuple[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        if link:
            info = tarfile.TarInfo(link[0])
            info.type, info.linkname = tarfile.SYMTYPE, link[1]
            tar.addfile(info)
    return buffer.getvalue()


def test_a_file_arrives_whole_and_is_not_fetched_twice(server: Server, tmp_path: Path):
    target = tmp_path / "deep" / "data.tar"
    for _ in range(2):
        download(server.url, target, server.md5)
    assert target.read_bytes() == server.content
    assert server.ranges == [None]
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_a_broken_download_goes_on_where_it_stopped(
    server: Server, tmp_path: Path, knows_ranges: bool
):
    server.break_after, server.knows_ranges = 3000, knows_ranges
    target = tmp_path / "data.tar"
    with pytest.raises(
        UserError, match=r"cannot fetch http.*start again to go on from .*data\.tar\.part"
    ):
        download(server.url, target, server.md5)
    assert not target.exists() and (tmp_path / "data.tar.part").stat().st_size == 3000
    server.break_after = None
    download(server.url, target, server.md5)
    assert target.read_bytes() == server.content
    assert server.ranges == [None, "bytes=3000-"]


def test_a_finished_part_needs_nothing_more(server: Server, tmp_path: Path):
    (tmp_path / "data.tar.part").write_bytes(server.content)
    download(server.url, tmp_path / "data.tar", server.md5)
    assert (tmp_path / "data.tar").read_bytes() == server.content


def test_a_wrong_digest_is_refused_and_deleted(server: Server, tmp_path: Path):
    with pytest.raises(UserError, match="digest"):
        download(server.url, tmp_path / "data.tar", "0" * 32)
    assert not list(tmp_path.iterdir())


def test_no_server_is_one_clear_line(tmp_path: Path):
    with pytest.raises(UserError, match=r"cannot fetch http://127\.0\.0\.1:9/x") as caught:
        download("http://127.0.0.1:9/x", tmp_path / "x", "")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("members", "link"),
    [
        ({"../outside.txt": b"x"}, None),
        ({"VOCdevkit/../../outside.txt": b"x"}, None),
        ({}, ("VOCdevkit/link", "../../outside.txt")),
        ({}, ("VOCdevkit/link", "/etc/passwd")),
    ],
)
def test_members_outside_the_target_are_refused(
    tmp_path: Path, members: dict[str, bytes], link: tuple[str, str] | None
):
    (tmp_path / "bad.tar").write_bytes(tar_of(members, link))
    with pytest.raises(UserError, match=r"bad\.tar: refused"):
        unpack(tmp_path / "bad.tar", tmp_path / "deep" / "root")
    assert not list(tmp_path.rglob("outside.txt"))


def test_an_absolute_member_stays_inside(tmp_path: Path):
    (tmp_path / "bad.tar").write_bytes(tar_of({str(tmp_path / "outside.txt"): b"x"}))
    unpack(tmp_path / "bad.tar", tmp_path / "root")
    assert not (tmp_path / "outside.txt").exists()


def test_a_damaged_archive_is_one_clear_line(tmp_path: Path):
    (tmp_path / "bad.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(UserError, match=r"bad\.tar: is damaged"):
        unpack(tmp_path / "bad.tar", tmp_path / "root")


def test_voc_is_fetched_unpacked_and_left_alone_afterwards(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    listing = "VOCdevkit/VOC2007/ImageSets/Main/test.txt"
    server.content = tar_of(
        {listing: b"000001\n", "VOCdevkit/VOC2007/Annotations/000001.xml": b"<a/>"}
    )
    monkeypatch.setitem(downloading.VOC_ARCHIVES, "2007:test", Archive(server.url, server.md5))
    root = tmp_path / "VOCdevkit"
    for _ in range(2):
        ensure_voc(root, "2007:test")
    assert (root / "VOC2007/ImageSets/Main/test.txt").read_text() == "000001\n"
    assert not (root / "data.tar").exists()
    assert server.ranges == [None]


def test_an_unpacking_that_was_cut_short_is_done_again(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    listing = "VOC2007/ImageSets/Main/test.txt"
    server.content = tar_of({f"VOCdevkit/{listing}": b"000001\n", "VOCdevkit/VOC2007/x": b"late"})
    monkeypatch.setitem(downloading.VOC_ARCHIVES, "2007:test", Archive(server.url, server.md5))
    (tmp_path / listing).parent.mkdir(parents=True)
    (tmp_path / listing).write_text(
        "000001\n"
    )  # unpacked, but not the rest: the archive still lies there
    (tmp_path / "data.tar").write_bytes(server.content)
    ensure_voc(tmp_path, "2007:test")
    assert (tmp_path / "VOC2007/x").read_text() == "late"
    assert server.ranges == []


def test_a_split_that_is_not_public_names_those_that_are(tmp_path: Path):
    with pytest.raises(UserError, match="'2012:test'; there are 2007:train"):
        ensure_voc(tmp_path, "2012:test")
