"""Texts of records: what can be used, and why others cannot."""

import datetime
import decimal
import hashlib
import logging
from collections.abc import Iterable
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import regex
from numpy.typing import NDArray

from fintune.data.shapes import Columns
from fintune.data.tables import OPTIONAL, SPLITS, read_source
from fintune.data.unpacking import Row
from fintune.data.words import split_words
from fintune.errors import RecordError, brief

log = logging.getLogger("fintune")
# what exports write for a missing value; "None" and "N/A" may well be answers
NOT_A_TEXT = {"nan", "null", "<na>"}
NOT_A_QUESTION = NOT_A_TEXT | {"none"}
LONGEST = max(map(len, NOT_A_QUESTION))
VISIBLE = regex.compile(r"(?V1)[^\p{Z}\p{Cc}\p{Cf}\p{Default_Ignorable_Code_Point}\u2800]")
HALF = regex.compile(r"\p{Cs}")  # of a character, as a cut in UTF-16 leaves it
MANY = 0.05  # share of rows; more that are dropped is a warning
SPLIT_NAMES = {
    **{name: name for name in SPLITS},
    **dict.fromkeys(("valid", "val", "dev", "eval"), "validation"),
}


def warn_of_dropped(source: str, dropped: int, examples: Iterable[str], rows: int) -> None:
    """Warn if many rows were dropped, and name up to three of them."""
    if dropped > MANY * rows:
        log.warning(
            "warning: %s: %d of %d rows (%.0f %%) were dropped: %s%s",
            source,
            dropped,
            rows,
            100 * dropped / rows,
            "; ".join(islice(examples, 3)),
            "; ..." if dropped > 3 else "",
        )


def counted(counts: dict[str, int]) -> str:
    """Write numbers by reason as a part of a sentence."""
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items() if count) or "none"


def hash_of(*texts: str) -> int:
    """Return 64 bits of a hash of texts."""
    digest = hashlib.sha256("\x00".join(texts).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8])


def hashes_of(name: str, texts: pa.Array, words: int = 1) -> NDArray[np.uint64]:
    """Return what `hash_of` makes of a name and each text of a column, texts x words of 64 bits."""
    start, size = name.encode() + b"\0", 8 * words
    every = texts.cast(pa.binary()).to_pylist()
    digests = b"".join([hashlib.sha256(start + text).digest()[:size] for text in every])
    return np.frombuffer(digests, ">u8").astype(np.uint64).reshape(-1, words)


def has_input(row: Row) -> bool:
    """Return whether a row has an input, of whatever kind."""
    return text_fault(to_text(row.get("input"))) not in ("missing", "empty")


def to_text(value: Any) -> Any:
    """Return a number, a date, true, false or bytes as the text that they would be in a CSV file."""
    if isinstance(value, str):
        return value
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


def fault_of(column: str, value: Any) -> str | None:
    """Return the reason why a record cannot hold this text there."""
    fault = text_fault(value)
    if fault is None and column != "output":
        bare = value.strip()
        return "literal_nan" if len(bare) <= LONGEST and bare.lower() in NOT_A_QUESTION else None
    return fault


def optional_values(row: Row, columns: Columns, place: str) -> Row:
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


def text_fault(value: Any) -> str | None:
    """Return the reason why a value cannot be trained on, or None."""
    if not isinstance(value, str):
        return "missing" if value is None or value != value else "not_text"
    if not ("a" <= value[:1].lower() <= "z" or VISIBLE.search(value)):
        return "empty"
    if not value.isascii() and HALF.search(value):
        return "lone_surrogate"
    bare = value.strip()
    return "literal_nan" if len(bare) <= LONGEST and bare.lower() in NOT_A_TEXT else None
