"""What `--images` names: picture files, or a video from a file, a webcam or an address."""

import re
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit

import av
import cv2
import numpy as np

from yolo.data.dataset import IMAGE_SUFFIXES
from yolo.data.images import list_pictures
from yolo.errors import UsageError, UserError, reason
from yolo.files import replacing

VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv")
WEBCAM = re.compile(r"webcam:(\d+)")
STREAMS = ("rtsp", "rtsps", "rtmp", "srt", "udp")  # what cameras in a network send
TIMEOUT = 30.0  # seconds
MAX_DOWNLOAD = 200 << 20  # bytes of one picture
DEFAULT_RATE = 25.0  # frames a second, where a source does not say


class Frame(NamedTuple):
    """One picture of a video."""

    image: np.ndarray  # [H, W, 3] uint8 RGB, upright
    seconds: float  # since the start


@dataclass(frozen=True)
class Video:
    """A video that is read frame by frame, once."""

    name: str  # for the files that are written about it
    frames: Iterator[Frame]
    rate: float  # frames a second, about
    count: int | None = None  # frames, where the file says so


def open_source(source: str, downloads: Path) -> list[Path] | Video:
    """Return the pictures that `--images` names, or the video.

    Args:
        source: a picture, a folder of pictures, a glob, a video file, `webcam:0` or an address.
        downloads: folder for a picture that is fetched.

    Raises:
        UsageError: if it names nothing of the kind.
        UserError: if it cannot be opened or fetched.
    """
    if webcam := WEBCAM.fullmatch(source):
        return _open_webcam(int(webcam[1]))
    if "://" in source:
        return _open_address(source, downloads)
    path = Path(source)
    if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file():
        return open_video(source, path.stem)
    return list_pictures(source)


def open_video(source: str, name: str, options: Mapping[str, str] | None = None) -> Video:
    """Open a video file or stream.

    Args:
        source: a path or an address.
        name: for the files that are written about it.
        options: of FFmpeg's demuxer, such as `format_whitelist`.

    Raises:
        UserError: if it cannot be opened, or has no pictures.
    """
    try:
        container = av.open(source, options=dict(options or {}), timeout=TIMEOUT)
    except (av.FFmpegError, OSError) as error:
        raise UserError(f"{source}: is no video that can be read ({reason(error)})") from None
    if not container.streams.video:
        container.close()
        raise UserError(f"{source}: holds no pictures, only sound")
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    rate = float(stream.average_rate or stream.guessed_rate or DEFAULT_RATE)
    return Video(name, _decode(container, source), rate, stream.frames or None)


def _decode(container: av.container.InputContainer, source: str) -> Iterator[Frame]:
    with container:
        start, last, seen, problem = 0.0, 0.0, 0, ""
        try:
            for frame in container.decode(video=0):
                time = last if frame.time is None else frame.time
                start = start if seen else time
                last = max(last, time - start)
                # phones store the picture as the sensor lies, and how to turn it
                image = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
                seen += 1
                yield Frame(np.ascontiguousarray(image), last)
        except av.FFmpegError as error:
            problem = f": {reason(error)}"
        if not seen:
            raise UserError(f"{source}: no frame can be read{problem}")
        if problem or seen < container.streams.video[0].frames:
            print(f"warning: {source}: only {seen} frames, {last:.1f} s, can be read{problem}")


def _open_webcam(number: int) -> Video:
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # the error says enough
    camera = cv2.VideoCapture(number)
    if not camera.isOpened():
        raise UserError(f"webcam:{number}: no such camera, or another program uses it")
    rate = camera.get(cv2.CAP_PROP_FPS) or DEFAULT_RATE

    def frames() -> Iterator[Frame]:
        start = cv2.getTickCount()
        while (read := camera.read())[0]:
            seconds = (cv2.getTickCount() - start) / cv2.getTickFrequency()
            yield Frame(cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB), seconds)

    return Video(f"webcam{number}", frames(), rate)


def _open_address(address: str, downloads: Path) -> list[Path] | Video:
    parts = urlsplit(address)
    path = PurePosixPath(unquote(parts.path))
    name = re.sub(r"[^\w.-]", "_", path.stem) or parts.hostname or "stream"
    if parts.scheme in STREAMS or path.suffix.lower() in VIDEO_SUFFIXES:
        return open_video(address, name)
    if parts.scheme not in ("http", "https"):
        raise UsageError(f"--images {address}: want http, https, {', '.join(STREAMS)} or a file")
    request = urllib.request.Request(address, headers={"User-Agent": "yolov3-fabric"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            kind = response.headers.get_content_type()
            content = response.read(MAX_DOWNLOAD + 1) if kind.startswith("image/") else b""
    except (OSError, ValueError) as error:  # URLError, timeouts, an address that is none
        reason = error if isinstance(error, HTTPError) else getattr(error, "reason", error)
        raise UserError(f"--images {address}: cannot be fetched ({reason})") from None
    if len(content) > MAX_DOWNLOAD:
        raise UserError(f"--images {address}: is over {MAX_DOWNLOAD >> 20} MB")
    if not content and kind.startswith("text/"):
        raise UserError(
            f"--images {address}: is a web page; want the address of the picture or video itself"
        )
    if not content:
        return open_video(address, name)
    suffix = path.suffix.lower() if path.suffix.lower() in IMAGE_SUFFIXES else ".jpg"
    with replacing(downloads / f"{name}{suffix}") as temporary:
        temporary.write_bytes(content)
    return [downloads / f"{name}{suffix}"]
