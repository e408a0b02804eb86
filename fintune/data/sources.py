"""Sources of rows: a file, a URL or a hub data set."""

import logging
import os
import shutil
import sys
from collections import Counter, deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from tqdm.auto import tqdm

from fintune import paths
from fintune.data.parsing import Pieces, columns_in, names_of, rows_in
from fintune.data.parts import BYTES_FROM, made_once
from fintune.data.records import counted, hash_of
from fintune.data.selection import (
    SCHEMA,
    Rules,
    Selected,
    check_selected,
    is_plain,
    select_columns,
    select_records,
)
from fintune.data.shapes import describe, hint, recognise
from fintune.data.stream import BATCH, ordered, unspool, writer
from fintune.data.tables import COLUMNS, check_sizes, is_table_file, list_dropped, opened, placed
from fintune.data.unpacking import Piece, Row
from fintune.errors import RecordError, UserError
from fintune.hub.datasets import read_dataset
from fintune.lineage import project_root
from fintune.params import Fetch, Source

log = logging.getLogger("fintune")
PIECES_KEPT = 32  # of a source, in a part that is kept
# dvc.yaml lists files in these as fetch's dependencies
WATCHED = (paths.DEMO_ASSETS, paths.OWN_DATA)


def is_large(params: Fetch) -> bool:
    """Return whether parts of the work on its sources are kept: of many bytes, or downloads."""
    files = [Path(part.source) for part in (params, *params.more)]
    return any(not file.is_file() or file.stat().st_size >= BYTES_FROM for file in files)


def fetch_records(params: Fetch, target: Path, kept_in: Path | None = None) -> dict[str, Any]:
    """Read all sources, and write their records to a table.

    Args:
        kept_in: a folder where downloads and records that are done are kept, and read if they are there.

    Returns:
        The manifest's entries: source, revision and license (of several, in one text each, and `sources` with
        an entry of each), `rows_read`, `rows` and `dropped` by reason.

    Raises:
        UserError: a source cannot be read, or holds no record.
    """
    folder = target.parent
    scratch = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        entries, present, dropped = [], set[str](), list[tuple[Any, ...]]()
        files = list[Path]()
        for number, part in enumerate((params, *params.more)):
            place = Place(kept_in or scratch, str(number), kept_in is not None)
            entry, columns, lost, found = _fetch(part, params.invalid_rows, place)
            dropped += lost
            entries.append(entry)
            present |= columns
            files += found
        names = [name for name in SCHEMA.names if name in present]
        with writer(target, pa.schema([SCHEMA.field(name) for name in names])) as write:
            for batch in chain.from_iterable(map(unspool, files)):
                write(pa.Table.from_batches([batch]).select(names))
    finally:
        shutil.rmtree(scratch)
    list_dropped(folder, ("source", "row", "reason", "text"), dropped)
    return entries[0] if len(entries) == 1 else _joined(entries)


class Place(NamedTuple):
    """A folder for the records of a source, what its files' names begin with, and whether they are kept."""

    folder: Path
    name: str
    is_kept: bool


def _fetch(
    part: Source, invalid_rows: Any, place: Place
) -> tuple[dict[str, Any], set[str], list[tuple[Any, ...]], list[Path]]:
    """Write a source's records to files.

    Returns:
        Its entry of the manifest, the columns of its records, its lost rows, and the files.

    What holds for all rows is assumed from the first ones, and the source read again where that was wrong:
    its columns, and which instructions come with an input.
    """
    with opened_source(part, place.folder if place.is_kept else None) as (table, origin):
        try:
            columns = recognise(table.names, part)
        except RecordError:
            if table.is_sure:
                raise
            columns = recognise(names_of(_rows(table)), part)
        while True:
            rules = Rules(
                columns,
                part.default_instruction,
                invalid_rows,
                part.source,
                part.turns,
                part.share,
            )
            told, files = select_all(table, rules, place)
            names = table.names if table.is_sure else list(told.names)
            if not told.rows or columns == (better := recognise(names, part)):
                break
            columns = better
        if columns != part.columns.model_dump():
            log.info("%s: recognised the columns %s", part.source, describe(columns))
        dropped = check_selected(told, part.source, hint(names, columns))
    read = told.kept + sum(dropped.values())  # of a conversation, each answer that is learned
    log.info("%s: %d rows, %d kept; dropped: %s", part.source, read, told.kept, counted(dropped))
    counts = {"rows_read": read, "rows": told.kept, "dropped": dropped}
    lost = [(part.source, *each) for each in told.lost]
    return {"source": part.source, **origin, **counts}, {*COLUMNS, *told.present}, lost, files


def _rows(table: Pieces) -> Iterator[Row]:
    for piece in table.read(()):
        yield from rows_in(piece)


def select_all(table: Pieces, rules: Rules, place: Place) -> tuple[Selected, list[Path]]:
    """Write the records of a table to files, in a pool of processes.

    Which instructions come with an input is known at the end, and the table read again where it matters.
    """
    told, files = _select(table, rules, place)
    if not_alone := told.alone & told.asked:
        told, files = _select(table, rules._replace(not_alone=frozenset(not_alone)), place)
    return told, files


