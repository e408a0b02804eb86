"""The evaluation's metrics: names, titles and directions, and number formatting."""

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """A metric's title and direction: 1 if higher is better, -1 if lower is, 0 if neither."""

    title: str
    better: int


METRICS = {
    "accuracy": Metric("Right answers, share of those that can be checked", 1),
    "checkable_rows": Metric("Rows whose result can be checked", 0),
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
    "loop_rate": Metric("Answers that end in a loop", -1),
    "empty_rate": Metric("Empty answers", -1),
    "distinct_2": Metric("Different word pairs (distinct-2)", 1),
    "longest_repeat": Metric("Longest repeated stretch, words", -1),
    "mean_answer_tokens": Metric("Tokens an answer", 0),
    "length_ratio": Metric("Length, answers to references", 0),
}


def number(value: float | None) -> str:
    """Format with four significant digits, or as a whole number from 10,000 on."""
    if value is None or not math.isfinite(value):
        return "not a number"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}".replace("-", "−")


def finite(value: Any) -> float | None:
    """Return the value as a float without negative zero, or None if JSON cannot represent it."""
    return float(value) + 0.0 if math.isfinite(value) else None
