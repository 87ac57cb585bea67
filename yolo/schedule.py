"""The one-cycle learning rate as a table: planned once, stored as text, then only read.

The policy is Smith & Topin's super-convergence (arXiv:1708.07120); the numbers are torch's own
`OneCycleLR`. A cycle belongs to one global batch and one data set: `schedule.txt` names both, and a
resume compares them.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from yolo.config import ResolvedConfig
from yolo.errors import UserError
from yolo.files import replacing


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate and Adam's beta1 of every optimizer step, and what they were planned for.

    A re-planned schedule keeps the rows before `replanned_step` as they were trained, and goes on
    from row `replanned_position` of the cycle that its header describes.
    """

    optimizer: str
    global_batch: int
    grad_accum_steps: int
    ranks: int
    dataset_size: int
    dataset_digest: str
    steps_per_epoch: int
    epochs: int | float
    max_lr: float
    pct_start: float
    div_factor: float
    final_div_factor: float
    anneal: str
    replanned_step: int = 0
    replanned_position: int = 0
    lr: tuple[float, ...] = ()
    beta1: tuple[float, ...] = ()

    def __len__(self) -> int:
        """Return the number of optimizer steps."""
        return len(self.lr)

    @cached_property
    def digest(self) -> str:
        """Fingerprint of the whole table, header included."""
        return _fingerprint(_lines(self))

    def position(self, step: int) -> tuple[int, int]:
        """Return the (epoch, batch within it) at which optimizer step `step` belongs."""
        return divmod(step - self.replanned_step + self.replanned_position, self.steps_per_epoch)


_HEADER = [field for field in dataclasses.fields(Schedule) if field.name not in ("lr", "beta1")]
_READ: dict[Any, Callable[[str], Any]] = {
    str: str,
    int: int,
    float: float,
    int | float: lambda text: float(text) if "." in text else int(text),
}
# What the cycle depends on; ranks and accumulation only split the same batch.
_MUST_AGREE = (
    "optimizer",
    "global_batch",
    "dataset_size",
    "dataset_digest",
    "epochs",
    "max_lr",
    "pct_start",
    "div_factor",
    "final_div_factor",
    "anneal",
)
_TITLE = (
    "# one-cycle schedule, a line per optimizer step. "
    "Training reads this file: do not edit, use --replan"
)
_COLUMNS = "# step lr beta1"


def plan_schedule(
    cfg: ResolvedConfig,
    *,
    ranks: int,
    dataset_size: int,
    dataset_digest: str,
    steps_per_epoch: int,
) -> Schedule:
    """Plan the whole cycle: `cfg.epochs * steps_per_epoch` rows, rounded."""
    header = Schedule(
        optimizer="adam",
        global_batch=cfg.batch_size,
        grad_accum_steps=cfg.grad_accum_steps,
        ranks=ranks,
        dataset_size=dataset_size,
        dataset_digest=dataset_digest,
        steps_per_epoch=steps_per_epoch,
        epochs=cfg.epochs,
        max_lr=float(cfg.max_lr),
        pct_start=float(cfg.pct_start),
        div_factor=float(cfg.div_factor),
        final_div_factor=float(cfg.final_div_factor),
        anneal=cfg.anneal,
    )
    return _with_cycle(header)


def replan(old: Schedule, new: Schedule, step: int) -> Schedule:
    """Return `old` up to `step`, then `new` from the same epoch (or its end) of its cycle on.

    Steps keep counting from `step`, so that no checkpoint or metrics line is named twice.
    """
    done = step - old.replanned_step + old.replanned_position
    position = min(round(done * new.steps_per_epoch / old.steps_per_epoch), len(new.lr))
    return dataclasses.replace(
        new,
        replanned_step=step,
        replanned_position=position,
        lr=old.lr[:step] + new.lr[position:],
        beta1=old.beta1[:step] + new.beta1[position:],
    )


def differences(stored: Schedule, planned: Schedule) -> list[str]:
    """Return, as `name old -> new`, where the cycle of a run is not what its resume would plan."""
    pairs = ((name, getattr(stored, name), getattr(planned, name)) for name in _MUST_AGREE)
    return [f"{name} {old} -> {new}" for name, old, new in pairs if old != new]


def check_resume(stored: Schedule, planned: Schedule, path: Path) -> list[str]:
    """Compare the schedule of a run with what its resume would plan; return notices worth printing.

    Raises:
        UserError: if the cycle does not fit any more, naming both values and the way out.
    """
    if changed := differences(stored, planned):
        raise UserError(
            f"{path} was planned for another run ({', '.join(changed)}); give the old value(s) to "
            "go on exactly, or --replan to go on from the same epoch of a new cycle"
        )
    if (stored.ranks, stored.grad_accum_steps) == (planned.ranks, planned.grad_accum_steps):
        return []
    return [
        f"the global batch of {stored.global_batch} was split over {stored.ranks} rank(s) x "
        f"{stored.grad_accum_steps} accumulation step(s), now {planned.ranks} x "
        f"{planned.grad_accum_steps}: the schedule holds, but results may differ in the last bits, "
        "and BatchNorm sees another micro-batch"
    ]


