"""From what was measured on each row to figures, differences with intervals, breakdowns and the gate.

A model's figures come as sums: by metric, a numerator and a denominator for each row. Every metric is
the quotient of the two totals (perplexity its exponential), over all rows as over some or over rows
that are drawn again.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fintune.params import Gate

Sums = dict[str, tuple[np.ndarray, np.ndarray]]  # metric: numerator, denominator; (rows,) each
Row = dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """A metric's title, and which way is better: 1 up, -1 down, 0 neither."""

    title: str
    better: int


METRICS = {
    "loss": Metric("Loss, nats an answer token", -1),
    "perplexity": Metric("Answer perplexity", -1),
    "bits_per_byte": Metric("Bits a byte", -1),
    "token_accuracy": Metric("Token accuracy", 1),
    "rouge_1": Metric("ROUGE-1", 1),
    "rouge_2": Metric("ROUGE-2", 1),
    "rouge_l": Metric("ROUGE-L", 1),
    "chrf": Metric("chrF", 1),
    "similarity": Metric("Likeness of meaning", 1),
    "stop_rate": Metric("Stop rate", 1),
    "empty_rate": Metric("Empty answers", -1),
    "distinct_2": Metric("Different word pairs (distinct-2)", 1),
    "longest_repeat": Metric("Longest repeated stretch, words", -1),
    "mean_answer_tokens": Metric("Tokens an answer", 0),
    "length_ratio": Metric("Length, answers to references", 0),
}
BROKEN_DOWN = ("loss", "rouge_l", "stop_rate")
TEMPLATES = 10  # instruction templates that are shown apart, the most frequent ones
EXTREMES = 20
DRAWN_AT_ONCE = 4_000_000  # counts in memory


def number(value: float | None) -> str:
    """Four digits, as a person reads them."""
    if value is None or not math.isfinite(value):
        return "not a number"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}".replace("-", "−")


def select_rows(
    rows: Sequence[Row], questions: Sequence[str], max_rows: int | None
) -> tuple[list[Row], list[str], list[list[str]]]:
    """The rows that are measured, which do not depend on the order of the table.

    Args:
        questions: the normalised question of each row.

    Returns:
        At most `max_rows` rows in the order of a hash, those of one question together; the question
        of each; and all different answers that the table has for it.
    """
    references: dict[str, list[str]] = {}
    for row, question in zip(rows, questions, strict=True):
        references.setdefault(question, []).append(row["output"])

    def place(pair: tuple[Row, str]) -> tuple[bytes, bytes]:
        row, question = pair
        return _digest(question), _digest("\0".join((row["prompt"], row["completion"])))

    chosen = sorted(zip(rows, questions, strict=True), key=place)[:max_rows]
    return (
        [row for row, _ in chosen],
        [question for _, question in chosen],
        [sorted(set(references[question])) for _, question in chosen],
    )


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def summarize(sums: Sums) -> dict[str, float | None]:
    """The metrics of one model; None where the model's numbers are not finite."""
    return {
        name: finite(_figure(name, over.sum(), under.sum())) for name, (over, under) in sums.items()
    }


def _figure(name: str, over: Any, under: Any) -> Any:
    with np.errstate(all="ignore"):
        quotient = np.divide(over, under)
        return np.exp(quotient) if name == "perplexity" else quotient


def finite(value: Any) -> float | None:
    """The number, or None where it is none that JSON has; a zero has no sign."""
    return float(value) + 0.0 if math.isfinite(value) else None


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
            old, new = (_figure(name, sums[:, m, k, 0], sums[:, m, k, 1]) for m in (0, 1))
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


