"""Train a detector (or a classifier) with Lightning Fabric.

python train.py                            # handwritten digits, made on first use: minutes on a CPU
python train.py --config configs/voc.yaml --data-root VOCdevkit
python train.py --resume auto              # go on where the newest run of this config stopped
python train.py --plan-only                # write schedule.txt and schedule.png, and stop
python train.py --check-data               # count, check and draw the data, and stop
torchrun --nproc_per_node=4 train.py --config configs/voc.yaml
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from yolo import cli
from yolo.config import Config, parse_seconds
from yolo.errors import UsageError
from yolo.runs.folder import RunFolder, find_run_folder, stored_config

if TYPE_CHECKING:
    from yolo.data.samplers import MultiSizeBatchSampler
    from yolo.engine.fabric import Fabric
    from yolo.engine.state import State
    from yolo.engine.stopping import StopRequest
    from yolo.runs.run import Run
    from yolo.tasks.base import Task

DEFAULT_CONFIG = "configs/digits.yaml"


@dataclass(frozen=True, kw_only=True)
class TrainArgs(Config):
    """The flags of this run, over those of its configuration."""

    config: str = DEFAULT_CONFIG
    """YAML file whose keys are the names of the flags below."""
    out_dir: str | None = None
    """Folder of this run. Default: `runs/<config>-<time>`."""
    resume: str | None = None
    """`auto` (newest checkpoint of --out-dir, or of the newest unfinished run), a checkpoint, or a folder."""
    replan: bool = False
    """On resume with another batch, data set or cycle: plan a new schedule from the same epoch."""
    mirror: str | None = None
    """Copy finished checkpoints, schedule and metrics here: a folder on another drive or any fsspec URL."""
    max_time: str | None = None
    """Save and stop after this long, as in `2h45m`."""
    plan_only: bool = False
    """Write schedule.txt and schedule.png, and stop."""
    check_data: bool = False
    """Check, count and draw the data, and stop."""
    find_lr: bool = False
    """Run a learning-rate range test, propose --max-lr, and stop."""
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, assemble, train; return the exit code."""
    words = cli.command_line(argv)
    config_file = cli.value_of("--config", words) or DEFAULT_CONFIG
    folder, source, resuming = locate_run(words, Path(config_file).stem)
    stored = stored_config(folder, source) if resuming else None  # a resumed run keeps its settings
    args = cli.parse(TrainArgs, words, __doc__ or "", stored or config_file)
    cfg = Config.from_dict(args.to_dict())
    max_seconds = parse_seconds("--max-time", args.max_time) if args.max_time else None
    if args.plan_only and folder.holds_a_run:
        raise UsageError(f"--plan-only would replace the schedule of {folder.path}: name another --out-dir")

    # torch takes seconds to import: not before the arguments are known to be right
    from yolo.check_data import check_data
    from yolo.engine import fabric as processes
    from yolo.engine import loaders, loop, tuning
    from yolo.engine.state import make_state
    from yolo.engine.stopping import StopRequest
    from yolo.runs.checkpoint import find_newest
    from yolo.runs.mirror import Mirror
    from yolo.runs.pretrained import start_weights
    from yolo.runs.run import Run
    from yolo.tasks.build import build_task

    stop = StopRequest(max_seconds)
    fabric, scaler = processes.make_fabric(cfg)
    # rank 0 decides: other nodes may see other files
    folder, source, resuming, stored, cfg = fabric.broadcast((folder, source, resuming, stored, cfg))
    fabric.seed_everything(cfg.seed, verbose=False)
    if args.check_data:
        return 1 if fabric.is_global_zero and check_data(cfg, folder.path, fabric.print) else 0
    with fabric.rank_zero_first(local=True) if cfg.download else nullcontext():  # one process fetches
        task = build_task(cfg)
    checkpoint = source
    if resuming and source is None:
        checkpoint = fabric.broadcast(
            find_newest(folder.checkpoints, fabric.print) if fabric.is_global_zero else None
        )
    if not checkpoint and not args.plan_only:
        with fabric.rank_zero_first(local=True):  # one process fetches
            for line in start_weights(task.model, cfg):
                fabric.print(line)
    task = tuning.settle(fabric, scaler, task, folder.path, cli.read_yaml(stored) if stored else {})
    if args.find_lr:
        tuning.find_max_lr(fabric, scaler, task, folder.path)
        return 0
    cfg = task.config
    sampler = loaders.make_sampler(fabric, cfg, len(task.train_set))
    state = make_state(fabric, scaler, cfg, task)
    run = Run(
        folder,
        task,
        loop.plan(fabric, cfg, task, sampler),
        state,
        writes=fabric.is_global_zero,
        say=fabric.print,
        mirror=Mirror(args.mirror, folder.path.name) if args.mirror and fabric.is_global_zero else None,
    )
    if args.plan_only:
        run.write_plan()
        return 0

    if checkpoint:
        run.continue_from(checkpoint, may_replan=args.replan)
    elif resuming:
        fabric.print(f"nothing to resume in {folder.path}: starting fresh")
    if state.step >= run.end:
        if folder.results.exists():
            fabric.print(f"{folder.path} is at its end (step {state.step}): see {folder.results}")
            return 0
        state.evaluation_due = True  # the last test was cut off before its results were written
    run.start()
    fabric.print(loop.introduction(fabric, cfg, task, run))
    return train(fabric, state, task, sampler, stop, run)


def locate_run(words: Sequence[str], config_name: str) -> tuple[RunFolder, Path | None, bool]:
    """Return the folder of the run, the checkpoint that `--resume` names, and whether to go on at all."""
    out_dir, resume = cli.value_of("--out-dir", words), cli.value_of("--resume", words)
    mirror_url = cli.value_of("--mirror", words)
    if resume == "auto" and mirror_url:
        from yolo.runs.mirror import bring_back

        bring_back(mirror_url, config_name, out_dir)
    return find_run_folder(config_name, out_dir, resume)


def train(
    fabric: "Fabric",
    state: "State",
    task: "Task",
    sampler: "MultiSizeBatchSampler",
    stop: "StopRequest",
    run: "Run",
) -> int:
    """Train, test and save, epoch after epoch, until the end or a request to stop; return the exit code."""
    from yolo.engine import fabric as processes
    from yolo.engine import loaders, loop
    from yolo.engine.stopping import EXIT_CODES

    sampler.set_position(state.epoch, state.batch)
    train_loader = loaders.make_train_loader(fabric, task.config, task, sampler)
    steps = loop.optimizer_steps(train_loader, task.config.grad_accum_steps)
    test_loader = loaders.make_eval_loader(fabric, task.config, task.eval_split)
    results = None
    while results is None or state.step < run.end:
        if not state.evaluation_due and state.step < run.end:
            loop.train_one_epoch(fabric, state, task, steps, stop, run)
        reason = processes.agreed_reason(fabric, stop)
        if reason is None:
            results = loop.evaluate_if_due(fabric, state, task, test_loader, stop, run)
            reason = processes.agreed_reason(fabric, stop)
        at_end = state.step >= run.end
        if any(processes.agree(fabric, at_end or reason is not None or run.save_is_due(state.step))):
            run.save()
        if reason is not None:
            run.close()
            fabric.barrier()  # when one rank exits, launchers kill the others: not before rank 0 wrote
            stopped = f"stopped by {reason} at step {state.step} of {run.end}"
            fabric.print(f"{stopped}; continue with --resume {run.folder.path}")
            return EXIT_CODES[reason]
    run.finish(results)
    return 0


if __name__ == "__main__":
    cli.run(main)
