"""Split the raw rows by question into train, validation and test."""

import json
from pathlib import Path

from fintune.params import read_params
from fintune.records import SPLITS, read_rows, write_rows
from fintune.splitting import describe_splits, split_rows
from fintune.stage import log, run, write_json

RAW = Path("data/raw")
OUT = Path("data/split")
METRICS = Path("reports/split.json")


def main() -> None:
    params = read_params().split
    rows = read_rows(RAW / "qa.parquet")
    splits, dropped = split_rows(rows, params)
    for name, part in splits.items():
        write_rows(OUT / f"{name}.parquet", part)
    counts = describe_splits({name: read_rows(OUT / f"{name}.parquet") for name in SPLITS})
    fetched = json.loads((RAW / "manifest.json").read_text(encoding="utf-8"))
    report = {
        **counts,
        "rows_in": fetched["rows_read"],
        "dropped": {**fetched["dropped"], **dropped},
    }
    write_json(METRICS, report)
    shares = ", ".join(f"{counts[name]['rows']} {name}" for name in SPLITS)
    log.info("%d rows: %s; %d duplicates left out", len(rows), shares, dropped["duplicate"])


if __name__ == "__main__":
    run(main)
