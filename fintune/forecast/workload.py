"""The work that a run has: rows and tokens, from the first rows of its source."""

import hashlib
import statistics
from dataclasses import dataclass, field
from typing import Any

from fintune.data import chat
from fintune.data.parsing import rows_in
from fintune.data.prompt import encode, render_row
from fintune.data.selection import Rules, Selected, select_records
from fintune.data.shapes import describe, recognise
from fintune.data.sources import opened_source
from fintune.data.unpacking import Piece
from fintune.errors import UserError
from fintune.params import Fetch, Source, Split

FIRST = 20_000  # rows of a source that are looked at; the others are counted
ENCODED = 400  # rows whose tokens are counted


@dataclass
class Sample:
    """The first records of the sources, and how many rows there are; `said` has a line for each source."""

    rows: float = 0.0
    records: list[dict[str, Any]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Workload:
    """Rows of each split, and the tokens of some of them."""

    train: float
    validation: float
    test: float
    lengths: list[int]
    answers: list[int]

    @property
    def tokens(self) -> float:
        """Return the mean tokens of a row."""
        return statistics.fmean(self.lengths)

    @property
    def answer_tokens(self) -> float:
        """Return the mean tokens of an answer."""
        return statistics.fmean(self.answers)


def take_sample(part: Source, sample: Sample) -> None:
    """Add a source's first records and the number of its rows, as fetch would select them.

    Raises:
        UserError: it cannot be reached or read, or has none of the columns.
    """
    with opened_source(part) as (table, _):
        columns = recognise(table.names, part)
        rules = Rules(
            columns, part.default_instruction, "drop", part.source, part.turns, part.share
        )
        told, further = Selected(), 0
        for piece in table.read({name for name in columns.values() if name is not None}):
            if told.rows >= FIRST:
                further += _count(piece)
                continue
            some, records = select_records(rows_in(piece), rules, told.rows)
            told.add(some)
            sample.records += records.to_pylist()
    if not told.rows:
        raise UserError(f"{part.source}: no rows")
    if not told.kept:
        raise UserError(
            f"{part.source}: none of its first {told.rows:,} rows can be used: "
            + ", ".join(f"{reason} in {count:,}" for reason, count in told.faults.most_common(3))
        )
    lost = sum(told.dropped.values())
    sample.rows += told.kept * (1 + further / told.rows)
    sample.said.append(
        f"{part.source}: {told.rows + further:,} rows; columns {describe(columns)}; "
        f"{lost:,} of the first {told.rows:,} would be dropped"
    )


def _count(piece: Piece) -> int:
    if isinstance(piece.content, bytes):
        return piece.content.count(b"\n")
    return len(piece.content)


def workload(sample: Sample, split: Split, tokenizer: Any, max_tokens: int) -> Workload:
    """Return the rows of each split without duplicates, and the tokens of rows spread over the sample."""
    records = list({_digest(record): record for record in sample.records}.values())
    rows = sample.rows * len(records) / len(sample.records)
    named = [record.get("split") for record in records]
    shares = {
        name: fraction if fraction is not None else named.count(name) / len(records)
        for name, fraction in (
            ("validation", split.validation_fraction),
            ("test", split.test_fraction),
        )
    }
    lengths, answers = [], []
    for record in records[:: max(1, len(records) // ENCODED)]:
        try:
            prompt, answer = encode(tokenizer, *render_row(tokenizer, record, record["output"]))
        except chat.Refused:
            continue
        lengths.append(min(max_tokens, len(prompt) + len(answer)))
        answers.append(max(1, lengths[-1] - len(prompt)))
    if not lengths:
        raise UserError("format.template: the base's chat template refuses all rows")
    held_out = {name: rows * share for name, share in shares.items()}
    return Workload(rows - sum(held_out.values()), **held_out, lengths=lengths, answers=answers)


def sources_of(fetch: Fetch) -> list[Source]:
    """Return all sources."""
    return [fetch, *fetch.more]


def _digest(record: dict[str, Any]) -> bytes:
    texts = "\0".join(str(record.get(name)) for name in ("instruction", "input", "output"))
    return hashlib.md5(texts.encode()).digest()
