"""Split the raw rows by question into train, validation and test."""

import json

from fintune import paths
from fintune.data.parts import are_many, kept_parts
from fintune.data.records import counted
from fintune.data.splitting import describe_splits, split_rows
from fintune.data.tables import SPLITS
from fintune.params import read_params
from fintune.stage import log, run, write_json


def main() -> None:
    params, inputs = read_params().split, [paths.RAW_ROWS]
    with kept_parts("split", are_many(inputs), inputs, [params.model_dump()]) as kept:
        dropped, groups = split_rows(paths.RAW_ROWS, paths.SPLIT, params, kept)
        counts = describe_splits(paths.SPLIT)
        fetched = json.loads(paths.MANIFEST.read_text(encoding="utf-8"))
        report = {
            **counts,
            **groups,
            "rows_in": fetched["rows_read"],
            "dropped": {**fetched["dropped"], **dropped},
        }
        write_json(paths.SPLIT_METRICS, report)
    shares = ", ".join(f"{counts[name]['rows']} {name}" for name in SPLITS)
    log.info("%d rows: %s; left out: %s", fetched["rows"], shares, counted(dropped))


if __name__ == "__main__":
    run(main)
