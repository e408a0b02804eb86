"""Fetch the question-and-answer rows, set aside what cannot be used and say where they came from."""

import hashlib
from pathlib import Path
from typing import Any

from fintune.hub import read_dataset
from fintune.params import Fetch, UserError, read_params
from fintune.records import is_table_file, read_source, select_records, write_rows
from fintune.stage import log, run, write_json

OUT = Path("data/raw")
WATCHED = (Path("assets"), Path("data/source"))  # what dvc.yaml names as this stage's inputs


def main() -> None:
    params = read_params().fetch
    rows, origin = read(params)
    records, dropped = select_records(
        rows,
        params.columns.model_dump(),
        params.default_instruction,
        params.invalid_rows,
        params.source,
    )
    write_rows(OUT / "qa.parquet", records)
    digest = hashlib.sha256((OUT / "qa.parquet").read_bytes()).hexdigest()
    counts = {"rows_read": len(rows), "rows": len(records), "dropped": dropped}
    write_json(OUT / "manifest.json", {**origin, "sha256": digest, **counts})
    log.info(
        "%s: %d rows, %d kept, dropped: %s", params.source, len(rows), len(records), dropped or 0
    )


def read(params: Fetch) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The source's rows, and its entry in the manifest: source and, for the hub, commit and licence.

    Raises:
        UserError: the source is neither a file, nor a URL, nor a hub id.
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
                "or keep it in data/source",
                source,
            )
        return read_source(source), {"source": source, "revision": None, "license": None}
    if source.count("/") != 1 or source.startswith((".", "~", "/")):
        raise UserError(f"fetch.source: {source}: no such file, and neither a URL nor a hub id")
    rows, origin = read_dataset(source, params.revision, params.split)
    return rows, {"source": source, **origin}


if __name__ == "__main__":
    run(main)
