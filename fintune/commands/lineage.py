"""Trace a model to its run, data and commit, with the commands that rebuild it.

python -m fintune lineage financial-qa@champion     # a registered version, or NAME/3
python -m fintune lineage models/adapter            # an adapter, or a merged model
"""

import argparse
import configparser
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fintune import paths
from fintune.errors import UserError
from fintune.lineage import adapter_read, folder_md5, locked_stages, project_root


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the argument for the model."""
    parser.add_argument("model", metavar="MODEL", help="NAME@ALIAS, NAME/VERSION or a folder")


def main(given: argparse.Namespace) -> None:
    """Print the model's lineage."""
    print(trace(given.model))


def trace(model: str) -> str:
    """Describe a registered version's or a folder's run, data and commit, and the commands to rebuild it.

    Raises:
        UserError: there is no such version, or none with this folder's adapter.
    """
    from fintune.registry.versions import find_version
    from fintune.tracking.client import connect

    client = connect(project_root())
    folder = Path(model)
    version = _version_of_folder(client, folder) if folder.is_dir() else find_version(client, model)
    run, tags = client.get_run(version.run_id), version.tags
    aliases = client.get_model_version(version.name, version.version).aliases
    ended = datetime.fromtimestamp((run.info.end_time or run.info.start_time) / 1000, UTC)
    lines = [
        f"{version.name} version {version.version} ({', '.join(aliases) or 'no alias'})",
        f"  gate      {tags.get('gate', 'not evaluated')}",
        f"  run       {run.info.run_id}  {run.info.run_name}, {ended:%Y-%m-%d %H:%M} UTC",
        *(
            f"  md5       {tags[key]}  {key.removeprefix('md5.')}"
            for key in sorted(tags)
            if "md5." in key
        ),
        f"  commit    {tags.get('git_commit', 'none: not run in a git repository')}",
    ]
    if tags.get("git_dirty") == "true":
        lines.append("            with uncommitted changes; the parameters are those of the run")
    if missing := tags.get("inputs_in_no_commit"):
        lines.append(f"            in no commit, so a clone has to be given it: {missing}")
    return "\n".join([*lines, *(f"  rebuild   {line}" for line in _rebuild(tags))])


def _rebuild(tags: dict[str, str]) -> list[str]:
    """List the commands that rebuild the model from its commit, with the experiment's changes."""
    commands = [f"git checkout {tags['git_commit']}"] if tags.get("git_commit") else []
    if experiment := tags.get("dvc_experiment"):
        commands.append(f"dvc exp apply {experiment}")
    config = configparser.ConfigParser()
    config.read(paths.DVC_CONFIG)
    pull = " --pull" if config.has_option("core", "remote") else ""  # refused without a remote
    return [*commands, f"dvc repro{pull}"]


def _version_of_folder(client: Any, folder: Path) -> Any:
    """Find the newest version whose adapter is in this folder or was merged into it."""
    md5 = folder_md5(folder)
    for stage in locked_stages().values():
        if any(out["md5"] == md5 for out in stage.get("outs", [])):
            md5 = adapter_read(stage) or md5
    found = client.search_model_versions(f"tags.`md5.{paths.ADAPTER}` = '{md5}'")
    if not found:
        raise UserError(
            f"{folder}: no registered version has this adapter (md5 {md5}); its run may be in another "
            "store (MLFLOW_TRACKING_URI), or the folder was changed"
        )
    return max(found, key=lambda version: int(version.version))
