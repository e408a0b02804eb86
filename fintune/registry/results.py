"""Results that later stages add to an adapter's run."""

import json
import tempfile
from pathlib import Path
from typing import Any

from mlflow.entities import RunTag
from mlflow.tracking import MlflowClient

from fintune.params import flatten
from fintune.tracking.points import changed
from fintune.tracking.runs import as_texts, upload

TABLES = "mlflow.loggedArtifacts"  # the tag that MLflow's UI finds tables by


def log_results(
    client: MlflowClient,
    run_id: str,
    metrics: dict[str, Any],
    settings: dict[str, Any],
    files: list[Path],
) -> None:
    """Add a later stage's results to the adapter's run.

    The stage's parameters become tags: an adapter may be evaluated again with different ones, and MLflow's
    parameters are immutable.
    """
    numbers = {
        key.replace(".", "/"): float(value)
        for key, value in flatten(metrics).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    client.log_batch(
        run_id,
        metrics=changed(client, run_id, numbers),
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
