"""Build the evaluation's report and table of predictions from the measurements."""

from typing import Any

import pyarrow as pa

from fintune.evaluation.breakdown import break_down, calibration_curve, extremes
from fintune.evaluation.correctness import is_correct
from fintune.evaluation.gate import apply_gate, gate_lines
from fintune.evaluation.measure import Measured
from fintune.evaluation.rows import Chosen
from fintune.evaluation.scores import result_of
from fintune.evaluation.statistics import Sums, compare, summarize
from fintune.evaluation.sums import metric_sums
from fintune.metrics import number
from fintune.params import Evaluate
from fintune.registry.champion import Champion

COLUMNS = {
    "instruction": "instruction",
    "question": "input",
    "reference": "output",
    "result": "result",
    "kind": "kind",
}
SIDES = ("base", "tuned", "champion")  # the champion's columns are null where it is not compared
SCHEMA = {
    **dict.fromkeys((*COLUMNS, *SIDES, "tuned_greedy"), pa.string()),
    **{f"{side}_{key}": pa.bool_() for key in ("stopped", "right") for side in SIDES},
    **{f"{side}_{key}": pa.float64() for key in ("loss", "rouge_l") for side in SIDES},
}


def conclude(
    measured: Measured, test: Chosen, champion: Champion, params: Evaluate
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Compute the content of evaluation.json, and the table of predictions.

    Returns:
        Metrics, differences with intervals, decoding, breakdowns and gate; and each test row with both
        models' answers and figures.
    """
    draws = (params.bootstrap_samples, params.seed)
    results, questions = measured.results, test.questions
    sums, greedy = {}, {}
    for name, result in results.items():
        sums[name], greedy[name] = metric_sums(result, test, measured.similarity.get(name))
    report: dict[str, Any] = {name: summarize(sums[name]) for name in ("base", "tuned")}
    report["improvement"] = compare(sums["base"], sums["tuned"], questions, *draws)
    report["decoding"] = measured.decoding
    alone = {name: summarize(greedy[name]) for name in ("base", "tuned")}
    if not all(figures.items() <= report[name].items() for name, figures in alone.items()):
        report["greedy"] = alone
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
    if results["base"].general and results["tuned"].general:
        losses = {
            n: {"loss": (r.general.nll, r.general.tokens)} for n, r in results.items() if r.general
        }
        ids = [str(i) for i in range(len(losses["base"]["loss"][0]))]
        # the base's improvement over the tuned model is what the tuned model has lost
        rise = compare(losses["tuned"], losses["base"], ids, *draws)["loss"]
        report["forgetting"] = {name: summarize(each)["loss"] for name, each in losses.items()}
        report["forgetting"] |= {"rise": rise, "passages": len(ids)}
    if measured.harness:
        report["harness"] = measured.harness
    report["rows"] = len(test.rows)
    report["questions"] = len(set(questions))
    report["gate"] = apply_gate(report, params.gate)
    report["calibration"] = {n: calibration_curve(r.scores.calibration) for n, r in results.items()}
    report["breakdown"] = break_down(test.rows, sums["base"], sums["tuned"])
    report["worst_rows"], report["best_rows"] = extremes(sums["base"], sums["tuned"])
    return report, predictions(test.rows, measured, sums)


def predictions(
    rows: list[dict[str, Any]], measured: Measured, sums: dict[str, Sums]
) -> list[dict[str, Any]]:
    """Tabulate each test row's question, reference, and each model's first answer and figures."""
    table = []
    for i, row in enumerate(rows):
        line = {key: row.get(column) for key, column in COLUMNS.items()}
        line["tuned_greedy"] = measured.results["tuned"].greedy[i].text
        for name in SIDES:
            if name not in sums:
                parts = ("stopped", "right", "loss", "rouge_l")
                line |= {name: None} | dict.fromkeys(f"{name}_{part}" for part in parts)
                continue
            answer, (nll, tokens) = measured.results[name].answers[i][0], sums[name]["loss"]
            line |= {name: answer.text, f"{name}_stopped": answer.stopped}
            line[f"{name}_right"] = is_correct(result_of(row), answer.text, row["input"])
            line[f"{name}_loss"] = float(nll[i] / tokens[i])
            line[f"{name}_rouge_l"] = float(sums[name]["rouge_l"][0][i])
        table.append(line)
    return table


def row_losses(table: list[dict[str, Any]]) -> str:
    """Format both models' loss on each row as CSV."""
    lines = [f"{row['base_loss']:.5g},{row['tuned_loss']:.5g}\n" for row in table]
    return "base,tuned\n" + "".join(lines)


def summary(report: dict[str, Any]) -> list[str]:
    """Format the terminal output: one line per model, and the gate with a line for each rule."""
    shown: tuple[str, ...] = ("loss", "perplexity", "rouge_1", "rouge_l", "stop_rate", "loop_rate")
    if checked := report["tuned"]["checkable_rows"]:
        shown = ("accuracy", *shown)
    lines = [f"decoding: {report['decoding']['reason']}"]
    if checked:
        lines.append(
            f"{checked:.0f} of {report['rows']} test rows have a result that can be checked"
        )
    for name in ("base", "tuned"):
        figures = (f"{key} {number(report[name][key])}" for key in shown)
        lines.append(f"{name:<5} " + "  ".join(figures))
    if found := report.get("collected"):
        right = ", ".join(f"{name} {count}" for name, count in found["right"].items())
        lines.append(f"of {found['asked']} collected questions are right: {right}")
    return [*lines, *gate_lines(report["gate"])]
