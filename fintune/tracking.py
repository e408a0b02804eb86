"""MLflow: the one run that belongs to an adapter, what is logged to it, and the model registry.

Training opens the run and writes `models/run.json`; evaluation and export add to it. That file holds
all that the run's record consists of besides metrics and artifacts, so a run that DVC restored from
its cache, or that a server has lost, is logged again from the files.
"""

import csv
import io
import json
import logging
import os
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2"
)  # the default keeps retrying for minutes
os.environ.setdefault("MLFLOW_ENABLE_ASYNC_LOGGING", "false")
import mlflow
from filelock import FileLock
from mlflow.entities import Metric, RunTag
from mlflow.entities import Param as MlflowParam
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from ruamel.yaml import YAML

from fintune.params import UserError

log = logging.getLogger("fintune")
EXPERIMENT = "financial-qa"
COMPLETE = "training_logged"
SWEEP = "experiments_on_commit"
NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # a model, an alias
TABLES = "mlflow.loggedArtifacts"  # the tag by which MLflow's pages find tables
for noisy in ("alembic", "mlflow", "sqlalchemy"):
    logging.getLogger(noisy).setLevel(logging.WARNING)


def connect(root: Path) -> MlflowClient:
    """Point MLflow at its store and make sure that the store answers, within seconds.

    `MLFLOW_TRACKING_URI` names a server or database; without it, or with a relative SQLite path, the
    file lies at the project's root, also for experiments that DVC runs in a temporary folder.
    `MLFLOW_EXPERIMENT_NAME` names the experiment.

    Raises:
        UserError: the server does not answer, or refuses.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    local = uri.startswith("sqlite:///") and not uri.startswith("sqlite:////")
    if local:
        uri = f"sqlite:///{root / uri.removeprefix('sqlite:///')}"
    if uri.startswith("http"):
        _ask_server(uri)
    mlflow.set_tracking_uri(uri)
    with _one_at_a_time(root):
        return _client(root, uri, local)


@contextmanager
def _one_at_a_time(root: Path) -> Iterator[None]:
    """Workers of `dvc queue start` that find no database or no experiment would both make it."""
    lock = root / ".checkpoints/mlflow.lock"
    lock.parent.mkdir(exist_ok=True)
    with FileLock(lock):
        yield


def _client(root: Path, uri: str, local: bool) -> MlflowClient:
    client = MlflowClient()
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    try:
        if client.get_experiment_by_name(name) is None:
            location = (root / "mlartifacts").as_uri() if local else None
            kind = {
                "mlflow.experimentKind": "custom_model_development"
            }  # else the UI shows agents' pages
            client.create_experiment(name, artifact_location=location, tags=kind)
        mlflow.set_experiment(name)
    except MlflowException as error:
        if error.get_http_status_code() in (401, 403) or "error code 401" in str(error):
            raise UserError(
                f"MLflow at {_shown(uri)} refuses access: set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD to a user of that server and its password"
            ) from None
        message = str(error).replace(uri, _shown(uri))  # which may hold a password
        raise UserError(f"MLflow at {_shown(uri)}: {message}") from None
    return client


def _ask_server(uri: str) -> None:
    import requests

    try:
        requests.get(f"{uri.rstrip('/')}/health", timeout=5).raise_for_status()
    except requests.RequestException as error:
        raise UserError(
            f"no MLflow server answers at {_shown(uri)} ({type(error).__name__}); start it, or unset "
            "MLFLOW_TRACKING_URI to log to mlflow.db in this folder"
        ) from None


def _shown(uri: str) -> str:
    """The address without a user's name and password."""
    scheme, _, rest = uri.partition("://")
    return f"{scheme}://{rest.rsplit('@', 1)[-1]}"


