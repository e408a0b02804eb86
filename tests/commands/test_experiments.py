"""The table of experiments, from what `dvc exp show --json` says."""

import csv
import io
from typing import Any

from fintune.commands.experiments import as_csv, as_markdown, as_text, in_order, read_rows


def revision(name: str | None, loss: float | None, **params: Any) -> dict[str, Any]:
    measured = {} if loss is None else {"tuned": {"loss": loss, "accuracy": 1 - loss}}
    train = {"learning_rate": 3e-3, "lora": {"r": 32}, "max_steps": None} | params
    return {
        "rev": "a" * 40,
        "name": name,
        "data": {
            "params": {"params.yaml": {"data": {"train": train}}},
            "metrics": {"reports/evaluation.json": {"data": measured}},
        },
    }


SHOWN = [
    {"rev": "workspace", "data": None},
    revision("main", 0.25)
    | {
        "experiments": [
            {"revs": [revision("gamy-oxen", 0.125, learning_rate=1e-3, lora={"r": 8})]},
            {"revs": [revision("a-name-that-is-very-much-too-long", 0.5, max_steps=7)]},
            {"revs": [{"rev": "b" * 40, "name": "failed", "data": None, "error": {"msg": "x"}}]},
        ]
    },
]


def names(rows: Any) -> list[str]:
    return [row.name.split("-")[0] for row in rows]


def test_the_best_comes_first_by_the_metric_s_own_direction() -> None:
    rows = read_rows(SHOWN)
    assert names(in_order(rows, "tuned.loss")) == ["gamy", "main", "a", "failed"]
    assert names(in_order(rows, "tuned.accuracy")) == ["gamy", "main", "a", "failed"]


def test_the_table_fits_80_columns_and_says_what_changed() -> None:
    rows = in_order(read_rows(SHOWN), "tuned.loss")
    text = as_text(rows)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "  train.learning_rate=0.001, train.lora.r=8\n" in text
    assert "\n  train.max_steps=7\n" in text and "0.125" in text
    first = as_markdown(rows).splitlines()[2]
    assert first.startswith("| gamy-oxen | - | 0.125 | 0.875 |")
    assert first.endswith("| train.learning_rate=0.001, train.lora.r=8 |")
    table = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert [row["tuned.loss"] for row in table] == ["0.125", "0.25", "0.5", ""]
    assert (table[0]["train.lora.r"], table[2]["train.max_steps"]) == ("8", "7")
