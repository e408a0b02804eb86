"""Fetch the question-answer records, drop or refuse unusable rows, and write a manifest of their origin."""

import hashlib

from fintune import paths
from fintune.data.records import select_records
from fintune.data.sources import read_rows_of
from fintune.data.tables import write_rows
from fintune.params import read_params
from fintune.stage import log, run, write_json


def main() -> None:
    params = read_params().fetch
    rows, columns, origin = read_rows_of(params)
    records, dropped = select_records(
        rows,
        columns,
        params.default_instruction,
        params.invalid_rows,
        params.source,
        params.turns,
    )
    write_rows(paths.RAW_ROWS, records)
    digest = hashlib.sha256(paths.RAW_ROWS.read_bytes()).hexdigest()
    read = len(records) + sum(dropped.values())  # of a conversation, each answer that is learned
    counts = {"rows_read": read, "rows": len(records), "dropped": dropped}
    write_json(paths.MANIFEST, {**origin, "sha256": digest, **counts})
    log.info("%s: %d rows, %d kept, dropped: %s", params.source, read, len(records), dropped or 0)


if __name__ == "__main__":
    run(main)
