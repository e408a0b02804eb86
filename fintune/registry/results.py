"""Results that later stages add to an adapter's run."""

import json
import tempfile
from pathlib import Path
from typing import Any

from mlflow.entities import RunTag
from mlflow.tracking import MlflowClient

from fintune import paths
from fintune.params import flatten
from fintune.registry.answers import log_answers_or_later
from fintune.tracking.datasets import describe_table, log_data_set
from fintune.tracking.files import upload
from fintune.tracking.models import linked_points, model_of_run
from fintune.tracking.points import FIRST, changed
from fintune.tracking.runs import as_texts

TEST = {"instruction": "instruction", "input": "question", "output": "reference"}  # of the table
SHOWN_FIRST = (
    "accuracy",
    "perplexity",
)  # of the tuned model, in the first section of MLflow's charts
VERDICTS = {True: "holds", False: "broken"}
TABLES = "mlflow.loggedArtifacts"  # the tag that MLflow's UI finds tables by


def log_evaluation(
    client: MlflowClient,
    run_id: str,
    report: dict[str, Any],
    settings: dict[str, Any],
    table: list[dict[str, Any]],
) -> None:
    """Add an evaluation to the adapter's run and model: figures, gate, files, test rows and answers.

    Args:
        settings: the sections that it ran with.
        table: the rows of `reports/predictions.parquet`.
    """
    rows = [{column: row[name] for column, name in TEST.items()} for row in table]
    data = describe_table(rows, "test", paths.rows(paths.FORMATTED, "test"))
    log_data_set(client, run_id, data)
    rules = report["gate"]["rules"]
    figures = report | {"gate": {each["rule"]: float(each["passed"]) for each in rules}}
    figures |= {FIRST: {f"tuned_{key}": report["tuned"].get(key) for key in SHOWN_FIRST}}
    verdicts = {each["rule"]: f"{VERDICTS[each['passed']]}: {each['reason']}" for each in rules}
    settings = settings | {"gate": verdicts, "gate_passed": report["gate"]["passed"]}
    files = (paths.EVALUATION, paths.PREDICTIONS, paths.EVALUATION_PAGE)
    there = [file for file in files if file.is_file()]
    log_results(client, run_id, figures, settings, there, (data["name"], data["digest"]))
    log_rows(client, run_id, "predictions", table)
    log_rows(client, run_id, "decodings", report["decoding"]["candidates"])
    log_answers_or_later(client, run_id, table)


def log_results(
    client: MlflowClient,
    run_id: str,
    metrics: dict[str, Any],
    settings: dict[str, Any],
    files: list[Path],
    data: tuple[str, str] | None = None,
) -> None:
    """Add a later stage's results to the adapter's run, and to its model what is measured on that.

    The stage's parameters become tags: an adapter may be evaluated again with different ones, and MLflow's
    parameters are immutable.

    Args:
        data: name and digest of the data set.
    """
    numbers = {
        key.replace(".", "/"): float(value)
        for key, value in flatten(metrics).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    model = model_of_run(client, run_id)
    linked = {key: v for key, v in numbers.items() if key.startswith("tuned/") or "/" not in key}
    points = linked_points(client, run_id, model, linked, data) if model else []
    others = numbers if model is None else {k: v for k, v in numbers.items() if k not in linked}
    client.log_batch(
        run_id,
        metrics=changed(client, run_id, others) + points,
        tags=[RunTag(key, value) for key, value in as_texts(settings).items()],
    )
    for file in files:
        upload(client, run_id, file)


def log_rows(client: MlflowClient, run_id: str, name: str, rows: list[dict[str, Any]]) -> None:
    """Log rows as a table on the run's page, in place of an earlier table of this name.

    `mlflow.log_table` would append them to it.
    """
    import pandas as pd

    file = f"{name}.json"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / file
        pd.DataFrame(rows).to_json(path, orient="split", index=False)
        client.log_artifact(run_id, str(path))
    there = json.loads(client.get_run(run_id).data.tags.get(TABLES, "[]"))
    table = {"path": file, "type": "table"}
    client.set_tag(run_id, TABLES, json.dumps([*(t for t in there if t != table), table]))
