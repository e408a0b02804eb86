"""Versions of the registered model: find, download, register."""

from itertools import islice
from pathlib import Path
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from fintune.errors import UserError
from fintune.tracking.models import link_version, model_of_run

LATER = ("evaluate.", "generation.")  # sections that are tags of a run
MOST_CHANGES = 8  # that a version's description names
SAME = "the data are the same"
FROM_MODEL = "models:/m-"  # begins the source of a version that is a logged model
FIGURES = "**Evaluated**"  # begins the last part of a version's description
DATA = (  # hashes in the order of the stages: the first that differs says what happened
    ("md5.data/raw", "the source's rows are others"),
    ("md5.data/split", "the same rows are split otherwise"),
    ("md5.data/formatted", "the same rows are laid out otherwise"),
)
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


def where_registered(client: MlflowClient, name: str, run_id: str) -> str | None:
    """Return the version that a run's adapter is registered as, with its aliases; or None."""
    version = version_of_run(client, name, run_id)
    if version is None:
        return None
    aliases = client.get_model_version(name, version).aliases
    return f"{name} version {version} ({', '.join(sorted(aliases)) or 'no alias'})"


def changes(client: MlflowClient, run_id: str, name: str, tags: dict[str, str]) -> str:
    """Say what distinguishes a run's adapter from the last version of a model: its parameters and data."""
    versions = client.search_model_versions()
    there = [each for each in versions if each.name == name and each.run_id != run_id]
    if not there:
        return f"The first version of {name}."
    last = max(there, key=lambda each: int(each.version))
    now, before = (_settings(client, each) for each in (run_id, last.run_id))
    apart = [key for key in sorted({*now, *before}) if now.get(key) != before.get(key)]
    said = [
        f"{key} is {now.get(key, 'gone')} and was {before.get(key, 'not there')}"
        for key in islice(apart, MOST_CHANGES)
    ]
    if len(apart) > MOST_CHANGES:
        said.append(f"{len(apart) - MOST_CHANGES} more parameters differ")
    said.append(next((text for key, text in DATA if tags.get(key) != last.tags.get(key)), SAME))
    if said == [SAME]:
        said.append("so are the parameters: what differs is code, hardware or chance")
    return f"Against version {last.version}: {'; '.join(said)}."


def _settings(client: MlflowClient, run_id: str) -> dict[str, str]:
    """Return a run's parameters, with those of its evaluation, which are tags."""
    data = client.get_run(run_id).data
    later = {key: text for key, text in data.tags.items() if key.startswith(LATER)}
    return data.params | later


def register(
    client: MlflowClient,
    run_id: str,
    name: str,
    tags: dict[str, str],
    passed: bool,
    figures: str = "",
) -> tuple[str, list[str]]:
    """Register the run's adapter as a version of `name`, unless it is registered, and move the aliases.

    A new version's description says what changed against the last one, and ends with the figures. Of a
    version that is registered, the figures are replaced and the rest stays as people have left it.

    Returns:
        The version and its aliases: `candidate` always, `champion` if the gate passed.
    """
    try:
        client.create_registered_model(name, description="LoRA adapters for question answering")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    version, model = version_of_run(client, name, run_id), model_of_run(client, run_id)
    if version is None:
        said = changes(client, run_id, name, tags) + figures
        model_id = model.model_id if model else None
        source = f"models:/{model_id}" if model else f"runs:/{run_id}/adapter"
        made = client.create_model_version(
            name, source, run_id, description=said, model_id=model_id
        )
        version = str(made.version)
    elif figures:
        before = client.get_model_version(name, version).description or ""
        kept = before.partition(FIGURES)[0].rstrip()
        client.update_model_version(name, version, kept + figures)
    if model and model_id_of(client.get_model_version(name, version)):
        link_version(client, model, name, version)
    for key, value in tags.items():
        client.set_model_version_tag(name, version, key, value)
    aliases = ["candidate", *(["champion"] if passed else [])]
    for alias in aliases:
        client.set_registered_model_alias(name, alias, version)
    return version, aliases


def model_id_of(version: Any) -> str | None:
    """Return the id of a version's logged model; None in earlier releases, whose versions have none."""
    source = str(version.source)
    return source.removeprefix(FROM_MODEL[:-2]) if source.startswith(FROM_MODEL) else None


def adapter_uri(version: Any) -> str:
    """Return where a version's adapter is: in its logged model or, in earlier releases, in its run."""
    return version.source if model_id_of(version) else f"runs:/{version.run_id}/adapter"


def registered_figures(client: MlflowClient, version: Any) -> dict[str, str]:
    """Return the test rows' figures of a version's model or, in earlier releases, of its tags."""
    model_id = model_id_of(version)
    if model_id is None:
        tags = {key: text for key, text in version.tags.items() if key.startswith("tuned_")}
        return {key.removeprefix("tuned_"): f"{float(text):.6g}" for key, text in tags.items()}
    measured = client.get_logged_model(model_id).metrics or []
    newest = sorted(measured, key=lambda metric: metric.timestamp)
    return {each.key.removeprefix("tuned/"): f"{each.value:.6g}" for each in newest}
