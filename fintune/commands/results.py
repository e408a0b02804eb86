"""Show the last run: quality, cost and output paths.

python -m fintune results
"""

import argparse
import os
from typing import Any

from fintune import paths
from fintune.integrity import check_outputs
from fintune.stage import read_json

ROWS = {
    "accuracy": "right answers",
    "checkable_rows": "of so many",
    "perplexity": "answer perplexity",
    "rouge_l": "ROUGE-L",
    "stop_rate": "stop rate",
    "loop_rate": "loop rate",
    "mean_answer_tokens": "tokens an answer",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no arguments: the last run is in this folder."""


def main(given: argparse.Namespace) -> None:
    """Print a summary of the last `dvc repro`."""
    print(last_run())


def last_run() -> str:
    """Summarise the reports of the last `dvc repro`."""
    reports = (paths.EVALUATION, paths.EXPORT, paths.TRAIN_METRICS)
    check_outputs(reports, strict=False)
    evaluation, export, train = map(read_json, reports)
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    show_ui = (
        f"open {uri}"
        if uri and uri.startswith("http")
        else f"mlflow ui --backend-store-uri sqlite:///{paths.MLFLOW_DATABASE}"
    )
    return (
        format_comparison(evaluation)
        + f"""

Gate: {evaluation["gate"]["reason"]}
Trained {train["steps"]} steps in {train["seconds"]:.0f} s, {train["tokens_per_second"]:,.0f} tokens/s, \
{train["peak_memory_gib"]:.1f} GiB at most

Adapter       {paths.ADAPTER}
Merged model  {paths.MERGED}   (logits within {export["max_logit_difference"]:.2g} of the adapter's)
Registered    {export["registered_model"]} version {export["version"]} ({", ".join(export["aliases"])})
Report        {paths.EVALUATION_PAGE}   (verdict, intervals, plots, samples)

Browse the runs   source .venv/bin/activate && {show_ui}   then http://127.0.0.1:5000
Try a change      dvc exp run -S train.learning_rate=1e-3   then   dvc exp show"""
    )


def format_comparison(evaluation: dict[str, Any]) -> str:
    """Format base and tuned model side by side, one line per metric."""
    lines = [f"{evaluation['rows']} test questions    {'base':>10} {'tuned':>10}"]
    for key, title in ROWS.items():
        values = (evaluation[side][key] for side in ("base", "tuned"))
        base, tuned = ("none" if value is None else f"{value:.4g}" for value in values)
        lines.append(f"{title:<22} {base:>10} {tuned:>10}")
    return "\n".join(lines)
