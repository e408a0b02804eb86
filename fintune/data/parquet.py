"""Parquet from anywhere, read in batches whose size in memory is bounded.

A dictionary, or prefixes of the value before, make gigabytes of few bytes.
"""

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fintune.data.stream import BATCH
from fintune.data.unpacking import Piece, explained, source_limit, too_large, unpacked

MOST_AT_ONCE = 2**28  # bytes of a batch, if a value has no more


def open_parquet(path: Path) -> tuple[list[str], Callable[[Collection[str]], Iterator[Piece]]]:
    """Open a table, packed or not.

    Returns:
        The names of its columns, and a function that reads those that are named.

    Raises:
        RecordError: it has more bytes than the limit; the function raises this, too.
    """
    with path.open("rb") as file:
        is_plain = file.read(4) == b"PAR1"
    content = None
    if not is_plain:
        with unpacked(path) as read:
            content = pa.py_buffer(read(source_limit() + 1))

    def opened(dictionaries: list[str] | None = None) -> pq.ParquetFile:
        source: Any = path if content is None else pa.BufferReader(content)
        return pq.ParquetFile(source, read_dictionary=dictionaries)

    file_ = opened()
    names = file_.schema_arrow.names
    limit, stated = source_limit(), file_.metadata
    groups = [stated.row_group(i) for i in range(stated.num_row_groups)]
    if max(sum(group.total_byte_size for group in groups), stated.num_rows) > limit:
        raise too_large("unpacked, it has")

    def read_batches(wanted: Collection[str]) -> Iterator[Piece]:
        with explained(".parquet"):
            columns, count = [name for name in names if name in wanted], 0
            for number, group in enumerate(groups):
                size = max(1, min(BATCH, MOST_AT_ONCE // _longest(opened, group, number, columns)))
                for batch in file_.iter_batches(size, [number], columns, use_threads=False):
                    if (count := count + size_of(batch)) > limit:
                        raise too_large("unpacked, it has")
                    yield Piece(pa.Table.from_batches([batch]))

    return names, read_batches


def _longest(
    opened: Callable[[list[str]], pq.ParquetFile], group: Any, number: int, columns: list[str]
) -> int:
    """Return a bound on the bytes of a value that takes less room in a row group than when it is read."""
    parts = [group.column(i) for i in range(group.num_columns)]
    chained = {part.path_in_schema for part in parts if "DELTA_BYTE_ARRAY" in part.encodings}
    longest = max(
        (p.total_uncompressed_size for p in parts if p.path_in_schema in chained), default=1
    )
    file = opened(sorted({part.path_in_schema for part in parts} - chained))
    first = next(file.iter_batches(1, [number], columns, use_threads=False), None)
    for values in _leaves(first) if first else ():
        if pa.types.is_dictionary(values.type) and len(values.dictionary):
            longest = max(longest, pc.max(_lengths(values.dictionary)).as_py() or 1)
    return longest


def size_of(batch: pa.RecordBatch | pa.Table) -> int:
    """Return the bytes of the values, each counted where it is repeated."""
    size = batch.num_rows
    for values in _leaves(batch):
        if pa.types.is_dictionary(values.type):
            size += pc.sum(_lengths(values.dictionary).take(values.indices)).as_py() or 0
        else:
            size += values.nbytes
    return size


def _leaves(batch: pa.RecordBatch | pa.Table) -> Iterator[pa.Array]:
    found = [part for column in batch.columns for part in getattr(column, "chunks", [column])]
    while found:
        values = found.pop()
        if pa.types.is_struct(values.type):
            found += values.flatten()
        elif pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
            found.append(values.flatten())
        elif pa.types.is_map(values.type):
            found += [values.keys, values.items]
        else:
            yield values


def _lengths(values: pa.Array) -> pa.Array:
    try:
        return pc.binary_length(values)
    except pa.ArrowNotImplementedError:  # numbers
        return pa.repeat(pa.scalar(8, pa.int32()), len(values))
