"""Sources of rows: a file, a URL or a hub data set."""

import hashlib
import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

from fintune import paths
from fintune.data.parsing import Row
from fintune.data.questions import normalize_question
from fintune.data.records import select_records
from fintune.data.shapes import Columns, describe, hint, recognise
from fintune.data.tables import is_table_file, read_source
from fintune.errors import UserError
from fintune.hub.datasets import read_dataset
from fintune.params import Fetch, Source

log = logging.getLogger("fintune")
# dvc.yaml lists files in these as fetch's dependencies
WATCHED = (paths.DEMO_ASSETS, paths.OWN_DATA)


def fetch_records(params: Fetch) -> tuple[list[Row], dict[str, Any]]:
    """Read all sources.

    Returns:
        Their records, and the manifest's entries: source, revision and license (of several, in one text
        each, and `sources` with an entry of each), `rows_read`, `rows` and `dropped` by reason.

    Raises:
        UserError: a source cannot be read, or holds no record.
    """
    records: list[Row] = []
    entries = []
    for part in (params, *params.more):
        rows, columns, way_out, origin = read_rows_of(part)
        found, dropped = select_records(
            rows,
            columns,
            part.default_instruction,
            params.invalid_rows,
            part.source,
            part.turns,
            way_out,
        )
        taken = [row for row in found if _is_taken(row, part.share)]
        if len(taken) < len(found):
            dropped["beyond_share"] = len(found) - len(taken)
        read = len(taken) + sum(dropped.values())  # of a conversation, each answer that is learned
        log.info("%s: %d rows, %d kept, dropped: %s", part.source, read, len(taken), dropped or 0)
        entries.append({**origin, "rows_read": read, "rows": len(taken), "dropped": dropped})
        records += taken
    return records, entries[0] if len(entries) == 1 else _joined(entries)


def _is_taken(row: Row, share: float) -> bool:
    """Return whether a record is in the share, which depends on its question alone."""
    digest = hashlib.sha256(f"share {normalize_question(row['input'])}".encode()).digest()
    return share == 1 or int.from_bytes(digest[:8]) / 2**64 < share


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


def read_rows_of(params: Source) -> tuple[list[Row], Columns, str, dict[str, Any]]:
    """Read the rows of `fetch.source`, with the columns that hold what records are made of.

    Returns:
        The rows; which of their columns hold what; what to set if none can be used; and the source's manifest
        entry: `source`, and `revision` and `license` for a hub data set (else None).

    Raises:
        UserError: the source is not a file, a URL or a hub id, or is a URL with credentials.
    """
    source, columns, present = params.source, {}, []

    def choose(names: list[str]) -> set[str]:
        present.extend(names)
        columns.update(recognise(names, params))
        return {name for name in columns.values() if name is not None}

    rows, origin = _read(params, choose)
    if columns and columns != params.columns.model_dump():
        log.info("%s: recognised as %s", source, describe(columns))
    return rows, columns, hint(present, columns), {"source": source, **origin}


def _read(params: Source, choose: Any) -> tuple[list[Row], dict[str, Any]]:
    source = params.source
    unpinned = {"revision": None, "license": None}
    if "://" in source:
        log.warning(
            "note: DVC does not notice when %s changes; run `dvc repro --force fetch` to fetch it again",
            source,
        )
        return read_source(source, choose), unpinned
    if os.path.lexists(source) or is_table_file(source):
        real = Path(os.path.realpath(source))
        if not any(real.is_relative_to(os.path.realpath(watched)) for watched in WATCHED):
            log.warning(
                "note: DVC does not watch %s; after editing it run `dvc repro --force fetch` "
                "or keep it in %s",
                source,
                paths.OWN_DATA,
            )
        return read_source(source, choose), unpinned
    if source.count("/") != 1 or source.startswith((".", "~", "/")):
        raise UserError(f"fetch.source: {source}: no such file, and neither a URL nor a hub id")
    return read_dataset(source, params.revision, params.config, params.split, choose)
