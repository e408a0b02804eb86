"""Register an adapter as an MLflow model, with its card, lineage and quality."""

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from fintune import paths
from fintune.export.card import read_records, write_card
from fintune.export.pyfunc import write_model_files
from fintune.export.signature import seal, signing_key
from fintune.generation.tuned import generation_config
from fintune.integrity import hash_files
from fintune.lineage import PARENT_RUN, locked_params, locked_stages
from fintune.model.adapter import AdapterInfo, read_training
from fintune.params import MergeExport
from fintune.registry.recovery import has_metric
from fintune.registry.results import log_results
from fintune.registry.versions import register, version_of_run

log = logging.getLogger("fintune")
REGISTERED = (
    "registered_model",
    "version",
    "run_id",
    "aliases",
    "not_registered",
)  # not measurements


def register_adapter(
    client: Any,
    run_id: str,
    trained: AdapterInfo,
    records: dict[str, dict[str, Any]],
    hashes: dict[str, str],
    params: MergeExport,
) -> tuple[str | None, list[str], str]:
    """Log the run's adapter as an MLflow model, register it if it is to be, and move the aliases.

    Args:
        records: as returned by `card.read_records`.
        hashes: the md5 of the data and the adapter, as tags.

    Returns:
        The version, or None; its aliases; and why it is not registered, or an empty text.
    """
    evaluation = records["evaluation"]
    with tempfile.TemporaryDirectory() as scratch:
        files = Path(scratch) / "model"
        write_model_files(files, evaluation["decoding"], run_id)
        tokenizer = trained.load_tokenizer()
        generation_config(tokenizer, evaluation["decoding"]).save_pretrained(files)
        write_card(files, trained, records, None, params)
        seal(files, hash_files(paths.ADAPTER) | hash_files(files), signing_key())
        client.log_artifacts(run_id, str(files), "adapter")  # where the adapter is
    quality = {f"tuned_{key}": str(value) for key, value in evaluation["tuned"].items()}
    gate = {"gate": evaluation["gate"]["reason"]}
    tags = records["run"]["tags"] | hashes | quality | gate
    name, passed = params.registered_model, evaluation["gate"]["passed"]
    reason = why_not(params, passed)
    if reason and version_of_run(client, name, run_id) is None:
        return None, [], reason
    return *register(client, run_id, name, tags, passed), ""


def why_not(params: MergeExport, passed: bool) -> str:
    """Return why a model does not become a version; an empty text if it does."""
    if os.environ.get(PARENT_RUN):
        return "it is a trial of a search"
    if params.register == "never":
        return "merge_export.register is never"
    if params.register == "passed" and not passed:
        return "it failed the gate, and merge_export.register is passed"
    return ""


def restore_export(client: Any, run_id: str, hashes: dict[str, str]) -> str:
    """Restore the export's results and the registered version where they are missing.

    The version number may differ from `reports/export.json`: a new registry starts from 1.

    Returns:
        "registered as NAME/VERSION", or why not.
    """
    report = json.loads(paths.EXPORT.read_text())
    name = report["registered_model"]
    settings = locked_params(locked_stages().get("merge_export", {}))
    if not has_metric(client, run_id, "merged_loss"):
        measured = {key: value for key, value in report.items() if key not in REGISTERED}
        log_results(client, run_id, measured, settings, [paths.EXPORT])
        log.info("MLflow had no export of this adapter; logged it again")
    if known := version_of_run(client, name, run_id):
        return f"registered as {name}/{known}"
    params = MergeExport(**settings["merge_export"])
    adapter = read_training(paths.ADAPTER)
    records = read_records()
    version, aliases, reason = register_adapter(client, run_id, adapter, records, hashes, params)
    if version is None:
        return f"not registered: {reason}"
    log.info("registered again: %s version %s (%s)", name, version, ", ".join(aliases))
    return f"registered as {name}/{version}"
