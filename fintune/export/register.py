"""Register an adapter as an MLflow model, with its card, lineage and quality."""

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

from fintune import paths
from fintune.export.card import read_records, write_card
from fintune.export.pyfunc import write_model_files
from fintune.export.signature import seal, signing_key
from fintune.generation.tuned import generation_config
from fintune.integrity import hash_files
from fintune.lineage import locked_params, locked_stages
from fintune.model.adapter import AdapterInfo, read_training
from fintune.params import MergeExport
from fintune.registry.recovery import has_metric
from fintune.registry.results import log_results
from fintune.registry.versions import register, version_of_run

log = logging.getLogger("fintune")
REGISTERED = ("registered_model", "version", "run_id", "aliases")  # not measurements


def register_adapter(
    client: Any,
    run_id: str,
    trained: AdapterInfo,
    records: dict[str, dict[str, Any]],
    hashes: dict[str, str],
    params: MergeExport,
) -> tuple[str, list[str]]:
    """Log the run's adapter as an MLflow model, register it and move the aliases.

    Args:
        records: as returned by `card.read_records`.
        hashes: the md5 of the data and the adapter, as tags.

    Returns:
        The version and its aliases.
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
    return register(client, run_id, params.registered_model, tags, evaluation["gate"]["passed"])


def restore_export(client: Any, run_id: str, hashes: dict[str, str]) -> str:
    """Restore the export's results and the registered version where they are missing.

    The version number may differ from `reports/export.json`: a new registry starts from 1.

    Returns:
        The version as NAME/VERSION.
    """
    report = json.loads(paths.EXPORT.read_text())
    name = report["registered_model"]
    settings = locked_params(locked_stages().get("merge_export", {}))
    if not has_metric(client, run_id, "merged_loss"):
        measured = {key: value for key, value in report.items() if key not in REGISTERED}
        log_results(client, run_id, measured, settings, [paths.EXPORT])
        log.info("MLflow had no export of this adapter; logged it again")
    if known := version_of_run(client, name, run_id):
        return f"{name}/{known}"
    params = MergeExport(**settings["merge_export"])
    adapter = read_training(paths.ADAPTER)
    version, aliases = register_adapter(client, run_id, adapter, read_records(), hashes, params)
    log.info("registered again: %s version %s (%s)", name, version, ", ".join(aliases))
    return f"{name}/{version}"
