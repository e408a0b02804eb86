"""Question-answer records: map a source's rows, and drop or refuse unusable ones."""

import difflib
from collections import Counter
from typing import Any, Literal

from fintune.data.tables import COLUMNS, OPTIONAL, SPLITS, Row, read_source
from fintune.errors import RecordError

NOT_A_TEXT = {"nan", "none", "null"}
SPLIT_NAMES = {
    **{name: name for name in SPLITS},
    **dict.fromkeys(("valid", "val", "dev", "eval"), "validation"),
}


def select_records(
    rows: list[Row],
    columns: dict[str, str | None],
    default_instruction: str | None,
    invalid_rows: Literal["drop", "refuse"],
    source: str,
) -> tuple[list[Row], dict[str, int]]:
    """Map a source's rows to records, and drop or refuse the unusable ones.

    Args:
        rows: the source's rows; their columns may differ.
        columns: the source's names for instruction, input and output, and perhaps for result, kind and
            split; only input and output may not be null.
        default_instruction: the instruction of every record if the source has no column for it.
        invalid_rows: `drop` unusable rows and count them by reason, or `refuse` the source at the first.
        source: its name, for messages.

    Returns:
        The records, with those optional columns that are named; and the number of rows dropped for each
        reason: `missing` (null or absent), `not_text`, `empty` (only white space), `literal_nan` (`nan`,
        `none` or `null` as text, left by an earlier export). An empty result or kind is None.

    Raises:
        RecordError: a column does not exist, a row is unusable with `refuse`, no row is usable, a result
            or a kind is no text, or a split is not the name of one.
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
            if column in COLUMNS
        }
        faults = ((column, fault) for column in COLUMNS if (fault := text_fault(record[column])))
        column, reason = next(faults, ("", ""))
        if not reason:
            records.append(record | _optional(row, columns, f"{source} row {number}"))
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


def _optional(row: Row, columns: dict[str, str | None], place: str) -> Row:
    """Read a row's optional columns; a split gets the name that the pipeline uses."""
    values: Row = {}
    for column in OPTIONAL:
        name = columns.get(column)
        if name is None:
            continue
        value = row.get(name)
        fault = text_fault(value)
        if fault == "not_text":
            raise RecordError(f"{place}: {name} is not text: {value!r}; mend the source")
        values[column] = None if fault in ("missing", "empty") else value
    if "split" in values:
        given = values["split"]
        values["split"] = SPLIT_NAMES.get(str(given).strip().lower())
        if values["split"] is None:
            raise RecordError(
                f"{place}: {columns['split']} is {given!r}, not one of {', '.join(SPLIT_NAMES)}; "
                "mend the source, or set fetch.columns.split: null"
            )
    return values


def read_passages(source: str) -> list[str]:
    """Read the texts of a table with a column `text`.

    Raises:
        RecordError: the table cannot be read, is empty, or has a text of fewer than two words.
    """
    rows = read_source(source)
    for number, row in enumerate(rows, start=1):
        if text_fault(row.get("text")) or len(row["text"].split()) < 2:
            raise RecordError(f"{source} row {number}: text is {row.get('text')!r}, not some words")
    if not rows:
        raise RecordError(f"{source}: no rows")
    return [row["text"] for row in rows]


def usual_instruction(rows: list[Row]) -> str:
    """Return the most frequent instruction; of equally frequent ones, the first in the alphabet."""
    counts = Counter(row["instruction"] for row in rows)
    return str(min(counts, key=lambda text: (-counts[text], text)))


def text_fault(value: Any) -> str | None:
    """Return the reason why a value cannot be trained on, or None."""
    if value is None or (isinstance(value, float) and value != value):
        return "missing"
    if not isinstance(value, str):
        return "not_text"
    if not value.strip():
        return "empty"
    return "literal_nan" if value.strip().lower() in NOT_A_TEXT else None
