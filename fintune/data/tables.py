"""Tables of rows: read a source in any supported format; read and write parquet between stages."""

import csv
import io
import stat
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fintune import paths
from fintune.data.download import downloaded
from fintune.data.parquet import open_parquet, size_of
from fintune.data.parsing import Pieces, names_of, open_table, rows_in, suffix_of
from fintune.data.stream import open_rows
from fintune.data.unpacking import AT_ONCE, Row, explained, source_limit, too_large, unpacked
from fintune.errors import RecordError
from fintune.stage import write_text

COLUMNS = ("instruction", "input", "output")
OPTIONAL = ("result", "kind", "split", "group", "turns")
Choice = Callable[[list[str]], Collection[str]]  # of the names of columns
LISTED = 1000  # dropped rows that are listed, of each source and split
SPLITS = ("train", "validation", "test")


def is_table_file(source: str) -> bool:
    """Return whether a file name ends in a supported extension."""
    return bool(suffix_of(source)[0])


@contextmanager
def opened(source: str, kept_in: Path | None = None) -> Iterator[Pieces]:
    """Open a table in a local file or at any URL that fsspec opens; the extension gives the format.

    Args:
        kept_in: a folder where a download is kept, and read if it is there.

    Raises:
        RecordError: the file is missing, its format is unknown, a line is malformed (the message gives
            its number), or the transfer failed.
    """
    with ExitStack() as stack:
        name, path = source, Path(source)
        if "://" in source:
            address = source.split("::")[0]  # fsspec's chains begin with the file itself
            name = urlsplit(address).path or address
            path = stack.enter_context(downloaded(source, kept_in))
        else:
            _check_file(path)
        with placed(source):
            about = path.stat()
            yield open_table(path, name)._replace(state=f"{about.st_size} {about.st_mtime_ns}")


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


def check_sizes(files: Iterable[Path] = (), stated: int = 0) -> None:
    """Check that all files of a data set together have no more bytes than a source may have, unpacked.

    Args:
        stated: the bytes that they have as they are, before there are files.

    Raises:
        RecordError: they have, or one is an archive of a kind that is not looked into.
    """
    total, limit = stated, source_limit()
    for file in files:
        with placed(file.name), explained(suffix_of(file.name)[0]):
            total += _unpacked_size(file)
    if total > limit:
        raise too_large("its files have" if stated else "unpacked, its files have")


def _unpacked_size(file: Path) -> int:
    with file.open("rb") as opened:
        start = opened.read(8)
    if start.startswith((b"7z\xbc\xaf", b"Rar!", b"\x04\x22\x4d\x18")):
        raise RecordError(
            ": an archive whose size is not known before it is unpacked; it is not read"
        )
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            return sum(member.file_size for member in archive.infolist())
    if start.startswith(b"PAR1"):
        names, batches = open_parquet(file)
        return sum(size_of(piece.content) for piece in batches(names))
    with unpacked(file) as read:
        return sum(len(part) for part in iter(lambda: read(AT_ONCE), b""))


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


def list_dropped(folder: Path, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """List dropped rows in a file beside those that were kept."""
    listed = io.StringIO()
    csv.writer(listed).writerows([columns, *rows])
    write_text(folder / paths.DROPPED, listed.getvalue())


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
