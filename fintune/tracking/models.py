"""The adapter as a logged model: its files and parameters, and the metrics that the Models page compares."""

import json
from typing import Any

from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus, Metric
from mlflow.tracking import MlflowClient

from fintune import paths
from fintune.tracking.files import writable
from fintune.tracking.points import changed, now_ms

TYPE = "LoRA adapter"
NOT_IN_NAMES = str.maketrans({".": "·", **dict.fromkeys("/:%\"'", "_")})  # MLflow refuses them
VERSIONS = "mlflow.modelVersions"  # the tag that the Models page finds a model's versions by


def model_of_run(client: MlflowClient, run_id: str) -> LoggedModel | None:
    """Return the logged model of a run's adapter; None if it was not logged, or not to its end."""
    models = _models(client, run_id)
    return next((each for each in models if each.status == LoggedModelStatus.READY), None)


def _models(client: MlflowClient, run_id: str) -> list[LoggedModel]:
    experiment = client.get_run(run_id).info.experiment_id
    wanted = f"source_run_id = '{run_id}'"
    found = client.search_logged_models([experiment], filter_string=wanted)
    return [each for each in found if each.model_type == TYPE]


def begin_model(client: MlflowClient, run_record: dict[str, Any]) -> LoggedModel:
    """Find or create the model of a run's adapter, named after the run, with the run's parameters."""
    run_id = run_record["run_id"]
    if found := _models(client, run_id):
        return found[0]
    run = client.get_run(run_id)
    return client.create_logged_model(
        run.info.experiment_id,
        str(run.info.run_name).translate(NOT_IN_NAMES),
        source_run_id=run_id,
        params=run_record["params"],
        model_type=TYPE,
    )


def finish_model(client: MlflowClient, run_id: str, model: LoggedModel, step: int) -> None:
    """Upload the adapter to its model, and link the model to the run.

    Args:
        step: of the training whose weights are kept.
    """
    with writable(paths.ADAPTER) as copy:
        client.log_model_artifacts(model.model_id, str(copy))
    linked = client.get_run(run_id).outputs.model_outputs
    if model.model_id not in [each.model_id for each in linked]:  # MLflow takes a link once
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)


def linked_points(
    client: MlflowClient,
    run_id: str,
    model: LoggedModel,
    values: dict[str, float],
    data: tuple[str, str] | None = None,
) -> list[Metric]:
    """Return final metrics for a run and its model, without those that both have with this value.

    Args:
        data: name and digest of the data set that they were measured on.
    """
    name, digest = data or (None, None)
    newest = sorted(client.get_logged_model(model.model_id).metrics or [], key=_time)
    there = {each.key: each.dataset_digest for each in newest}
    new = {metric.key for metric in changed(client, run_id, values)}
    points = []
    for key, value in values.items():
        of_data = there.get(key)
        if key not in new and key in there and digest in (None, of_data):
            continue
        time = now_ms()
        if key not in new and key not in there:  # the run takes a point of the same time once
            time = client.get_metric_history(run_id, key)[-1].timestamp
        points.append(Metric(key, value, time, 0, model.model_id, name, digest, run_id))
    return points


def _time(metric: Metric) -> int:
    return int(metric.timestamp)


def link_version(client: MlflowClient, model: LoggedModel, name: str, version: str) -> None:
    """Let the Models page show a registered version beside its model."""
    known = json.loads(model.tags.get(VERSIONS, "[]"))
    ours = {"name": name, "version": version}
    if ours not in known:
        client.set_logged_model_tags(model.model_id, {VERSIONS: json.dumps([*known, ours])})
