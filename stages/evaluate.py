"""Evaluate base, tuned model and champion on the test rows, and apply the gate."""

import hashlib
import tempfile
from dataclasses import replace
from pathlib import Path

from fintune import paths
from fintune.data.questions import questions_of
from fintune.data.tables import read_rows, write_rows
from fintune.errors import UserError
from fintune.evaluation.collected import collected_rows, describe_collected
from fintune.evaluation.harness import data_sets, load_tasks
from fintune.evaluation.measure import measure
from fintune.evaluation.page import render
from fintune.evaluation.report import SCHEMA, conclude, row_losses, summary
from fintune.evaluation.rows import general_passages, select_rows
from fintune.generation.vllm import find_vllm
from fintune.lineage import project_root
from fintune.params import read_params
from fintune.processes import of_first, rank, start
from fintune.registry.champion import fetch_champion
from fintune.registry.recovery import read_curve, run_of_adapter
from fintune.registry.results import log_evaluation
from fintune.reports import OF_EVALUATION, compact
from fintune.stage import log, run, write_json, write_text
from fintune.tracking.client import connect

TEST, VALIDATION = (paths.rows(paths.FORMATTED, split) for split in ("test", "validation"))
COLUMNS = ("instruction", "input", "output", "prompt", "completion")


def main() -> None:
    everything = read_params()
    params = everything.evaluate
    if start("evaluate", "auto" if params.engine == "built_in" else 1, "evaluate.engine: vllm"):
        return
    # fail fast if the harness, a task or its data is missing
    harness_data = data_sets(load_tasks(params.harness)) if params.harness.tasks else {}
    if params.engine == "vllm":
        find_vllm()
    client = connect(project_root()) if rank() == 0 else None  # which writes and logs
    run_id = run_of_adapter(client) if client else ""
    stored = read_rows(TEST, COLUMNS)
    test = select_rows(stored, questions_of(stored), params.max_rows)
    held_out = read_rows(VALIDATION, COLUMNS)
    validation = select_rows(held_out, questions_of(held_out), None)
    name = params.champion_of(everything.merge_export.registered_model)
    passages = general_passages(params.general_text)
    collected = collected_rows()
    with tempfile.TemporaryDirectory() as folder:
        ours = (paths.RUN, paths.ADAPTER)
        champion = fetch_champion(client, name, *ours, Path(folder)) if client else None
        adapters = (paths.ADAPTER, of_first(champion.folder if champion else None))
        answers = everything.generation
        measured = measure(*adapters, test, validation, passages, params, answers, collected.rows)
    if client is None or champion is None:
        return
    if measured.champion_fault:
        log.warning("the champion is not compared: %s", measured.champion_fault)
        champion = replace(champion, reason=measured.champion_fault, broken=True)
    origin = {"test_rows": len(stored), "test_md5": hashlib.md5(TEST.read_bytes()).hexdigest()}
    about = measured.about | {"adapter_run": run_id} | origin
    about |= {f"data_of_{task}": data for task, data in harness_data.items()}
    report, table = conclude(measured, test, champion, params)
    report["evaluated"] = about
    if collected.rows:
        report["collected"] = describe_collected(collected, measured.collected)
    write_json(paths.EVALUATION, compact(report, OF_EVALUATION))
    write_text(paths.EVALUATION_PAGE, render(report, table, read_curve(paths.TRAIN_CURVE), params))
    write_rows(paths.PREDICTIONS, table, SCHEMA)
    write_text(paths.ROW_LOSS, row_losses(table))
    settings = {"evaluate": params.model_dump(), "generation": everything.generation.model_dump()}
    settings |= {"harness_data": harness_data} if harness_data else {}
    rows = [{key: row[key] for key in SCHEMA} for row in table]
    log_evaluation(client, run_id, report, settings, rows)
    for line in summary(report):
        log.info("%s", line)
    if params.gate.strict and not report["gate"]["passed"]:
        raise UserError(
            f"evaluate.gate: {report['gate']['reason']}; {paths.EVALUATION_PAGE} shows why, and "
            "evaluate.gate.strict: false lets the pipeline go on without moving the champion"
        )


if __name__ == "__main__":
    run(main)
