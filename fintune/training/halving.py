"""The plan of a search for the learning rate, and the judgement of its losses.

Successive halving (Jamieson and Talwalkar, 2016) trains all candidates for a few steps and goes on with the
better ones. A few steps favour rates that are too high for a whole training (Wu et al., 2018), so what is
best there is lowered by a factor that was measured (docs/experiments.md).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fintune.errors import UserError

SHARE = 0.15  # of a training's steps, at most, that its search takes
RATES = tuple(1e-4 * 2**n for n in range(10))
BELOW, ABOVE = 2, 1  # neighbours of the best one that go on: more steps favour lower rates
FEWEST, LEAST = 2, 8  # steps of a candidate in the first round and in the last one, at least
SHALLOW = 8  # the last round is at most so many times as deep as the first
# what is best after a few steps, times LOWERED, is best for a training; after ALIKE steps it is that itself
LOWERED, ALIKE = 0.4, 40


class Round(NamedTuple):
    """The candidates of a round, the step that each reaches, and the steps of all of them to get there."""

    candidates: int
    until: int
    steps: int


@dataclass(frozen=True)
class Found:
    """The rate that a search found, the steps and seconds that it took, and its losses.

    `losses` has a row for each candidate of each round: `steps`, `learning_rate`, and the `loss` in nats per
    answer token, which is None if it is not finite.
    """

    rate: float
    steps: int
    seconds: float
    losses: list[dict[str, float | None]]


def plan_rounds(steps: int) -> list[Round]:
    """Plan the rounds of a search, as deep as its share of a training's steps allows.

    Raises:
        UserError: the share is too small to tell rates apart.
    """
    plan, deeper = list[Round](), _rounds(LEAST)
    while sum(each.steps for each in deeper) <= SHARE * steps:
        plan, deeper = deeper, _rounds(deeper[-1].until + 1)
    if not plan:
        needed = math.ceil(sum(each.steps for each in deeper) / SHARE)
        raise UserError(
            f"train.learning_rate: auto: a search may take {SHARE:.0%} of the steps, and of this training's "
            f"{steps} that is too few to tell rates apart ({needed} or more are needed); give a number, such "
            "as 1e-3 for a small base, 2e-4 for a 7B"
        )
    return plan


def _rounds(until: int) -> list[Round]:
    """Plan rounds whose last one reaches a step; the first step's gradients are the same for all."""
    all_, last, first = len(RATES), BELOW + 1 + ABOVE, max(FEWEST, until // SHALLOW)
    return [
        Round(all_, first, 1 + all_ * (first - 1)),
        Round(last, until, last * (until - first)),
    ]


def score(losses: Sequence[float | None]) -> float:
    """Return the mean of the later half of a candidate's losses; infinity if one is not finite.

    A step's loss is measured before its update, on rows that no step before it had. So all candidates are
    judged by the same rows, and by none that they were trained on.
    """
    if None in losses:
        return math.inf
    later = losses[len(losses) // 2 :]
    return sum(float(loss or 0) for loss in later) / len(later)


def survivors(scores: Mapping[float, float]) -> list[float]:
    """Return the best rate and those of its neighbours that can be best in the end."""
    rates = sorted(scores)
    best = rates.index(min(rates, key=lambda rate: scores[rate]))
    first = min(max(0, best - BELOW), len(rates) - (BELOW + 1 + ABOVE))
    return rates[first : first + BELOW + 1 + ABOVE]


def best_rate(scores: Mapping[float, float], until: int) -> float:
    """Return the rate for the whole training, by the scores of the last round.

    It is the lowest point of a parabola through the best one and its neighbours, over the logarithm of the
    rate; lowered, since it is the best one for `until` steps.

    Raises:
        UserError: no loss is finite.
    """
    rates = sorted(scores)
    place = rates.index(min(rates, key=lambda rate: scores[rate]))
    best = rates[place]
    if not math.isfinite(scores[best]):
        raise UserError(
            f"train.learning_rate: auto: no rate from {rates[0]:g} to {rates[-1]:g} had a finite loss; "
            "base.model may have weights that are not finite, or overflow in train.precision"
        )
    if 0 < place < len(rates) - 1:
        below, above = (scores[rates[n]] - scores[best] for n in (place - 1, place + 1))
        spacing = math.log(rates[place + 1] / best)
        # an infinite loss above it puts the lowest point half a spacing lower
        share = (below - above) / (below + above) if math.isfinite(above) and below + above else 0.0
        best *= math.exp(spacing / 2 * (share if math.isfinite(above) else -1.0))
    return float(f"{best * min(1.0, max(LOWERED, until / ALIKE)):.2g}")
