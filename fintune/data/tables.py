"""Tables of rows: read a source in any supported format; read and write parquet between stages."""

import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fintune.data.download import downloaded
from fintune.data.parsing import Pieces, names_of, open_table, rows_in, suffix_of
from fintune.data.stream import open_rows
from fintune.data.unpacking import Row, source_limit, too_large
from fintune.errors import RecordError

COLUMNS = ("instruction", "input", "output")
OPTIONAL = ("result", "kind", "split", "group", "turns")
Choice = Callable[[list[str]], Collection[str]]  # of the names of columns
SPLITS = ("train", "validation", "test")


def is_table_file(source: str) -> bool:
    """Return whether a file name ends in a supported extension."""
    return bool(suffix_of(source)[0])


@contextmanager
def opened(source: str) -> Iterator[Pieces]:
    """Open a table in a local file or at any URL that fsspec opens; the extension gives the format.

    Raises:
        RecordError: the file is missing, its format is unknown, a line is malformed (the message gives
            its number), or the transfer failed.
    """
    with ExitStack() as stack:
        name, path = source, Path(source)
        if "://" in source:
            address = source.split("::")[0]  # fsspec's chains begin with the file itself
            name = urlsplit(address).path or address
            path = stack.enter_context(downloaded(source))
        else:
            _check_file(path)
        with placed(source):
            yield open_table(path, name)


@contextmanager
def placed(source: str) -> Iterator[None]:
    """Name the source in errors that begin with a line, or with what follows a name."""
    try:
        yield
    except RecordError as error:
        said = str(error)
        if not said.startswith((":", "line ")):
            raise
        raise RecordError(f"{source}{'' if said.startswith(':') else ' '}{said}") from None


def _check_file(path: Path) -> None:
    try:
        if not stat.S_ISREG(mode := path.stat().st_mode) and not stat.S_ISDIR(mode):
            raise RecordError(
                f"{path}: a pipe, a socket or a device, which may never end; give a file"
            )
        if path.stat().st_size > source_limit():
            raise RecordError(f"{path}{too_large('it has')}")
        path.open("rb").close()
    except OSError as error:
        raise RecordError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_source(source: str, choose: Choice = set) -> list[Row]:
    """Read a table as a whole.

    Args:
        choose: returns the names of the columns to read, given those that there are; by default all.

    Raises:
        RecordError: as `opened` does.
    """
    with opened(source) as table:
        wanted = choose(table.names) if table.is_sure else ()
        rows = [row for piece in table.read(wanted) for row in rows_in(piece)]
        if not table.is_sure:
            wanted = choose(names_of(rows))
        return [{name: value for name, value in row.items() if name in wanted} for row in rows]


def read_rows(path: Path, columns: Iterable[str] = COLUMNS) -> list[Row]:
    """Read a table that an earlier stage wrote.

    Raises:
        RecordError: the file is missing or lacks one of the columns.
    """
    table = open_rows(path, columns).read()
    rows: list[Row] = table.to_pylist()
    return rows


def read_columns(
    path: Path, columns: Iterable[str] = ("instruction", "input", "output")
) -> pa.Table:
    """Read columns of a table that an earlier stage wrote, without a Python object for each value."""
    names = list(columns)
    return open_rows(path, names).read(names)


def usual_instruction(path: Path) -> str:
    """Return a table's most frequent instruction; of equally frequent ones, the first in the alphabet."""
    counts = pc.value_counts(read_columns(path, ["instruction"])["instruction"]).to_pylist()
    return str(min(counts, key=lambda each: (-each["counts"], each["values"]))["values"])


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
