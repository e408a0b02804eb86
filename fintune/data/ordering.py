"""Rows in another order: few of them, or all, through files."""

from collections.abc import Iterable
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fintune.data.keys import Keys
from fintune.data.stream import GROUP, batches, in_threads, spool, unspool, writer
from fintune.data.tables import OPTIONAL

PLACE = pa.field("place", pa.int32())
Numbers = NDArray[Any]


def inputs_of(file: pq.ParquetFile, rows: Numbers) -> list[str]:
    """Return the inputs of a few rows."""
    found, begin = {}, 0
    for batch in batches(file, ["input"]) if len(rows) else ():
        for row in rows:
            if begin <= row < begin + batch.num_rows:
                found[int(row)] = str(batch.column("input")[int(row) - begin])
        begin += batch.num_rows
    return [found[int(row)] for row in rows]


def write_in_order(
    file: pq.ParquetFile, order: Numbers, counts: Numbers, paths: Iterable[Path], scratch: Path
) -> None:
    """Write a table's rows in another order to several tables, in flat memory.

    They go to a file for each row group first, as they come, and these are then sorted.

    Args:
        order: places of rows in the table; those of the first result, then those of the next.
        counts: the number of rows of each result.
    """
    place = np.full(file.metadata.num_rows, -1, np.int32)
    starts = np.cumsum(counts) - counts
    within = np.arange(len(order)) - np.repeat(starts, counts)
    buckets = np.concatenate(([0], np.cumsum(-(-counts // GROUP))))
    bucket = np.full(len(place), -1, np.int16)
    bucket[order] = np.repeat(buckets[:-1], counts) + within // GROUP
    place[order] = within
    schema = file.schema_arrow.remove_metadata()
    with ExitStack() as stack:
        write = [
            stack.enter_context(spool(scratch / str(number), schema.append(PLACE)))
            for number in range(buckets[-1])
        ]
        begin = 0
        for batch in batches(file, None, "split: sort", GROUP):
            end = begin + batch.num_rows
            placed = batch.append_column(PLACE, pa.array(place[begin:end]))
            by_bucket = np.argsort(bucket[begin:end], kind="stable")
            cuts = np.searchsorted(bucket[begin:end][by_bucket], np.arange(buckets[-1] + 1))
            for number, (low, high) in enumerate(pairwise(cuts)):
                write[number](placed.take(pa.array(by_bucket[low:high])))
            begin = end
    for path, (low, high) in zip(paths, pairwise(buckets), strict=True):
        with writer(path, schema) as write_group:
            for table in in_threads(
                _sorted, (scratch / str(number) for number in range(low, high))
            ):
                write_group(table)


def _sorted(path: Path) -> pa.Table:
    """Return the rows of a file in the order of their places."""
    table = pa.Table.from_batches(unspool(path))
    path.unlink()
    return table.take(pa.array(np.argsort(table[PLACE.name].to_numpy()))).drop_columns(PLACE.name)


def without_duplicates(file: pq.ParquetFile, keys: Keys, order: Numbers) -> Numbers:
    """Return rows in hash order without those whose texts equal another's.

    What the optional columns of the duplicates hold decides which one stays, not their order.
    """
    same = np.ones(max(0, len(order) - 1), bool)
    for name in ("order", "row", "row_too"):
        values = keys[name][order]
        same &= values[1:] == values[:-1]
    new = np.concatenate(([True], ~same))[: len(order)]
    unique = order[new]
    optional = [name for name in file.schema_arrow.names if name in OPTIONAL]
    if same.any() and optional:
        several = np.concatenate((same, [False])) | ~new
        best: dict[int, tuple[str, int]] = {}
        place = np.full(file.metadata.num_rows, -1, np.int32)
        place[order[several]] = (np.cumsum(new) - 1)[several]
        begin = 0
        for batch in batches(file, optional):
            there = np.flatnonzero(place[begin : begin + batch.num_rows] >= 0)
            for row, values in zip(there, batch.take(pa.array(there)).to_pylist(), strict=True):
                at = int(place[begin + row])
                best[at] = max(best.get(at, ("", 0)), (str(values), begin + int(row)))
            begin += batch.num_rows
        unique[list(best)] = [row for _, row in best.values()]
    return unique
