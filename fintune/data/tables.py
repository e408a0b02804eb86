"""Tables of rows: read a source in any supported format; read and write parquet between stages."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from fintune.errors import RecordError

COLUMNS = ("instruction", "input", "output")
OPTIONAL = ("result", "kind", "split")
SPLITS = ("train", "validation", "test")
FORMATS = (".parquet", ".jsonl", ".json", ".csv")

Row = dict[str, Any]


def is_table_file(source: str) -> bool:
    """Return whether a file name or URL ends in a supported extension."""
    return urlsplit(source).path.lower().endswith(FORMATS)


def read_source(source: str) -> list[Row]:
    """Read a table from a local file or any URL that fsspec opens; the extension gives the format.

    Raises:
        RecordError: the file is missing, its format is unknown, a line is malformed (the message gives
            its number), or the transfer failed.
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


def optional_columns(rows: list[Row]) -> list[str]:
    """Return which of the optional columns a record's rows have."""
    return [name for name in OPTIONAL if any(name in row for row in rows)]


def write_rows(path: Path, rows: list[Row], schema: dict[str, pa.DataType] | None = None) -> None:
    """Write rows as parquet, atomically; equal rows give equal bytes.

    Args:
        schema: the columns and their types; by default those of a record, all strings.
    """
    fields = schema or dict.fromkeys((*COLUMNS, *optional_columns(rows)), pa.string())
    table = pa.Table.from_pylist(rows, schema=pa.schema(list(fields.items())))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    pq.write_table(table, partial, compression="zstd")
    partial.replace(path)
