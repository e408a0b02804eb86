"""Tables of rows: read a source in any supported format; read and write parquet between stages."""

import stat
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from fintune.data.download import download
from fintune.data.parsing import Choice, Row, parse, source_limit, suffix_of, too_large
from fintune.errors import RecordError, brief

COLUMNS = ("instruction", "input", "output")
OPTIONAL = ("result", "kind", "split", "group", "turns")
SPLITS = ("train", "validation", "test")


def is_table_file(source: str) -> bool:
    """Return whether a file name ends in a supported extension."""
    return bool(suffix_of(source)[0])


def read_source(source: str, choose: Choice = set) -> list[Row]:
    """Read a table from a local file or any URL that fsspec opens; the extension gives the format.

    Args:
        choose: returns the names of the columns to read, given those that there are; by default all.

    Raises:
        RecordError: the file is missing, its format is unknown, a line is malformed (the message gives
            its number), or the transfer failed.
    """
    name = source
    if "://" in source:
        address = source.split("::")[0]  # fsspec's chains begin with the file itself
        name = urlsplit(address).path or address
        content = download(source)
    else:
        try:
            if not stat.S_ISREG(mode := Path(source).stat().st_mode) and not stat.S_ISDIR(mode):
                raise RecordError(
                    f"{source}: a pipe, a socket or a device, which may never end; give a file"
                )
            if Path(source).stat().st_size > source_limit():
                raise RecordError(f"{source}{too_large('it has')}")
            content = Path(source).read_bytes()
        except OSError as error:
            raise RecordError(f"{source}: cannot be read: {error.strerror or error}") from error
    try:
        return parse(content, name, choose)
    except RecordError as error:
        raise RecordError(f"{source}{'' if str(error).startswith(':') else ' '}{error}") from None


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
    except (OSError, pa.ArrowException) as error:
        raise RecordError(f"{path}: not a parquet table: {brief(error)}") from None
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
