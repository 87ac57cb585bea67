"""Measure a trained model, or let it predict.

python evaluate.py --checkpoint runs/digits-.../checkpoints/....ckpt
python evaluate.py --checkpoint C --data-root VOCdevkit --split 2007:test
python evaluate.py --checkpoint C --images PATH|DIR|GLOB              # annotated pictures, JSON and CSV
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from yolo import cli
from yolo.config import HardwareConfig


@dataclass(frozen=True, kw_only=True)
class EvaluateArgs(HardwareConfig):
    """What to measure; settings of the data that are not given are those of the training run."""

    checkpoint: str
    """A `.ckpt` or `.safetensors` file."""
    data_root: str | None = None
    split: str | None = None
    test_size: int | None = None
    out_dir: str | None = None
    """Folder of the results. Default: `evaluations/<time>/` in the run folder."""
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, load, measure, print; return the exit code."""
    args = cli.parse(EvaluateArgs, argv, __doc__ or "")

    from yolo import engine
    from yolo.checkpoint import load_weights
    from yolo.logbook import summary_lines
    from yolo.tasks import build_test

    loaded = load_weights(Path(args.checkpoint))
    given = {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(args)
        if field.name in loaded.config.to_dict() and getattr(args, field.name) is not None
    }
    cfg = dataclasses.replace(loaded.config, **given)
    fabric, _ = engine.make_fabric(cfg)
    test = build_test(cfg, loaded.class_names, loaded.anchors)
    loader = engine.make_test_loader(fabric, cfg, test)
    results = engine.evaluate(fabric, loaded.model.to(fabric.device), test, loader, full=True)
    fabric.print("\n".join(summary_lines(results, [("data", test.dataset.name)])))
    fabric.print(json.dumps({key: value for key, value in results.items() if isinstance(value, float)}))
    return 0


if __name__ == "__main__":
    cli.run(main)
