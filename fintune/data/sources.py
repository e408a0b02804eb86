"""Sources of rows: a file, a URL or a hub data set."""

import logging
import os
from pathlib import Path
from typing import Any

from fintune import paths
from fintune.data.parsing import Row
from fintune.data.shapes import Columns, describe, recognise
from fintune.data.tables import is_table_file, read_source
from fintune.errors import UserError
from fintune.hub.datasets import read_dataset
from fintune.params import Fetch

log = logging.getLogger("fintune")
# dvc.yaml lists files in these as fetch's dependencies
WATCHED = (paths.DEMO_ASSETS, paths.OWN_DATA)


def read_rows_of(params: Fetch) -> tuple[list[Row], Columns, dict[str, Any]]:
    """Read the rows of `fetch.source`, with the columns that hold what records are made of.

    Returns:
        The rows; which of their columns hold what; and the source's manifest entry: `source`, and `revision`
        and `license` for a hub data set (else None).

    Raises:
        UserError: the source is not a file, a URL or a hub id, or is a URL with credentials.
    """
    source, columns = params.source, {}

    def choose(names: list[str]) -> set[str]:
        columns.update(recognise(names, params))
        return {name for name in columns.values() if name is not None}

    rows, origin = _read(params, choose)
    if columns and columns != params.columns.model_dump():
        log.info("%s: recognised as %s", source, describe(columns))
    return rows, columns, {"source": source, **origin}


def _read(params: Fetch, choose: Any) -> tuple[list[Row], dict[str, Any]]:
    source = params.source
    unpinned = {"revision": None, "license": None}
    if "://" in source:
        if "@" in source.split("://", 1)[1].split("/", 1)[0]:
            raise UserError(
                "fetch.source: holds a user name or password, and params.yaml is kept in git; "
                "use the storage's own environment variables"
            )
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
