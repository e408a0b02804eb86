"""Sources of rows: a file, a URL or a hub data set."""

import logging
from pathlib import Path
from typing import Any

from fintune import paths
from fintune.data.tables import Row, is_table_file, read_source
from fintune.errors import UserError
from fintune.hub.datasets import read_dataset
from fintune.params import Fetch

log = logging.getLogger("fintune")
# dvc.yaml lists files in these as fetch's dependencies
WATCHED = (paths.DEMO_ASSETS, paths.OWN_DATA)


def read_rows_of(params: Fetch) -> tuple[list[Row], dict[str, Any]]:
    """Read the rows of `fetch.source`.

    Returns:
        The rows, and the source's manifest entry: `source`, and `revision` and `license` for a hub data
        set (else None).

    Raises:
        UserError: the source is not a file, a URL or a hub id, or is a URL with credentials.
    """
    source = params.source
    if "://" in source:
        if "@" in source.split("://", 1)[1].split("/", 1)[0]:
            raise UserError(
                "fetch.source: holds a user name or password, and params.yaml is kept in git; "
                "use the storage's own environment variables"
            )
        return read_source(source), {"source": source, "revision": None, "license": None}
    path = Path(source)
    if path.exists() or is_table_file(source):
        if not any(path.resolve().is_relative_to(watched.resolve()) for watched in WATCHED):
            log.warning(
                "note: DVC does not watch %s; after editing it run `dvc repro --force fetch` "
                "or keep it in %s",
                source,
                paths.OWN_DATA,
            )
        return read_source(source), {"source": source, "revision": None, "license": None}
    if source.count("/") != 1 or source.startswith((".", "~", "/")):
        raise UserError(f"fetch.source: {source}: no such file, and neither a URL nor a hub id")
    rows, origin = read_dataset(source, params.revision, params.split)
    return rows, {"source": source, **origin}
