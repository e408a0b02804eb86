"""Compare `train.learning_rate: auto` with a grid of rates: validation loss, rate, share of steps and time.

    python benchmarks/learning_rate.py --recipe recipes/demo.yaml --out benchmarks/learning_rate.json
    python -m tools.smollm2
    python benchmarks/learning_rate.py --recipe recipes/smollm2-best.yaml --data fiqa_qa.parquet \\
        --center 1e-3 --out benchmarks/learning_rate.json

Each rate, and `auto`, is trained with the project's own training, whole. The grid has seven rates, each
twice the one before, around `--center` (the recipe's rate, unless given). `--base` takes another folder
than the recipe's; `--data` a table with the columns instruction, input and output in place of its rows, of
whose questions a tenth is for validation and a tenth for the test, which is not used. The file named by
--out is written after every training; it holds any number of settings, and one that it has is gone on with.
Texts are not in it.
Run from the project's root.
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.quantization_cost import (
    LIBRARIES,
    read_recipe,
    read_splits,
    train_adapter,
    vary,
)
from benchmarks.recipes import OTHER_DATA
from benchmarks.training_speed import version
from fintune.data.prompt import encode, load_tokenizer
from fintune.hardware import compute_dtype, free_memory
from fintune.model.base import load_base
from fintune.params import Params
from fintune.stage import log, run, write_json

POINTS = 7
BAR = 0.01  # nats an answer token above the grid's best
KEPT = ("validation_loss", "best_step", "steps", "seconds", "validation_seconds", "learning_rate")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--base", help="a folder in place of the recipe's base.model")
    parser.add_argument("--data", help="a file or URL in place of the recipe's fetch.source")
    parser.add_argument("--center", type=float, help="of the grid; default: the recipe's rate")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", dest="changes")
    given = parser.parse_args()
    changes = [f"fetch.source={given.data}", *OTHER_DATA] if given.data else []
    changes += [f"base.model={given.base}"] if given.base else []
    params = read_recipe(given.recipe, [*changes, *given.changes])
    center = given.center or float(params.train.learning_rate)
    grid = [float(f"{center * 2.0**n:.3g}") for n in range(-(POINTS // 2), POINTS // 2 + 1)]
    known = json.loads(given.out.read_text()) if given.out.is_file() else {"settings": []}
    reports: list[dict[str, Any]] = known["settings"]
    report = begin(reports, params, grid)
    tokenizer = load_tokenizer(params.base, params.train.end_token, params.format.template)
    rows = read_splits(params, tokenizer)
    tokens = {
        name: [encode(tokenizer, row["prompt"], row["completion"]) for row in rows[name]]
        for name in ("train", "validation")
    }
    report["rows"] = {name: len(part) for name, part in tokens.items()}
    for rate in ["auto", *sorted(grid, key=lambda rate: abs(rate - center))]:
        if any(each["given"] == rate for each in report["runs"]):
            continue
        log.info("learning rate %s", rate)
        settings = vary(params, learning_rate=rate)
        report["runs"].append({"given": rate, **one_run(settings, tokenizer, rows, tokens)})
        report.update(conclude(report["runs"]))
        write_json(given.out, known)
        print(table(report), flush=True)


def begin(reports: list[dict[str, Any]], params: Params, grid: list[float]) -> dict[str, Any]:
    """Return the report of this setting among those of a file, which gets a new one if it has none."""
    report: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in LIBRARIES},
        "parameters": params.model_dump(mode="json", include={"base", "train"}),
        "data": Path(params.fetch.source).name,
        "grid": grid,
        "runs": [],
    }
    same = ("device", "versions", "parameters", "data", "grid")
    for each in reports:
        if all(each[key] == report[key] for key in same):
            return each
    reports.append(report)
    return report


def one_run(
    params: Params, tokenizer: Any, rows: dict[str, Any], tokens: dict[str, Any]
) -> dict[str, Any]:
    """Train once."""
    settings, dtype = params.train, compute_dtype(params.train.precision)
    model = load_base(params.base, tokenizer, settings.quantization, dtype)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = train_adapter(model, settings, tokenizer, tokens, rows["validation"], Path(folder))
    found = {key: result.metrics[key] for key in KEPT} | {
        "wall_seconds": time.perf_counter() - begun
    }
    if result.search:
        found["search"] = {
            "steps": result.search.steps,
            "share_of_steps": result.search.steps / result.metrics["steps"],
            "seconds": result.search.seconds,
            "share_of_seconds": result.search.seconds / result.metrics["seconds"],
            "losses": result.search.losses,
        }
    del model, result
    free_memory()
    return found


def conclude(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare the found rate with the best of the grid, as far as it is measured."""
    found = next(each for each in runs if each["given"] == "auto")
    of_grid = [each for each in runs if each["given"] != "auto"]
    if not of_grid:
        return {}
    best = min(of_grid, key=lambda each: each["validation_loss"])
    above = found["validation_loss"] - best["validation_loss"]
    return {
        "best_of_grid": best["given"],
        "auto": found["learning_rate"],
        "auto_above_best": above,
        "grid_is_whole": len(of_grid) == POINTS,
        "within_bar": above <= BAR if len(of_grid) == POINTS else None,
    }


def table(report: dict[str, Any]) -> str:
    """Format one line per training, and the comparison."""
    lines = [f"{'rate':>10} {'validation':>11} {'seconds':>8}"]
    for each in sorted(report["runs"], key=lambda each: each["learning_rate"]):
        mark = (
            f"  auto, {each['search']['share_of_steps']:.1%} of the steps"
            if "search" in each
            else ""
        )
        loss, rate = each["validation_loss"], each["learning_rate"]
        lines.append(f"{rate:>10.3g} {loss:>11.4f} {each['seconds']:>8.1f}{mark}")
    if "auto_above_best" in report:
        lines.append(f"auto is {report['auto_above_best']:+.4f} nats above the grid's best")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
