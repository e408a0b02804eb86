"""Parts of a long stage's work that outlast a kill, kept in a scratch folder until the stage has ended."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock, Timeout

from fintune import paths
from fintune.data.stream import open_rows
from fintune.lineage import project_root

log = logging.getLogger("fintune")

KEPT_FROM = 2**18  # rows; fewer are made again sooner than kept
BYTES_FROM = 2**26  # of a source's file, whose rows are not counted yet
LOCK = "lock"
LIBRARIES = ("numpy", "pyarrow", "regex", "tokenizers")  # that parts depend on

Told = dict[str, Any]  # of a batch, in JSON


@contextmanager
def kept_parts(
    stage: str, is_large: bool, inputs: Sequence[Path], settings: Sequence[Any]
) -> Iterator[Path | None]:
    """Yield the folder for the parts that a stage makes of tables; None unless there are many rows.

    Its name is a hash of all that they are made of: tables, settings, this package and its libraries. It is
    removed when the block ends well, and those of killed stages with other tables or settings at once. A
    process beside one that has the folder keeps nothing.
    """
    scratch = project_root() / paths.SCRATCH
    folder = scratch / f"{stage}-{_hash(inputs, settings)}" if is_large else None
    for other in scratch.glob(f"{stage}-*"):
        if other != folder:
            with suppress(Timeout), FileLock(other / LOCK).acquire(timeout=0):
                shutil.rmtree(other)
    if folder is None:
        yield None
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / LOCK).acquire(timeout=0)
    except Timeout:
        yield None
        return
    with lock:
        if finished := list(folder.glob("*.arrow")):
            log.info("%s goes on: %d parts were finished before", stage, len(finished))
        is_done = False
        try:
            yield folder
            is_done = True
        finally:
            if is_done or [path.name for path in folder.iterdir()] == [LOCK]:
                shutil.rmtree(folder)


def _hash(inputs: Sequence[Path], settings: Sequence[Any]) -> str:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in [*inputs, *sorted(Path(__file__).parent.glob("*.py"))]:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    digest.update(json.dumps(list(map(version, LIBRARIES))).encode())
    return digest.hexdigest()[:16]


def are_many(tables: Iterable[Path]) -> bool:
    """Return whether tables have so many rows that parts of a stage's work are kept."""
    return sum(open_rows(path).metadata.num_rows for path in tables) >= KEPT_FROM


def made_once(
    path: Path | None,
    schema: pa.Schema,
    made: Iterable[tuple[pa.RecordBatch, Told]],
    compression: str | None = "lz4",
    lasts: bool = True,
) -> Iterator[tuple[pa.RecordBatch, Told]]:
    """Yield the batches of a part and what is told of each: from its file, or made, and then kept there.

    Args:
        lasts: whether the file outlasts this process.
    """
    if path is None:
        yield from made
        return
    if path.is_file():
        with (
            pa.OSFile(str(path), "rb") as kept,
            pa.ipc.open_stream(kept) as stream,
            suppress(StopIteration),
        ):
            while True:
                batch, about = stream.read_next_batch_with_custom_metadata()
                yield batch, json.loads(about[b"told"])
        return
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with partial.open("wb") as file:
        options = pa.ipc.IpcWriteOptions(compression=compression)
        with pa.ipc.new_stream(file, schema, options=options) as stream:
            for batch, told in made:
                stream.write_batch(batch, {"told": json.dumps(told)})
                yield batch, told
        file.flush()
        if lasts:
            os.fsync(
                file.fileno()
            )  # else a machine that dies can leave the name without the content
    partial.replace(path)
