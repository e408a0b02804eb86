"""Log the results in this folder to MLflow again, if they are missing there.

    python -m fintune restore

DVC can restore adapters and reports from its cache or a remote without running a stage, and a server
can be replaced. This logs the training, evaluation and export in this folder that no run has yet. It is
idempotent.
"""

import argparse
import logging
from pathlib import Path
from typing import Any

from fintune import paths
from fintune.errors import UserError
from fintune.integrity import check_outputs
from fintune.lineage import (
    UPSTREAM,
    adapter_read,
    folder_md5,
    locked_stages,
    output_hashes,
    project_root,
)

log = logging.getLogger("fintune")
NEEDED = (paths.RUN, paths.ADAPTER / "training.json", paths.TRAIN_METRICS, paths.TRAIN_CURVE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no arguments: the results are in this folder."""


def main(given: argparse.Namespace) -> None:
    """Log the run, its evaluation and its export, if missing."""
    if missing := [str(path) for path in NEEDED if not path.is_file()]:
        raise UserError(
            f"{', '.join(missing)}: not found; `dvc pull` or `dvc checkout` brings a trained adapter"
        )
    stages = locked_stages()
    locked = output_hashes([stages.get("train", {})]).get(f"md5.{paths.ADAPTER}")
    if locked != folder_md5(paths.ADAPTER):
        raise UserError(
            f"{paths.ADAPTER} is not the adapter of dvc.lock; `dvc checkout` brings that one, `dvc commit` "
            "makes this one it"
        )
    restored = [*NEEDED, paths.EVALUATION, paths.PREDICTIONS, paths.EVALUATION_PAGE, paths.EXPORT]
    check_outputs(restored, strict=True)
    from fintune.export.register import restore_export
    from fintune.registry.recovery import restore_evaluation, run_of_adapter
    from fintune.tracking.client import connect

    client = connect(project_root())
    run_id = run_of_adapter(client)
    version = None
    if _is_done(stages.get("evaluate", {}), locked):
        restore_evaluation(client, run_id)
    if _is_done(stages.get("merge_export", {}), locked):
        upstream = [stages[name] for name in UPSTREAM if name in stages]
        version = restore_export(client, run_id, output_hashes(upstream))
    log.info("run %s has all that is here%s", run_id, f"; {version}" if version else "")


def _is_done(entry: dict[str, Any], md5: str) -> bool:
    """Return whether a stage's dvc.lock entry is for this adapter and its reports are here."""
    reports = [Path(out["path"]) for out in entry.get("outs", []) if out["path"].endswith(".json")]
    return adapter_read(entry) == md5 and all(path.is_file() for path in reports)
