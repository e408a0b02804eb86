"""Split the raw rows by question into train, validation and test."""

import json

from fintune import paths
from fintune.data.splitting import describe_splits, split_rows
from fintune.data.tables import SPLITS, read_rows, write_rows
from fintune.params import read_params
from fintune.stage import log, run, write_json


def main() -> None:
    params = read_params().split
    rows = read_rows(paths.RAW_ROWS)
    splits, dropped, groups = split_rows(rows, params)
    for name, part in splits.items():
        write_rows(paths.rows(paths.SPLIT, name), part)
    counts = describe_splits({name: read_rows(paths.rows(paths.SPLIT, name)) for name in SPLITS})
    fetched = json.loads(paths.MANIFEST.read_text(encoding="utf-8"))
    report = {
        **counts,
        **groups,
        "rows_in": fetched["rows_read"],
        "dropped": {**fetched["dropped"], **dropped},
    }
    write_json(paths.SPLIT_METRICS, report)
    shares = ", ".join(f"{counts[name]['rows']} {name}" for name in SPLITS)
    log.info("%d rows: %s; left out: %s", len(rows), shares, dropped)


if __name__ == "__main__":
    run(main)
