"""Open a model in the browser: detections, Grad-CAM heat maps, and the model card.

python app.py                                                 # the bundled VOC and CIFAR-10 models
python app.py --data-root cifar-10-batches-bin                # ... with the misclassified images
python app.py --checkpoint runs/voc-...                       # repeat --checkpoint for a classifier
python app.py --checkpoint hf://owner/name                    # weights from the Hugging Face Hub
python app.py --checkpoint C --build-space DIR --samples 12   # a folder for a Hugging Face Space
python app.py --checkpoint C --build-space DIR --push owner/name
"""

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import tyro

from yolo import cli
from yolo.errors import UsageError

if TYPE_CHECKING:
    from yolo.app.models import Model
    from yolo.app.samples import SampleSet

HOME = Path(__file__).parent
SETTINGS = HOME / "app.yaml"  # a Space brings its own along


@dataclass(frozen=True, kw_only=True)
class AppArgs:
    """What is shown, and where."""

    checkpoint: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A run folder, a `.ckpt` or `.safetensors` file, or `hf://owner/name`: a detector, a
    classifier, or both (repeat the flag). Default: what is in `weights/`."""
    last: bool = False
    """Of a run folder take the newest checkpoint, not the best."""
    data_root: str | None = None
    """Where the test data lies that samples are taken from. Default: as in the training run."""
    split: str | None = None
    """The split of the samples. Default: as in the training run."""
    samples: int = 12
    """Pictures of the test data to offer."""
    model_url: str | None = None
    """Where the model is published, which About links. Default: the page of an `hf://` checkpoint,
    or that which --push makes."""
    build_space: str | None = None
    """Write a folder for Hugging Face Spaces here, and stop."""
    push: str | None = None
    """Upload that folder to the Space `owner/name`, and its weights to the model `owner/name`."""
    public: bool = False
    """Offer nothing of this machine but the models: no Your runs tab. A Space is always so, and
    an app that listens to other machines."""
    host: str | None = None
    """Address to listen on. Default: this machine alone."""
    port: int | None = None
    """Port to listen on. Default: the first free one from 7860."""
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, load, then build a Space or serve; return the exit code."""
    args = cli.parse(AppArgs, argv, __doc__ or "", SETTINGS if SETTINGS.exists() else None)

    if args.push and not args.build_space:
        raise UsageError(
            "--push uploads the folder that --build-space DIR writes: give that as well"
        )

    from yolo.app import space
    from yolo.app.models import load_models

    models = load_models(args.checkpoint, args.model_url, last=args.last)
    data = {
        key: getattr(args, key) for key in ("data_root", "split") if getattr(args, key) is not None
    }
    brought = HOME / "samples"
    if args.build_space:
        if args.push:
            models = space.with_page(models, args.push)
        folder = space.build(Path(args.build_space), HOME, models, args.samples, data, brought)
        print(f"{folder} is ready: try it with `cd {folder} && python app.py`")
        if args.push:
            print(space.push(folder, args.push, models))
        return 0

    # as `docker stop` and `systemctl stop` send it: what people uploaded is deleted then, too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with TemporaryDirectory(prefix="yolo-app-") as scratch:
        os.environ["GRADIO_TEMP_DIR"] = f"{scratch}/files"  # read when gradio is imported
        from yolo.app.limits import log_in_one_line
        from yolo.app.page import build_page, serve

        if not args.debug:
            log_in_one_line()
        numbers = count()

        def find(model: "Model") -> "SampleSet | None":
            made = Path(scratch) / f"samples{next(numbers)}"
            return space.find_samples(made, model, args.samples, data, brought)

        samples = {task: find(model) for task, model in models.items()}
        alone = args.host in (None, "localhost", "127.0.0.1") and "SPACE_ID" not in os.environ
        page = build_page(models, samples, find if alone and not args.public else None)
        serve(page, models, args.host, args.port)
    return 0


if __name__ == "__main__":
    cli.run(main)
