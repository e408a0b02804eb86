"""The MLflow run of a training job: started, logged to live, and described in `models/run.json`.

That file is the run record except for metrics and artifacts, so a run that DVC restored from its cache
or that a server lost can be logged again from the files.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Param as MlflowParam
from mlflow.entities import RunTag
from mlflow.tracking import MlflowClient
from ruamel.yaml import YAML

from fintune import paths
from fintune.lineage import (
    PARENT_RUN,
    finished_stages,
    git,
    in_no_commit,
    locked_params,
    output_hashes,
)
from fintune.params import PARAMS_FILE, flatten, with_usual
from fintune.stage import write_text
from fintune.tracking.client import experiment_name, store_lock
from fintune.tracking.datasets import log_data_set
from fintune.tracking.models import begin_model, finish_model, linked_points
from fintune.tracking.points import LiveCurve, log_missing, points_of
from fintune.tracking.scratch import RUN_ID, existing_run, own_scratch

log = logging.getLogger("fintune")

COMPLETE = "training_logged"
SWEEP = "experiments_on_commit"
MOST_NAMED = 4  # changes in a run's name


@contextmanager
def training_run(scratch: Path, name: str, parent: str | None) -> Iterator[tuple[str, LiveCurve]]:
    """Start a training job's run, or resume its earlier one, with system metrics.

    Args:
        scratch: the training's own folder, where the run's id outlives a kill.
        name: of a new run; under `dvc exp run`, what the experiment changed replaces it.
        parent: the run under which the UI nests a new one, if any.

    Yields:
        The run's id and its curve. The run ends as FINISHED, KILLED (by the user) or FAILED.

    Raises:
        UserError: another process trains the same.
    """
    client, id_file = MlflowClient(), scratch / RUN_ID
    with own_scratch(client, scratch):
        known = existing_run(client, id_file.read_text().strip()) if id_file.is_file() else None
        run = mlflow.start_run(
            run_id=known,
            parent_run_id=None if known else parent,
            run_name=None if known else name_of_run(name),
            log_system_metrics=True,
        )
        write_text(id_file, run.info.run_id)
        curve = LiveCurve(client, run.info.run_id)
        try:
            yield run.info.run_id, curve
        except BaseException as error:
            curve.close(seconds=5)
            with suppress(Exception):  # what ended the training is what the user needs to see
                mlflow.end_run("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        _or_later(mlflow.end_run)


def name_of_run(name: str) -> str:
    """Return what an experiment of DVC changed, with the experiment's name; else the given name."""
    experiment = os.environ.get("DVC_EXP_NAME")
    if not experiment:
        return name
    yaml = YAML(typ="safe")
    baseline = git(Path(), "show", f"{os.environ.get('DVC_EXP_BASELINE_REV')}:./{PARAMS_FILE}")
    before = flatten(yaml.load(baseline) or {})
    now = flatten(yaml.load(PARAMS_FILE.read_text(encoding="utf-8")))
    changed = [
        f"{key.removeprefix('train.')}={json.dumps(value)}"
        for key, value in now.items()
        if baseline and before.get(key) != value
    ]
    more = [f"{len(changed) - MOST_NAMED} more"] if len(changed) > MOST_NAMED else []
    told = ", ".join([*changed[:MOST_NAMED], *more])
    return f"{told} ({experiment})" if told else experiment


def sweep_run(client: MlflowClient, root: Path) -> str | None:
    """Find or create the run that groups one commit's experiments in MLflow.

    It groups the experiments that DVC runs outside the workspace, queued or with --temp. A search sets
    its own run in the environment (PARENT_RUN).

    Returns:
        The run's id, or None for training in the workspace.
    """
    if parent := os.environ.get(PARENT_RUN):
        return parent
    baseline = os.environ.get("DVC_EXP_BASELINE_REV")
    if not baseline or Path.cwd().resolve() == root:
        return None
    name = experiment_name()
    experiment = client.get_experiment_by_name(name).experiment_id
    with store_lock(root):
        found = client.search_runs([experiment], f"tags.{SWEEP} = '{baseline}'")
        if found:
            return str(found[0].info.run_id)
        tags = {
            SWEEP: baseline,
            "mlflow.note.content": "Queued and temporary experiments on this commit",
        }
        run = client.create_run(experiment, run_name=f"experiments on {baseline[:7]}", tags=tags)
        client.set_terminated(run.info.run_id, "FINISHED")
    return str(run.info.run_id)


def search_run(client: MlflowClient, name: str, space: dict[str, str]) -> str:
    """Find or create the run that holds a search's trials, and set its status to RUNNING."""
    named = experiment_name()
    experiment = client.get_experiment_by_name(named).experiment_id
    found = client.search_runs([experiment], f"tags.search = '{name}'")
    if found:
        run_id = str(found[0].info.run_id)
        client.update_run(run_id, status="RUNNING")
        return run_id
    tried = ", ".join(key.removeprefix("train.") for key in space)
    title = f"search of {tried} ({name})"
    run_id = str(client.create_run(experiment, run_name=title, tags={"search": name}).info.run_id)
    client.log_batch(run_id, params=[MlflowParam(key, value) for key, value in space.items()])
    return run_id


