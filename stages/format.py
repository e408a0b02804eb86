"""Render every row as prompt and completion, make it fit and count its tokens."""

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm.auto import tqdm

from fintune.params import Format, UserError, read_params
from fintune.preflight import check_base
from fintune.prompts import describe_tokens, format_row, load_tokenizer
from fintune.records import COLUMNS, SPLITS, read_rows, write_rows
from fintune.stage import log, run, write_json

SPLIT = Path("data/split")
OUT = Path("data/formatted")
METRICS = Path("reports/format.json")
SCHEMA = {
    **dict.fromkeys((*COLUMNS, "prompt", "completion"), pa.string()),
    "tokens": pa.int32(),
}


def main() -> None:
    leave_torch_out()
    params = read_params()
    check_base(params.base)  # a refusal by the hub costs seconds here and minutes in train
    tokenizer = load_tokenizer(params.base)
    report = {}
    for name in SPLITS:
        rows, report[name] = format_rows(
            tokenizer, read_rows(SPLIT / f"{name}.parquet"), params.format, name
        )
        write_rows(OUT / f"{name}.parquet", rows, SCHEMA)
        log.info("%s: %s", name, report[name])
    write_json(METRICS, report)


def leave_torch_out() -> None:
    """Make transformers do without torch: it takes seconds to import, and tokenizers need none of it."""
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # nothing is missing


def format_rows(
    tokenizer: Any, rows: list[dict[str, Any]], params: Format, name: str
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Format one split.

    Returns:
        The rows that fit, and their token counts with what was truncated and dropped, by reason.

    Raises:
        UserError: no row is left.
    """
    kept, events = [], Counter[str]()
    for row in tqdm(rows, desc=f"format {name}", unit="row", leave=False):
        formatted, event = format_row(tokenizer, row, params.max_tokens, params.overlong)
        if formatted:
            kept.append(formatted)
        if event:
            events[event] += 1
    if not kept:
        raise UserError(
            f"format: no {name} row fits into format.max_tokens: {params.max_tokens}; raise it"
        )
    truncated = events.pop("truncated", 0)
    return kept, {
        **describe_tokens([row["tokens"] for row in kept]),
        "rows_truncated": truncated,
        "rows_dropped": len(rows) - len(kept),
        "dropped": dict(sorted(events.items())),
    }


if __name__ == "__main__":
    run(main)
