"""The metrics files: what experiments compare, and all else in a list, which DVC leaves out."""

from collections.abc import Collection
from typing import Any

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
        if isinstance(inside, dict) and isinstance(value, dict):
            value = _joined(inside, value)
        found[key] = value
    return found
