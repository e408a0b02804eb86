"""Versions of the registered model: find, download, register."""

from pathlib import Path
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from fintune.errors import UserError

NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # a model, an alias


def find_version(client: MlflowClient, name: str) -> Any:
    """Find the registered version named by NAME@ALIAS or NAME/VERSION.

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
    """Download a registered version's files into a folder.

    Raises:
        UserError: the version does not exist, or its files are gone.
    """
    version = find_version(client, name)
    uri = f"models:/{version.name}/{version.version}"
    try:
        return Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(into)))
    except Exception as error:  # each store raises its own library's errors
        raise UserError(f"{name}: its files could not be fetched: {error}") from error


def version_of_run(client: MlflowClient, name: str, run_id: str) -> str | None:
    """Return the newest version of a model that a run's adapter is registered as, or None.

    The name is no part of the search: in MLflow's filters, a quotation mark would end it.
    """
    found = client.search_model_versions(f"run_id = '{run_id}'")
    versions = [int(each.version) for each in found if each.name == name]
    return str(max(versions)) if versions else None


def register(
    client: MlflowClient, run_id: str, name: str, tags: dict[str, str], passed: bool
) -> tuple[str, list[str]]:
    """Register the run's adapter as a version of `name`, unless it is registered, and move the aliases.

    Returns:
        The version and its aliases: `candidate` always, `champion` if the gate passed.
    """
    try:
        client.create_registered_model(name, description="LoRA adapters for question answering")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    version = version_of_run(client, name, run_id)
    if version is None:
        version = str(client.create_model_version(name, f"runs:/{run_id}/adapter", run_id).version)
    for key, value in tags.items():
        client.set_model_version_tag(name, version, key, value)
    aliases = ["candidate", *(["champion"] if passed else [])]
    for alias in aliases:
        client.set_registered_model_alias(name, alias, version)
    return version, aliases
