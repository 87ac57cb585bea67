"""Train a detector (or a classifier) with Lightning Fabric.

python train.py                            # handwritten digits, made on first use: minutes on a CPU
python train.py --data-root flowers        # your own pictures: a folder, a zip, a data.yaml
python train.py --config configs/voc.yaml --data-root VOCdevkit
python train.py --resume auto              # go on where the newest run of this config stopped
python train.py --plan-only                # write schedule.txt and schedule.png, and stop
python train.py --check-data               # count, check and draw the data, and stop
torchrun --nproc_per_node=4 train.py --config configs/voc.yaml
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from yolo import cli
from yolo.config import Config, parse_seconds
from yolo.engine.launch import torchrun_launch
from yolo.errors import UsageError
from yolo.runs.folder import RunFolder, RunPlan, plan_run

if TYPE_CHECKING:
    import torch

    from yolo.config import ResolvedConfig
    from yolo.data.layouts import Reading
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
    """`auto` (newest checkpoint of --out-dir, or of the newest unfinished run), a checkpoint, or a
    folder."""
    replan: bool = False
    """On resume with another batch, data set or cycle: plan a new schedule from the same epoch."""
    mirror: str | None = None
    """Copy finished checkpoints, schedule and metrics here: a folder on another drive or any fsspec
    URL."""
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
    """Parse, launch, and do what the flags ask for; return the exit code."""
    argv = cli.command_line(argv)
    config_file, found = recognise_data(argv)
    name = Path(config_file).stem
    data_root = str(found.root) if found else cli.value_of("--data-root", argv)
    plan = replace(locate_run(argv, name, data_root), config_name=name)
    args = parse_args(argv, plan.stored_config, config_file, found)
    max_seconds = parse_seconds("--max-time", args.max_time) if args.max_time else None
    if args.plan_only and plan.folder.holds_a_run:
        folder = plan.folder.path
        raise UsageError(
            f"--plan-only would replace the schedule of {folder}: name another --out-dir"
        )

    # torch takes seconds to import: not before the arguments are known to be right
    from yolo.check_data import check_data
    from yolo.data.splits import parse_split
    from yolo.engine.fabric import make_fabric
    from yolo.engine.stopping import StopRequest

    stop = StopRequest(max_seconds)
    fabric, scaler = make_fabric(args)
    # rank 0 decides: other nodes may see other files
    plan, cfg = fabric.broadcast((plan, Config.from_dict(args.to_dict())))
    fabric.seed_everything(cfg.seed, verbose=False)
    if found and not plan.stored_config:
        fabric.print(f"recognised   {found}: trained on by {config_file}")
        if parse_split(cfg.train_split)[1]:
            fabric.print(
                f"validation   {cfg.val_fraction:.0%} of the pictures, drawn by their names "
                "(--val-fraction), choose the best weights"
            )
    if args.check_data:
        return 1 if fabric.is_global_zero and check_data(cfg, plan.folder.path, fabric.print) else 0
    return assemble(args, plan, cfg, fabric, scaler, stop)


def recognise_data(argv: Sequence[str]) -> "tuple[str, Reading | None]":
    """Return the configuration file, and how the data are read where no flag or file says it."""
    config, dataset, root = (
        cli.value_of(name, argv) for name in ("--config", "--dataset", "--data-root")
    )
    if dataset == "digits" or (config is None and root is None):
        return config or DEFAULT_CONFIG, None
    if config is not None:
        values = cli.read_yaml(Path(config))
        root = root or cli.setting(config, "data_root", str | None, values.get("data_root"))
        if "auto" not in (dataset, values.get("dataset")):
            return config, None
    if root is None:
        raise UsageError("--dataset auto: name the data with --data-root")
    from yolo.data.layouts import recognise

    found = recognise(Path(root), None if dataset == "auto" else dataset)
    return config or found.config, found


def parse_args(
    argv: Sequence[str], stored_config: Path | None, config_file: str, found: "Reading | None"
) -> TrainArgs:
    """Parse the flags over the configuration: that of the run to continue, or what was found."""
    if stored_config or not found:
        args = cli.parse(TrainArgs, argv, __doc__ or "", stored_config or config_file)
    else:
        train_split = cli.value_of("--train-split", argv)
        settings = found.settings(val_fraction(argv, config_file), train_split)
        args = cli.parse(TrainArgs, argv, __doc__ or "", config_file, settings)
    if found:
        args = replace(args, data_root=str(found.root))
    planned = {"--epochs", "--train-steps", "--train-time"}
    given = {name for name in planned if cli.value_of(name, argv)}
    if given and "--train-time" not in given:  # the plain plan goes over that of a file
        args = replace(args, train_time=None)
    if given == {"--epochs"}:
        args = replace(args, train_steps=None)
    return args


def val_fraction(argv: Sequence[str], config_file: str) -> float:
    """Return the share that validates, before the flags are parsed: they depend on it."""
    flag = cli.value_of("--val-fraction", argv)
    try:
        share = None if flag is None else float(flag)
    except ValueError:
        raise UsageError(f"--val-fraction {flag}: want a number between 0 and 1") from None
    if share is None:
        value = cli.read_yaml(Path(config_file)).get("val_fraction", Config.val_fraction)
        share = cli.setting(config_file, "val_fraction", float, value)
    if not 0 <= share <= 1:
        raise UsageError(f"--val-fraction {share}: must lie between 0 and 1")
    return share


def locate_run(argv: Sequence[str], config_name: str, data_root: str | None) -> RunPlan:
    """Return where to write and what to continue.

    For `--resume auto`, what a mirror has newer is fetched.
    """
    names = ("--out-dir", "--resume", "--mirror")
    out_dir, resume, mirror = (cli.value_of(name, argv) for name in names)
    if resume == "auto" and mirror:
        from yolo.runs.mirror import bring_back

        bring_back(mirror, config_name, out_dir)
    plan = plan_run(config_name, out_dir, resume, torchrun_launch(), data_root)
    given = cli.given(argv)
    edited = plan.stored_config and not RunFolder(plan.stored_config.parent).read_config()[1]
    if not edited or "replan" in given:
        return plan
    return replace(plan, unsure=frozenset(Config().to_dict().keys() - {"max_steps"} - given))


def assemble(
    args: TrainArgs,
    plan: RunPlan,
    config: Config,
    fabric: "Fabric",
    scaler: "torch.amp.GradScaler | None",
    stop: "StopRequest",
) -> int:
    """Open the data, build every part, take over the checkpoint, train; return the exit code."""
    from yolo.engine import loaders, tuning
    from yolo.engine.fabric import ranks_per_node
    from yolo.engine.memory import fit_memory
    from yolo.engine.state import make_state
    from yolo.runs.mirror import Mirror
    from yolo.runs.pretrained import start_weights
    from yolo.runs.resume import Start, check_settings, open_checkpoint, resume
    from yolo.runs.run import Run, write_plan
    from yolo.tasks.build import build_task

    folder, log, is_writer = plan.folder, fabric.print, fabric.is_global_zero
    if config.fit_memory and not plan.stored_config:
        config = fit_memory(fabric, config)
    with (
        fabric.rank_zero_first(local=True) if config.download else nullcontext()
    ):  # one process fetches
        task = build_task(config, ranks_per_node(fabric, config))
    checkpoint = open_checkpoint(plan, fabric)
    check_settings(plan, checkpoint, config)
    if not checkpoint and not args.plan_only:
        with fabric.rank_zero_first(local=True):  # one process fetches
            for line in start_weights(task.model, config, task.class_names):
                log(line)
    cfg = tuning.resolve(fabric, scaler, task, folder.path, checkpoint)
    task = task.with_config(cfg)
    if args.find_lr:
        tuning.find_max_lr(fabric, scaler, task, cfg, folder.path)
        return 0
    sampler = loaders.make_sampler(fabric, cfg, len(task.train_set))
    schedule = tuning.plan(fabric, cfg, task, sampler)
    if args.plan_only:
        if is_writer:
            write_plan(schedule, folder.schedule, log)
        return 0
    state = make_state(fabric, scaler, cfg, task)
    start = Start(schedule)
    if checkpoint:
        start = resume(checkpoint, folder, task, schedule, state, may_replan=args.replan, log=log)
        del checkpoint  # it is as large as the state
    mirror = Mirror(args.mirror, folder.path.name) if args.mirror and is_writer else None
    run = Run(plan, start, cfg, task, state, writes=is_writer, log=log, mirror=mirror)
    try:
        return train(fabric, cfg, state, task, sampler, stop, run)
    finally:
        state.threads.take(state.threads.most)  # a notebook goes on in this process


def train(
    fabric: "Fabric",
    cfg: "ResolvedConfig",
    state: "State",
    task: "Task",
    sampler: "MultiSizeBatchSampler",
    stop: "StopRequest",
    run: "Run",
) -> int:
    """Train, test and save, epoch by epoch, to the end or a stop request; return the exit code."""
    from yolo.engine import loaders, loop
    from yolo.engine.fabric import agree, agreed_reason
    from yolo.engine.introduction import introduction
    from yolo.engine.stopping import EXIT_CODES

    if state.step >= run.end:
        if run.folder.results.exists():
            fabric.print(
                f"{run.folder.path} is at its end (step {state.step}): see {run.folder.results}"
            )
            return 0
        state.evaluation_due = True  # the last test was cut off before its results were written
    run.open()
    fabric.print(introduction(fabric, cfg, task, run))
    sampler.set_position(state.epoch, state.batch)
    train_loader = loaders.make_train_loader(fabric, cfg, task, sampler)
    steps = loop.optimizer_steps(train_loader, cfg.grad_accum_steps)
    eval_loader = loaders.make_eval_loader(fabric, cfg, task.eval_split)
    results = None
    while results is None or state.step < run.end:
        if not state.evaluation_due and state.step < run.end:
            loop.train_one_epoch(fabric, state, task, steps, stop, run)
        reason = agreed_reason(fabric, stop)
        if reason is None:
            results = loop.evaluate_if_due(fabric, state, task, eval_loader, stop, run)
            reason = agreed_reason(fabric, stop)
        at_end = state.step >= run.end
        if any(agree(fabric, at_end or reason is not None or run.save_is_due(state.step))):
            run.save()
        if at_end or reason is not None:
            run.wait()  # the results name the checkpoint, and the last tests fork workers
        if reason is not None:
            if reason == "--max-time":
                model, split = state.ema.module, task.eval_split
                run.report_stop(loop.measure(fabric, model, split, eval_loader, full=True) or {})
            run.close()
            # when one rank exits, launchers kill the others: not before rank 0 wrote
            fabric.barrier()
            stopped = f"stopped by {reason} at step {state.step} of {run.end}"
            fabric.print(f"{stopped}; continue with --resume {run.folder.path}")
            return EXIT_CODES[reason]
    run.finish(loop.headline(fabric, state, task, run, results))
    return 0


if __name__ == "__main__":
    cli.run(main)
