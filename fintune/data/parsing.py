"""Read a table piece by piece: parquet, JSON, JSON Lines, CSV or TSV.

Numbers in JSON stay as they are written. Of parquet, CSV and TSV only the chosen columns are read. A JSON
list is read as a whole.
"""

import codecs
import csv
import io
import json
import logging
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow.json import ParseOptions, ReadOptions, read_json

from fintune.data.parquet import open_parquet
from fintune.data.stream import BATCH
from fintune.data.unpacking import (
    Piece,
    Row,
    explained,
    lines_of,
    text_of,
    unpacked,
    whole_text,
)
from fintune.errors import RecordError, brief

log = logging.getLogger("fintune")

LINES = (".jsonl", ".ndjson", ".jsonlines")
SEPARATED = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
FORMATS = (".parquet", ".json", *LINES, *SEPARATED)
OTHER = {";": "semicolons", "\t": "tabs", "|": "bars"}  # as spreadsheets and databases write CSV
DEEPEST = 64  # brackets that a line opens; of some ten thousand within another Arrow's parser dies
PACKED = (".gz", ".zst", ".bz2", ".xz")


def suffix_of(name: str) -> tuple[str, ...]:
    """Return the ending that names the format, with that of a compression."""
    stem = name.lower()
    packed = next((end for end in PACKED if stem.endswith(end)), "")
    stem = stem.removesuffix(packed)
    return next((end for end in FORMATS if stem.endswith(end)), ""), packed


class Pieces(NamedTuple):
    """A table that is read piece by piece, as often as need be.

    `names` are those of its columns; of JSON Lines of the first piece, and `is_sure` is false. `state`
    is another for other content, as the time of a file.
    """

    names: list[str]
    is_sure: bool
    read: Callable[[Collection[str]], Iterator[Piece]]  # given the columns to read
    state: str = ""


def open_table(path: Path, name: str) -> Pieces:
    """Open a table; its beginning says whether it is compressed, its name the format.

    Without a known ending, the beginning says whether it is parquet, a JSON list or JSON Lines.

    Raises:
        RecordError: the content is malformed, or two columns have one name; the message begins with the
            line, where there are lines.
    """
    format_ = suffix_of(name)[0]
    with explained(format_):
        format_ = format_ or _format_of(path, name)
    with explained(format_):
        if format_ == ".parquet":
            names, batches = open_parquet(path)
            _refuse_twins(names, "")
            return Pieces(names, True, batches)
        if format_ in SEPARATED:
            return _separated(path, SEPARATED[format_])
        if format_ in LINES:
            first = next(lines_of(path, format_), Piece(b"", 1))
            columns = columns_in(first, ())
            names = names_of(rows_in(first)) if columns is None else columns.column_names
            return Pieces(names, False, lambda wanted: lines_of(path, format_))
        return in_memory(list(_json_rows(whole_text(path))))


def in_memory(rows: list[Row]) -> Pieces:
    """Return rows in pieces."""
    return Pieces(
        names_of(rows),
        True,
        lambda wanted: (Piece(rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)),
    )


def names_of(rows: Iterable[Row]) -> list[str]:
    """Return the names of all columns of some rows."""
    return list(dict.fromkeys(name for row in rows for name in row))


def rows_in(piece: Piece) -> list[Row]:
    """Return the rows of a piece.

    Raises:
        RecordError: a line is malformed.
    """
    if isinstance(piece.content, pa.Table):
        with explained(".parquet"):
            rows: list[Row] = piece.content.to_pylist()
            return rows
    if not isinstance(piece.content, bytes):
        return piece.content
    with explained(LINES[0]):
        return list(_json_lines(text_of(piece), piece.line))


def columns_in(piece: Piece, wanted: Collection[str]) -> pa.Table | None:
    """Return a piece as columns, the wanted ones of strings; None where `rows_in` has to read it.

    Arrow reads JSON Lines several times as fast, but not a column of texts and numbers, and it takes what
    `rows_in` refuses: an object over two lines, or two on one.

    Raises:
        RecordError: the text is not UTF-8.
    """
    table = piece.content
    if isinstance(table, bytes):
        text_of(piece)
        lines = table.removeprefix(codecs.BOM_UTF8 if piece.line == 1 else b"").strip(b"\r\n")
        ends = lines.count(b"}\n{") + lines.count(b"}\r\n{")
        opened = (line.count(b"[") + line.count(b"{") for line in lines.split(b"\n"))
        if lines.count(b"\n") != ends or max(opened) > DEEPEST:
            return None
        schema = pa.schema([(name, pa.string()) for name in sorted(wanted)])
        try:
            table = read_json(
                pa.BufferReader(lines),
                ReadOptions(use_threads=False, block_size=len(lines) + 1),
                ParseOptions(explicit_schema=schema),
            )
        except pa.ArrowException:
            return None
        if table.num_rows != ends + 1:
            return None
    if not isinstance(table, pa.Table):
        return None
    try:
        found = table.select([name for name in table.column_names if name in wanted])
        found.validate(full=True)
    except pa.ArrowException:
        return None
    return table if all(pa.types.is_string(kind) for kind in found.schema.types) else None


