"""The Video tab: a film in, the same film with frames around what was found out."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import gradio as gr

from yolo.app.detect_tab import DetectTab
from yolo.app.detector import SHOWN_SIDE, resized
from yolo.app.widgets import Updates, shown_errors, store_file, threshold_sliders
from yolo.inference.sources import Frame, Video, open_video
from yolo.inference.video import predict_video

MAX_FRAMES = 200  # some minutes of two CPU cores
MAX_RATE = 10.0  # frames a second: others are left out
# FFmpeg opens what a file names, on the disk and in the network, unless it knows the kind
SAFE = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi",
    "protocol_whitelist": "file",
}
PROGRESS = gr.Progress()  # Gradio looks for it among the defaults
HELP = (
    f"The first {MAX_FRAMES / MAX_RATE:.0f} seconds are looked at, {MAX_RATE:.0f} pictures in "
    "each; sound is left out. On a computer without a graphics card that takes a minute or two."
)


class VideoTab:
    """Components and the handler; instances live inside the `gr.Blocks` in which they are made."""

    def __init__(self, detect: DetectTab) -> None:
        """Find what the Picture tab finds, with its model."""
        self.detect = detect
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                self.upload = gr.Video(
                    sources=["upload", "webcam"], label="Your video", height=300, elem_id="film"
                )
                # Gradio's own way starts programs that may not be there
                self.upload.preprocess = _path_of_upload  # type: ignore[method-assign, assignment]
                defaults = detect.detector.default_score, detect.detector.default_iou
                score, iou = threshold_sliders(*defaults)
                start = gr.Button("Find objects in it", variant="primary", elem_id="start")
                gr.Markdown(HELP)
            with gr.Column(scale=2, min_width=320):
                self.film = gr.Video(
                    label="With what the model found", interactive=False, elem_id="found-film"
                )
                self.caption = gr.Markdown(elem_classes="caption", elem_id="film-caption")
                self.lines = gr.DownloadButton(
                    "Download all that was found (JSON, a line for each picture)", size="sm"
                )
        start.click(
            self.on_start,
            [self.upload, score, iou],
            [self.film, self.caption, self.lines],
            api_name="video",
            concurrency_id="video",
            concurrency_limit=1,
        )

    def on_start(
        self, video: str | None, score: float, iou: float, progress: gr.Progress = PROGRESS
    ) -> Updates:
        """Detect on the first seconds of a video."""
        if not video:
            gr.Info("Please choose a video first.")
            return gr.skip()
        with shown_errors(), TemporaryDirectory() as scratch:
            film = _shortened(open_video(video, "found", SAFE), progress)
            count = predict_video(self.detect.detector.detector, film, Path(scratch), score, iou)
            film_file, lines = (Path(scratch) / name for name in ("found.mp4", "predictions.jsonl"))
            return {
                self.film: store_file(film_file.read_bytes(), "found.mp4"),
                self.lines: store_file(lines.read_bytes(), "found.jsonl"),
                self.caption: f"**{count} pictures of the video.** Each frame names what the model "
                "found there and how sure it is.",
            }


def _path_of_upload(payload: gr.data_classes.FileData | None) -> str | None:
    return payload.path if payload else None


def _shortened(video: Video, progress: gr.Progress) -> Video:
    """Return the start of a video: few frames, none larger than the screen."""
    rate = min(video.rate, MAX_RATE)

    def frames() -> Iterator[Frame]:
        due, taken = 0.0, 0
        for frame in video.frames:
            if frame.seconds + 1e-3 < due:
                continue
            due, taken = due + 1 / rate, taken + 1
            progress((taken, min(MAX_FRAMES, _expected(video, rate))), unit="pictures")
            large = max(frame.image.shape[:2]) > SHOWN_SIDE
            yield frame._replace(image=resized(frame.image, SHOWN_SIDE)) if large else frame
            if taken == MAX_FRAMES:
                return

    return replace(video, frames=frames(), rate=rate, count=None)


def _expected(video: Video, rate: float) -> int:
    return round(video.count / video.rate * rate) if video.count else MAX_FRAMES
