"""Speed and losses of a training, line after line."""

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from yolo.config import Config
from yolo.engine.fabric import Fabric, peak_memory_gib, sum_over_ranks
from yolo.engine.state import State
from yolo.errors import UserError
from yolo.runs.logbook import Progress, duration
from yolo.runs.run import Run

MAX_BAD_STEPS = 5  # consecutive steps with a loss that is not finite, before giving up


class Meter:
    """Speed, losses, time to go, logged every `log_every` steps: the only waits for the device."""

    def __init__(self, fabric: Fabric, cfg: Config, state: State, run: Run) -> None:
        self.fabric, self.cfg, self.state, self.run = fabric, cfg, state, run
        title = f"epoch {state.epoch + 1}/{cfg.epochs:g}"
        self.progress = Progress(run.schedule.steps_per_epoch, title, fabric.is_global_zero)
        self.progress.update(state.batch)
        self._restart()

    def timed(self, steps: Iterator[list[Any]]) -> Iterator[list[Any]]:
        """Pass the steps on, and add up the time spent waiting for them."""
        while True:
            start = time.perf_counter()
            try:
                micro_batches = next(steps)
            except StopIteration:
                return
            self.waited += time.perf_counter() - start
            yield micro_batches

    def count(self, micro_batches: Sequence[Any]) -> None:
        """Count the images of an optimizer step, over all ranks."""
        self.images += sum(len(images) for images, _ in micro_batches) * self.fabric.world_size
        self.steps += 1
        self.img_size = micro_batches[0][0].shape[-1]
        self.progress.update()

    def log(self) -> None:
        """Write the mean losses since the last line.

        Raises:
            UserError: if the loss has not been finite for `MAX_BAD_STEPS` steps, or the weights are
                not; on all ranks together.
        """
        state = self.state
        hopeless = torch.stack([state.bad_steps >= MAX_BAD_STEPS, ~state.is_finite()]).double()
        sums = torch.stack([*state.loss_sums.values(), *hopeless])
        # waits for the device
        *losses, bad_loss, bad_weights = sum_over_ranks(self.fabric, sums).tolist()
        if bad_loss or bad_weights:
            subject = "the loss has" if bad_loss else "the weights or batch statistics have"
            since = f" for {MAX_BAD_STEPS} steps" if bad_loss else ""
            go_on = (
                f"the last good checkpoint is {self.run.last_checkpoint}: go on from it with a "
                "lower --max-lr (--resume auto --replan) or with --precision 32-true"
                if self.run.last_checkpoint
                else "there is no checkpoint yet: start anew with a lower --max-lr or "
                "--precision 32-true"
            )
            raise UserError(f"{subject} not been finite{since} (now step {state.step}); {go_on}")
        seconds = time.perf_counter() - self.start
        count = state.step - (state.step - 1) // self.cfg.log_every * self.cfg.log_every
        means = {name: value / count for name, value in zip(state.loss_sums, losses, strict=True)}
        speed = self.images / seconds
        values = {
            "epoch": state.epoch,
            "loss": sum(means.values()),
            **means,
            "lr": self.run.schedule.lr[state.step - 1],
            "img_size": self.img_size,
            "images_per_second": speed,
            "data_wait_share": self.waited / seconds,
            "peak_memory_gib": peak_memory_gib(self.fabric.device),
            **self._skipped_steps(),
        }
        self.run.record("train", state.step, values)
        self.progress.note(self._line(values, seconds))
        if state.step % self.cfg.log_every == 0:  # at an end between two, a later start needs them
            state.loss_sums = {}
        self._restart()

    def close(self) -> None:
        """Remove the bar."""
        self.progress.close()

    def _restart(self) -> None:
        self.start, self.waited, self.images, self.steps, self.img_size = (
            time.perf_counter(),
            0.0,
            0,
            0,
            0,
        )

    def _skipped_steps(self) -> dict[str, int]:
        """Steps that the gradient scaler left out since the last line: each halves the scale."""
        if self.state.scaler is None:
            return {}
        previous, self.state.logged_scale = self.state.logged_scale, self.state.scaler.get_scale()
        return {"skipped_steps": max(0, round(math.log2(previous / self.state.logged_scale)))}

    def _line(self, values: dict[str, Any], seconds: float) -> str:
        steps_left = self.run.end - self.state.step
        eta = steps_left * seconds / max(self.steps, 1)
        terms = " ".join(f"{name} {values[name]:.3f}" for name in ("loss", *self.state.loss_sums))
        return (
            f"step {self.state.step} {terms} lr {values['lr']:.2e} size {values['img_size']} "
            f"{values['images_per_second']:.0f} img/s (wait {values['data_wait_share']:.0%}) "
            f"{values['peak_memory_gib']:.1f} GiB, {duration(eta)} to go"
        )