def judge(report: dict[str, Any], gate: Gate) -> dict[str, Any]:
    """Whether the tuned model may become champion: a verdict and a reason for every rule.

    Each rule looks at the end of the interval that speaks against the model. A rule without a
    champion to compare with holds; where there is one that could not be fetched, it is broken.

    Returns:
        `passed`, `reason` in one line, and `rules`: a list of `rule`, `passed` and `reason`.
    """
    rules: list[dict[str, Any]] = []

    def rule(name: str, held: bool | None, reason: str) -> None:
        rules.append({"rule": name, "passed": bool(held), "reason": reason})

    if (limit := gate.min_perplexity_reduction) is not None:
        low = report["improvement"]["perplexity_reduction"]["low"]
        reason = f"perplexity reduction at least {_shown(low)} (95 %), {limit:g} required"
        rule("min_perplexity_reduction", low is not None and low >= limit, reason)
    if (limit := gate.min_stop_rate) is not None:
        rate = report["tuned"]["stop_rate"]
        rule("min_stop_rate", rate >= limit, f"stop rate {_shown(rate)}, {limit:g} required")
    if (limit := gate.max_forgetting) is not None:
        high = report["forgetting"]["rise"]["high"]
        reason = f"general text's loss up by at most {_shown(high)} (95 %), {limit:g} allowed"
        rule("max_forgetting", high is not None and high <= limit, reason)
    if (limit := gate.max_loss_above_champion) is not None:
        champion = report["champion"]
        if champion["compared"]:
            low = champion["improvement"]["loss"]["low"]
            high = None if low is None else -low
            reason = f"loss above champion's by at most {_shown(high)} (95 %), {limit:g} allowed"
            rule("max_loss_above_champion", high is not None and high <= limit, reason)
        else:
            reason = f"not compared with a champion: {champion['reason']}"
            rule("max_loss_above_champion", not champion["broken"], reason)
    passed = all(each["passed"] for each in rules)
    told = [each["reason"] for each in rules if each["passed"] == passed] or ["no rule is set"]
    return {
        "passed": passed,
        "reason": f"{'passed' if passed else 'failed'}: {'; '.join(told)}",
        "rules": rules,
    }


def _shown(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.3f}"


def break_down(
    rows: Sequence[Row], base: Sums, tuned: Sums
) -> dict[str, list[dict[str, float | str | None]]]:
    """Metrics of both models by question length, answer length and instruction template.

    Lengths are cut at their quartiles, so that each part has about as many rows.

    Returns:
        By kind, the parts in their order: `label`, `rows`, and `base_` and `tuned_` with each metric.
    """
    labels = {
        "question_words": _by_length([len(row["input"].split()) for row in rows]),
        "answer_words": _by_length([len(row["output"].split()) for row in rows]),
        "instruction": _by_template([row["instruction"] for row in rows]),
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
                    part[f"{side}_{name}"] = finite(_figure(name, over, under))
            parts[kind].append(part)
    return parts


def _by_length(words: Sequence[int]) -> list[tuple[int, str]]:
    """Each row's part: its place among the parts, and a label such as `8 to 12 words`."""
    inner = np.unique(np.percentile(words, [25, 50, 75], method="lower"))
    places = np.searchsorted(inner, words)
    labels = {}
    for place in set(places.tolist()):
        of_part = [w for w, p in zip(words, places, strict=True) if p == place]
        low, high = min(of_part), max(of_part)
        range_of_words = f"{low}" if low == high else f"{low} to {high}"
        labels[place] = f"{range_of_words} word{'s' * (high > 1)}"
    return [(place, labels[place]) for place in places.tolist()]


def _by_template(instructions: Sequence[str]) -> list[tuple[int, str]]:
    ranked = sorted(Counter(instructions).items(), key=lambda item: (-item[1], item[0]))
    place = {text: i for i, (text, _) in enumerate(ranked[:TEMPLATES])}
    others = f"{len(ranked) - TEMPLATES} others"
    return [(place[text], text) if text in place else (TEMPLATES, others) for text in instructions]


def extremes(base: Sums, tuned: Sums) -> tuple[list[int], list[int]]:
    """The rows whose loss a token fell least, or rose most, and those whose loss fell most; 20 of each."""
    change = _figure("loss", *tuned["loss"]) - _figure("loss", *base["loss"])
    order = np.argsort(-np.nan_to_num(change, nan=np.inf), kind="stable").tolist()
    count = min(EXTREMES, len(order) // 2)
    return order[:count], order[::-1][:count]


def calibration_curve(sums: np.ndarray) -> dict[str, Any]:
    """How often the most likely token is right, by the probability that the model gives it.

    Args:
        sums: (bins, 3): tokens, sum of their probabilities, number right.

    Returns:
        `calibration_error`, the expected one (Guo et al. 2017): the mean distance of the two,
        weighed by tokens; and `bins`, the ones that have tokens.
    """
    full = sums[sums[:, 0] > 0]
    bins = [
        {"tokens": int(n), "confidence": finite(sure / n), "accuracy": finite(right / n)}
        for n, sure, right in full
    ]
    distance = np.abs(full[:, 1] - full[:, 2]).sum() / sums[:, 0].sum()
    # not named `error`: DVC takes a metric of that name for its own failure to read the file
    return {"calibration_error": finite(distance), "bins": bins}