def describe_run(
    run_id: str, sections: dict[str, Any], hardware: str, root: Path
) -> dict[str, Any]:
    """Build the run record for `models/run.json`: id, parameters and lineage.

    Args:
        sections: the parameter sections that training itself used.
        hardware: name of the device.
        root: the folder with dvc.lock, which holds the parameters and hashes of earlier stages.
    """
    params = dict(sections)
    tags = {"mlflow.source.git.commit": git(root, "rev-parse", "HEAD"), "hardware": hardware}
    tags["git_commit"] = tags["mlflow.source.git.commit"]
    written = (f":!{paths.LOCK}", f":!{paths.REPORTS}")  # earlier stages wrote these
    changes = git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", *written)
    tags["git_dirty"] = str(bool(changes)).lower()
    if experiment := os.environ.get("DVC_EXP_NAME"):
        tags["dvc_experiment"] = experiment
    before = finished_stages(root, ("fetch", "split", "format"))
    for entry in before:
        params.update(with_usual(locked_params(entry)))
    tags |= output_hashes(before)
    fetched = params.get("fetch", {})
    sources = [part["source"] for part in (fetched, *fetched.get("more", [])) if "source" in part]
    untracked = in_no_commit(root, [*sources, params["base"]["model"]])
    if tags["git_commit"] and untracked:
        tags |= {"git_dirty": "true", "inputs_in_no_commit": ", ".join(untracked)}
        log.warning(
            "warning: %s in no commit, so a clone cannot rebuild this adapter; `git add` or `dvc add` it, "
            "and commit",
            " and ".join(untracked) + (" is" if len(untracked) == 1 else " are"),
        )
    active = mlflow.active_run()
    return {
        "run_id": run_id,
        "name": active.info.run_name if active else run_id,
        "experiment": experiment_name(),
        "params": as_texts(params),
        "tags": {key: value for key, value in tags.items() if value},
    }


def as_texts(tree: dict[str, Any]) -> dict[str, str]:
    """Flatten for MLflow; values are JSON, except plain strings, so types survive the round trip."""
    return {
        key: value if isinstance(value, str) and not _is_json(value) else json.dumps(value)
        for key, value in flatten(tree).items()
    }


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def log_training(
    client: MlflowClient,
    run_record: dict[str, Any],
    metrics: dict[str, float],
    curve: list[dict[str, float | None]],
) -> None:
    """Log parameters, data sets, final metrics, the adapter, and what was not logged live of the curve."""
    run_id = run_record["run_id"]
    for described in run_record.get("datasets", []):  # records of earlier releases have none
        log_data_set(client, run_id, described)
    model = begin_model(client, run_record)
    step = int(metrics.get("best_step", metrics["steps"]))
    params = [MlflowParam(key, value) for key, value in run_record["params"].items()]
    tags = [RunTag(key, value) for key, value in run_record["tags"].items()]
    tags.append(RunTag("mlflow.note.content", _description(metrics)))
    finals = linked_points(client, run_id, model, metrics)
    client.log_batch(run_id, metrics=finals, params=params, tags=tags)
    if search := run_record.get("learning_rate_search"):
        client.log_dict(run_id, search, "learning_rate_search.json")
    log_missing(client, run_id, points_of(curve), {})
    finish_model(client, run_id, model, step)
    client.set_tag(run_id, COMPLETE, "true")


def _description(metrics: dict[str, float]) -> str:
    """Format the note at the top of the run's page."""
    return (
        f"Validation loss {metrics['validation_loss']:.4g} after {metrics['steps']:.0f} steps in "
        f"{metrics['seconds']:.0f} s, {metrics['tokens_per_second']:,.0f} tokens/s. "
        f"{_rate(metrics)}Answers to read: Artifacts, evaluation.html. Curves: Model metrics, section curve."
    )


def _rate(metrics: dict[str, float]) -> str:
    """Say which learning rate a search found, if there was one."""
    if "search_steps" not in metrics:
        return ""
    return (
        f"Learning rate {metrics['learning_rate']:g}, found in {metrics['search_steps']:.0f} further steps: "
        "Artifacts, learning_rate_search.json. "
    )


def log_training_or_later(live: LiveCurve, *arguments: Any) -> None:
    """Call `log_training` after the live curve, but only warn on failure: evaluation logs the run again."""
    if live.close():
        _or_later(log_training, *arguments)


def _or_later(action: Callable[..., Any], *arguments: Any) -> None:
    try:
        action(*arguments)
    except Exception as error:  # the adapter is on disk, and evaluate logs the run again
        log.warning("MLflow: %s; evaluate logs the run again from the files", error)
