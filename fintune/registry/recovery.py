"""Log a run again from the files if MLflow lacks it."""

import csv
import io
import logging
from pathlib import Path
from typing import Any

import mlflow
from mlflow.tracking import MlflowClient

from fintune import paths
from fintune.data.tables import read_rows
from fintune.lineage import locked_params, locked_stages, project_root
from fintune.registry.answers import log_answers_or_later
from fintune.registry.results import log_evaluation
from fintune.reports import whole
from fintune.stage import read_json
from fintune.tracking.models import model_of_run
from fintune.tracking.runs import COMPLETE, log_training
from fintune.tracking.scratch import existing_run, forget_locked

RECORD = ("run_id", "name", "experiment", "params", "tags")  # what models/run.json has
log = logging.getLogger("fintune")


def run_of_adapter(client: MlflowClient) -> str:
    """Return the id of the adapter's run, logging it again from the files if it is missing.

    A run that was logged again has a new id; its tag `first_run_id` has the one in `models/run.json`. A run
    of an earlier release gets the logged model that it lacks. The checkpoints of a training that dvc.lock has
    are removed.
    """
    run_record = read_json(paths.RUN, *RECORD)
    metrics = whole(read_json(paths.TRAIN_METRICS))
    curve = read_curve(paths.TRAIN_CURVE)
    run_id = find_run(client, run_record)
    if run_id is None:
        experiment = mlflow.set_experiment(run_record["experiment"])
        tags = {"first_run_id": run_record["run_id"]}
        run_id = client.create_run(
            experiment.experiment_id, tags=tags, run_name=run_record["name"]
        ).info.run_id
        log.info("MLflow has no run %s; logging it again as %s", run_record["run_id"], run_id)
    run = client.get_run(run_id)
    if run.data.tags.get(COMPLETE) != "true" or model_of_run(client, run_id) is None:
        log_training(client, {**run_record, "run_id": run_id}, metrics, curve)
    if run.info.status != "FINISHED":
        client.set_terminated(run_id, "FINISHED")
    forget_locked(project_root())
    return str(run_id)


def find_run(client: MlflowClient, run_record: dict[str, Any]) -> str | None:
    """Return the id of the run that a record describes, or of the one that it was logged again as."""
    run_id = run_record["run_id"]
    if known := existing_run(client, run_id):
        return known
    experiment = client.get_experiment_by_name(run_record["experiment"])
    if experiment is None:
        return None
    again = client.search_runs([experiment.experiment_id], f"tags.first_run_id = '{run_id}'")
    return str(again[0].info.run_id) if again else None


def read_curve(path: Path) -> list[dict[str, float | None]]:
    """Read the training curve step by step; None where a step has no value."""
    return [
        {key: float(value) if value else None for key, value in row.items()}
        for row in csv.DictReader(io.StringIO(path.read_text()))
    ]


def restore_evaluation(client: Any, run_id: str) -> None:
    """Add the evaluation's results to a run that lacks them, or its answers."""
    if has_metric(client, run_id, "tuned/loss"):
        if paths.PREDICTIONS.is_file():
            log_answers_or_later(client, run_id, read_rows(paths.PREDICTIONS, []))
        return
    report = whole(read_json(paths.EVALUATION))
    settings = locked_params(locked_stages().get("evaluate", {}))
    log_evaluation(client, run_id, report, settings, read_rows(paths.PREDICTIONS, []))
    log.info("MLflow had no evaluation of this adapter; logged it again")


def has_metric(client: Any, run_id: str, metric: str) -> bool:
    """Return whether a run has a value of this metric."""
    return metric in client.get_run(run_id).data.metrics
