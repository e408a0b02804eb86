"""Connect to MLflow: a server, or an SQLite file at the project's root."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import mlflow
from filelock import FileLock
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from fintune import paths
from fintune.errors import ANOTHER_STORE, UserError, explain_store, shown
from fintune.params import read_name
from fintune.tracking.database import prepare_database, sqlite_uri

KIND = (
    "mlflow.experimentKind",
    "custom_model_development",
)  # else the UI guesses: pages for agents
GUESSED = "_inferred"  # ends what it guesses
UNNAMED = "fintune"  # the experiment where no params.yaml names it
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # the default retries for minutes
os.environ.setdefault("MLFLOW_ENABLE_ASYNC_LOGGING", "false")
for noisy in ("alembic", "mlflow", "sqlalchemy"):
    logging.getLogger(noisy).setLevel(logging.WARNING)

DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


def connect(root: Path) -> MlflowClient:
    """Connect to MLflow's store, and fail within seconds if it does not respond.

    `MLFLOW_TRACKING_URI` names a server or database. Without it, or with a relative SQLite path, the file
    is at the project's root, even for experiments that DVC runs in a temporary folder.
    `MLFLOW_EXPERIMENT_NAME` names the experiment, else merge_export.registered_model does.

    Raises:
        UserError: the address is none that MLflow has; the server does not respond, or refuses access; the
            file is broken.
    """
    uri = _given_uri()
    _check_address(uri)
    local = uri.startswith("sqlite:///") and not uri.startswith("sqlite:////")
    if uri.startswith("http"):
        _ask_server(uri)
    with store_lock(root):
        if uri.startswith("sqlite:///"):
            path, mark, options = uri.removeprefix("sqlite:///").partition("?")
            prepare_database(root / path, root / paths.MLFLOW_ARTIFACTS)
            uri = sqlite_uri(root / path) + mark + options
        mlflow.set_tracking_uri(uri)
        return _client(root, uri, local)


def check_store(root: Path) -> str:
    """Ask MLflow's store for its experiments, and change nothing; return what it is, in words.

    Raises:
        UserError: as `connect`.
    """
    uri = _given_uri()
    _check_address(uri)
    if uri.startswith("sqlite:///"):
        file = root / uri.removeprefix("sqlite:///").partition("?")[0]
        return f"{file}{'' if file.is_file() else ', which the training makes'}"
    if uri.startswith("http"):
        _ask_server(uri)
    try:
        MlflowClient(uri).search_experiments(max_results=1)
    except Exception as error:  # each store raises its own library's errors
        raise UserError(explain_store(error, uri)) from None
    return f"{shown(uri)} responds"


def experiment_name() -> str:
    """Return the name of MLflow's experiment."""
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or read_name() or UNNAMED


def _given_uri() -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{paths.MLFLOW_DATABASE}"


def existing_store(root: Path) -> MlflowClient | None:
    """Connect to the store that is set or at the project's root; None where there is none, and make none."""
    there = os.environ.get("MLFLOW_TRACKING_URI") or (root / paths.MLFLOW_DATABASE).is_file()
    return connect(root) if there else None


@contextmanager
def store_lock(root: Path) -> Iterator[None]:
    """Lock out other workers of `dvc queue start`, which would create the same database or run."""
    lock = root / paths.SCRATCH / "mlflow.lock"
    lock.parent.mkdir(exist_ok=True)
    with FileLock(lock):
        yield


def _client(root: Path, uri: str, local: bool) -> MlflowClient:
    name = experiment_name()
    try:
        client = MlflowClient()
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            location = (root / paths.MLFLOW_ARTIFACTS).as_uri() if local else None
            client.create_experiment(name, artifact_location=location, tags=dict([KIND]))
        elif experiment.tags.get(KIND[0], GUESSED).endswith(GUESSED):
            with suppress(MlflowException):  # who may only read does without
                client.set_experiment_tag(experiment.experiment_id, *KIND)
        mlflow.set_experiment(name)
    except Exception as error:  # each store raises its own library's errors
        raise UserError(explain_store(error, uri)) from None
    return client


def _check_address(uri: str) -> None:
    """Refuse what is neither a server nor a database: MLflow would fail in many ways.

    Raises:
        UserError: it is.
    """
    scheme = uri.partition("://")[0] if "://" in uri else ""
    if scheme in ("http", "https") or scheme.split("+")[0] in DATABASES:
        return
    raise UserError(
        f"MLFLOW_TRACKING_URI: {shown(uri)}: no address of an MLflow server or database; "
        f"set https://HOST, http://HOST:PORT, postgresql://... or sqlite:///FILE, {ANOTHER_STORE}"
    )


def _ask_server(uri: str) -> None:
    import requests

    try:
        requests.get(f"{uri.rstrip('/')}/health", timeout=5).raise_for_status()
    except requests.RequestException as error:
        raise UserError(
            f"no MLflow server responds at {shown(uri)} ({type(error).__name__}); start it, {ANOTHER_STORE}"
        ) from None
