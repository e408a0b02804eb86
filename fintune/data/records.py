"""The question-answer record: unusable rows are dropped or refused, by reason."""

import difflib
import re
import unicodedata
from collections import Counter
from typing import Any, Literal

from fintune.data.tables import COLUMNS, Row, read_source
from fintune.errors import RecordError

NOT_A_TEXT = {"nan", "none", "null"}


def select_records(
    rows: list[Row],
    columns: dict[str, str | None],
    default_instruction: str | None,
    invalid_rows: Literal["drop", "refuse"],
    source: str,
) -> tuple[list[Row], dict[str, int]]:
    """Map a source's rows to records and set aside those that cannot be used.

    Args:
        rows: the source's rows; a column that the first row lacks may be in others.
        columns: instruction, input and output, each with its name in the source (instruction may be null).
        default_instruction: the instruction of every record where the source has no such column.
        invalid_rows: `drop` and count by reason, or `refuse` the source at the first one.
        source: its name, for messages.

    Returns:
        The records, and the number of rows dropped for each reason: `missing` (null or absent),
        `not_text`, `empty` (nothing but white space), `literal_nan` (a `nan`, `none` or `null` that
        an earlier export wrote out as text).

    Raises:
        RecordError: a column does not exist, an unusable row with `refuse`, or no usable row at all.
    """
    if not rows:
        raise RecordError(f"{source}: no rows")
    present = {name for row in rows for name in row}
    for column, name in columns.items():
        if name is not None and name not in present:
            near = difflib.get_close_matches(name, present, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(present))}"
            raise RecordError(f"{source}: fetch.columns.{column}: no column {name!r}; {hint}")
    records, dropped = [], Counter[str]()
    for number, row in enumerate(rows, start=1):
        record = {
            column: default_instruction if name is None else row.get(name)
            for column, name in columns.items()
        }
        faults = ((column, fault) for column in COLUMNS if (fault := text_fault(record[column])))
        column, reason = next(faults, ("", ""))
        if not reason:
            records.append(record)
        elif invalid_rows == "refuse":
            raise RecordError(
                f"{source} row {number}: {columns[column]} is {reason.replace('_', ' ')}: "
                f"{record[column]!r}; mend the source or set fetch.invalid_rows: drop"
            )
        else:
            dropped[reason] += 1
    if not records:
        raise RecordError(f"{source}: none of its {len(rows)} rows can be used: {dict(dropped)}")
    return records, dict(sorted(dropped.items()))


def read_passages(source: str) -> list[str]:
    """The texts of a table with a column `text`.

    Raises:
        RecordError: it cannot be read, has no row, or a row without a text of some words.
    """
    rows = read_source(source)
    for number, row in enumerate(rows, start=1):
        if text_fault(row.get("text")) or len(row["text"].split()) < 2:
            raise RecordError(f"{source} row {number}: text is {row.get('text')!r}, not some words")
    if not rows:
        raise RecordError(f"{source}: no rows")
    return [row["text"] for row in rows]


def usual_instruction(rows: list[Row]) -> str:
    """Return the instruction that most rows have; of equally frequent ones the first in the alphabet."""
    counts = Counter(row["instruction"] for row in rows)
    return str(min(counts, key=lambda text: (-counts[text], text)))


def text_fault(value: Any) -> str | None:
    """Why a value is no text to train on, or None."""
    if value is None or (isinstance(value, float) and value != value):
        return "missing"
    if not isinstance(value, str):
        return "not_text"
    if not value.strip():
        return "empty"
    return "literal_nan" if value.strip().lower() in NOT_A_TEXT else None


def normalize_question(text: str) -> str:
    """Fold what does not make another question: case, white space, punctuation, Unicode variants.

    NFKC maps compatibility characters (full-width letters, no-break spaces, ligatures); invisible
    format characters and soft hyphens go. Signs that carry meaning next to a number stay: `$ % . -`.
    """
    text = unicodedata.normalize("NFKC", text)
    text = "".join(c for c in text if unicodedata.category(c) not in ("Cf", "Cc") or c.isspace())
    text = unicodedata.normalize("NFKC", text.casefold())
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    text = re.sub(r"(?<!\d)[.\-](?!\d)|(?<=\d)[.\-](?!\d)|[^\w\s$%.\-]|_", " ", text)
    return " ".join(text.split()) or "?"
