"""Metrics from sums over rows, and differences with confidence intervals.

A metric has a numerator and a denominator for each row. Its value is the quotient of their totals
(perplexity: the exponential of it), over all rows, over some, or over a bootstrap sample.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fintune.metrics import METRICS, finite

Sums = dict[str, tuple[np.ndarray, np.ndarray]]  # metric: numerator, denominator; (rows,) each
Row = dict[str, Any]
DRAWN_AT_ONCE = 4_000_000  # bootstrap counts in memory


def summarize(sums: Sums) -> dict[str, float | None]:
    """Compute the metrics of one model; None if a value is not finite."""
    return {
        name: finite(quotients(name, over.sum(), under.sum()))
        for name, (over, under) in sums.items()
    }


def quotients(name: str, over: Any, under: Any) -> Any:
    with np.errstate(all="ignore"):
        quotient = np.divide(over, under)
        return np.exp(quotient) if name == "perplexity" else quotient


def compare(
    before: Sums, after: Sums, questions: Sequence[str], samples: int, seed: int
) -> dict[str, dict[str, float | None]]:
    """Compute the improvement of `after` over `before`, with 95 % paired bootstrap intervals by question.

    Pairing cancels out what is hard for both models. Rows of a question are drawn together because their
    errors are correlated.

    Args:
        questions: the question of each row.
        samples: the number of bootstrap samples.

    Returns:
        For each metric that both have, `value`, `low` and `high` of the difference, signed so that more is
        better (after minus before if the metric has no direction); and `perplexity_reduction`, a fraction.
    """
    names = [name for name in before if name in after]
    columns = np.stack([part for side in (before, after) for n in names for part in side[n]], 1)
    drawn = resampled_sums(columns, questions, samples, seed)
    shape = (-1, 2, len(names), 2)  # draws, models, metrics, numerator and denominator
    all_rows, drawn = columns.sum(axis=0).reshape(shape), drawn.reshape(shape)

    def differences(sums: np.ndarray) -> dict[str, np.ndarray]:
        found = {}
        for k, name in enumerate(names):
            old, new = (quotients(name, sums[:, m, k, 0], sums[:, m, k, 1]) for m in (0, 1))
            found[name] = (new - old) * (METRICS[name].better or 1)
            if name == "loss":
                found["perplexity_reduction"] = 1 - np.exp(new - old)
        return found

    with np.errstate(all="ignore"):
        values, spread = differences(all_rows), differences(drawn)
        for k, name in enumerate(names):  # a draw without a row that counts says nothing
            counted = (drawn[:, :, k, 1] != 0).all(axis=1)
            spread[name] = spread[name][counted] if counted.any() else spread[name]
        return {
            name: {
                "value": finite(values[name][0]),
                "low": finite(np.percentile(spread[name], 2.5)),
                "high": finite(np.percentile(spread[name], 97.5)),
            }
            for name in values
        }


def resampled_sums(
    columns: np.ndarray, questions: Sequence[str], samples: int, seed: int
) -> np.ndarray:
    """Sum the columns over bootstrap samples of the questions.

    A sample is a count per question, so its sums are a matrix product with the questions' sums.

    Args:
        columns: (rows, columns).

    Returns:
        (samples, columns).
    """
    names, owner = np.unique(np.array(questions, dtype=object), return_inverse=True)
    sums = np.zeros((len(names), columns.shape[1]))
    np.add.at(sums, owner, columns)
    generator = np.random.default_rng(seed)
    shares = np.full(len(names), 1 / len(names))
    size = max(1, DRAWN_AT_ONCE // len(names))
    parts = [
        generator.multinomial(len(names), shares, size=min(size, samples - start)) @ sums
        for start in range(0, samples, size)
    ]
    return np.concatenate(parts)