@contextmanager
def training_run(record: Path, name: str, parent: str | None) -> Iterator[str]:
    """The active run of a training, with system metrics; a resumed training goes on in its own run.

    Args:
        record: keeps the run's id between a kill and the resumption.
        name: of a new run; `dvc exp run` gives its experiment's name instead.
        parent: the run under which the UI shows a new one, if any.

    Yields:
        The run's id. The run ends as FINISHED, KILLED (by the user) or FAILED.
    """
    run_id = None
    if record.is_file():
        run_id = _existing(MlflowClient(), record.read_text().strip())
    run = mlflow.start_run(
        run_id=run_id,
        parent_run_id=None if run_id else parent,
        run_name=None if run_id else os.environ.get("DVC_EXP_NAME") or name,
        log_system_metrics=True,
    )
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(run.info.run_id)
    try:
        yield run.info.run_id
    except KeyboardInterrupt:
        mlflow.end_run("KILLED")
        raise
    except BaseException:
        mlflow.end_run("FAILED")
        raise
    _or_later(mlflow.end_run)


def sweep_run(client: MlflowClient, root: Path) -> str | None:
    """The run under which MLflow shows the experiments of one commit, made by the first of them.

    For experiments that DVC runs beside the user's workspace, queued or with --temp: those of a sweep.
    A search names its own run in `FINTUNE_PARENT_RUN`. None for others.
    """
    if parent := os.environ.get("FINTUNE_PARENT_RUN"):
        return parent
    baseline = os.environ.get("DVC_EXP_BASELINE_REV")
    if not baseline or Path.cwd().resolve() == root:
        return None
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    experiment = client.get_experiment_by_name(name).experiment_id
    with _one_at_a_time(root):
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
    """The running run that holds the trials of a search; the one of before where it is resumed."""
    named = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    experiment = client.get_experiment_by_name(named).experiment_id
    found = client.search_runs([experiment], f"tags.search = '{name}'")
    if found:
        run_id = str(found[0].info.run_id)
        client.update_run(run_id, status="RUNNING")
        return run_id
    run_id = str(client.create_run(experiment, run_name=name, tags={"search": name}).info.run_id)
    client.log_batch(run_id, params=[MlflowParam(key, value) for key, value in space.items()])
    return run_id


def live_logger(run_id: str) -> Callable[[int, dict[str, float]], None]:
    """A function that logs a step's values; a server that goes away costs the curve, not the training."""
    client = MlflowClient()
    lost = False

    def log_values(step: int, values: dict[str, float]) -> None:
        nonlocal lost
        if lost:
            return
        metrics = [Metric(f"curve/{k}", v, _now(), step) for k, v in values.items()]
        try:
            client.log_batch(run_id, metrics=metrics)
        except Exception as error:  # whatever it is, minutes of training are worth more
            lost = True
            log.warning("MLflow stopped answering (%s); evaluate logs the run again", error)

    return log_values


def describe_run(
    run_id: str, sections: dict[str, Any], hardware: str, root: Path
) -> dict[str, Any]:
    """The record of a run for `models/run.json`: id, parameters and lineage.

    Args:
        sections: the parameter sections that training itself used.
        hardware: what it ran on.
        root: the folder with dvc.lock, which holds the parameters and hashes of the stages before.
    """
    params = dict(sections)
    tags = {"mlflow.source.git.commit": _git(root, "rev-parse", "HEAD"), "hardware": hardware}
    tags["git_commit"] = tags["mlflow.source.git.commit"]
    written = (":!dvc.lock", ":!reports")  # by the stages before, on the way here
    changes = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", *written)
    tags["git_dirty"] = str(bool(changes)).lower()
    if experiment := os.environ.get("DVC_EXP_NAME"):
        tags["dvc_experiment"] = experiment
    for entry in _locked_stages(root, ("fetch", "split", "format")):
        params.update(entry.get("params", {}).get("params.yaml", {}))
    tags |= data_hashes(root, ("fetch", "split", "format"))
    active = mlflow.active_run()
    return {
        "run_id": run_id,
        "name": active.info.run_name if active else run_id,
        "experiment": os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT,
        "params": _flat(params),
        "tags": {key: value for key, value in tags.items() if value},
    }


def data_hashes(root: Path, stages: Sequence[str]) -> dict[str, str]:
    """The md5 of the data and the adapter that these stages wrote, as tags; none outside DVC."""
    return output_hashes(_locked_stages(root, stages))


