"""What a person wants to know when the pipeline is done, or of a model that is in use.

python -m fintune.results                           # the last run: quality, cost, where things are
python -m fintune.results financial-qa@champion     # where a registered version comes from, also NAME/3
python -m fintune.results models/adapter            # the same of a folder: an adapter or a merged model
"""

import argparse
import configparser
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from fintune.params import UserError

ROWS = {
    "perplexity": "answer perplexity",
    "token_accuracy": "token accuracy",
    "rouge_l": "ROUGE-L",
    "stop_rate": "stop rate",
    "mean_answer_tokens": "tokens an answer",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="NAME@ALIAS, NAME/VERSION or a folder")
    model = parser.parse_args().model
    print(lineage(model) if model else last_run())


def last_run() -> str:
    """The reports of the last `dvc repro`, in short."""
    evaluation = read_report("evaluation")
    export = read_report("export")
    train = read_report("train")
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    show_ui = (
        f"open {uri}"
        if uri and uri.startswith("http")
        else "mlflow ui --backend-store-uri sqlite:///mlflow.db"
    )
    return (
        compare(evaluation)
        + f"""

Gate: {evaluation["gate"]["reason"]}
Trained {train["steps"]} steps in {train["seconds"]:.0f} s, {train["tokens_per_second"]:,.0f} tokens/s, \
{train["peak_memory_gib"]:.1f} GiB at most

Adapter       models/adapter
Merged model  models/merged   (logits within {export["max_logit_difference"]:.2g} of the adapter's)
Registered    {export["registered_model"]} version {export["version"]} ({", ".join(export["aliases"])})
Report        reports/evaluation.html   (verdict, intervals, plots, samples)

Browse the runs   source .venv/bin/activate && {show_ui}   then http://127.0.0.1:5000
Try a change      dvc exp run -S train.learning_rate=1e-3   then   dvc exp show"""
    )


def compare(evaluation: dict[str, Any]) -> str:
    """Base and tuned model side by side, a line a metric."""
    lines = [f"{evaluation['rows']} test questions    {'base':>10} {'tuned':>10}"]
    for key, title in ROWS.items():
        values = (evaluation[side][key] for side in ("base", "tuned"))
        base, tuned = ("none" if value is None else f"{value:.4g}" for value in values)
        lines.append(f"{title:<22} {base:>10} {tuned:>10}")
    return "\n".join(lines)


def read_report(name: str) -> dict[str, Any]:
    """A stage's metrics.

    Raises:
        UserError: the stage has not run.
    """
    path = Path(f"reports/{name}.json")
    if not path.is_file():
        raise UserError(f"{path}: not found; run `dvc repro` first")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def lineage(model: str) -> str:
    """From a registered version or a folder to its run, data, commit and the commands that rebuild it.

    Raises:
        UserError: there is no such version, or none with this folder's adapter.
    """
    from fintune.stage import project_root
    from fintune.tracking import connect, find_version

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
    return "\n".join([*lines, *(f"  rebuild   {line}" for line in _rebuild(tags))])


def _rebuild(tags: dict[str, str]) -> list[str]:
    """The commands that make the same model again: from its commit, with the experiment's changes."""
    commands = [f"git checkout {tags['git_commit']}"] if tags.get("git_commit") else []
    if experiment := tags.get("dvc_experiment"):
        commands.append(f"dvc exp apply {experiment}")
    config = configparser.ConfigParser()
    config.read([".dvc/config", ".dvc/config.local"])
    pull = " --pull" if config.has_option("core", "remote") else ""  # refused where there is none
    return [*commands, f"dvc repro{pull}"]


def _version_of_folder(client: Any, folder: Path) -> Any:
    """The newest version whose adapter this folder holds, or was merged from."""
    from fintune.restore import folder_md5

    md5 = folder_md5(folder)
    lock = Path("dvc.lock")
    stages = YAML(typ="safe").load(lock.read_text())["stages"] if lock.is_file() else {}
    for stage in stages.values():
        if any(out["md5"] == md5 for out in stage.get("outs", [])):
            made_of = [dep["md5"] for dep in stage["deps"] if dep["path"] == "models/adapter"]
            md5 = made_of[0] if made_of else md5
    found = client.search_model_versions(f"tags.`md5.models/adapter` = '{md5}'")
    if not found:
        raise UserError(
            f"{folder}: no registered version has this adapter (md5 {md5}); its run may be in another "
            "store (MLFLOW_TRACKING_URI), or the folder was changed"
        )
    return max(found, key=lambda version: int(version.version))


if __name__ == "__main__":
    from fintune.stage import run

    run(main)
