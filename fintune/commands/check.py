"""Check all that a run needs, and say what it takes: memory, time, disk, money.

    python -m fintune check                                  # params.yaml, on this machine
    python -m fintune check recipes/mistral-7b.yaml --gpu h100 --price-per-hour 2.50
    python -m fintune check --gpu a100 --gpu-memory 40 --gpus 2 --json

Nothing is changed, and nothing computed but a matrix product. Of a base on the hub only its configuration
and tokenizer are downloaded; a source is read as `fetch` reads it. An H100's speed is measured, other GPUs
are scaled from it. Downloads are not in the time. The exit status is 1 if something would fail.
"""

import argparse
import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fintune.errors import UserError
from fintune.lineage import project_root
from fintune.params import PARAMS_FILE, flatten, left_out, read_params, read_valid_sections


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for the recipe, the machine and the price."""
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", type=Path, default=PARAMS_FILE)
    parser.add_argument(
        "--gpu", help="a kind of GPU to forecast, such as h100; default: this machine"
    )
    parser.add_argument("--gpu-memory", type=_positive, metavar="GB", help="default: as published")
    parser.add_argument("--gpus", type=int, choices=range(1, 9), metavar="N")
    parser.add_argument("--price-per-hour", type=_positive, metavar="PRICE", help="of the machine")
    parser.add_argument(
        "--only", choices=("base",), help="check parameters and base alone, as format does"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")


def main(given: argparse.Namespace) -> None:
    """Run the checks, and print what they found."""
    from fintune.forecast.checks import Findings, table  # these import torch, which takes seconds
    from fintune.forecast.report import check_run

    logging.getLogger("transformers").setLevel(logging.ERROR)  # of rows that format would cut
    found, about = Findings(), dict[str, Any]()
    taken: dict[str, Any] = {}
    found.check(
        "parameters",
        lambda: _valid(given.recipe, taken, left_out(read_params(given.recipe))),
    )
    try:
        sections = read_valid_sections(given.recipe)
    except UserError:
        sections = {}
    check_run(found, about, sections, project_root(), given)
    if taken:
        found.check("left out", lambda: f"and taken as usual: {_shown(taken)}")
    if given.json:
        print(json.dumps({"findings": [asdict(each) for each in found], **about}, indent=2))
    else:
        print(table(found))
    if problems := found.problems:
        names = ", ".join(dict.fromkeys(each.what for each in problems))
        sys.exit(f"error: {len(problems)} problem{'s' * (len(problems) > 1)}: {names}")


def _valid(recipe: Path, taken: dict[str, Any], usual: dict[str, Any]) -> str:
    taken.update(usual)
    return f"{recipe}: valid"


def _shown(values: dict[str, Any]) -> str:
    """Write values by section, without those that are null or empty."""
    sections: dict[str, list[str]] = {}
    for key, value in flatten(values).items():
        if value not in (None, []):
            section, _, name = key.partition(".")
            text = value if isinstance(value, str) else json.dumps(value)
            sections.setdefault(section, []).append(f"{name} {text}")
    return "; ".join(f"{section}: {', '.join(said)}" for section, said in sections.items())


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(text)
    return value
