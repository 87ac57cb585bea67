"""Videos, addresses and webcams in; an mp4 that browsers play out."""

import functools
import http.server
import json
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import av
import cv2
import numpy as np
import pytest
from lively import lively_detector

from yolo.errors import UsageError, UserError
from yolo.inference.predict import Detector
from yolo.inference.sources import Frame, Video, open_source, open_video
from yolo.inference.video import mp4_writer, predict_video

HEIGHT, WIDTH = 49, 64  # an odd side


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten frames, each brighter than the one before, with a pause in the middle."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    with mp4_writer(path, 10) as write:
        for k in range(10):
            write(np.full((HEIGHT, WIDTH, 3), 25 * k, np.uint8), k / 10 + (k >= 5))
    return path


def frames_of(path: Path) -> list[Frame]:
    return list(open_video(str(path), path.stem).frames)


def test_a_written_film_is_of_the_kind_that_every_browser_plays(film: Path) -> None:
    with av.open(str(film)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.height, stream.width) == (HEIGHT - 1, WIDTH)
    content = film.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")  # plays before all of it has arrived


def test_frames_come_back_with_their_times_and_colours(film: Path) -> None:
    frames = frames_of(film)
    times = [frame.seconds for frame in frames]
    assert times == pytest.approx([k / 10 + (k >= 5) for k in range(10)], abs=0.001)
    assert [round(float(frame.image.mean())) for frame in frames] == pytest.approx(
        [25 * k for k in range(10)], abs=4
    )


def test_the_film_of_a_phone_is_turned_upright(tmp_path: Path) -> None:
    path = tmp_path / "phone.mp4"
    image = np.zeros((48, 64, 3), np.uint8)
    image[:, :16] = 255  # white on the left
    with mp4_writer(path, 10) as write:
        write(image, 0)
    identity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    clockwise = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    content = path.read_bytes()
    place = content.index(identity, content.index(b"tkhd"))
    path.write_bytes(content[:place] + clockwise + content[place + len(clockwise) :])
    [frame] = frames_of(path)
    assert frame.image.shape[:2] == (64, 48)
    assert frame.image[:12].mean() > 200 > 50 > frame.image[20:].mean()  # now at the top


def test_detections_are_drawn_and_listed_for_each_frame(film: Path, tmp_path: Path) -> None:
    detector = Detector(lively_detector(0.05, 64))
    video = open_video(str(film), "film")
    assert video.count == 10
    assert predict_video(detector, video, tmp_path, 0.01, images=tmp_path / "images") == 10
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [line["seconds"] for line in lines][4:6] == [0.4, 1.5]
    assert any(line["detections"] for line in lines)
    assert len(frames_of(tmp_path / "film.mp4")) == 10
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == [
        line["image"] for line in lines
    ]


def test_a_stopped_film_is_finished_with_what_there_is(tmp_path: Path) -> None:
    seen: list[int] = []

    def endless() -> Iterator[Frame]:
        while True:
            seen.append(0)
            yield Frame(np.zeros((32, 32, 3), np.uint8), len(seen) / 25)

    detector = Detector(lively_detector(0.05, 64))
    video = Video("camera", endless(), 25.0)
    done = predict_video(detector, video, tmp_path, 0.3, stop=lambda: len(seen) > 5)
    assert done == 5 == len(frames_of(tmp_path / "camera.mp4"))


def test_a_damaged_film_gives_the_frames_before_the_damage(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    damaged = tmp_path / "damaged.mp4"
    noise = np.random.default_rng(0)
    with mp4_writer(damaged, 10) as write:
        for k in range(40):
            write(noise.integers(0, 255, (32, 32, 3), dtype=np.uint8), k / 10)
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size * 3 // 4])
    assert 0 < len(frames_of(damaged)) < 40
    assert "can be read" in capsys.readouterr().out
    (tmp_path / "text.mp4").write_text("not a film")
    with pytest.raises(UserError, match=r"text\.mp4: is no video that can be read"):
        open_video(str(tmp_path / "text.mp4"), "text")


@pytest.fixture
def address(film: Path, tmp_path: Path) -> Iterator[str]:
    """A web server on this machine with a picture, a page and a film."""
    cv2.imwrite(str(tmp_path / "a photo.png"), np.zeros((8, 9, 3), np.uint8))
    (tmp_path / "page.html").write_text("<html>")
    (tmp_path / "film.mp4").write_bytes(film.read_bytes())
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_address_is_a_picture_a_film_or_an_error_in_one_line(
    address: str, tmp_path: Path
) -> None:
    [picture] = open_source(f"{address}/a%20photo.png", tmp_path / "got")  # type: ignore[misc]
    assert picture.name == "a_photo.png" and cv2.imread(str(picture)).shape == (8, 9, 3)
    video = open_source(f"{address}/film.mp4", tmp_path)
    assert isinstance(video, Video) and len(list(video.frames)) == 10
    with pytest.raises(UserError, match="is a web page"):
        open_source(f"{address}/page.html", tmp_path)
    with pytest.raises(UserError, match=r"cannot be fetched \(.*404"):
        open_source(f"{address}/none.png", tmp_path)
    with pytest.raises(UsageError, match="want http"):
        open_source("ftp://host/a.png", tmp_path)


def test_a_webcam_gives_frames_until_it_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    blue = np.zeros((4, 6, 3), np.uint8)
    blue[..., 0] = 255  # in OpenCV's order
    reads = iter([(True, blue), (True, blue), (False, None)])
    camera = SimpleNamespace(isOpened=lambda: True, get=lambda _: 0.0, read=lambda: next(reads))
    monkeypatch.setattr(cv2, "VideoCapture", lambda number: camera)
    video = open_source("webcam:0", tmp_path)
    assert isinstance(video, Video) and video.rate == 25
    frames = list(video.frames)
    assert len(frames) == 2 and tuple(frames[0].image[0, 0]) == (0, 0, 255)
    camera.isOpened = lambda: False
    with pytest.raises(UserError, match="webcam:1: no such camera"):
        open_source("webcam:1", tmp_path)