def _format_of(path: Path, name: str) -> str:
    with unpacked(path) as read:
        start = read(1000).removeprefix(b"\xef\xbb\xbf").lstrip()
    for beginning, format_ in ((b"PAR1", ".parquet"), (b"{", ".jsonl"), (b"[", ".json")):
        if start.startswith(beginning):
            return format_
    ending = "." + name.rpartition(".")[2] if "." in name.rpartition("/")[2] else ""
    raise RecordError(
        f": unknown format {ending!r}; use one of {', '.join(FORMATS)}, also with {' or '.join(PACKED)}"
    )


def _refuse_twins(names: Iterable[str], place: str) -> None:
    twins = [name for name, count in Counter(names).items() if count > 1 and name]
    if twins:
        raise RecordError(f"{place}: two columns have the name {brief(twins[0])!r}; rename one")


def _separated(path: Path, separator: str) -> Pieces:
    csv.field_size_limit(2**31 - 1)
    first = text_of(next(lines_of(path, ".csv"), Piece(b"", 1))).partition("\n")[0]
    other = next((each for each in OTHER if each in first), "")
    if separator == "," and "," not in first and other:
        log.info("the values are separated by %s, not by commas: read so", OTHER[other])
        separator = other
    found = _values(path, separator)
    header = next(found, (1, []))[1]
    found.close()
    _refuse_twins(header, "line 1")

    def read(wanted: Collection[str]) -> Iterator[Piece]:
        places = [place for place, name in enumerate(header) if name in wanted]
        names = [header[place] for place in places]
        rows: list[Row] = []
        with explained(".csv"):
            for line, values in islice(_values(path, separator), 1, None):
                if values and len(values) != len(header):
                    raise RecordError(
                        f"line {line}: not as many values as the header has names, {len(values)} "
                        f"and {len(header)}: {brief(separator.join(values))}"
                    )
                if values:
                    rows.append(dict(zip(names, [values[place] for place in places], strict=True)))
                if len(rows) == BATCH:
                    yield Piece(rows)
                    rows = []
            yield Piece(rows)

    return Pieces(header, True, read)


def _values(path: Path, separator: str) -> Generator[tuple[int, list[str]], None, None]:
    """Yield the line where each row of values begins, and the values."""
    lines = (
        line for piece in lines_of(path, ".csv") for line in io.StringIO(text_of(piece), newline="")
    )
    reader, begun = csv.reader(lines, delimiter=separator, strict=True), 1
    try:
        for values in reader:
            yield begun, values
            begun = reader.line_num + 1
    except csv.Error as error:
        raise RecordError(
            f"line {begun}: {brief(error)}; a quote within a quoted value is written twice"
        ) from None


def _json_rows(text: str) -> Iterator[Row]:
    """Yield the objects of a JSON list, or of JSON Lines under its name."""
    try:
        loaded = _load(text)
    except json.JSONDecodeError as error:
        if not text.lstrip().startswith("{") or "\n" not in text.strip():
            raise
        if error.msg != "Extra data":
            raise RecordError(f"line {error.lineno}: not JSON: {error.msg}") from None
        yield from _json_lines(text, 1)
        return
    if not isinstance(loaded, list) or not all(isinstance(row, dict) for row in loaded):
        raise RecordError(": a JSON source is a list of objects, or one object a line")
    yield from loaded


def _json_lines(text: str, begin: int) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=begin):
        if not line.strip():
            continue
        try:
            row = _load(line)
        except json.JSONDecodeError as error:
            raise RecordError(
                f"line {number}: not JSON: {error.msg} at character {error.colno}"
            ) from None
        except RecordError as error:
            raise RecordError(f"line {number}{error}") from None
        if not isinstance(row, dict):
            raise RecordError(f"line {number}: not a JSON object: {brief(line)}")
        yield row


def _load(text: str) -> Any:
    try:
        return json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=str,
            parse_float=str,
            parse_constant=lambda name: None if name == "NaN" else name,
        )
    except RecursionError:
        raise RecordError(": objects or lists are nested too deeply to be read") from None


def _object(pairs: list[tuple[str, Any]]) -> Row:
    found = dict(pairs)
    if len(found) < len(pairs):
        twin = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise RecordError(f": an object has two keys {brief(twin)!r}; rename one")
    return found
