"""Evaluate base, tuned model and champion on the test rows, and apply the gate."""

import hashlib
import tempfile
from dataclasses import replace
from pathlib import Path

from fintune import paths
from fintune.data.records import normalize_question, read_passages
from fintune.data.tables import read_rows, write_rows
from fintune.errors import UserError
from fintune.evaluation.harness import task_manager
from fintune.evaluation.measure import measure, metric_sums
from fintune.evaluation.page import render
from fintune.evaluation.report import SCHEMA, conclude, predictions, row_losses, summary
from fintune.evaluation.rows import select_rows
from fintune.generation.vllm import find_vllm
from fintune.lineage import project_root
from fintune.params import read_params
from fintune.registry.champion import fetch_champion
from fintune.registry.recovery import read_curve, run_of_adapter
from fintune.registry.results import log_predictions, log_results
from fintune.stage import log, run, write_json, write_text
from fintune.tracking.client import connect
from fintune.tracking.runs import log_table

TEST = paths.rows(paths.FORMATTED, "test")
COLUMNS = ("instruction", "input", "output", "prompt", "completion")


def main() -> None:
    params = read_params().evaluate
    if params.harness.tasks:
        task_manager(params.harness)  # fail fast if the harness or a task is missing
    if params.engine == "vllm":
        find_vllm()
    client = connect(project_root())
    run_id = run_of_adapter(client)
    stored = read_rows(TEST, COLUMNS)
    questions_of_rows = [normalize_question(row["input"]) for row in stored]
    rows, questions, references = select_rows(stored, questions_of_rows, params.max_rows)
    passages = read_passages(params.general_text) if params.general_text else []
    if passages and Path(params.general_text or "").resolve() != paths.GENERAL_TEXT.resolve():
        log.warning(
            "note: DVC does not watch evaluate.general_text: %s; after editing it run "
            "`dvc repro --force evaluate`",
            params.general_text,
        )
    with tempfile.TemporaryDirectory() as folder:
        ours = (paths.RUN, paths.ADAPTER)
        champion = fetch_champion(client, params.champion, *ours, Path(folder))
        measured = measure(paths.ADAPTER, champion.folder, rows, references, passages, params)
    if measured.champion_fault:
        log.warning("the champion is not compared: %s", measured.champion_fault)
        champion = replace(champion, reason=measured.champion_fault, broken=True)
    sums = {
        name: metric_sums(result, rows, references, measured.similarity.get(name))
        for name, result in measured.results.items()
    }
    test = {"test_rows": len(stored), "test_md5": hashlib.md5(TEST.read_bytes()).hexdigest()}
    about = measured.about | {"adapter_run": run_id} | test
    report = conclude(measured, sums, rows, questions, champion, params) | {"evaluated": about}
    table = predictions(rows, measured, sums)
    write_json(paths.EVALUATION, report)
    write_text(paths.EVALUATION_PAGE, render(report, table, read_curve(paths.TRAIN_CURVE), params))
    write_rows(paths.PREDICTIONS, table, SCHEMA)
    write_text(paths.ROW_LOSS, row_losses(table))
    log_table(run_id, rows, "test", "evaluation", TEST)
    settings = {"evaluate": params.model_dump(), "gate_passed": report["gate"]["passed"]}
    files = [paths.EVALUATION, paths.PREDICTIONS, paths.EVALUATION_PAGE]
    log_results(client, run_id, report, settings, files)
    log_predictions(client, run_id, [{key: row[key] for key in SCHEMA} for row in table])
    for line in summary(report):
        log.info("%s", line)
    if params.gate.strict and not report["gate"]["passed"]:
        raise UserError(
            f"evaluate.gate: {report['gate']['reason']}; {paths.EVALUATION_PAGE} shows why, and "
            "evaluate.gate.strict: false lets the pipeline go on without moving the champion"
        )


if __name__ == "__main__":
    run(main)
