"""Question-answer records: map a source's rows, and drop or refuse unusable ones."""

import datetime
import decimal
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

import regex

from fintune.data.parsing import Row
from fintune.data.shapes import Columns, Unusable, rows_of
from fintune.data.tables import COLUMNS, OPTIONAL, SPLITS, read_source
from fintune.data.words import split_words
from fintune.errors import RecordError, brief

log = logging.getLogger("fintune")
# what exports write for a missing value; "None" and "N/A" may well be answers
NOT_A_TEXT = {"nan", "null", "<na>"}
NOT_A_QUESTION = NOT_A_TEXT | {"none"}
VISIBLE = regex.compile(r"(?V1)[^\p{Z}\p{Cc}\p{Cf}\p{Default_Ignorable_Code_Point}\u2800]")
HALF = regex.compile(r"\p{Cs}")  # of a character, as a cut in UTF-16 leaves it
MANY = 0.05  # share of rows; more that are dropped is a warning
SPLIT_NAMES = {
    **{name: name for name in SPLITS},
    **dict.fromkeys(("valid", "val", "dev", "eval"), "validation"),
}


def select_records(
    rows: list[Row],
    columns: Columns,
    default_instruction: str | None,
    invalid_rows: Literal["drop", "refuse"],
    source: str,
    turns: Literal["last", "all"] = "last",
    hint: str = "",
) -> tuple[list[Row], dict[str, int]]:
    """Map a source's rows to records, and drop or refuse the unusable ones.

    A row without an input asks with its instruction, if no row with an input has that instruction; its own
    is `default_instruction` then. Numbers, dates, true and false are taken as texts.

    Args:
        rows: the source's rows; their columns may differ.
        columns: the source's names, as `fintune.data.shapes.recognise` returns them.
        default_instruction: the instruction of a record for which the source has none.
        invalid_rows: `drop` unusable rows and count them by reason, or `refuse` the source at the first.
        source: its name, for messages.
        turns: of a conversation, learn the `last` answer or `all`.
        hint: what to set, where no row can be used.

    Returns:
        The records, with those optional columns that are named; and the number of rows dropped for each
        reason: `missing` (null or absent), `not_text`, `empty` (nothing that shows), `literal_nan` (`nan`,
        `null` or, as a question, `none`, left by an earlier export), `lone_surrogate` (half a character),
        and of conversations `not_messages`, `unknown_role` and `no_answer`. An empty result or kind is
        None.

    Raises:
        RecordError: a row is unusable with `refuse`, no row is usable, a result or a kind is no text, or a
            split is not the name of one.
    """
    if not rows:
        raise RecordError(f"{source}: no rows")
    records, dropped, examples = [], Counter[str](), []
    given = list(_given(rows, columns, turns))
    with_input = {
        str(row["instruction"]) for _, row, fault in given if not fault and has_input(row)
    }
    has_instructions = columns.get("instruction") is not None
    moved = 0
    for number, row, reason in given:
        place = f"{source} row {number}"
        column = columns.get("messages") or ""
        record: Row = {}
        if not reason:
            record = {name: to_text(row.get(name)) for name in COLUMNS}
            alone = not has_input(row) and str(row["instruction"]) not in with_input
            if has_instructions and alone and text_fault(record["instruction"]) is None:
                record |= {"instruction": None, "input": record["instruction"]}
                moved += 1
            elif has_instructions:
                alone = False
            checked: tuple[str, ...] = COLUMNS
            if record["instruction"] is None and (alone or not has_instructions):
                record["instruction"] = default_instruction or ""
                checked = ("input", "output")
            faults = ((name, _fault(name, record[name])) for name in checked)
            column, reason = next(((name, said) for name, said in faults if said), ("", None))
        if not reason:
            records.append(record | _optional(row, columns, place))
            continue
        shown = columns.get(column) or column
        said = f"{shown} is {reason.replace('_', ' ')}" if record else reason.replace("_", " ")
        value = f": {brief(repr(record[column]))}" if record else ""
        if invalid_rows == "refuse":
            raise RecordError(
                f"{place}: {said}{value}; mend the source or set fetch.invalid_rows: drop"
            )
        dropped[reason] += 1
        examples.append(f"row {number}: {said}")
    if not records:
        faults_of = Counter(example.partition(": ")[2] for example in examples)
        reasons = "; ".join(f"{reason} in {count}" for reason, count in faults_of.most_common())
        raise RecordError(f"{source}: none of its {len(rows)} rows can be used: {reasons}{hint}")
    if moved:
        log.info("%s: %d rows have no input and ask with their instruction", source, moved)
    warn_of_dropped(source, examples, len(given))
    return records, dict(sorted(dropped.items()))


def warn_of_dropped(source: str, examples: list[str], rows: int) -> None:
    """Warn if many rows were dropped, and name three of them."""
    if len(examples) > MANY * rows:
        log.warning(
            "warning: %s: %d of %d rows (%.0f %%) were dropped: %s%s",
            source,
            len(examples),
            rows,
            100 * len(examples) / rows,
            "; ".join(examples[:3]),
            "; ..." if len(examples) > 3 else "",
        )


def _given(
    rows: list[Row], columns: Columns, turns: Literal["last", "all"]
) -> Iterator[tuple[int, Row, str | None]]:
    """Yield the number of each source's row, what it says by role, and why that cannot be used."""
    for number, row in enumerate(rows, start=1):
        try:
            for said in rows_of(row, columns, turns):
                yield number, {"instruction": None} | said, None
        except Unusable as unusable:
            yield number, {}, str(unusable)


def has_input(row: Row) -> bool:
    """Return whether a row has an input, of whatever kind."""
    return text_fault(to_text(row.get("input"))) not in ("missing", "empty")


def to_text(value: Any) -> Any:
    """Return a number, a date, true, false or bytes as the text that they would be in a CSV file."""
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, bool | int | float | decimal.Decimal | datetime.date | datetime.time):
        return str(value)
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    return value


def _fault(column: str, value: Any) -> str | None:
    """Return the reason why a record cannot hold this text there."""
    fault = text_fault(value)
    if fault is None and column != "output" and value.strip().lower() in NOT_A_QUESTION:
        return "literal_nan"
    return fault


def _optional(row: Row, columns: Columns, place: str) -> Row:
    """Read a row's optional columns; a split gets the name that the pipeline uses."""
    values: Row = {}
    for column in OPTIONAL:
        if column not in row:
            continue
        value = to_text(row[column])
        fault = text_fault(value)
        if fault in ("not_text", "lone_surrogate"):
            name, said = columns.get(column), brief(repr(value))
            raise RecordError(
                f"{place}: {name} is {fault.replace('_', ' ')}: {said}; mend the source"
            )
        values[column] = None if fault in ("missing", "empty") else str(value)
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
    rows = read_source(source, lambda names: ["text"])
    for number, row in enumerate(rows, start=1):
        if text_fault(row.get("text")) or len(split_words(row["text"])) < 2:
            said = brief(repr(row.get("text")))
            raise RecordError(f"{source} row {number}: text is {said}, not some words")
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
    if not VISIBLE.search(value):
        return "empty"
    if HALF.search(value):
        return "lone_surrogate"
    return "literal_nan" if value.strip().lower() in NOT_A_TEXT else None
