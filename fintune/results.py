"""What a person wants to know when the pipeline is done: `python -m fintune.results`."""

import json
import os
from pathlib import Path
from typing import Any

from fintune.params import UserError

ROWS = {
    "perplexity": "answer perplexity",
    "token_accuracy": "token accuracy",
    "rouge_l": "ROUGE-L",
    "stop_rate": "stop rate",
    "mean_answer_tokens": "tokens an answer",
}


def main() -> None:
    evaluation = read_report("evaluation")
    export = read_report("export")
    train = read_report("train")
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    show_ui = (
        f"open {uri}"
        if uri and uri.startswith("http")
        else "mlflow ui --backend-store-uri sqlite:///mlflow.db"
    )
    print(compare(evaluation))
    print(
        f"""
Gate: {evaluation["gate"]["reason"]}
Trained {train["steps"]} steps in {train["seconds"]:.0f} s, {train["tokens_per_second"]:,.0f} tokens/s, \
{train["peak_memory_gib"]:.1f} GiB at most

Adapter       models/adapter
Merged model  models/merged   (logits within {export["max_logit_difference"]:.2g} of the adapter's)
Registered    {export["registered_model"]} version {export["version"]} ({", ".join(export["aliases"])})
Samples       reports/samples.md

Browse the runs   source .venv/bin/activate && {show_ui}   then http://127.0.0.1:5000
Try a change      dvc exp run -S train.learning_rate=1e-3   then   dvc exp show"""
    )


def compare(evaluation: dict[str, Any]) -> str:
    """Base and tuned model side by side, a line a metric."""
    lines = [f"{evaluation['rows']} test questions    {'base':>10} {'tuned':>10}"]
    for key, title in ROWS.items():
        base, tuned = evaluation["base"][key], evaluation["tuned"][key]
        lines.append(f"{title:<22} {base:>10.4g} {tuned:>10.4g}")
    return "\n".join(lines)


def read_report(name: str) -> dict[str, Any]:
    """A stage's metrics.

    Raises:
        UserError: the stage has not run.
    """
    path = Path(f"reports/{name}.json")
    if not path.is_file():
        raise UserError(f"{path}: not found; run `dvc repro` first")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


if __name__ == "__main__":
    from fintune.stage import run

    run(main)
