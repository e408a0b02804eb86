"""Which registered version a model is."""

from pathlib import Path

from mlflow.tracking import MlflowClient

from fintune import paths
from fintune.registry.recovery import RECORD, find_run
from fintune.registry.versions import find_version, version_of_run
from fintune.stage import read_json

FOLDERS = (str(paths.MERGED), str(paths.ADAPTER))


def identify(client: MlflowClient, source: str) -> tuple[str, str | None]:
    """Return NAME/VERSION of a model and MLflow's id of it, if it has one.

    What is registered nowhere is its folder.
    """
    if source in FOLDERS and paths.RUN.is_file() and paths.EXPORT.is_file():
        name = read_json(paths.EXPORT, "registered_model")["registered_model"]
        run = find_run(client, read_json(paths.RUN, *RECORD))
        number = version_of_run(client, name, run) if run else None
        source = f"{name}/{number}" if number else source
    if Path(source).is_dir() or source in FOLDERS:
        return source, None
    version = find_version(client, source)
    return f"{version.name}/{version.version}", getattr(version, "model_id", None) or None
