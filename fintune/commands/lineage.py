"""Trace a model to its run, data and commit, with the commands that rebuild it.

    python -m fintune lineage financial-qa@champion     # a registered version, or NAME/3
    python -m fintune lineage models/adapter            # an adapter, or a merged model
    python -m fintune lineage models/adapter --verify   # rebuild it in a clone, and compare

The commit is the one whose dvc.lock has the adapter: its parameters and data are the model's.
"""

import argparse
import configparser
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from fintune import paths
from fintune.errors import UserError
from fintune.lineage import (
    adapter_read,
    commit_with,
    experiment_with,
    folder_md5,
    git,
    locked_stages,
    output_hashes,
    project_root,
    unlike_lock,
)
from fintune.stage import read_json

ADAPTER_TAG = f"md5.{paths.ADAPTER}"


class Model(NamedTuple):
    """A model: what it is called, its run, and what is known of it."""

    title: str
    run_id: str
    tags: dict[str, str]


class Recipe(NamedTuple):
    """The commit that a model is rebuilt from; the commands; what has to be done first."""

    commit: str | None
    commands: list[str]
    missing: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for the model."""
    parser.add_argument("model", metavar="MODEL", help="NAME@ALIAS, NAME/VERSION or a folder")
    parser.add_argument("--verify", action="store_true", help="rebuild it in a clone, and compare")


def main(given: argparse.Namespace) -> None:
    """Print the model's lineage."""
    from fintune.tracking.client import connect

    client = connect(project_root())
    model = find_model(client, given.model)
    print(describe(client, model), flush=True)
    if given.verify:
        rebuild(recipe_of(model.tags), model.tags[ADAPTER_TAG])
        print(f"  rebuilt   the same adapter, byte for byte: md5 {model.tags[ADAPTER_TAG]}")


def find_model(client: Any, name: str) -> Model:
    """Find a registered version, or what is known of the model in a folder.

    Raises:
        UserError: there is no such version, and neither a version nor a run of this folder's adapter.
    """
    from fintune.registry.versions import find_version

    folder = Path(name)
    version = _version_of_folder(client, folder) if folder.is_dir() else find_version(client, name)
    if version is None:
        return _unregistered(client, folder)
    aliases = client.get_model_version(version.name, version.version).aliases
    title = f"{version.name} version {version.version} ({', '.join(aliases) or 'no alias'})"
    return Model(title, version.run_id, version.tags)


def describe(client: Any, model: Model) -> str:
    """Describe a model's run, data and commit, and the commands to rebuild it."""
    run, tags, recipe = client.get_run(model.run_id), model.tags, recipe_of(model.tags)
    ended = datetime.fromtimestamp((run.info.end_time or run.info.start_time) / 1000, UTC)
    lines = [
        model.title,
        f"  gate      {tags.get('gate', 'not evaluated')}",
        f"  run       {run.info.run_id}  {run.info.run_name}, {ended:%Y-%m-%d %H:%M} UTC",
        *(
            f"  md5       {tags[key]}  {key.removeprefix('md5.')}"
            for key in sorted(tags)
            if key.startswith("md5.")
        ),
        f"  commit    {recipe.commit or 'none here has its parameters and data'}",
    ]
    if missing := tags.get("inputs_in_no_commit"):
        lines.append(f"            in no commit, so a clone has to be given it: {missing}")
    if recipe.missing:
        lines.append(f"            {recipe.missing}")
    return "\n".join([*lines, *(f"  rebuild   {line}" for line in recipe.commands)])


def recipe_of(tags: dict[str, str]) -> Recipe:
    """Find the commands that rebuild a model, or say why there are none and what to do."""
    md5 = tags.get(ADAPTER_TAG, "none")
    config = configparser.ConfigParser()
    config.read(paths.DVC_CONFIG)
    pull = " --pull" if config.has_option("core", "remote") else ""  # refused without a remote
    remote = (git(Path(), "remote").split() or [""])[0]
    if commit := commit_with(md5):
        return _unless_changed(Recipe(commit, [f"git checkout {commit}", f"dvc repro{pull}"]))
    if found := experiment_with(md5):
        commit, fetch = found[1], _fetch(found[0], remote)
        push = f"dvc exp push {remote or 'REMOTE'} {found[0]}"
        said = f"an experiment, which others can pull once you have run `{push}`"
        return _unless_changed(
            Recipe(commit, [*fetch, f"git checkout {commit}", f"dvc repro{pull}"], said)
        )
    if md5 in output_hashes(list(locked_stages().values())).values():
        said = (
            f"it cannot be rebuilt yet: {paths.LOCK} and what it was made of are in no commit; run "
        )
        return Recipe(None, [], f"{said}`git add -A && git commit`")
    if experiment := tags.get("dvc_experiment"):
        fetch = _fetch(experiment, remote or "REMOTE")
        return Recipe(
            None, [], f"an experiment that is not in this clone: `{fetch[0]}`, and ask again"
        )
    said = f"it cannot be rebuilt from this clone: no {paths.LOCK} in its history has the adapter; "
    return Recipe(None, [], f"{said}`git fetch`, or ask who trained it to commit")


