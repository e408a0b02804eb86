"""Connect to MLflow: a server, or an SQLite file at the project's root."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import mlflow
from filelock import FileLock
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from fintune import paths
from fintune.errors import UserError
from fintune.tracking.database import prepare_database, sqlite_uri

EXPERIMENT = "financial-qa"
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # the default retries for minutes
os.environ.setdefault("MLFLOW_ENABLE_ASYNC_LOGGING", "false")
for noisy in ("alembic", "mlflow", "sqlalchemy"):
    logging.getLogger(noisy).setLevel(logging.WARNING)

OR_NONE = f"or unset MLFLOW_TRACKING_URI to log to {paths.MLFLOW_DATABASE} in this folder"
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


def connect(root: Path) -> MlflowClient:
    """Connect to MLflow's store, and fail within seconds if it does not respond.

    `MLFLOW_TRACKING_URI` names a server or database. Without it, or with a relative SQLite path, the file
    is at the project's root, even for experiments that DVC runs in a temporary folder.
    `MLFLOW_EXPERIMENT_NAME` names the experiment.

    Raises:
        UserError: the address is none that MLflow has; the server does not respond, or refuses access; the
            file is broken.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{paths.MLFLOW_DATABASE}"
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


@contextmanager
def store_lock(root: Path) -> Iterator[None]:
    """Lock out other workers of `dvc queue start`, which would create the same database or run."""
    lock = root / paths.SCRATCH / "mlflow.lock"
    lock.parent.mkdir(exist_ok=True)
    with FileLock(lock):
        yield


def _client(root: Path, uri: str, local: bool) -> MlflowClient:
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    try:
        client = MlflowClient()
        if client.get_experiment_by_name(name) is None:
            location = (root / paths.MLFLOW_ARTIFACTS).as_uri() if local else None
            # else the UI shows its pages for agents
            kind = {"mlflow.experimentKind": "custom_model_development"}
            client.create_experiment(name, artifact_location=location, tags=kind)
        mlflow.set_experiment(name)
    except Exception as error:  # each store raises its own library's errors
        raise UserError(explain(error, uri)) from None
    return client


def explain(error: Exception, uri: str) -> str:
    """Explain an error of MLflow or its store, with the way out; never show a password.

    Args:
        uri: the tracking URI in use.
    """
    status = error.get_http_status_code() if isinstance(error, MlflowException) else None
    text = str(error).replace(uri, _shown(uri))  # the URI may hold a password
    if password := urlsplit(uri).password:
        text = text.replace(password, "...")
    if status in (401, 403) or "error code 401" in text:
        return (
            f"MLflow at {_shown(uri)} refuses access: set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD to a user of that server and its password"
        )
    first = (text.strip().splitlines() or [""])[0][:300]
    if isinstance(error, ImportError):
        driver = getattr(error, "name", None) or "its driver"
        return (
            f"MLFLOW_TRACKING_URI: {_shown(uri)}: the package {driver} is not installed; install it, "
            f"name an installed driver (postgresql+psycopg2://...), {OR_NONE}"
        )
    if isinstance(error, MlflowException) and not uri.startswith("http"):
        return f"MLflow at {_shown(uri)}: {first}"
    return (
        f"MLflow at {_shown(uri)} failed ({type(error).__name__}: {first}); look at the server, and run "
        f"it again when it responds, {OR_NONE}"
    )


def _check_address(uri: str) -> None:
    """Refuse what is neither a server nor a database: MLflow would fail in many ways.

    Raises:
        UserError: it is.
    """
    scheme = uri.partition("://")[0] if "://" in uri else ""
    if scheme in ("http", "https") or scheme.split("+")[0] in DATABASES:
        return
    raise UserError(
        f"MLFLOW_TRACKING_URI: {_shown(uri) if scheme else uri}: no address of an MLflow server or database; "
        f"set https://HOST, http://HOST:PORT, postgresql://... or sqlite:///FILE, {OR_NONE}"
    )


def _ask_server(uri: str) -> None:
    import requests

    try:
        requests.get(f"{uri.rstrip('/')}/health", timeout=5).raise_for_status()
    except requests.RequestException as error:
        raise UserError(
            f"no MLflow server responds at {_shown(uri)} ({type(error).__name__}); start it, {OR_NONE}"
        ) from None


def _shown(uri: str) -> str:
    """Return the URI without user name and password."""
    scheme, _, rest = uri.partition("://")
    return f"{scheme}://{rest.rsplit('@', 1)[-1]}"
