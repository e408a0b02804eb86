"""Compare base, tuned model and champion on the test rows: likelihood, greedy answers, a verdict."""

import hashlib
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from fintune.harness import task_manager
from fintune.measuring import Measured, measure, sums_of
from fintune.params import Evaluate, UserError, read_params
from fintune.records import read_passages, read_rows, write_rows
from fintune.report import render
from fintune.splitting import normalize_question
from fintune.stage import log, project_root, run, write_json, write_text
from fintune.tracking import (
    Champion,
    connect,
    fetch_champion,
    log_predictions,
    log_results,
    log_table,
    read_curve,
    run_of_adapter,
)
from fintune.verdict import (
    Sums,
    break_down,
    calibration_curve,
    compare,
    extremes,
    judge,
    number,
    select_rows,
    summarize,
)
from fintune.vllm import find_vllm

TEST = Path("data/formatted/test.parquet")
ADAPTER = Path("models/adapter")
RUN = Path("models/run.json")
TRAIN_METRICS = Path("reports/train.json")
TRAIN_CURVE = Path("reports/train_curve.csv")
METRICS = Path("reports/evaluation.json")
PAGE = Path("reports/evaluation.html")
PREDICTIONS = Path("reports/predictions.parquet")
WATCHED = Path("assets/general-text.jsonl")  # the general text that dvc.yaml names as an input
ROW_LOSS = Path("reports/row_loss.csv")
TEXTS = ("instruction", "question", "reference", "base", "tuned", "sampled")
SCHEMA = {
    **dict.fromkeys(TEXTS, pa.string()),
    **dict.fromkeys(("base_stopped", "tuned_stopped"), pa.bool_()),
    **dict.fromkeys(("base_loss", "tuned_loss", "base_rouge_l", "tuned_rouge_l"), pa.float64()),
}


def main() -> None:
    params = read_params().evaluate
    if params.harness.tasks:
        task_manager(params.harness)  # a missing package or task is told before minutes are spent
    if params.engine == "vllm":
        find_vllm()
    client = connect(project_root())
    run_id = run_of_adapter(client, RUN, TRAIN_METRICS, TRAIN_CURVE, ADAPTER)
    stored = read_rows(TEST, ["instruction", "input", "output", "prompt", "completion"])
    asked = [normalize_question(row["input"]) for row in stored]
    rows, questions, references = select_rows(stored, asked, params.max_rows)
    passages = read_passages(params.general_text) if params.general_text else []
    if passages and Path(params.general_text or "").resolve() != WATCHED.resolve():
        log.warning(
            "note: DVC does not watch evaluate.general_text: %s; after editing it run "
            "`dvc repro --force evaluate`",
            params.general_text,
        )
    with tempfile.TemporaryDirectory() as folder:
        champion = fetch_champion(client, params.champion, RUN, ADAPTER, Path(folder))
        measured = measure(ADAPTER, champion.folder, rows, references, passages, params)
    if measured.champion_fault:
        log.warning("the champion is not compared: %s", measured.champion_fault)
        champion = replace(champion, reason=measured.champion_fault, broken=True)
    sums = {
        name: sums_of(side, rows, references, measured.similarity.get(name))
        for name, side in measured.sides.items()
    }
    test = {"test_rows": len(stored), "test_md5": hashlib.md5(TEST.read_bytes()).hexdigest()}
    about = measured.about | {"adapter_run": run_id} | test
    report = conclude(measured, sums, rows, questions, champion, params) | {"evaluated": about}
    table = predictions(rows, measured, sums)
    page = render(report, table, read_curve(TRAIN_CURVE), params)
    write_json(METRICS, report)
    write_text(PAGE, page)
    write_rows(PREDICTIONS, table, SCHEMA)
    write_text(
        ROW_LOSS,
        "base,tuned\n" + "".join(f"{r['base_loss']:.5g},{r['tuned_loss']:.5g}\n" for r in table),
    )
    log_table(run_id, rows, "test", "evaluation", TEST)
    settings = {"evaluate": params.model_dump(), "gate_passed": report["gate"]["passed"]}
    log_results(client, run_id, report, settings, [METRICS, PREDICTIONS, PAGE])
    log_predictions(client, run_id, [{key: row[key] for key in SCHEMA} for row in table])
    told = ("loss", "perplexity", "token_accuracy", "rouge_l", "stop_rate", "mean_answer_tokens")
    for name in ("base", "tuned"):
        figures = (f"{key} {number(report[name][key])}" for key in told)
        log.info("%-5s %s", name, "  ".join(figures))
    log.info("gate: %s", report["gate"]["reason"])
    if params.gate.strict and not report["gate"]["passed"]:
        raise UserError(
            f"evaluate.gate: {report['gate']['reason']}; {PAGE} shows why, and "
            "evaluate.gate.strict: false lets the pipeline go on without moving the champion"
        )


