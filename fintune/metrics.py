"""The metrics: names, titles and directions, which ones experiments compare, and number formatting."""

import math
from collections.abc import Collection
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

OF_MODELS = (
    *("loss", "perplexity", "token_accuracy", "accuracy", "checkable_rows", "rouge_l"),
    *("stop_rate", "loop_rate", "mean_answer_tokens"),
)
# keys of the metrics files, or of their sections, that are compared
OF_TRAINING = (
    *("train_loss", "validation_loss", "validation_answers", "best_step", "learning_rate", "steps"),
    *("seconds", "tokens_per_second", "peak_memory_gib", "processes"),
    *("trainable_parameters", "trainable_percent"),
)
OF_EVALUATION = (
    *(f"{side}.{name}" for side in ("tuned", "base") for name in OF_MODELS),
    *("improvement.loss", "improvement.accuracy", "forgetting.rise.value", "rows", "questions"),
    *("gate.passed", "gate.reason", "gate.rules", "decoding.max_new_tokens"),
    *(f"decoding.{name}" for name in ("temperature", "top_p", "min_p", "top_k")),
    "decoding.repetition_penalty",
)
DETAILS = "details"


def compact(report: dict[str, Any], compared: Collection[str]) -> dict[str, Any]:
    """Return a report with all that experiments do not compare in one list, `details`, which DVC leaves out.

    Args:
        compared: dotted keys of the values and sections that stay where they are.
    """
    kept, others = _parted(report, compared, "")
    return {**kept, DETAILS: [others]} if others else kept


def whole(report: dict[str, Any]) -> dict[str, Any]:
    """Return a report with its details where they belong; one of an earlier release as it is."""
    found = {key: value for key, value in report.items() if key != DETAILS}
    for others in report.get(DETAILS, []):
        found = _joined(found, others)
    return found


def _parted(
    tree: dict[str, Any], compared: Collection[str], prefix: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    kept: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for key, value in tree.items():
        name = prefix + key
        if name in compared:
            kept[key] = value
        elif isinstance(value, dict) and any(each.startswith(f"{name}.") for each in compared):
            inside, outside = _parted(value, compared, f"{name}.")
            kept |= {key: inside} if inside else {}
            others |= {key: outside} if outside or not inside else {}
        else:
            others[key] = value
    return kept, others


def _joined(tree: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    found = dict(tree)
    for key, value in others.items():
        inside = found.get(key)
        nested = isinstance(inside, dict) and isinstance(value, dict)
        found[key] = _joined(inside, value) if nested else value
    return found


def number(value: float | None) -> str:
    """Format with four significant digits, or as a whole number from 10,000 on."""
    if value is None or not math.isfinite(value):
        return "not a number"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}".replace("-", "−")


def finite(value: Any) -> float | None:
    """Return the value as a float without negative zero, or None if JSON cannot represent it."""
    return float(value) + 0.0 if math.isfinite(value) else None
