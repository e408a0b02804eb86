"""The plan of a search for the learning rate, and the judgement of its losses.

Candidates are short trainings, each with its own warm-up and decay. The best rate of a training falls with
its length: by the power of 0.32 in Bjorck et al. 2024, "Scaling Optimal LR Across Token Horizons". So what
is best for a few steps is lowered by that law (measured here: docs/experiments.md).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fintune.errors import UserError

SHARE = 0.15  # of a training's steps, at most, that its search takes
COARSE = tuple(1e-4 * 4**n for n in range(5))
FINE = (0.5, 1.0, 2.0)  # times the best of the coarse ones
LEAST = 5  # steps of a fine candidate; a coarse one has half as many
RISE = 0.25  # of a candidate's steps
HORIZON = 1 / 3  # the power by which the best rate falls with the number of steps


class Round(NamedTuple):
    """The candidates of a round, the steps of each, and those of all; the first step is computed once."""

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
    coarse, fine, first = len(COARSE), len(FINE), until // 2
    return [
        Round(coarse, first, 1 + coarse * (first - 1)),
        Round(fine, until, fine * (until - 1)),
    ]


def factor(step: int, steps: int) -> float:
    """Return a candidate's learning rate at a step, as a share of its highest; it rises and falls to zero."""
    rise = math.ceil(RISE * steps)
    return (step + 1) / rise if step < rise else 1 - (step - rise) / (steps - rise)


def score(losses: Sequence[float | None]) -> float:
    """Return the mean of the later half of a candidate's losses; infinity if one is not finite.

    A step's loss is measured before its update, on rows that no step before it had. So all candidates are
    judged by the same rows, and by none that they were trained on.
    """
    if None in losses:
        return math.inf
    later = losses[len(losses) // 2 :]
    return sum(float(loss or 0) for loss in later) / len(later)


def best_of(scores: Mapping[float, float]) -> float:
    """Return the rate with the lowest score.

    Raises:
        UserError: no score is finite.
    """
    best = min(scores, key=lambda rate: scores[rate])
    if not math.isfinite(scores[best]):
        raise UserError(
            f"train.learning_rate: auto: no rate from {min(scores):g} to {max(scores):g} had a finite loss; "
            "base.model may have weights that are not finite, or overflow in train.precision"
        )
    return best


def lowest_point(scores: Mapping[float, float], untrained: float) -> float:
    """Return the lowest point of a parabola through the best rate and its neighbours, over its logarithm.

    At an end of the rates, it is the best one itself.

    Args:
        scores: of rates, each the same multiple of the one before.
        untrained: the score of a model that is not trained; what is worse counts as that.
    """
    best, rates = best_of(scores), sorted(scores)
    place = rates.index(best)
    if not 0 < place < len(rates) - 1:
        return best
    least, *others = (min(scores[rates[n]], untrained) for n in (place, place - 1, place + 1))
    below, above = (max(0.0, each - least) for each in others)
    share = (below - above) / (below + above) if below + above else 0.0
    return best * math.exp(math.log(rates[place + 1] / best) / 2 * share)


def rate_for(steps: int, rate: float, until: int) -> float:
    """Return the rate for a training, by the best one for its first steps."""
    return float(f"{rate * (until / steps) ** HORIZON:.2g}")
