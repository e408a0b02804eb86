"""Search for the learning rate on a training's first steps, and leave the training as it was."""

import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from fintune.processes import of_first, rank
from fintune.stage import write_text
from fintune.training.callbacks import StepTimer
from fintune.training.rates import (
    COARSE,
    FINE,
    Found,
    best_of,
    factor,
    lowest_point,
    plan_rounds,
    rate_for,
    score,
)
from fintune.training.trainer import AnswerTrainer

log = logging.getLogger("fintune")

FILE = "rates.json"  # in the training's folder
Losses = dict[
    tuple[int, float], list[float | None]
]  # by a candidate's steps and rate; None: not finite


def find_rate(trainer: AnswerTrainer, steps: int, scratch: Path) -> Found:
    """Find the learning rate for a trainer that has not begun to train.

    Each candidate is a short training of its own, from the same adapter, on the rows of the training's first
    steps and with the same random numbers. What is measured is kept in the training's folder: a search that
    was killed goes on with the candidate at which it was.

    Args:
        trainer: all that training changes is as before afterwards.
        steps: of the training.

    Raises:
        UserError: the training has too few steps, or no candidate has a finite loss.
    """
    plan, rates = plan_rounds(steps), COARSE
    total, until = sum(each.steps for each in plan), plan[-1].until
    losses, seconds = of_first(_read(scratch / FILE) if rank() == 0 else ({}, 0.0))
    rows: list[dict[str, float | None]] = []
    scores: dict[float, float] = {}
    with _lent(trainer, steps, until, total) as candidates:
        for each in plan:
            if scores:
                rates = tuple(float(f"{best_of(scores) * times:.3g}") for times in FINE)
            for rate in rates:
                begun = time.perf_counter()
                if (each.until, rate) not in losses:
                    losses[each.until, rate] = candidates.train(rate, each.until)
                    seconds += time.perf_counter() - begun
                    if rank() == 0:
                        _write(scratch / FILE, losses, seconds)
            scores = {rate: score(losses[each.until, rate]) for rate in rates}
            rows += [
                {"steps": each.until, "learning_rate": r, "loss": s if math.isfinite(s) else None}
                for r, s in scores.items()
            ]
            said = ", ".join(f"{rate:.1e} {loss:.4f}" for rate, loss in scores.items())
            log.info("learning rate: losses in %d steps: %s", each.until, said)
        best = lowest_point(scores, float(candidates.first_loss))
    found = Found(rate_for(steps, best, until), total, seconds, rows)
    log.info(
        "learning rate: %g, by %.2g for %d steps; found in %d steps (%.0f %% of the training's) and %.0f s",
        *(found.rate, best, until, total, 100 * total / steps, seconds),
    )
    return found


class _Candidates:
    """Trains candidates with one trainer, one after the other."""

    def __init__(self, trainer: AnswerTrainer, most: int, bar: Any) -> None:
        """Draw the rows of the first `most` steps, and keep the adapter as it is."""
        self.trainer, self.bar = trainer, bar
        sampler: Any = trainer.get_train_dataloader().batch_sampler
        drawn = islice(chain.from_iterable(repeat(sampler)), most)
        self.steps = [trainer.data_collator([{"row": i} for i in rows]) for rows in drawn]
        self.weights = [p for p in trainer.model.parameters() if p.requires_grad]
        self.optimizer = trainer.accelerator.prepare(trainer.create_optimizer())
        scaler = trainer.accelerator.scaler
        self.first = {
            "weights": [weight.detach().clone() for weight in self.weights],
            "optimizer": deepcopy(self.optimizer.state_dict()),
            "scaler": dict(scaler.state_dict()) if scaler else {},
        }
        self.first_loss = self._gradients(0)
        self.first_gradients = [None if p.grad is None else p.grad.clone() for p in self.weights]

    def train(self, rate: float, steps: int) -> list[float | None]:
        """Train a candidate from the start; return the losses of its steps."""
        self.reset()
        found = []
        for number in range(steps):
            for group in self.optimizer.param_groups:
                group["lr"] = rate * factor(number, steps)
            found.append(self._step(number))
        return [loss if math.isfinite(loss) else None for loss in torch.stack(found).tolist()]

    def _step(self, number: int) -> torch.Tensor:
        """Do a step; return its loss."""
        if number:
            loss = self._gradients(number)
        else:
            loss = self.first_loss
            for weight, gradient in zip(self.weights, self.first_gradients, strict=True):
                weight.grad = None if gradient is None else gradient.clone()
        self.trainer._clip_grad_norm(self.trainer.model)
        self.optimizer.step()
        self.trainer.model.zero_grad()
        return loss

    def _gradients(self, number: int) -> torch.Tensor:
        """Compute the gradients of a step, of the first one for all candidates; return its loss."""
        torch.manual_seed(self.trainer.args.seed + number)
        loss = self.trainer.training_step(self.trainer.model, self.steps[number])
        self.bar.update()
        return loss.detach().float()

    @torch.no_grad()
    def reset(self) -> None:
        """Put the adapter, the optimizer and the scaler of the gradients back as they were."""
        for weight, value in zip(self.weights, self.first["weights"], strict=True):
            weight.copy_(value)
        self.optimizer.load_state_dict(deepcopy(self.first["optimizer"]))
        if self.first["scaler"]:
            self.trainer.accelerator.scaler.load_state_dict(self.first["scaler"])


@contextmanager
def _lent(trainer: AnswerTrainer, steps: int, most: int, total: int) -> Iterator[_Candidates]:
    """Yield candidates that train with a trainer, which is as before afterwards.

    Args:
        steps: of the training, by which the trainer knows that these are early ones.
        most: steps of a candidate.
        total: steps of all.
    """
    timer, trainer.timer = trainer.timer, StepTimer(lambda *_: None)
    trainer.state.max_steps = steps
    bar = tqdm(total=total, desc="learning rate", unit="step", leave=False)
    with torch.random.fork_rng(), bar:
        candidates = _Candidates(trainer, most, bar)
        yield candidates
        candidates.reset()
    trainer.optimizer = None
    trainer.timer, trainer.largest_micro_batch = timer, 0
    trainer.step_tokens.clear()


def _read(file: Path) -> tuple[Losses, float]:
    """Read what a search has measured; nothing, where it has not begun."""
    if not file.is_file():
        return {}, 0.0
    known = json.loads(file.read_text())
    return {(each["steps"], each["rate"]): each["losses"] for each in known["candidates"]}, known[
        "seconds"
    ]


def _write(file: Path, losses: Losses, seconds: float) -> None:
    rows = [
        {"steps": steps, "rate": rate, "losses": each} for (steps, rate), each in losses.items()
    ]
    write_text(file, json.dumps({"candidates": rows, "seconds": seconds}, indent=1) + "\n")
