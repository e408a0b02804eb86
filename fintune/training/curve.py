"""The training curve, as rows and as CSV."""

import csv
import io
from typing import Any

from fintune.training.callbacks import CURVE

Curve = list[dict[str, float | None]]


def curve_of(history: list[dict[str, Any]]) -> Curve:
    """Merge the Trainer's log entries into one row per step; None where a value was not measured."""
    by_step: dict[int, dict[str, float]] = {}
    for entry in history:
        values = {name: entry[key] for key, name in CURVE.items() if key in entry}
        if values:
            by_step.setdefault(entry["step"], {}).update(values)
    return [
        {"step": step, **{name: values.get(name) for name in CURVE.values()}}
        for step, values in sorted(by_step.items())
    ]


def validations(curve: Curve) -> Curve:
    """Select the validated steps, with the loss and the score of the answers."""
    names = ("step", "validation_loss", "validation_answers")
    return [
        {name: point[name] for name in names}
        for point in curve
        if point["validation_loss"] is not None
    ]


def as_csv(curve: Curve) -> str:
    """Format a curve as CSV, with empty cells where a value was not measured."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(curve[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(curve)
    return text.getvalue()
