"""Detections on a video, written as one that browsers play: H.264 in an mp4."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import islice, takewhile
from pathlib import Path

import av
import cv2
import numpy as np
from tqdm import tqdm

from yolo.errors import UserError
from yolo.files import replacing
from yolo.inference.predict import BATCH, Detector
from yolo.inference.sources import Video
from yolo.viz.draw import draw_boxes

TIME_BASE = Fraction(1, 90_000)  # the clock of MPEG: keeps a changing frame rate


def predict_video(
    detector: Detector,
    video: Video,
    folder: Path,
    score_threshold: float,
    iou_threshold: float | None = None,
    stop: Callable[[], bool] = lambda: False,
    images: Path | None = None,
) -> int:
    """Detect on each frame; write `<name>.mp4` and `predictions.jsonl`, one line for each frame.

    Args:
        detector: a trained detector.
        video: read to its end, or until `stop`.
        folder: where the files go.
        score_threshold: lowest score that is drawn.
        iou_threshold: as `Detector.detect` takes it.
        stop: asked before each frame: whether to finish the files with what there is.
        images: folder for the frames themselves, as JPEG.

    Returns:
        The number of frames.

    Raises:
        UserError: if there is none.
    """
    done = 0
    names = detector.loaded.class_names
    frames = takewhile(lambda _: not stop(), video.frames)
    lines = folder / "predictions.jsonl"
    with (
        replacing(lines) as temporary,
        temporary.open("w") as file,
        mp4_writer(folder / f"{video.name}.mp4", video.rate) as write,
        tqdm(total=video.count, desc="detect", unit="frame", leave=False, disable=None) as bar,
    ):
        while batch := list(islice(frames, BATCH)):
            found = detector.detect(
                [frame.image for frame in batch], score_threshold, iou_threshold
            )
            for (image, seconds), one in zip(batch, found, strict=True):
                write(
                    draw_boxes(image, one.boxes, one.labels.tolist(), names, one.scores.tolist()),
                    seconds,
                )
                name = f"{video.name}-{done + 1:06d}.jpg"
                record = {"image": name, "seconds": round(seconds, 3), **one.record()}
                file.write(json.dumps(record) + "\n")
                if images is not None:
                    images.mkdir(exist_ok=True)
                    cv2.imwrite(str(images / name), image[..., ::-1])
                done += 1
            bar.update(len(batch))
        if not done:
            raise UserError(f"{video.name}: holds no frame")
    return done


@contextmanager
def mp4_writer(path: Path, rate: float) -> Iterator[Callable[[np.ndarray, float], None]]:
    """Yield what writes one RGB frame [H, W, 3] and its time in seconds; the file appears whole.

    All frames get the size of the first, less a last row or column that would make a side odd.
    """
    with (
        replacing(path) as temporary,
        av.open(str(temporary), "w", format="mp4", options={"movflags": "faststart"}) as container,
    ):
        frame_rate = Fraction(rate).limit_denominator(1001)
        stream = container.add_stream("libx264", rate=frame_rate, options={"preset": "veryfast"})
        stream.pix_fmt = "yuv420p"  # the only one that every browser decodes
        stream.codec_context.time_base = TIME_BASE
        last = -1

        def write(image: np.ndarray, seconds: float) -> None:
            nonlocal last
            if last < 0:
                stream.height, stream.width = (max(2, side // 2 * 2) for side in image.shape[:2])
            if image.shape[0] // 2 * 2 != stream.height or image.shape[1] // 2 * 2 != stream.width:
                image = cv2.resize(image, (stream.width, stream.height))
            pixels = np.ascontiguousarray(image[: stream.height, : stream.width])
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            last = max(last + 1, round(seconds / TIME_BASE))
            frame.pts, frame.time_base = last, TIME_BASE
            container.mux(stream.encode(frame))

        yield write
        if last >= 0:
            container.mux(stream.encode(None))
