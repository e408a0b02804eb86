"""Summarise the last run: quality, the gate, where things are, and what can be done next."""

import os
from typing import Any

from mlflow.tracking import MlflowClient

from fintune import paths
from fintune.errors import shown
from fintune.evaluation.gate import gate_lines
from fintune.registry.recovery import RECORD, find_run
from fintune.registry.versions import where_registered
from fintune.stage import read_json
from fintune.tracking.client import experiment_name

ROWS = {
    "accuracy": "right answers",
    "checkable_rows": "of so many",
    "perplexity": "answer perplexity",
    "rouge_l": "ROUGE-L",
    "stop_rate": "stop rate",
    "loop_rate": "loop rate",
    "mean_answer_tokens": "tokens an answer",
}


def summarise(client: MlflowClient | None) -> str:
    """Summarise the reports in this folder, and what the registry says of the model.

    Args:
        client: None where there is no store.
    """
    evaluation, export, train = map(
        read_json, (paths.EVALUATION, paths.EXPORT, paths.TRAIN_METRICS)
    )
    uri, page = os.environ.get("MLFLOW_TRACKING_URI", ""), _page(client)
    browse = (
        f"open {shown(uri).rstrip('/')}/{page}"
        if uri.startswith("http")
        else f"mlflow ui --backend-store-uri sqlite:///{paths.MLFLOW_DATABASE}   then "
        f"http://127.0.0.1:5000/{page}"
    )
    gate = "\n".join(gate_lines(evaluation["gate"]))
    return f"""{format_comparison(evaluation)}

{gate}
Trained {train["steps"]} steps in {train["seconds"]:.0f} s, {train["tokens_per_second"]:,.0f} tokens/s, \
{train["peak_memory_gib"]:.1f} GiB at most

Adapter       {paths.ADAPTER}
Merged model  {paths.MERGED}   (logits within {export["max_logit_difference"]:.2g} of the adapter's)
Registered    {registration(client, export)}
Report        {paths.EVALUATION_PAGE}   (verdict, intervals, plots, samples)

Next, in the environment (source .venv/bin/activate):
Ask it            python -m fintune ask "..."
Browse the runs   {browse}
Try a change      dvc exp run -S train.learning_rate=1e-3   then   make experiments
Keep this one     git add -A && git commit -m "..."   then   python -m fintune lineage {paths.ADAPTER}"""


def _page(client: MlflowClient | None) -> str:
    """Return the address of the runs' page in MLflow's UI, in its view for training."""
    experiment = client.get_experiment_by_name(experiment_name()) if client else None
    if experiment is None:
        return ""
    return f"#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning"


def registration(client: MlflowClient | None, export: dict[str, Any]) -> str:
    """Say which version the model is in the registry that is set now, or why it is none there."""
    if client is None:
        return f"nowhere: there is no MLflow store here; {RESTORE}"
    name, run_id = export["registered_model"], find_run(client, read_json(paths.RUN, *RECORD))
    if run_id and (version := where_registered(client, name, run_id)):
        return version
    if reason := export.get("not_registered"):
        return f"no: {reason}"
    return f"not in this registry; {RESTORE}"


RESTORE = "`python -m fintune restore` logs the model there, or MLFLOW_TRACKING_URI names another"


def format_comparison(evaluation: dict[str, Any]) -> str:
    """Format base and tuned model side by side, one line per metric."""
    lines = [f"{evaluation['rows']} test questions    {'base':>10} {'tuned':>10}"]
    for key, title in ROWS.items():
        values = (evaluation[side][key] for side in ("base", "tuned"))
        base, tuned = ("none" if value is None else f"{value:.4g}" for value in values)
        lines.append(f"{title:<22} {base:>10} {tuned:>10}")
    return "\n".join(lines)