def conclude(
    measured: Measured,
    sums: dict[str, Sums],
    rows: list[dict[str, Any]],
    questions: list[str],
    champion: Champion,
    params: Evaluate,
) -> dict[str, Any]:
    """The content of evaluation.json: metrics, differences with intervals, breakdowns and the gate."""
    draws = (params.bootstrap_samples, params.seed)
    sides = measured.sides
    report: dict[str, Any] = {name: summarize(sums[name]) for name in ("base", "tuned")}
    report["improvement"] = compare(sums["base"], sums["tuned"], questions, *draws)
    report["champion"] = {
        "compared": "champion" in sums,
        "version": champion.version,
        "run": champion.run_id,
        "reason": champion.reason,
        "note": champion.note,
        "broken": champion.broken,
    }
    if "champion" in sums:
        better = compare(sums["champion"], sums["tuned"], questions, *draws)
        report["champion"] |= {"metrics": summarize(sums["champion"]), "improvement": better}
    if sides["base"].general and sides["tuned"].general:
        losses = {
            n: {"loss": (s.general.nll, s.general.tokens)} for n, s in sides.items() if s.general
        }
        ids = [str(i) for i in range(len(losses["base"]["loss"][0]))]
        # the improvement of the base on the tuned model is what the tuned model has lost
        rise = compare(losses["tuned"], losses["base"], ids, *draws)["loss"]
        report["forgetting"] = {name: summarize(each)["loss"] for name, each in losses.items()}
        report["forgetting"] |= {"rise": rise, "passages": len(ids)}
    if measured.harness:
        report["harness"] = measured.harness
    report["rows"] = len(rows)
    report["questions"] = len(set(questions))
    report["gate"] = judge(report, params.gate)
    report["calibration"] = {n: calibration_curve(s.scores.calibration) for n, s in sides.items()}
    report["breakdown"] = break_down(rows, sums["base"], sums["tuned"])
    report["worst_rows"], report["best_rows"] = extremes(sums["base"], sums["tuned"])
    return report


def predictions(
    rows: list[dict[str, Any]], measured: Measured, sums: dict[str, Sums]
) -> list[dict[str, Any]]:
    """One row a test row: the question, its reference, both models' answers and figures."""
    table = []
    for i, row in enumerate(rows):
        line = {
            key: row[column]
            for key, column in zip(TEXTS, ("instruction", "input", "output"), strict=False)
        }
        line["sampled"] = measured.sampled[i] if i < len(measured.sampled) else None
        for name in ("base", "tuned"):
            answer, (nll, tokens) = measured.sides[name].answers[i], sums[name]["loss"]
            line |= {name: answer.text, f"{name}_stopped": answer.stopped}
            line[f"{name}_loss"] = float(nll[i] / tokens[i])
            line[f"{name}_rouge_l"] = float(sums[name]["rouge_l"][0][i])
        table.append(line)
    return table


if __name__ == "__main__":
    run(main)
