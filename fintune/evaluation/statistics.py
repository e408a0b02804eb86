"""From sums over rows to metrics, and to differences with intervals.

A model's figures come as sums: by metric, a numerator and a denominator for each row. Every metric is
the quotient of the two totals (perplexity its exponential), over all rows as over some or over rows
that are drawn again.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fintune.metrics import METRICS, finite

Sums = dict[str, tuple[np.ndarray, np.ndarray]]  # metric: numerator, denominator; (rows,) each
Row = dict[str, Any]
DRAWN_AT_ONCE = 4_000_000  # counts in memory


def summarize(sums: Sums) -> dict[str, float | None]:
    """The metrics of one model; None where the model's numbers are not finite."""
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
    """What `after` improves on `before`, with 95 % intervals of a paired bootstrap by question.

    Both models' rows of a drawn question come together, so that what is hard for both cancels out, and
    rows of one question stay together, since their errors go together.

    Args:
        questions: the question of each row.
        samples: how many times as many questions as there are get drawn, with replacement.

    Returns:
        For each metric that both have, `value`, `low` and `high`: the difference, signed so that more
        is better, and after minus before where neither way is; and `perplexity_reduction`, a share.
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
    """Totals of the columns over questions that are drawn with replacement, as many as there are.

    A draw is how often each question comes, so a total is a product with the questions' own sums.

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