def write_schedule(schedule: Schedule, path: Path) -> None:
    """Write the table as text, whole or not at all; `read_schedule` returns the same floats."""
    with replacing(path) as temporary:
        lines = [_TITLE, f"# digest {schedule.digest}", *_lines(schedule)]
        temporary.write_text("\n".join(lines) + "\n")


def read_schedule(path: Path) -> Schedule:
    """Read a schedule and verify its digest.

    Raises:
        UserError: if the file is missing, is no schedule, or was changed, with line and way out.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the schedule cannot be read ({error})") from None
    schedule, digest = _parse(lines, path)
    if digest != _fingerprint(lines[2:]):
        raise UserError(
            f"{path}{_first_edit(schedule, lines)}: the file was changed after it was written (its "
            "digest does not match); restore it (a mirror has a copy), or delete it to have it "
            "planned again"
        )
    return schedule


def plot_schedule(schedule: Schedule, path: Path) -> None:
    """Draw learning rate and beta1 over the steps as a PNG."""
    from matplotlib.figure import Figure  # half a second, and only for this picture

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    cycle = f"{schedule.epochs} epochs of {schedule.steps_per_epoch} steps"
    title = f"{cycle}, batch {schedule.global_batch}"
    lr_axes = figure.add_subplot(xlabel="optimizer step", ylabel="learning rate", title=title)
    (lr_line,) = lr_axes.plot(schedule.lr, color="tab:blue", label="learning rate")
    beta_axes = lr_axes.twinx()
    beta_axes.set_ylabel("beta1")
    (beta_line,) = beta_axes.plot(schedule.beta1, color="tab:orange", linestyle="--", label="beta1")
    lr_axes.legend(handles=[lr_line, beta_line], loc="lower center")
    lr_axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _with_cycle(header: Schedule) -> Schedule:
    total = max(1, round(header.epochs * header.steps_per_epoch))
    # torch divides by the length of the warm-up less one step: zero for a warm-up of one step
    pct_start = header.pct_start * (1 - 1e-9) if header.pct_start * total == 1 else header.pct_start
    optimizer = torch.optim.Adam([torch.zeros(1)], lr=header.max_lr)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=header.max_lr,
        total_steps=total,
        pct_start=pct_start,
        anneal_strategy=header.anneal,  # type: ignore[arg-type]
        div_factor=header.div_factor,
        final_div_factor=header.final_div_factor,
    )
    group = optimizer.param_groups[0]
    optimizer.step()  # changes nothing without gradients; the scheduler warns if it never ran
    lr, beta1 = [], []
    for step in range(total):
        lr.append(float(group["lr"]))
        beta1.append(float(group["betas"][0]))
        if step + 1 < total:
            cycle.step()
    return dataclasses.replace(header, lr=tuple(lr), beta1=tuple(beta1))


def _lines(schedule: Schedule) -> Iterator[str]:
    for field in _HEADER:
        yield f"# {field.name} {getattr(schedule, field.name)}"
    yield _COLUMNS
    for step, (lr, beta1) in enumerate(zip(schedule.lr, schedule.beta1, strict=True)):
        yield f"{step} {lr!r} {beta1!r}"


def _fingerprint(lines: list[str] | Iterator[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _parse(lines: list[str], path: Path) -> tuple[Schedule, str]:
    header: dict[str, str] = {}
    lr, beta1 = [], []
    for number, line in enumerate(lines, start=1):
        try:
            if line.startswith("# "):
                key, _, value = line[2:].partition(" ")
                header[key] = value
            else:
                _, lr_text, beta1_text = line.split()
                lr.append(float(lr_text))
                beta1.append(float(beta1_text))
        except ValueError:
            raise UserError(
                f"{path} line {number}: want 'step lr beta1', got '{line}'; restore the file (a "
                "mirror has a copy), or delete it to have it planned again"
            ) from None
    try:
        values = {field.name: _READ[field.type](header[field.name]) for field in _HEADER}
        return Schedule(**values, lr=tuple(lr), beta1=tuple(beta1)), header["digest"]
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: is no schedule of this program (header: {error})") from None


def _first_edit(schedule: Schedule, lines: list[str]) -> str:
    """Return ` line N (...)` for the first line, if any, that does not follow from its header.

    A header that means far more rows than the file has is the edit itself, and is not planned.
    """
    try:
        if not schedule.epochs * schedule.steps_per_epoch <= 10 * (len(lines) + 10_000):
            return ""
        whole = _with_cycle(schedule)
    except (ValueError, ZeroDivisionError, OverflowError):
        return ""
    start, position = schedule.replanned_step, schedule.replanned_position
    planned = dataclasses.replace(
        schedule,
        lr=schedule.lr[:start] + whole.lr[position:],
        beta1=schedule.beta1[:start] + whole.beta1[position:],
    )
    for number, (found, expected) in enumerate(zip_longest(lines[2:], _lines(planned)), start=3):
        if found != expected:
            return f" line {number} ('{found or 'missing'}', planned '{expected or 'nothing'}')"
    return ""
