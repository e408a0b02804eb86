"""Trainer callbacks: timing, logging and a progress bar."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import EarlyStoppingCallback, ProgressCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

from fintune.hardware import peak_memory_gib
from fintune.processes import count


class StepTimer(TrainerCallback, ExportableState):
    """Callback that times the steps, forwards logged values, and saves in time and at the very end.

    `seconds` is the time from the beginning of the first step, without validations and checkpoints;
    `aside` is that of each of these two; `tokens` and `answer_tokens` are those of the `steps`, `peak_gib` is
    the most memory. They are in each checkpoint, so a training that goes on counts on. The timer syncs the
    device only at validations and checkpoints, so that timing never stalls training.
    """

    def __init__(
        self, on_log: Callable[[int, dict[str, float]], None], save_every: int | None = None
    ) -> None:
        """Take what is called with logged values, and the steps from a checkpoint to the next one.

        Each validation writes one, too: the Trainer wants that of its best step.
        """
        self.on_log_values = on_log
        self.save_every = save_every
        self.seconds = 0.0
        self.steps = self.tokens = self.answer_tokens = 0
        self.peak_gib = 0.0
        self.aside = {"validation": 0.0, "checkpoint": 0.0}
        self._since: float | None = None

    def state(self) -> dict[str, dict[str, Any]]:
        """Return what a checkpoint keeps."""
        names = ("seconds", "steps", "tokens", "answer_tokens", "peak_gib", "aside")
        return {
            "args": {"processes": count()},
            "attributes": {name: getattr(self, name) for name in names},
        }

    @contextmanager
    def pause(self, reason: str) -> Iterator[None]:
        """Stop the clock for a validation or a checkpoint; every training ends with one."""
        begun = _synced_time()
        self.seconds += begun - (self._since or begun)
        self.peak_gib = max(self.peak_gib, peak_memory_gib())
        yield
        self._since = _synced_time()
        self.aside[reason] += self._since - begun

    def count(self, tokens: int, answer_tokens: int) -> None:
        """Count the tokens of a step."""
        self.tokens += tokens
        self.answer_tokens += answer_tokens

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._since = self._since or _synced_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps += 1
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True
        if self.save_every and state.global_step % self.save_every == 0:
            control.should_save = True
        # a training that goes on from a checkpoint takes the mean loss from there
        control.should_log = control.should_log or control.should_save

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        values = {name: float(logs[key]) for key, name in CURVE.items() if key in logs}
        if values:
            self.on_log_values(state.global_step, values)


def _synced_time() -> float:
    """Return the time in seconds after a device sync."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Bar(ProgressCallback):
    """The Trainer's progress bar, with the losses in it instead of a printed line per log."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: dict[str, str] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.shown |= {name: f"{logs[key]:.3f}" for key, name in SHOWN.items() if key in logs}
        if self.training_bar is not None:
            self.training_bar.set_postfix(self.shown)


class Patience(EarlyStoppingCallback):
    """Early stopping that counts only the validations that measured what decides."""

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any
    ) -> None:
        if args.metric_for_best_model in metrics:
            super().on_evaluate(args, state, control, metrics)


SHOWN = {"loss": "loss", "eval_loss": "validation", "eval_answers": "answers"}
CURVE = {
    "loss": "loss",
    "eval_loss": "validation_loss",
    "eval_answers": "validation_answers",
    "learning_rate": "learning_rate",
}
