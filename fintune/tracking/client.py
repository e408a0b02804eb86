"""Connect to MLflow: a server, or an SQLite file at the project's root."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
from filelock import FileLock
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from fintune import paths
from fintune.errors import UserError

EXPERIMENT = "financial-qa"
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # the default retries for minutes
os.environ.setdefault("MLFLOW_ENABLE_ASYNC_LOGGING", "false")
for noisy in ("alembic", "mlflow", "sqlalchemy"):
    logging.getLogger(noisy).setLevel(logging.WARNING)


def connect(root: Path) -> MlflowClient:
    """Connect to MLflow's store, and fail within seconds if it does not respond.

    `MLFLOW_TRACKING_URI` names a server or database. Without it, or with a relative SQLite path, the file
    is at the project's root, even for experiments that DVC runs in a temporary folder.
    `MLFLOW_EXPERIMENT_NAME` names the experiment.

    Raises:
        UserError: the server does not respond, or refuses access.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{paths.MLFLOW_DATABASE}"
    local = uri.startswith("sqlite:///") and not uri.startswith("sqlite:////")
    if local:
        uri = f"sqlite:///{root / uri.removeprefix('sqlite:///')}"
    if uri.startswith("http"):
        _ask_server(uri)
    mlflow.set_tracking_uri(uri)
    with store_lock(root):
        return _client(root, uri, local)


@contextmanager
def store_lock(root: Path) -> Iterator[None]:
    """Lock out other workers of `dvc queue start`, which would create the same database or run."""
    lock = root / paths.SCRATCH / "mlflow.lock"
    lock.parent.mkdir(exist_ok=True)
    with FileLock(lock):
        yield


def _client(root: Path, uri: str, local: bool) -> MlflowClient:
    client = MlflowClient()
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    try:
        if client.get_experiment_by_name(name) is None:
            location = (root / paths.MLFLOW_ARTIFACTS).as_uri() if local else None
            # else the UI shows its pages for agents
            kind = {"mlflow.experimentKind": "custom_model_development"}
            client.create_experiment(name, artifact_location=location, tags=kind)
        mlflow.set_experiment(name)
    except MlflowException as error:
        if error.get_http_status_code() in (401, 403) or "error code 401" in str(error):
            raise UserError(
                f"MLflow at {_shown(uri)} refuses access: set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD to a user of that server and its password"
            ) from None
        message = str(error).replace(uri, _shown(uri))  # the URI may hold a password
        raise UserError(f"MLflow at {_shown(uri)}: {message}") from None
    return client


def _ask_server(uri: str) -> None:
    import requests

    try:
        requests.get(f"{uri.rstrip('/')}/health", timeout=5).raise_for_status()
    except requests.RequestException as error:
        raise UserError(
            f"no MLflow server responds at {_shown(uri)} ({type(error).__name__}); start it, or unset "
            "MLFLOW_TRACKING_URI to log to mlflow.db in this folder"
        ) from None


def _shown(uri: str) -> str:
    """Return the URI without user name and password."""
    scheme, _, rest = uri.partition("://")
    return f"{scheme}://{rest.rsplit('@', 1)[-1]}"
