"""Search for the learning rate on a training's first steps, and leave the training as it was."""

import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from fintune.hardware import GIB, room_gib
from fintune.processes import of_first, rank
from fintune.stage import write_text
from fintune.training.callbacks import StepTimer
from fintune.training.halving import RATES, Found, best_rate, plan_rounds, score, survivors
from fintune.training.trainer import AnswerTrainer

log = logging.getLogger("fintune")

FILE = "learning_rate.json"  # in the training's folder
COPIES = 3  # of a candidate: weights and two moments
ROOM = 0.2  # of the free memory, for all candidates
Losses = dict[float, list[float | None]]  # of the steps, by rate; None for one that is not finite


def find_rate(trainer: AnswerTrainer, steps: int, scratch: Path) -> Found:
    """Find the learning rate for a trainer that has not begun to train.

    Each candidate trains at a constant rate, from the same adapter, on the rows of the training's first steps
    and with the same random numbers. What is measured is kept in the training's folder: a search that was
    killed goes on with the candidate at which it was.

    Args:
        trainer: all that training changes is as before afterwards.
        steps: of the training.

    Raises:
        UserError: the training has too few steps, or no candidate has a finite loss.
    """
    plan, rates = plan_rounds(steps), list(RATES)
    total = sum(each.steps for each in plan)
    losses, seconds = of_first(_read(scratch / FILE) if rank() == 0 else ({}, 0.0))
    rows: list[dict[str, float | None]] = []
    with _lent(trainer, steps, plan[-1].until, total) as candidates:
        for until in (each.until for each in plan):
            candidates.keep(rates)
            for rate in rates:
                begun = time.perf_counter()
                if len(losses.get(rate, [])) < until:
                    losses[rate] = candidates.train(rate, until)
                    seconds += time.perf_counter() - begun
                    if rank() == 0:
                        _write(scratch / FILE, losses, seconds)
            scores = {rate: score(losses[rate][:until]) for rate in rates}
            rows += [
                {"steps": until, "learning_rate": r, "loss": s if math.isfinite(s) else None}
                for r, s in scores.items()
            ]
            said = ", ".join(f"{rate:.1e} {loss:.4f}" for rate, loss in scores.items())
            log.info("learning rate: losses in %d steps: %s", until, said)
            rates = survivors(scores)
    found = Found(best_rate(scores, plan[-1].until), total, seconds, rows)
    log.info(
        "learning rate: %g, found in %d steps (%.0f %% of the training's) and %.0f s",
        *(found.rate, total, 100 * total / steps, seconds),
    )
    return found


class _Candidates:
    """Trains candidates with one trainer; those that wait are kept where there is room."""

    def __init__(self, trainer: AnswerTrainer, most: int, bar: Any) -> None:
        """Draw the rows of the first `most` steps, and keep the adapter as it is."""
        self.trainer, self.bar = trainer, bar
        sampler: Any = trainer.get_train_dataloader().batch_sampler
        drawn = islice(chain.from_iterable(repeat(sampler)), most)
        self.steps = [trainer.data_collator([{"row": i} for i in rows]) for rows in drawn]
        self.weights = [p for p in trainer.model.parameters() if p.requires_grad]
        self.optimizer = trainer.accelerator.prepare(trainer.create_optimizer())
        held = len(RATES) * COPIES * sum(p.numel() * p.element_size() for p in self.weights) / GIB
        self.place = self.weights[0].device if held < ROOM * room_gib() else torch.device("cpu")
        self.first = self._state()
        self.first_loss = self._gradients(0)
        self.first_gradients = [None if p.grad is None else p.grad.clone() for p in self.weights]
        self.waiting: dict[float, tuple[dict[str, Any], list[float | None]]] = {}

    def train(self, rate: float, until: int) -> list[float | None]:
        """Train a candidate up to a step, from where it is, and return the losses of all its steps."""
        state, before = self.waiting.get(rate, (self.first, []))
        self._restore(state)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        found = [self._step(number) for number in range(len(before), until)]
        losses = [loss if math.isfinite(loss) else None for loss in torch.stack(found).tolist()]
        self.waiting[rate] = self._state(), before + losses
        return before + losses

    def keep(self, rates: Sequence[float]) -> None:
        """Forget the other candidates."""
        self.waiting = {rate: each for rate, each in self.waiting.items() if rate in rates}

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

    def _state(self) -> dict[str, Any]:
        scaler = self.trainer.accelerator.scaler
        return {
            "weights": _copied(self.weights, self.place),
            "optimizer": _copied(self.optimizer.state_dict(), self.place),
            "scaler": dict(scaler.state_dict()) if scaler else {},
        }

    @torch.no_grad()
    def _restore(self, state: dict[str, Any]) -> None:
        for weight, value in zip(self.weights, state["weights"], strict=True):
            weight.copy_(value)
        self.optimizer.load_state_dict(_copied(state["optimizer"], self.place))
        if state["scaler"]:
            self.trainer.accelerator.scaler.load_state_dict(state["scaler"])

    def restore(self) -> None:
        """Put the adapter and the scaler of its gradients back as they were."""
        self._restore(self.first)
        self.trainer.optimizer = None


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
        candidates.restore()
    trainer.timer, trainer.largest_micro_batch = timer, 0
    trainer.step_tokens.clear()


def _read(file: Path) -> tuple[Losses, float]:
    """Read what a search has measured; nothing, where it has not begun."""
    if not file.is_file():
        return {}, 0.0
    known = json.loads(file.read_text())
    return {float(rate): losses for rate, losses in known["losses"].items()}, known["seconds"]


def _write(file: Path, losses: Losses, seconds: float) -> None:
    write_text(file, json.dumps({"losses": losses, "seconds": seconds}, indent=1) + "\n")


def _copied(tree: Any, place: torch.device) -> Any:
    """Copy nested containers, with their tensors, to a device."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().to(place, copy=True)
    if isinstance(tree, dict):
        return {key: _copied(value, place) for key, value in tree.items()}
    return [_copied(value, place) for value in tree] if isinstance(tree, list) else tree
