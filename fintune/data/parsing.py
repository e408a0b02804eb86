"""Parse the bytes of a table: parquet, JSON, JSON Lines, CSV or TSV.

Numbers in JSON stay as they are written. Only the chosen columns are returned, and of parquet only those are
read.
"""

import csv
import gzip
import io
import json
import math
import os
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fintune.errors import RecordError, brief

LINES = (".jsonl", ".ndjson", ".jsonlines")
SEPARATED = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
FORMATS = (".parquet", ".json", *LINES, *SEPARATED)
PACKED = (".gz", ".zst")
LIMIT, LIMIT_GIB = "FINTUNE_SOURCE_GIB", 8  # the variable, and the limit without it

Row = dict[str, Any]
Choice = Callable[[list[str]], Collection[str]]  # of the names of columns


def suffix_of(name: str) -> tuple[str, ...]:
    """Return the ending that names the format, with that of a compression."""
    stem = name.lower()
    packed = next((end for end in PACKED if stem.endswith(end)), "")
    stem = stem.removesuffix(packed)
    return next((end for end in FORMATS if stem.endswith(end)), ""), packed


def parse(content: bytes, name: str, choose: Choice) -> list[Row]:
    """Parse a table; its beginning says whether it is compressed, its name the format.

    Without a known ending, the beginning says whether it is parquet, a JSON list or JSON Lines.

    Args:
        choose: returns the columns to read, given those that there are.

    Raises:
        RecordError: the content is malformed, or two columns have one name; the message begins with the
            line, where there are lines.
    """
    format_ = suffix_of(name)[0]
    try:
        content = _unpacked(content)
        format_ = format_ or _format_of(content, name)
        if format_ == ".parquet":
            return _parquet(content, choose)
        text = content.decode("utf-8-sig")
        if format_ in SEPARATED:
            return _separated(text, SEPARATED[format_], choose)
        return _chosen(list(_json_rows(text, format_ in LINES)), choose)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecordError(f"line {line}: not UTF-8; save the file in that encoding") from None
    except (OSError, EOFError, zlib.error, ValueError, ArithmeticError, pa.ArrowException) as error:
        raise RecordError(
            f": not a readable {format_[1:] or 'compressed'} table: {brief(error)}"
        ) from None


def source_limit() -> int:
    """Return the bytes that a source may have, unpacked, from `FINTUNE_SOURCE_GIB`.

    Raises:
        RecordError: that is no number above 0.
    """
    given = os.environ.get(LIMIT, str(LIMIT_GIB))
    try:
        gib = float(given)
    except ValueError:
        gib = 0.0
    if not 0 < gib < math.inf:
        raise RecordError(f"{LIMIT}: {given!r} is no number of GiB above 0")
    return int(gib * 2**30)


def too_large(what: str) -> RecordError:
    """Return the error of a source beyond the limit."""
    gib = source_limit() / 2**30
    return RecordError(
        f": {what} more than {gib:.3g} GiB; if that is right, set {LIMIT} to a larger number"
    )


def _unpacked(content: bytes) -> bytes:
    """Unpack gzip or zstd, up to the limit."""
    limit = source_limit()
    if content.startswith(b"\x1f\x8b"):
        with gzip.open(io.BytesIO(content)) as unpacking:
            plain = unpacking.read(limit + 1)
    elif content.startswith(b"\x28\xb5\x2f\xfd"):
        with pa.CompressedInputStream(pa.BufferReader(content), "zstd") as stream:
            plain = stream.read(limit + 1)
    else:
        return content
    if len(plain) > limit:
        raise too_large("unpacked, it has")
    return plain


def _format_of(content: bytes, name: str) -> str:
    start = content[:1000].removeprefix(b"\xef\xbb\xbf").lstrip()
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


def _parquet(content: bytes, choose: Choice) -> list[Row]:
    file = pq.ParquetFile(pa.BufferReader(content))
    names = file.schema_arrow.names
    _refuse_twins(names, "")
    wanted = choose(names)
    groups = (file.metadata.row_group(i) for i in range(file.metadata.num_row_groups))
    if sum(group.total_byte_size for group in groups) > source_limit():
        raise too_large("unpacked, it has")
    table = file.read(columns=[name for name in names if name in wanted])
    rows: list[Row] = table.to_pylist()
    return rows


def _separated(text: str, separator: str, choose: Choice) -> list[Row]:
    csv.field_size_limit(2**31 - 1)
    first = text.partition("\n")[0]
    if separator == "," and "," not in first and ";" in first:
        separator = ";"  # as spreadsheets write it where the comma is in numbers
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows, begun = [], 1
    try:
        header = next(reader, [])
        _refuse_twins(header, "line 1")
        wanted = choose(header)
        begun = reader.line_num + 1
        for values in reader:
            if values and len(values) != len(header):
                raise RecordError(
                    f"line {begun}: not as many values as the header has names, {len(values)} "
                    f"and {len(header)}: {brief(separator.join(values))}"
                )
            if values:
                rows.append({n: v for n, v in zip(header, values, strict=True) if n in wanted})
            begun = reader.line_num + 1
    except csv.Error as error:
        raise RecordError(
            f"line {begun}: {brief(error)}; a quote within a quoted value is written twice"
        ) from None
    return rows


def _json_rows(text: str, by_line: bool) -> Iterator[Row]:
    """Yield the objects of a JSON list, or of JSON Lines under either name."""
    if not by_line:
        try:
            loaded = _load(text)
        except json.JSONDecodeError as error:
            if not text.lstrip().startswith("{") or "\n" not in text.strip():
                raise
            if error.msg != "Extra data":
                raise RecordError(f"line {error.lineno}: not JSON: {error.msg}") from None
        else:
            if not isinstance(loaded, list) or not all(isinstance(row, dict) for row in loaded):
                raise RecordError(": a JSON source is a list of objects, or one object a line")
            yield from loaded
            return
    for number, line in enumerate(text.split("\n"), start=1):
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


def _chosen(rows: list[Row], choose: Choice) -> list[Row]:
    wanted = choose(list(dict.fromkeys(name for row in rows for name in row)))
    return [{name: value for name, value in row.items() if name in wanted} for row in rows]
