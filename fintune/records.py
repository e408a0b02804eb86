"""The question-answer record: reading, checking and writing tables of instruction, input, output."""

import difflib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

COLUMNS = ("instruction", "input", "output")
SPLITS = ("train", "validation", "test")
FORMATS = (".parquet", ".jsonl", ".json", ".csv")
NOT_A_TEXT = {"nan", "none", "null"}

Row = dict[str, Any]


class RecordError(ValueError):
    """A table that cannot be read or that breaks its contract; names the file, the row, the column."""


def is_table_file(source: str) -> bool:
    """Whether the name of a file or URL ends as one of the formats that can be read."""
    return urlsplit(source).path.lower().endswith(FORMATS)


def read_source(source: str) -> list[Row]:
    """Read a table from a local file or from any URL that fsspec opens, in the format its name ends with.

    Raises:
        RecordError: no such file, an unknown format, a broken line (named), or a broken transfer.
    """
    import fsspec  # slow to import, and only fetch needs it

    suffix = Path(urlsplit(source).path).suffix.lower()
    if suffix not in FORMATS:
        raise RecordError(f"{source}: unknown format {suffix!r}; use one of {', '.join(FORMATS)}")
    try:
        with fsspec.open(source, "rb") as file:
            content = file.read()
    except (OSError, ValueError, ImportError) as error:
        raise RecordError(f"{source}: cannot be read: {error or type(error).__name__}") from error
    except Exception as error:  # each fsspec protocol raises its own library's errors
        raise RecordError(f"{source}: {type(error).__name__}: {error}") from error
    try:
        return _parse(content, suffix)
    except RecordError as error:
        raise RecordError(f"{source} {error}") from None
    except (ValueError, pa.ArrowInvalid) as error:
        raise RecordError(f"{source}: not a readable {suffix[1:]} table: {error}") from error


def _parse(content: bytes, suffix: str) -> list[Row]:
    if suffix == ".parquet":
        rows: list[Row] = pq.read_table(pa.BufferReader(content)).to_pylist()
        return rows
    text = content.decode("utf-8-sig")
    if suffix == ".csv":
        import csv
        import io

        csv.field_size_limit(2**27)
        return _csv_rows(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    if suffix == ".json":
        loaded = json.loads(text)
        if not isinstance(loaded, list) or not all(isinstance(row, dict) for row in loaded):
            raise RecordError(": a JSON source is a list of objects")
        return loaded
    return list(_json_lines(text))


def _csv_rows(reader: Any) -> list[Row]:
    rows = []
    for row in reader:
        if None in row or None in row.values():
            raise RecordError(f"line {reader.line_num}: not as many values as the header has names")
        rows.append(row)
    return rows


def _json_lines(text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise RecordError(f"line {number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise RecordError(f"line {number}: not a JSON object")
        yield row


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
        faults = ((column, fault) for column in COLUMNS if (fault := _fault(record[column])))
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


def _fault(value: Any) -> str | None:
    """Why a value is no text to train on, or None."""
    if value is None or (isinstance(value, float) and value != value):
        return "missing"
    if not isinstance(value, str):
        return "not_text"
    if not value.strip():
        return "empty"
    return "literal_nan" if value.strip().lower() in NOT_A_TEXT else None


def read_passages(source: str) -> list[str]:
    """The texts of a table with a column `text`.

    Raises:
        RecordError: it cannot be read, has no row, or a row without a text of some words.
    """
    rows = read_source(source)
    for number, row in enumerate(rows, start=1):
        if _fault(row.get("text")) or len(row["text"].split()) < 2:
            raise RecordError(f"{source} row {number}: text is {row.get('text')!r}, not some words")
    if not rows:
        raise RecordError(f"{source}: no rows")
    return [row["text"] for row in rows]


def read_rows(path: Path, columns: Iterable[str] = COLUMNS) -> list[Row]:
    """Read a table that an earlier stage wrote.

    Raises:
        RecordError: the file is missing or lacks one of the columns.
    """
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise RecordError(
            f"{path}: not found; `dvc repro` makes it, `dvc pull` fetches it"
        ) from None
    except pa.ArrowInvalid as error:
        raise RecordError(f"{path}: not a parquet table: {error}") from None
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise RecordError(f"{path}: no column {', '.join(missing)}; `dvc repro` makes it anew")
    rows: list[Row] = table.to_pylist()
    return rows


def write_rows(path: Path, rows: list[Row], schema: dict[str, pa.DataType] | None = None) -> None:
    """Write rows as parquet, whole or not at all; equal rows give equal bytes.

    Args:
        schema: the columns and their types; records (three strings) when left out.
    """
    fields = schema or dict.fromkeys(COLUMNS, pa.string())
    table = pa.Table.from_pylist(rows, schema=pa.schema(list(fields.items())))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    pq.write_table(table, partial, compression="zstd")
    partial.replace(path)