def output_hashes(entries: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The md5 of the data and the adapter in stages' entries of dvc.lock, as tags."""
    return {
        f"md5.{out['path']}": out["md5"]
        for entry in entries
        for out in entry.get("outs", [])
        if out["path"].startswith("data/") or out["path"] == "models/adapter"
    }


def _locked_stages(root: Path, stages: Sequence[str]) -> list[dict[str, Any]]:
    """What dvc.lock says of these stages; nothing where a stage is run by hand, outside DVC.

    Only stages before the running one may be asked for: its own entry is the last run's.
    """
    if "DVC_STAGE" not in os.environ or not (root / "dvc.lock").is_file():
        return []
    lock = YAML(typ="safe").load((root / "dvc.lock").read_text(encoding="utf-8"))
    return [lock["stages"][name] for name in stages if name in lock["stages"]]


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=root, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else ""


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted keys; values as JSON but for plain strings, so that their types survive the way back."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            plain = isinstance(value, str) and not _is_json(value)
            flat[prefix + key] = value if plain else json.dumps(value)
    return flat


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def log_training(
    client: MlflowClient,
    record: dict[str, Any],
    metrics: dict[str, float],
    adapter: Path,
    curve: list[dict[str, float | None]] | None = None,
) -> None:
    """Log parameters, lineage, final metrics and the adapter; the curve too where it was not live.

    Does nothing to a run that has all of it.
    """
    run_id = record["run_id"]
    params = [MlflowParam(key, value) for key, value in record["params"].items()]
    tags = [RunTag(key, value) for key, value in record["tags"].items()]
    tags.append(RunTag("mlflow.note.content", _description(metrics)))
    finals = [Metric(key, value, _now(), 0) for key, value in metrics.items()]
    client.log_batch(run_id, metrics=finals, params=params, tags=tags)
    for point in curve or []:
        step = int(point["step"] or 0)
        values = {k: v for k, v in point.items() if k != "step" and v is not None and v == v}
        client.log_batch(
            run_id, metrics=[Metric(f"curve/{k}", v, _now(), step) for k, v in values.items()]
        )
    client.log_artifacts(run_id, str(adapter), "adapter")
    client.set_tag(run_id, COMPLETE, "true")


def _description(metrics: dict[str, float]) -> str:
    """What the run's page says at its top."""
    return (
        f"Validation loss {metrics['validation_loss']:.4g} after {metrics['steps']:.0f} steps in "
        f"{metrics['seconds']:.0f} s, {metrics['tokens_per_second']:,.0f} tokens/s. "
        "Answers to read: Artifacts, samples.md. Curves: Model metrics, section curve."
    )


def log_training_or_later(*arguments: Any) -> None:
    """`log_training`, or a warning where the server is gone: evaluation logs the run again."""
    _or_later(log_training, *arguments)


def _or_later(action: Callable[..., Any], *arguments: Any) -> None:
    try:
        action(*arguments)
    except Exception as error:  # the adapter is on disk, and evaluate logs the run again
        log.warning("MLflow: %s; evaluate logs the run again from the files", error)


def log_table(
    run_id: str, rows: list[dict[str, Any]], name: str, context: str, source: Path
) -> None:
    """Record a table as an input of the run: its digest, columns and where it lies, not its rows."""
    import pandas as pd

    frame = pd.DataFrame(rows)[["instruction", "input", "output"]]
    with warnings.catch_warnings(), _active(run_id):
        warnings.simplefilter("ignore")  # MLflow finds two readers for a local file and takes one
        mlflow.log_input(mlflow.data.from_pandas(frame, source=str(source), name=name), context)


@contextmanager
def _active(run_id: str) -> Iterator[None]:
    """Make a run the active one, unless it is already."""
    active = mlflow.active_run()
    if active and active.info.run_id == run_id:
        yield
        return
    with mlflow.start_run(run_id=run_id, log_system_metrics=False):
        yield


def run_of_adapter(
    client: MlflowClient, record_file: Path, metrics_file: Path, curve_file: Path, adapter: Path
) -> str:
    """The id of the run that belongs to an adapter, logged again from the files where it is missing.

    A run that was logged again has another id than `models/run.json` says; it is found by the tag
    `first_run_id`.
    """
    record = json.loads(record_file.read_text())
    metrics = json.loads(metrics_file.read_text())
    curve = read_curve(curve_file)
    run_id = _existing(client, record["run_id"])
    if run_id is None:
        experiment = mlflow.set_experiment(record["experiment"])
        again = client.search_runs(
            [experiment.experiment_id], f"tags.first_run_id = '{record['run_id']}'"
        )
        if again:
            run_id = str(again[0].info.run_id)
        else:
            tags = {"first_run_id": record["run_id"]}
            run_id = client.create_run(
                experiment.experiment_id, tags=tags, run_name=record["name"]
            ).info.run_id
            log.info("MLflow has no run %s; logging it again as %s", record["run_id"], run_id)
    if client.get_run(run_id).data.tags.get(COMPLETE) != "true":
        log_training(client, {**record, "run_id": run_id}, metrics, adapter, curve)
        client.set_terminated(run_id, "FINISHED")
    return str(run_id)


def read_curve(path: Path) -> list[dict[str, float | None]]:
    """The training's values step by step; None where a step has none."""
    return [
        {key: float(value) if value else None for key, value in row.items()}
        for row in csv.DictReader(io.StringIO(path.read_text()))
    ]


def _existing(client: MlflowClient, run_id: str) -> str | None:
    """The id, if the store has this run and nobody deleted it."""
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise UserError(f"MLflow: {error}") from error
    return run_id if run.info.lifecycle_stage == "active" else None


def log_results(
    client: MlflowClient,
    run_id: str,
    metrics: dict[str, Any],
    settings: dict[str, Any],
    files: list[Path],
) -> None:
    """Add a later stage's results to the adapter's run.

    The stage's parameters become tags, because an adapter may be evaluated again with others and
    MLflow's parameters cannot change.
    """
    flat = {
        key.replace(".", "/"): json.loads(value)
        for key, value in _flat(metrics).items()
        if _number(value)
    }
    client.log_batch(
        run_id,
        metrics=[Metric(key, float(value), _now(), 0) for key, value in flat.items()],
        tags=[RunTag(key, value) for key, value in _flat(settings).items()],
    )
    for file in files:
        client.log_artifact(run_id, str(file))


def log_predictions(client: MlflowClient, run_id: str, rows: list[dict[str, Any]]) -> None:
    """Log rows as a table that the run's page shows.

    `mlflow.log_table` would append them to the table of an earlier evaluation.
    """
    import pandas as pd

    name = "predictions.json"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        pd.DataFrame(rows).to_json(path, orient="split", index=False)
        client.log_artifact(run_id, str(path))
    client.set_tag(run_id, TABLES, json.dumps([{"path": name, "type": "table"}]))


def find_version(client: MlflowClient, name: str) -> Any:
    """The registered version that NAME@ALIAS or NAME/VERSION names.

    Raises:
        UserError: there is none; the message lists the registry's models.
    """
    try:
        if "@" in name:
            return client.get_model_version_by_alias(*name.split("@", 1))
        if "/" in name:
            return client.get_model_version(*name.rsplit("/", 1))
    except MlflowException as error:
        known = [registered.name for registered in client.search_registered_models()]
        raise UserError(
            f"{name}: not in this registry ({error.message}); it has {', '.join(known) or 'no models'}; "
            "MLFLOW_TRACKING_URI names another one"
        ) from None
    raise UserError(f"{name}: no folder here; a registered version is NAME@ALIAS or NAME/VERSION")


def download_version(client: MlflowClient, name: str, into: Path) -> Path:
    """Copy a registered version's files into a folder.

    Raises:
        UserError: there is no such version, or its files are gone.
    """
    version = find_version(client, name)
    uri = f"models:/{version.name}/{version.version}"
    try:
        return Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(into)))
    except Exception as error:  # a store has its own library's kinds
        raise UserError(f"{name}: its files could not be fetched: {error}") from error


