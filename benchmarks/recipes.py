"""Compare recipes by the answers that people get: loss, answers, intervals and seconds, over several seeds.

    python -m tools.smollm2
    python benchmarks/recipes.py --recipes recipes/smollm2.yaml recipes/smollm2-best.yaml \\
        --source fiqa_qa.parquet --seeds 0 1 2 --out benchmarks/recipes.json

`--source` takes a table with the columns instruction, input and output in place of the recipes' data; a
tenth of its questions is for validation and a tenth for the test, of which 256 rows are measured. The
seed is that of the training and of the samples; all runs have the same rows. A figure is the mean over the
seeds; its interval is a bootstrap by question of that mean. It only writes the file named by --out,
after every run.
"""

import argparse
import shlex
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.quantization_cost import LIBRARIES, fine_tune, read_recipe, read_splits, vary
from benchmarks.training_speed import version
from fintune.data.prompt import encode, load_tokenizer
from fintune.data.questions import questions_of
from fintune.data.records import read_passages
from fintune.evaluation.measure import measure
from fintune.evaluation.report import conclude
from fintune.evaluation.rows import select_rows
from fintune.evaluation.statistics import Sums, quotients, resampled_sums
from fintune.evaluation.sums import metric_sums
from fintune.model.adapter import write_training
from fintune.params import Params
from fintune.registry.champion import Champion
from fintune.stage import log, run, write_json

SHOWN = ("loss", "perplexity", "accuracy", "stop_rate", "loop_rate", "distinct_2")
SHOWN = (*SHOWN, "rouge_1", "rouge_l", "chrf", "length_ratio", "mean_answer_tokens")
TRAINING = ("validation_loss", "steps", "seconds", "validation_seconds")
OTHER_DATA = (
    *("fetch.columns.instruction=instruction", "fetch.default_instruction=null"),
    *(f"fetch.columns.{name}=null" for name in ("result", "kind", "split")),
    *("split.validation_fraction=0.1", "split.test_fraction=0.1", "evaluate.max_rows=256"),
    *("generation.max_new_tokens=384", "format.max_tokens=512", "evaluate.champion=null"),
    "evaluate.gate.max_loss_above_champion=null",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", type=Path, nargs="+", required=True)
    parser.add_argument("--source", help="a file or URL in place of the recipes' fetch.source")
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", dest="changes")
    given = parser.parse_args()
    other = [f"fetch.source={given.source}", *OTHER_DATA] if given.source else []
    report: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "versions": {name: version(name) for name in LIBRARIES},
        "recipes": {},
    }
    for recipe in given.recipes:
        params = read_recipe(recipe, [*other, *given.changes])
        rows = read_splits(params, load_tokenizer(params.base, "new"))
        runs, sums = [], []
        for seed in given.seeds:
            log.info("%s, seed %d", recipe.stem, seed)
            figures, of_rows, questions = one_run(params, rows, seed)
            runs.append(figures | {"seed": seed})
            sums.append(of_rows)
            report["recipes"][recipe.stem] = {
                "parameters": params.model_dump(include={"base", "train", "generation"}),
                "rows": {name: len(part) for name, part in rows.items()},
                "test_questions": len(set(questions)),
                "tuned": intervals(sums, questions),
                "runs": runs,
            }
            write_json(given.out, report)
            print(table(report["recipes"]), flush=True)


def one_run(
    params: Params, rows: dict[str, list[dict[str, Any]]], seed: int
) -> tuple[dict[str, Any], Sums, list[str]]:
    """Train and evaluate once.

    Returns:
        The figures of the run, the tuned model's sums by row, and the rows' questions.
    """
    params = vary(params, seed=seed)
    evaluate = params.evaluate.model_copy(update={"seed": seed})
    tokenizer = load_tokenizer(params.base, params.train.end_token)
    tokens = {
        name: [encode(tokenizer, row["prompt"], row["completion"]) for row in part]
        for name, part in rows.items()
    }
    test, validation = (
        select_rows(rows[name], questions_of(rows[name]), most)
        for name, most in (("test", evaluate.max_rows), ("validation", None))
    )
    with tempfile.TemporaryDirectory() as folder:
        trained = fine_tune(params, tokenizer, tokens, rows["validation"], Path(folder))
        adapter = Path(folder) / "adapter"
        write_training(adapter, params.base, params.train.model_dump(), "")
        begun = time.perf_counter()
        passages = read_passages(evaluate.general_text) if evaluate.general_text else []
        arguments = (test, validation, passages, evaluate, params.generation)
        measured = measure(adapter, None, *arguments)
        report, table = conclude(measured, test, Champion(reason="not compared"), evaluate)
    sums, _ = metric_sums(measured.results["tuned"], test, None)
    return (
        {
            **{key: trained[key] for key in TRAINING},
            "evaluation_seconds": time.perf_counter() - begun,
            **{key: report[key] for key in ("base", "tuned", "decoding")},
            "greedy": report["greedy"]["tuned"],
            "forgetting": report.get("forgetting"),
            "gate": report["gate"],
            "answers": [{key: row[key] for key in ("question", "tuned")} for row in table[:10]],
        },
        sums,
        test.questions,
    )


def intervals(runs: list[Sums], questions: list[str]) -> dict[str, dict[str, float]]:
    """Compute each metric's mean over the runs, with the 95 % interval of a bootstrap by question."""
    found = {}
    for name in runs[0]:
        columns = np.mean([np.stack(sums[name], axis=1) for sums in runs], axis=0)
        value = quotients(name, *columns.sum(axis=0))
        if not np.isfinite(value):
            continue
        drawn = resampled_sums(columns, questions, 1000, 0)
        low, high = np.percentile(quotients(name, drawn[:, 0], drawn[:, 1]), [2.5, 97.5])
        found[name] = {"value": float(value), "low": float(low), "high": float(high)}
    return found


def table(recipes: dict[str, Any]) -> str:
    """Format the tuned models' figures, a column for each recipe."""
    lines = ["".join(f"{name:>28}" for name in ("", *recipes))]
    for key in SHOWN:
        cells = [found["tuned"].get(key) for found in recipes.values()]
        shown = [f"{c['value']:.3f} ({c['low']:.3f} – {c['high']:.3f})" if c else "" for c in cells]
        lines.append("".join(f"{cell:>28}" for cell in (key, *shown)))
    for key in ("seconds", "evaluation_seconds"):
        means = [np.mean([r[key] for r in found["runs"]]) for found in recipes.values()]
        lines.append("".join(f"{cell:>28}" for cell in (key, *(f"{mean:.0f}" for mean in means))))
    chosen = [[r["decoding"]["title"] for r in found["runs"]] for found in recipes.values()]
    return "\n".join([*lines, *(f"{n}: {c}" for n, c in zip(recipes, chosen, strict=True))])


if __name__ == "__main__":
    run(main)
