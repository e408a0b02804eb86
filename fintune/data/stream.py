"""Rows by the million: batches through a pool of processes, in order, and tables written group by group.

The size of a batch and of a row group does not depend on the number of processes, so neither do the bytes.
"""

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import pandas  # noqa: F401  # Arrow imports it at its first list, in each process that lacks it
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from fintune.errors import RecordError, UserError, brief

log = logging.getLogger("fintune")

BATCH = 16_384  # rows that a process works on at a time
GROUP = 65_536  # rows of a row group
WORKERS = "FINTUNE_WORKERS"

Job = TypeVar("Job")
Result = TypeVar("Result")


def workers() -> int:
    """Return the number of processes, from `FINTUNE_WORKERS`; by default one for each core.

    Raises:
        UserError: that is no number above 0.
    """
    given = os.environ.get(WORKERS) or str(len(os.sched_getaffinity(0)))
    if not given.isascii() or not given.isdecimal() or not int(given):
        raise UserError(f"{WORKERS}: {given!r} is no number of processes above 0")
    return int(given)


def ordered(function: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
    """Yield a function's results in the order of the jobs, from a pool of processes.

    A single job is done in this process. An error of the function ends all.

    Raises:
        UserError: a process was killed.
    """
    waiting = iter(jobs)
    begun = list(islice(waiting, 2))
    count = workers()
    if len(begun) < 2 or count == 1:
        yield from map(function, chain(begun, waiting))
        return
    context = multiprocessing.get_context(
        "fork"
    )  # the function may hold a tokenizer or large arrays
    pool = ProcessPoolExecutor(count, context, initializer=_begin, initargs=(function, os.getpid()))
    try:
        first = pool.submit(_work, begun[0])
    except OSError as error:  # some systems refuse to fork a process that has reserved much memory
        log.info("note: going on in one process: %s", error.strerror)
        yield from map(function, chain(begun, waiting))
        return
    try:
        yield from _in_turn(pool, _work, chain(begun[1:], waiting), deque([first]), 2 * count)
    except BrokenProcessPool:
        raise UserError(
            "a process that worked on rows was killed, perhaps for lack of memory; "
            f"with {WORKERS}=1 it takes less"
        ) from None


def in_threads(function: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
    """Yield the results of a function that is numpy's or Arrow's work, as `ordered` does, from threads."""
    waiting = iter(jobs)
    begun = list(islice(waiting, 2))
    if len(begun) < 2:
        yield from map(function, begun)
        return
    pool = ThreadPoolExecutor(workers())
    yield from _in_turn(pool, function, chain(begun, waiting), deque(), workers())


def _in_turn(
    pool: Executor,
    function: Callable[[Any], Any],
    jobs: Iterable[Any],
    running: deque[Future[Any]],
    most: int,
) -> Iterator[Any]:
    """Yield a pool's results, of which no more than a number wait, and end it."""
    try:
        for job in jobs:
            running.append(pool.submit(function, job))
            if len(running) > most:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_function: Callable[[Any], Any] | None = None


def _begin(function: Callable[[Any], Any], parent: int) -> None:
    """Prepare a process of the pool: it ends with its parent, which alone is interrupted."""
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def _work(job: Any) -> Any:
    assert _function is not None
    return _function(job)


def open_rows(path: Path, columns: Iterable[str] = ()) -> pq.ParquetFile:
    """Open a table that an earlier stage wrote.

    Raises:
        RecordError: the file is missing or lacks one of the columns.
    """
    try:
        file = pq.ParquetFile(path)
    except FileNotFoundError:
        raise RecordError(
            f"{path}: not found; `dvc repro` makes it, `dvc pull` fetches it"
        ) from None
    except (OSError, pa.ArrowException) as error:
        raise RecordError(f"{path}: not a parquet table: {brief(error)}") from None
    missing = [name for name in columns if name not in file.schema_arrow.names]
    if missing:
        raise RecordError(f"{path}: no column {', '.join(missing)}; `dvc repro` makes it anew")
    return file


def batches(
    file: pq.ParquetFile,
    columns: list[str] | None = None,
    shown: str = "",
    size: int = BATCH,
    groups: Sequence[int] | None = None,
) -> Iterator[pa.RecordBatch]:
    """Yield a table's rows, or those of some row groups, in batches, with a bar that says what is done."""
    groups = range(file.num_row_groups) if groups is None else groups
    total = sum(file.metadata.row_group(each).num_rows for each in groups)
    with tqdm(total=total, desc=shown, unit="row", leave=False, disable=not shown) as bar:
        for each in groups:  # read together, all stay in memory until the last is done
            for batch in file.iter_batches(size, [each], columns, use_threads=False):
                yield batch
                bar.update(batch.num_rows)


@contextmanager
def writer(path: Path, schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
    """Yield a function that writes rows to a parquet table, which is there only if the block ends well.

    Equal rows give equal bytes, in whatever pieces they come.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    waiting: list[pa.Table] = []
    try:
        with pq.ParquetWriter(partial, schema, compression="zstd") as file:

            def write(rows: pa.Table) -> None:
                waiting.append(rows)
                count = sum(map(len, waiting))
                while count >= GROUP:
                    table = pa.concat_tables(waiting)
                    file.write_table(table.slice(0, GROUP).combine_chunks(), GROUP)
                    waiting[:] = [table.slice(GROUP)]
                    count -= GROUP

            yield write
            rest = pa.concat_tables(waiting) if waiting else schema.empty_table()
            if len(rest):
                file.write_table(rest.combine_chunks(), GROUP)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def spool(path: Path, schema: pa.Schema) -> Iterator[Callable[[pa.RecordBatch], None]]:
    """Yield a function that writes batches to a file that is read again by `unspool`."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        yield stream.write_batch


def unspool(path: Path) -> Iterator[pa.RecordBatch]:
    """Yield the batches of a file that `spool` wrote."""
    with pa.OSFile(str(path), "rb") as file, pa.ipc.open_stream(file) as stream:
        yield from stream