@dataclass(frozen=True)
class Champion:
    """The adapter that a registered model's `champion` is, or the reason why there is none to compare.

    `broken` says that there may be one which could not be had, `note` what to mind in a comparison.
    """

    folder: Path | None = None
    version: str | None = None
    run_id: str | None = None
    reason: str = ""
    broken: bool = False
    note: str = ""


def fetch_champion(
    client: MlflowClient, name: str | None, record_file: Path, adapter: Path, into: Path
) -> Champion:
    """Download the champion's adapter, unless it is the one at hand or cannot go on the same base.

    Args:
        name: the registered model; None where no champion is wanted.
        record_file: `models/run.json` of the adapter that it is to be compared with.
        adapter: that adapter's folder.
        into: an empty folder for the download.
    """
    if name is None:
        return Champion(reason="evaluate.champion is null")
    try:
        version = client.get_model_version_by_alias(name, "champion")
    except Exception as error:  # a store has its own library's kinds
        if getattr(error, "error_code", "") in NOT_THERE:
            return Champion(reason=f"{name} has no champion yet")
        return _not_fetched(Champion(), name, error)
    found = Champion(version=str(version.version), run_id=str(version.run_id))
    try:
        folder = mlflow.artifacts.download_artifacts(
            run_id=version.run_id, artifact_path="adapter", dst_path=str(into)
        )
        reason = _unlike(Path(folder), adapter)
    except Exception as error:
        return _not_fetched(found, name, error)
    if reason:
        return replace(found, reason=f"version {found.version} {reason}")
    ours = json.loads(record_file.read_text())["tags"].get("md5.data/split")
    same_split = version.tags.get("md5.data/split") == ours
    note = "" if same_split else "its rows were split otherwise: it may have seen these test rows"
    return replace(found, folder=Path(folder), note=note)


