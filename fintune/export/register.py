"""Register an adapter as an MLflow model, with its card, lineage and quality."""

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from fintune import paths
from fintune.export.card import metric_lines, read_records, write_card
from fintune.export.pyfunc import write_model_files
from fintune.export.signature import seal, signing_key
from fintune.generation.tuned import generation_config
from fintune.integrity import hash_files
from fintune.lineage import PARENT_RUN, locked_params, locked_stages
from fintune.metrics import METRICS
from fintune.model.adapter import AdapterInfo, read_training
from fintune.params import MergeExport
from fintune.registry.recovery import has_metric
from fintune.registry.results import VERDICTS, log_results
from fintune.registry.versions import FIGURES, model_id_of, register, version_of_run
from fintune.tracking.models import model_of_run

log = logging.getLogger("fintune")
SHOWN = ("accuracy", "perplexity", "rouge_l", "stop_rate", "loop_rate")  # on a version's page
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
    evaluation, name = records["evaluation"], params.registered_model
    known, model = version_of_run(client, name, run_id), model_of_run(client, run_id)
    if known and model_id_of(client.get_model_version(name, known)) is None:
        model = None  # it is an artifact of its run, as in earlier releases
    model_id = model.model_id if model else None
    with tempfile.TemporaryDirectory() as scratch:
        files = Path(scratch) / "model"
        write_model_files(files, evaluation["decoding"], run_id, model_id)
        tokenizer = trained.load_tokenizer()
        generation_config(tokenizer, evaluation["decoding"]).save_pretrained(files)
        write_card(files, trained, records, None, params)
        seal(files, hash_files(paths.ADAPTER) | hash_files(files), signing_key())
        if model_id:
            client.log_model_artifacts(model_id, str(files))  # where the adapter is
        else:
            client.log_artifacts(run_id, str(files), "adapter")
    said = {k: text for k, text in records["run"]["tags"].items() if not k.startswith("mlflow.")}
    tags = said | hashes | {"gate": evaluation["gate"]["reason"]}
    passed = evaluation["gate"]["passed"]
    reason = why_not(params, passed)
    if reason and known is None:
        return None, [], reason
    figures = describe_figures(evaluation, client.get_run(run_id).info)
    return *register(client, run_id, name, tags, passed, figures), ""


def describe_figures(evaluation: dict[str, Any], run: Any) -> str:
    """Describe an evaluation for a version's page: the figures that matter, the gate and the report.

    Args:
        run: the info of its run, which has the report.
    """
    report = f"#/experiments/{run.experiment_id}/runs/{run.run_id}/artifacts/{paths.EVALUATION_PAGE.name}"
    lines = ["| | base | tuned | improvement |", "|---|---|---|---|"]
    shown = {METRICS[key].title for key in SHOWN}
    lines += [f"| {' | '.join(line)} |" for line in metric_lines(evaluation) if line[0] in shown]
    gate = evaluation["gate"]
    rules = [f"- {VERDICTS[each['passed']]}: {each['reason']}" for each in gate["rules"]]
    verdict = "passed" if gate["passed"] else "failed"
    parts = (
        f"{FIGURES} on {evaluation['rows']} test rows ([report]({report}))",
        "\n".join(lines),
        f"Gate: {verdict}",
        "\n".join(rules),
    )
    return "".join(f"\n\n{part}" for part in parts if part)


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
