"""Rows for training from what users said of answers."""

import datetime
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from fintune.data.questions import normalize_question, questions_of
from fintune.data.similar import Forest, group_similar
from fintune.data.tables import read_rows
from fintune.data.unpacking import Row
from fintune.errors import UserError
from fintune.evaluation.collected import is_right
from fintune.usage.exchanges import Exchange

log = logging.getLogger("fintune")

# of a collected row: its texts, the trace that it comes from, what made it one, the model's answer, when
COLUMNS = ("instruction", "input", "output", "origin", "reason", "model", "answered", "asked")
CORRECTED, APPROVED = "corrected", "approved"


@dataclass
class Collected:
    """Rows, and what became of the other exchanges: how many by reason, and a line for each to look at."""

    rows: list[Row] = field(default_factory=list)
    left: Counter[str] = field(default_factory=Counter)
    told: list[str] = field(default_factory=list)

    def leave(self, row: Row, reason: str, said: str) -> None:
        """Count a row that is left out, and tell where it comes from, without its text."""
        self.left[reason] += 1
        self.told.append(f"{row['origin']}: {reason}: {said}")


def collect(
    found: Iterable[Exchange],
    usual: str,
    test: list[str],
    similarity: float | None,
    look: Callable[[str], list[str]] | None,
) -> Collected:
    """Make rows of exchanges that were corrected or approved.

    Args:
        usual: the instruction of exchanges without one.
        test: normalised questions of the test rows.
        similarity: from which a question counts as one of them; None: equal ones alone.
        look: returns the kinds of secrets and personal data in a text; None: nothing is looked for.
    """
    collected = Collected()
    rows = []
    for each in found:
        if each.error or (each.correction is None and not each.approved):
            reason = "disapproved without a correction" if each.approved is False else "not judged"
            collected.left["failed" if each.error else reason] += 1
        elif each.correction is None and not each.ended:
            collected.left["approved, but cut off"] += 1
        else:
            rows.append(row_of(each, usual))
    kept = _without_conflicts(rows, collected)
    near = near_questions(questions_of(kept), test, similarity)
    for row, is_near in zip(kept, near, strict=True):
        if is_near:
            collected.leave(row, "near a test question", "training on it would spoil the test")
        elif look and (kinds := look("\n".join((row["input"], row["output"])))):
            collected.leave(row, "secret or personal data", ", ".join(kinds))
        else:
            collected.rows.append(row)
    return collected


def row_of(exchange: Exchange, usual: str) -> Row:
    """Return the row of a corrected or approved exchange."""
    at = datetime.datetime.fromtimestamp(exchange.at, datetime.UTC)
    return {
        "instruction": exchange.instruction or usual,
        "input": exchange.input,
        "output": exchange.correction or exchange.answer,
        "origin": exchange.trace,
        "reason": CORRECTED if exchange.correction else APPROVED,
        "model": exchange.model,
        "answered": exchange.answer,
        "asked": at.isoformat(timespec="seconds"),
    }


def _without_conflicts(rows: list[Row], collected: Collected) -> list[Row]:
    """Return the newest row of each question; the rows of one whose answers differ are left out."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        key = (row["instruction"], normalize_question(row["input"]))
        groups.setdefault(key, []).append(row)
    kept = []
    for group in groups.values():
        answers = {" ".join(row["output"].split()) for row in group}
        if len(answers) == 1:
            kept.append(group[-1])
            collected.left["said before"] += len(group) - 1
            continue
        for row in group:
            others = ", ".join(other["origin"] for other in group if other is not row)
            said = f"another answer than {others} to one question"
            collected.leave(row, "conflicting", said)
    return kept


def near_questions(questions: list[str], test: list[str], similarity: float | None) -> list[bool]:
    """Return of each normalised question whether it is equal or similar to one of the test's."""
    held = sorted(set(test))
    equal = set(held)
    if similarity is None or not held or not questions:
        return [question in equal for question in questions]
    both = [*held, *questions]
    forest = Forest(len(both))
    with tempfile.TemporaryDirectory() as scratch:
        texts = [pa.array(both, pa.string())]
        group_similar(texts, len(both), similarity, forest, Path(scratch))
    roots = forest.roots(np.arange(len(both)))
    near = set(roots[: len(held)].tolist())
    pairs = zip(questions, roots[len(held) :].tolist(), strict=True)
    return [question in equal or root in near for question, root in pairs]


def kept_rows(path: Path, since: datetime.datetime | None, new: list[Row]) -> list[Row]:
    """Return the new rows with the file's earlier ones, which a later date would leave out."""
    if since is None or not path.is_file():
        return new
    fresh = {row["origin"] for row in new}
    return [
        *(
            row
            for row in read_rows(path, COLUMNS)
            if row["origin"] not in fresh and _time(row["asked"]) < since
        ),
        *new,
    ]


def compare(rows: list[Row], answer: Callable[[Row], str]) -> tuple[list[bool], list[bool]]:
    """Return of each collected row whether the answer in its trace was right, and whether the new one is.

    Args:
        answer: has the model of now answer a row's question.
    """
    before = [is_right(row, row["answered"]) for row in rows]
    bar = tqdm(rows, desc="collected questions", unit="answer", leave=False)
    return before, [is_right(row, answer(row)) for row in bar]


def _time(text: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(text)


def read_date(text: str) -> datetime.datetime:
    """Read a date, or a date and a time, of this machine's time zone if it names none.

    Raises:
        UserError: it is none.
    """
    try:
        return datetime.datetime.fromisoformat(text).astimezone()
    except ValueError:
        raise UserError(f"--since {text}: no date; write it as 2026-11-27") from None
