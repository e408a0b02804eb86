"""Select the test rows to measure."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fintune import paths
from fintune.data.records import read_passages
from fintune.evaluation.statistics import Row

log = logging.getLogger("fintune")


@dataclass(frozen=True)
class Chosen:
    """Rows to measure, the normalised question of each, and all different answers to it in the table."""

    rows: list[Row]
    questions: list[str]
    references: list[list[str]]


def select_rows(rows: Sequence[Row], questions: Sequence[str], max_rows: int | None) -> Chosen:
    """Select the rows to measure, independently of the table's order.

    Args:
        questions: the normalised question of each row.

    Returns:
        At most `max_rows` rows in hash order, with the rows of a question together.
    """
    references: dict[str, list[str]] = {}
    for row, question in zip(rows, questions, strict=True):
        references.setdefault(question, []).append(row["output"])

    def place(pair: tuple[Row, str]) -> tuple[bytes, bytes]:
        row, question = pair
        return _digest(question), _digest("\0".join((row["prompt"], row["completion"])))

    chosen = sorted(zip(rows, questions, strict=True), key=place)[:max_rows]
    return Chosen(
        [row for row, _ in chosen],
        [question for _, question in chosen],
        [sorted(set(references[question])) for _, question in chosen],
    )


def general_passages(file: str | None) -> list[str]:
    """Read the passages of evaluate.general_text, if any, and say if DVC does not watch it."""
    if not file:
        return []
    passages = read_passages(file)
    if passages and Path(file).resolve() != paths.GENERAL_TEXT.resolve():
        log.warning(
            "note: DVC does not watch evaluate.general_text: %s; after editing it run "
            "`dvc repro --force evaluate`",
            file,
        )
    return passages


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
