r"""Compare experiments: what each changed, and the metrics that matter, the best first.

    python -m fintune experiments                          # on this commit, in 80 columns
    python -m fintune experiments --sort tuned.rouge_l
    python -m fintune experiments --format csv > experiments.csv    # or markdown

Options of `dvc exp show` that choose commits follow `--`, as in `experiments -- --all-commits`.
"""

import argparse
import csv
import io
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

from fintune.errors import UserError
from fintune.metrics import METRICS
from fintune.params import flatten

WIDTH = 80
NAME = 20  # characters of an experiment's name
SHOWN = {  # metrics by their title in the table
    "validation_loss": "val.loss",
    "tuned.loss": "loss",
    "tuned.accuracy": "right",
    "tuned.rouge_l": "ROUGE-L",
    "tuned.stop_rate": "stop",
}
UPWARD = {f"tuned.{key}" for key, metric in METRICS.items() if metric.better > 0}


class Row(NamedTuple):
    """An experiment or commit, with its metrics and the parameters that are not the commit's."""

    name: str
    metrics: dict[str, Any]
    changed: dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for the order and the format."""
    parser.add_argument("--sort", default="tuned.loss", metavar="METRIC", help="the best first")
    parser.add_argument("--format", choices=("text", "markdown", "csv"), default="text")
    parser.add_argument("options", nargs="*", metavar="-- OPTION", help="options of `dvc exp show`")


def main(given: argparse.Namespace) -> None:
    """Print the table."""
    rows = read_rows(_show(given.options))
    known = sorted({key for row in rows for key in row.metrics})
    if rows and given.sort not in known:
        raise UserError(f"--sort {given.sort}: no such metric; there are {', '.join(known)}")
    print(FORMATS[given.format](in_order(rows, given.sort)))


def _show(options: list[str]) -> Any:
    here = Path(sys.executable).absolute().parent
    path = f"{here}{os.pathsep}{os.environ.get('PATH', '')}"
    command = ["dvc", "exp", "show", "--json", *options]
    done = subprocess.run(
        command, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(f"`{' '.join(command)}`: {done.stderr.strip()}")
    return json.loads(done.stdout)


def read_rows(shown: Any) -> list[Row]:
    """Read the output of `dvc exp show --json`: each commit, and its experiments."""
    rows = []
    for commit in shown:
        if commit["rev"] == "workspace":
            continue
        before = _values(commit, "params")
        found = [each for group in commit.get("experiments") or [] for each in group["revs"]]
        for each in (commit, *found):
            params = _values(each, "params")
            changed = {k: v for k, v in params.items() if before.get(k) != v}
            name = each.get("name") or each["rev"][:7]
            rows.append(Row(name, _values(each, "metrics"), changed))
    return rows


def _values(revision: dict[str, Any], kind: str) -> dict[str, Any]:
    files = ((revision.get("data") or {}).get(kind) or {}).values()
    return {key: value for file in files for key, value in flatten(file.get("data") or {}).items()}


def in_order(rows: list[Row], metric: str) -> list[Row]:
    """Sort by a metric, the best first; what was not measured, or failed, comes last."""
    sign = -1 if metric in UPWARD else 1

    def place(row: Row) -> tuple[bool, float]:
        value = row.metrics.get(metric)
        return not isinstance(value, int | float), sign * value if value is not None else 0.0

    return sorted(rows, key=place)


def _number(row: Row, key: str) -> str:
    value = row.metrics.get(key)
    return f"{value:.4g}" if isinstance(value, int | float) else "-"


def _changes(row: Row) -> str:
    said = (f"{key}={json.dumps(v) if v is None else v}" for key, v in row.changed.items())
    return ", ".join(said)


def as_text(rows: list[Row]) -> str:
    """Format for a terminal: a line for the figures, and what was changed below it."""
    lines = [" ".join([f"{'':<{NAME}}", *(f"{title:>9}" for title in SHOWN.values())])]
    for row in rows:
        name = row.name if len(row.name) <= NAME else row.name[: NAME - 1] + "…"
        lines.append(" ".join([f"{name:<{NAME}}", *(f"{_number(row, key):>9}" for key in SHOWN)]))
        lines += textwrap.wrap(_changes(row), WIDTH, initial_indent="  ", subsequent_indent="  ")
    return "\n".join(lines)


def as_markdown(rows: list[Row]) -> str:
    """Format as a table in Markdown."""
    lines = [["experiment", *SHOWN, "changed"], ["---"] * (len(SHOWN) + 2)]
    lines += [[row.name, *(_number(row, key) for key in SHOWN), _changes(row)] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def as_csv(rows: list[Row]) -> str:
    """Format as CSV, with a column for each metric and each parameter that any experiment changed."""
    keys = list(dict.fromkeys(key for row in rows for key in row.changed))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["experiment", *SHOWN, *keys])
    for row in rows:
        figures = [row.metrics.get(key) for key in SHOWN]
        table.writerow([row.name, *figures, *(row.changed.get(key) for key in keys)])
    return text.getvalue().rstrip("\n")


FORMATS = {"text": as_text, "markdown": as_markdown, "csv": as_csv}