def _not_fetched(found: Champion, name: str, error: Exception) -> Champion:
    first = (str(error).strip().splitlines() or [""])[0][:300]
    reason = f"the champion of {name} could not be fetched ({type(error).__name__}: {first})"
    log.warning("MLflow: %s", reason)
    return replace(found, reason=reason, broken=True)


def _unlike(champion: Path, adapter: Path) -> str:
    """Why two adapters are not to be compared on one base; empty where they are."""
    weights = "adapter_model.safetensors"
    if (champion / weights).read_bytes() == (adapter / weights).read_bytes():
        return "is this very adapter"
    settings = [
        json.loads((folder / "training.json").read_text()) for folder in (champion, adapter)
    ]
    theirs, ours = (each["base"] for each in settings)
    if theirs != ours:
        named = [f"{each['model']} at {each['revision']}" for each in (theirs, ours)]
        return f"has another base: {named[0]}, not {named[1]}"
    if settings[0].get("base_fingerprint") != settings[1].get("base_fingerprint"):
        return f"was trained on other weights than {ours['model']} holds now"
    tokens = [
        json.loads((folder / "adapter_config.json").read_text())["trainable_token_indices"]
        for folder in (champion, adapter)
    ]
    return "" if tokens[0] == tokens[1] else "has other tokens"


def _number(text: str) -> bool:
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return isinstance(value, int | float) and not isinstance(value, bool)


def register(
    client: MlflowClient, run_id: str, name: str, tags: dict[str, str], passed: bool
) -> tuple[str, list[str]]:
    """Register the run's adapter as a version of `name`, once, and move the aliases.

    Returns:
        The version and its aliases: `candidate` always, `champion` where the gate passed.
    """
    try:
        client.create_registered_model(
            name, description="LoRA adapters for financial question answering"
        )
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    versions = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    if versions:
        version = str(max(int(v.version) for v in versions))
    else:
        version = str(client.create_model_version(name, f"runs:/{run_id}/adapter", run_id).version)
    for key, value in tags.items():
        client.set_model_version_tag(name, version, key, value)
    aliases = ["candidate", *(["champion"] if passed else [])]
    for alias in aliases:
        client.set_registered_model_alias(name, alias, version)
    return version, aliases


def _now() -> int:
    return int(time.time() * 1000)
