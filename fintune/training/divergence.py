"""Stop a training whose numbers are not finite, and warn of one that learned nothing."""

import logging
import math
import os
from pathlib import Path
from typing import Any

import torch

from fintune.errors import UserError

log = logging.getLogger("fintune")

GUESSING = 0.95  # of ln(vocabulary); a loss above that is a guess among all tokens


class FiniteSteps:
    """Loss and gradient norm of each step since the last check; they stay on the device until then.

    A check syncs the device. It comes with each logged loss, so before each validation and each
    checkpoint, and on a CPU, where it costs nothing, before each update.
    """

    def __init__(self, scaled: bool) -> None:
        """Take whether gradients are scaled (float16): the scaler itself looks for infinite ones."""
        self.scaled = scaled
        self._steps: list[int] = []
        self._values: list[torch.Tensor] = []

    def note(self, step: int, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """Keep a step's values; on a CPU, they are to be checked at once."""
        self._steps.append(step)
        self._values.append(torch.stack([loss.detach().float(), norm.detach().float()]))

    def check(self, state: Any, learning_rate: float) -> None:
        """Check the steps since the last check.

        Raises:
            UserError: a loss or a gradient norm is not finite; it names the first such step.
        """
        if not self._values:
            return
        found = torch.stack(self._values).tolist()
        steps, self._steps, self._values = self._steps, [], []
        for step, (loss, norm) in zip(steps, found, strict=True):
            if not math.isfinite(loss):
                raise UserError(_message("loss", loss, step, state, learning_rate))
            if not (math.isfinite(norm) or self.scaled):
                raise UserError(_message("gradient's norm", norm, step, state, learning_rate))


def check_validation(loss: float, state: Any, learning_rate: float) -> None:
    """Check a validation's loss.

    Raises:
        UserError: it is not finite.
    """
    if not math.isfinite(loss):
        step = state.global_step
        raise UserError(_message("validation loss", loss, step, state, learning_rate))


def check_weights(model: torch.nn.Module) -> None:
    """Check that all trained weights are finite.

    Raises:
        UserError: one is not.
    """
    for name, weight in model.named_parameters():
        if weight.requires_grad and not weight.isfinite().all():
            raise UserError(
                f"train: {name} has weights that are not finite; the adapter is not written; lower "
                "train.learning_rate"
            )


def warn_of_guessing(loss: float, vocabulary: int, learning_rate: float) -> None:
    """Warn if a trained model's loss is that of a guess among all tokens."""
    guess = math.log(vocabulary)
    if loss > GUESSING * guess:
        log.warning(
            "warning: the validation loss is %.2f nats, and a guess among the base's %s tokens has %.2f: "
            "nothing was learned; lower train.learning_rate (%g)",
            loss,
            f"{vocabulary:,}",
            guess,
            learning_rate,
        )


def _message(name: str, value: float, step: int, state: Any, learning_rate: float) -> str:
    way_out = f"lower train.learning_rate ({learning_rate:g}) or train.max_grad_norm"
    if step == 1:
        way_out = (
            "nothing was learned before it, so base.model has weights that are not finite, or overflows in "
            "train.precision"
        )
    kept = "no adapter is written"
    if "DVC_STAGE" in os.environ:
        kept += "; `dvc checkout` brings back the former one"
    if state.best_model_checkpoint and state.best_global_step:
        folder = Path(state.best_model_checkpoint)
        kept += (
            f"; the best so far is that of step {state.best_global_step}, with {state.best_metric:.4g}, "
            f"in {folder}"
        )
    return f"train: the {name} is {value} at step {step}; {way_out}\n  {kept}"