def _fetch(experiment: str, remote: str) -> list[str]:
    return [f"dvc exp pull --no-cache {remote} {experiment}"] if remote else []


def _unless_changed(recipe: Recipe) -> Recipe:
    """Return a recipe, or why it would make another model: its commit is not what made this one."""
    others = unlike_lock(recipe.commit or "")
    if not others:
        return recipe
    said = f"it cannot be rebuilt: {', '.join(others)} of that commit made another or no model; "
    return Recipe(recipe.commit, [], f"{said}run `dvc repro` and commit what it makes")


def rebuild(recipe: Recipe, md5: str) -> None:
    """Train the model anew in a clone of its commit, without any cache, and compare the adapter.

    Raises:
        UserError: there is no commit, a stage fails, or another adapter comes out.
    """
    if recipe.commit is None or not recipe.commands:
        raise UserError(recipe.missing or "its commit is not in this clone; the commands fetch it")
    top = git(Path(), "rev-parse", "--show-toplevel")
    inside = git(Path(), "rev-parse", "--show-prefix")
    here = Path(sys.executable).absolute().parent
    environment = {
        key: text for key, text in os.environ.items() if not key.startswith(("MLFLOW_", "DVC_"))
    }
    environment["PATH"] = f"{here}{os.pathsep}{environment.get('PATH', '')}"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "clone"
        for where, command in (
            (Path(scratch), ["git", "clone", "--quiet", "--no-checkout", top, str(folder)]),
            (folder, ["git", "fetch", "--quiet", "origin", recipe.commit]),
            (folder, ["git", "checkout", "--quiet", recipe.commit]),
            (folder / inside, ["dvc", "repro", "train"]),
        ):
            done = subprocess.run(
                command, cwd=where, env=environment, stdout=subprocess.PIPE, check=False
            )
            if done.returncode:
                raise UserError(f"`{' '.join(command)}` failed in a clone of {recipe.commit}")
        made = output_hashes([locked_stages(folder / inside)["train"]])[ADAPTER_TAG]
    if made != md5:
        raise UserError(
            f"a clone of {recipe.commit} makes another adapter, md5 {made} instead of {md5}: other hardware "
            "or other versions of the packages round otherwise"
        )


def _version_of_folder(client: Any, folder: Path) -> Any:
    """Find the newest version whose adapter is in this folder or was merged into it, or None."""
    found = client.search_model_versions(f"tags.`{ADAPTER_TAG}` = '{_adapter_md5(folder)}'")
    return max(found, key=lambda version: int(version.version), default=None)


def _adapter_md5(folder: Path) -> str:
    md5 = folder_md5(folder)
    for stage in locked_stages().values():
        if any(out["md5"] == md5 for out in stage.get("outs", [])):
            md5 = adapter_read(stage) or md5
    return md5


def _unregistered(client: Any, folder: Path) -> Model:
    """Describe the adapter of dvc.lock, which is no version, by the records in this folder."""
    from fintune.registry.recovery import RECORD, find_run

    md5, hashes = _adapter_md5(folder), output_hashes(list(locked_stages().values()))
    record = read_json(paths.RUN, *RECORD) if hashes.get(ADAPTER_TAG) == md5 else None
    run_id = find_run(client, record) if record else None
    if record is None or run_id is None:
        raise UserError(
            f"{folder}: no registered version has this adapter (md5 {md5}), and no run of this store; it "
            "may be in another store (MLFLOW_TRACKING_URI), or the folder was changed"
        )
    evaluated = read_json(paths.EVALUATION) if paths.EVALUATION.is_file() else None
    gate = {"gate": evaluated["gate"]["reason"]} if evaluated else {}
    return Model(f"{folder}: not registered", run_id, record["tags"] | hashes | gate)