def _select(table: Pieces, rules: Rules, place: Place) -> tuple[Selected, list[Path]]:
    """Select a source's records in a pool of processes; those in files that were kept are read there."""
    told, files = Selected(), list[Path]()
    wanted = {name for name in rules.columns.values() if name is not None}
    known = repr((table.state, rules._replace(not_alone=frozenset()), sorted(rules.not_alone)))
    name = f"{place.name}-{hash_of(known):016x}"
    pieces: deque[Piece] = deque()

    def read(begin: int) -> Iterator[Piece]:
        for piece in islice(table.read(wanted), begin, None):
            pieces.append(piece)
            yield piece

    def select(begin: int) -> Iterator[tuple[pa.RecordBatch, dict[str, Any]]]:
        for found in ordered(partial(_selected, rules=rules), read(begin)):
            piece = pieces.popleft()
            # an error is told with the number of its row, which is known here alone
            some, records = found or select_records(rows_in(piece), rules, told.rows)
            yield records, some.told()

    made: Iterator[tuple[pa.RecordBatch, dict[str, Any]]] | None = None
    size = count = PIECES_KEPT if place.is_kept else sys.maxsize
    with tqdm(desc="fetch", unit="row", leave=False) as bar:
        while count == size:
            files.append(place.folder / f"{name}-{len(files)}.arrow")
            if not files[-1].is_file():
                made = made or select(PIECES_KEPT * (len(files) - 1))
            some, count = islice(made or (), size), 0
            done = made_once(files[-1], SCHEMA, some, None, place.is_kept)
            for count, (_, about) in enumerate(done, 1):  # noqa: B007
                told.add(Selected.of(about))
                bar.update(about["rows"])
    return told, files


def _selected(piece: Piece, rules: Rules) -> tuple[Selected, pa.RecordBatch] | None:
    try:
        names = {name for name in rules.columns.values() if name is not None}
        if is_plain(rules) and (table := columns_in(piece, names)) is not None:
            return select_columns(table, rules)
        return select_records(rows_in(piece), rules)
    except RecordError:
        return None


def _joined(entries: list[dict[str, Any]]) -> dict[str, Any]:
    dropped: Counter[str] = sum((Counter(entry["dropped"]) for entry in entries), Counter())
    return {
        "source": "; ".join(
            entry["source"] + (f" at {entry['revision']}" if entry["revision"] else "")
            for entry in entries
        ),
        "revision": None,
        "license": "; ".join(entry["license"] or "not stated" for entry in entries),
        "rows_read": sum(entry["rows_read"] for entry in entries),
        "rows": sum(entry["rows"] for entry in entries),
        "dropped": dict(sorted(dropped.items())),
        "sources": entries,
    }


@contextmanager
def opened_source(
    part: Source, kept_in: Path | None = None
) -> Iterator[tuple[Pieces, dict[str, Any]]]:
    """Open `fetch.source`.

    Returns:
        Its table; and of a hub data set the `revision` and `license` (else None).

    Raises:
        UserError: the source is not a file, a URL or a hub id, or is a URL with credentials.
    """
    source, unpinned = part.source, {"revision": None, "license": None}
    if not os.path.lexists(source) and (project_root() / source).exists():
        raise UserError(
            f"fetch.source: {source}: not in this copy of the project, where DVC runs queued and temporary "
            f"experiments: it holds what git and DVC know. `git add` it (or `dvc add` it and `git "
            "add` the .dvc file), then queue the experiment again; `dvc exp run` alone finds it as it is"
        )
    if "://" in source:
        log.warning(
            "note: DVC does not notice when %s changes; run `dvc repro --force fetch` to fetch it again",
            source,
        )
    elif os.path.lexists(source) or is_table_file(source):
        real = Path(os.path.realpath(source))
        if not any(real.is_relative_to(os.path.realpath(watched)) for watched in WATCHED):
            log.warning(
                "note: DVC does not watch %s; after editing it run `dvc repro --force fetch` "
                "or keep it in %s",
                source,
                paths.OWN_DATA,
            )
    elif source.count("/") != 1 or source.startswith((".", "~", "/")):
        raise UserError(f"fetch.source: {source}: no such file, and neither a URL nor a hub id")
    else:
        with placed(source):
            dataset, origin = read_dataset(
                source, part.revision, part.config, part.split, check_sizes
            )
            yield _hub_table(dataset)._replace(state=str(origin["revision"])), origin
        return
    with opened(source, kept_in) as table:
        yield table, unpinned


def _hub_table(dataset: Any) -> Pieces:
    def read(wanted: Collection[str]) -> Iterator[Piece]:
        chosen = dataset.select_columns([each for each in dataset.column_names if each in wanted])
        return map(Piece, chosen.with_format("arrow").iter(BATCH))

    return Pieces(dataset.column_names, True, read)
