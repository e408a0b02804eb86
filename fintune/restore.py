"""Log what lies in this folder to MLflow again, where MLflow lacks it.

python -m fintune.restore

DVC brings adapters and reports back from its cache or a remote without running a stage, and a server
can be replaced. Whatever of the training, the evaluation and the export is here and in no run is
logged from the files: once, however often this is called.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from fintune.params import MergeExport, UserError
from fintune.records import read_rows
from fintune.stage import log, project_root, run
from fintune.tracking import (
    connect,
    log_predictions,
    log_results,
    output_hashes,
    run_of_adapter,
)

ADAPTER = Path("models/adapter")
RECORD = Path("models/run.json")
REPORTS = Path("reports")
MANIFEST = Path("data/raw/manifest.json")
UPSTREAM = ("fetch", "split", "format", "train")
REGISTERED = ("registered_model", "version", "run_id", "aliases")
EVALUATED = ("evaluation.json", "predictions.parquet", "evaluation.html")


def main() -> None:
    needed = (
        RECORD,
        ADAPTER / "training.json",
        REPORTS / "train.json",
        REPORTS / "train_curve.csv",
    )
    missing = [str(path) for path in needed if not path.is_file()]
    if missing:
        raise UserError(
            f"{', '.join(missing)}: not found; `dvc pull` or `dvc checkout` brings a trained adapter"
        )
    stages = locked_stages()
    locked = output_hashes([stages.get("train", {})]).get("md5.models/adapter")
    if locked != folder_md5(ADAPTER):
        raise UserError(
            f"{ADAPTER} is not the adapter of dvc.lock; `dvc checkout` brings that one, `dvc commit` "
            "makes this one it"
        )
    client = connect(project_root())
    run_id = run_of_adapter(
        client, RECORD, REPORTS / "train.json", REPORTS / "train_curve.csv", ADAPTER
    )
    done = [name for name in ("evaluate", "merge_export") if _reads(stages.get(name, {}), locked)]
    version = None
    if "evaluate" in done:
        restore_evaluation(client, run_id)
    if "merge_export" in done:
        upstream = [stages[name] for name in UPSTREAM if name in stages]
        version = restore_export(client, run_id, output_hashes(upstream))
    log.info("run %s has all that is here%s", run_id, f", as {version}" if version else "")


def restore_evaluation(client: Any, run_id: str) -> None:
    """Add the evaluation's results to a run that has none."""
    if _has(client, run_id, "tuned/loss"):
        return
    report = json.loads((REPORTS / "evaluation.json").read_text())
    settings = {**_settings("evaluate"), "gate_passed": report["gate"]["passed"]}
    files = [REPORTS / name for name in EVALUATED if (REPORTS / name).is_file()]
    log_results(client, run_id, report, settings, files)
    log_predictions(client, run_id, read_rows(REPORTS / "predictions.parquet", []))
    log.info("MLflow had no evaluation of this adapter; logged it again")


def restore_export(client: Any, run_id: str, hashes: dict[str, str]) -> str:
    """Add the export's results and the registered version where they are missing.

    The version may have another number than `reports/export.json` says: a new registry counts anew.

    Returns:
        The version as NAME/VERSION.
    """
    report = json.loads((REPORTS / "export.json").read_text())
    name = report["registered_model"]
    if not _has(client, run_id, "merged_loss"):
        measured = {key: value for key, value in report.items() if key not in REGISTERED}
        settings = _settings("merge_export")
        log_results(client, run_id, measured, settings, [REPORTS / "export.json"])
        log.info("MLflow had no export of this adapter; logged it again")
    known = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    if known:
        return f"{name}/{max(int(version.version) for version in known)}"
    from fintune.card import read_records  # these import torch
    from fintune.modeling import read_training
    from fintune.registering import register_adapter

    records = read_records(RECORD, REPORTS / "evaluation.json", MANIFEST)
    params = MergeExport(**_settings("merge_export")["merge_export"])
    version, aliases = register_adapter(
        client, run_id, read_training(ADAPTER), records, hashes, params
    )
    log.info("registered again: %s version %s (%s)", name, version, ", ".join(aliases))
    return f"{name}/{version}"


def locked_stages() -> dict[str, Any]:
    """The entries of dvc.lock; none without that file."""
    lock = Path("dvc.lock")
    stages: dict[str, Any] = (
        YAML(typ="safe").load(lock.read_text())["stages"] if lock.is_file() else {}
    )
    return stages


def _reads(entry: dict[str, Any], md5: str) -> bool:
    """Whether a stage's entry in dvc.lock is of a run on this adapter, and its reports are here."""
    deps = [dep["md5"] for dep in entry.get("deps", []) if dep["path"] == "models/adapter"]
    reports = [Path(out["path"]) for out in entry.get("outs", []) if out["path"].endswith(".json")]
    return deps == [md5] and all(path.is_file() for path in reports)


def folder_md5(folder: Path) -> str:
    """The hash by which DVC knows a folder: of the sorted list of its files' hashes and paths."""
    listed = []
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                md5 = hashlib.file_digest(file, "md5").hexdigest()
            listed.append({"md5": md5, "relpath": path.relative_to(folder).as_posix()})
    listed.sort(key=lambda entry: entry["relpath"])
    return hashlib.md5(json.dumps(listed, sort_keys=True).encode()).hexdigest() + ".dir"


def _has(client: Any, run_id: str, metric: str) -> bool:
    return metric in client.get_run(run_id).data.metrics


def _settings(stage: str) -> dict[str, Any]:
    """The parameters with which a stage ran, from dvc.lock."""
    params: dict[str, Any] = locked_stages().get(stage, {}).get("params", {}).get("params.yaml", {})
    return params


if __name__ == "__main__":
    run(main)
