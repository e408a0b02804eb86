"""Metrics by length and instruction, rows with extreme changes, and calibration."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from fintune.data.words import split_words
from fintune.evaluation.statistics import Row, Sums, quotients
from fintune.metrics import finite

BROKEN_DOWN = ("accuracy", "loss", "rouge_l", "stop_rate")
SHOWN = 10  # most frequent kinds or instruction templates shown separately
EXTREMES = 20


def break_down(
    rows: Sequence[Row], base: Sums, tuned: Sums
) -> dict[str, list[dict[str, float | str | None]]]:
    """Compute both models' metrics by kind, question length, answer length and instruction template.

    Lengths are cut at their quartiles. Kinds are those of the source's column, if it has one.

    Returns:
        By kind, its parts in order: `label`, `rows`, and `base_` and `tuned_` with each metric.
    """
    kinds = [str(row.get("kind") or "none") for row in rows]
    labels = {
        **({"kind": _by_name(kinds)} if set(kinds) != {"none"} else {}),
        "question_words": _by_length([len(split_words(row["input"])) for row in rows]),
        "answer_words": _by_length([len(split_words(row["output"])) for row in rows]),
        "instruction": _by_name([row["instruction"] for row in rows]),
    }
    parts: dict[str, list[dict[str, float | str | None]]] = {}
    for kind, of_rows in labels.items():
        parts[kind] = []
        for _, label in sorted(set(of_rows)):
            inside = np.array([each[1] == label for each in of_rows])
            part: dict[str, float | str | None] = {"label": label, "rows": int(inside.sum())}
            for name in BROKEN_DOWN:
                for side, sums in (("base", base), ("tuned", tuned)):
                    over, under = (column[inside].sum() for column in sums[name])
                    part[f"{side}_{name}"] = finite(quotients(name, over, under))
            parts[kind].append(part)
    return parts


def _by_length(words: Sequence[int]) -> list[tuple[int, str]]:
    """Return each row's part: its index, and a label such as `8 to 12 words`."""
    inner = np.unique(np.percentile(words, [25, 50, 75], method="lower"))
    places = np.searchsorted(inner, words)
    labels = {}
    for place in set(places.tolist()):
        of_part = [w for w, p in zip(words, places, strict=True) if p == place]
        low, high = min(of_part), max(of_part)
        range_of_words = f"{low}" if low == high else f"{low} to {high}"
        labels[place] = f"{range_of_words} word{'s' * (high > 1)}"
    return [(place, labels[place]) for place in places.tolist()]


def _by_name(names: Sequence[str]) -> list[tuple[int, str]]:
    """Return each row's part: its place among the most frequent names, and the name."""
    ranked = sorted(Counter(names).items(), key=lambda item: (-item[1], item[0]))
    place = {text: i for i, (text, _) in enumerate(ranked[:SHOWN])}
    others = f"{len(ranked) - SHOWN} others"
    return [(place[text], text) if text in place else (SHOWN, others) for text in names]


def extremes(base: Sums, tuned: Sums) -> tuple[list[int], list[int]]:
    """Return the 20 rows whose loss per token fell least or rose most, and the 20 where it fell most."""
    change = quotients("loss", *tuned["loss"]) - quotients("loss", *base["loss"])
    order = np.argsort(-np.nan_to_num(change, nan=np.inf), kind="stable").tolist()
    count = min(EXTREMES, len(order) // 2)
    return order[:count], order[::-1][:count]


def calibration_curve(sums: np.ndarray) -> dict[str, Any]:
    """Compute how often the most likely token is right, by the probability that the model gives it.

    Args:
        sums: (bins, 3): tokens, sum of their probabilities, number right.

    Returns:
        `calibration_error`, the expected calibration error (Guo et al. 2017): the mean distance between
        probability and accuracy, weighted by tokens; and `bins`, those that have tokens.
    """
    full = sums[sums[:, 0] > 0]
    bins = [
        {"tokens": int(n), "confidence": finite(sure / n), "accuracy": finite(right / n)}
        for n, sure, right in full
    ]
    distance = np.abs(full[:, 1] - full[:, 2]).sum() / sums[:, 0].sum()
    # not named `error`: DVC reads a metric of that name as its own failure to read the file
    return {"calibration_error": finite(distance), "bins": bins}
