"""Compare base and tuned model on the test rows: likelihood, greedy answers, a verdict."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fintune.modeling import compute_dtype, load_adapter, load_base
from fintune.params import Base, Evaluate, Gate, read_params
from fintune.prompts import encode, end_token_id, load_tokenizer
from fintune.records import read_rows, write_rows
from fintune.scoring import Answer, Likelihood, bootstrap_interval, generate, likelihood, rouge_l
from fintune.splitting import normalize_question
from fintune.stage import log, project_root, run, write_json, write_text
from fintune.tracking import connect, log_results, log_table, run_of_adapter

TEST = Path("data/formatted/test.parquet")
ADAPTER = Path("models/adapter")
RUN = Path("models/run.json")
TRAIN_METRICS = Path("reports/train.json")
TRAIN_CURVE = Path("reports/train_curve.csv")
METRICS = Path("reports/evaluation.json")
PREDICTIONS = Path("reports/predictions.parquet")
ROW_LOSS = Path("reports/row_loss.csv")
TEXTS = ("instruction", "question", "reference", "base", "tuned", "sampled")
SCHEMA = {
    **dict.fromkeys(TEXTS, pa.string()),
    **dict.fromkeys(("base_stopped", "tuned_stopped"), pa.bool_()),
    **dict.fromkeys(("base_loss", "tuned_loss", "base_rouge_l", "tuned_rouge_l"), pa.float64()),
}

Measured = tuple[Likelihood, list[Answer], np.ndarray]  # the array: ROUGE-L, shape (rows,)


def main() -> None:
    params = read_params().evaluate
    client = connect(project_root())
    run_id = run_of_adapter(client, RUN, TRAIN_METRICS, TRAIN_CURVE, ADAPTER)
    rows = read_rows(TEST, ["prompt", "completion"])[: params.max_rows]
    measured, sampled = measure(rows, params)
    report = verdict(measured, [normalize_question(row["input"]) for row in rows], params)
    write_json(METRICS, report)
    table = predictions(rows, measured, sampled)
    write_rows(PREDICTIONS, table, SCHEMA)
    write_text(
        ROW_LOSS,
        "base,tuned\n" + "".join(f"{r['base_loss']:.5g},{r['tuned_loss']:.5g}\n" for r in table),
    )
    log_table(run_id, rows, "test", "evaluation", TEST)
    settings = {"evaluate": params.model_dump(), "gate_passed": report["gate"]["passed"]}
    log_results(
        client,
        run_id,
        report,
        settings,
        [METRICS, PREDICTIONS, samples_page(table, params.sampling.rows)],
    )
    for name in ("base", "tuned"):
        log.info(
            "%-5s %s", name, "  ".join(f"{key} {value:.4g}" for key, value in report[name].items())
        )
    log.info("gate: %s", report["gate"]["reason"])


def measure(rows: list[dict[str, Any]], params: Evaluate) -> tuple[dict[str, Measured], list[str]]:
    """Load the model once and measure it with its adapter off and on; samples come from the tuned one."""
    trained = json.loads((ADAPTER / "training.json").read_text())
    base = Base(**trained["base"])
    tokenizer = load_tokenizer(base)
    dtype = compute_dtype(trained["train"]["precision"])
    model = load_adapter(
        load_base(base, tokenizer, trained["train"]["quantization"], dtype), ADAPTER
    )
    tokens = [encode(tokenizer, row["prompt"], row["completion"]) for row in rows]
    prompts = [prompt for prompt, _ in tokens]
    options = (end_token_id(tokenizer), params.max_new_tokens, params.rows_per_batch)

    def both(name: str) -> Measured:
        answers = generate(model, tokenizer, prompts, *options, title=f"{name} answers")
        scores = rouge_l([answer.text for answer in answers], [row["output"] for row in rows])
        return likelihood(model, tokens, f"{name} likelihood"), answers, scores

    with model.disable_adapter():
        measured = {"base": both("base")}
    measured["tuned"] = both("tuned")
    sampling = params.sampling.model_dump(exclude={"rows"})
    sampled = generate(
        model,
        tokenizer,
        prompts[: params.sampling.rows],
        *options,
        "samples",
        sampling,
        params.seed,
    )
    return measured, [answer.text for answer in sampled]


def verdict(
    measured: dict[str, Measured], questions: list[str], params: Evaluate
) -> dict[str, Any]:
    """The metrics of both, the tuned model's improvement with 95 % intervals by question, and the gate."""
    report: dict[str, Any] = {name: describe(*each) for name, each in measured.items()}
    (base, _, base_rouge), (tuned, _, tuned_rouge) = measured["base"], measured["tuned"]

    def reduction(index: np.ndarray) -> float:
        tokens = base.tokens[index].sum()
        return 1 - math.exp((tuned.nll[index].sum() - base.nll[index].sum()) / tokens)

    def rouge_gain(index: np.ndarray) -> float:
        return float((tuned_rouge[index] - base_rouge[index]).mean())

    report["improvement"] = {}
    for name, statistic in {"perplexity_reduction": reduction, "rouge_l": rouge_gain}.items():
        low, high = bootstrap_interval(statistic, questions, params.bootstrap_samples, params.seed)
        value = statistic(np.arange(len(questions)))
        report["improvement"][name] = {"value": value, "low": low, "high": high}
    report["rows"] = len(questions)
    report["gate"] = judge(report, params.gate)
    return report


def describe(scores: Likelihood, answers: list[Answer], rouge: np.ndarray) -> dict[str, float]:
    """The metrics of one model."""
    return {
        "loss": scores.loss,
        "perplexity": math.exp(scores.loss),
        "token_accuracy": scores.accuracy,
        "rouge_l": float(rouge.mean()),
        "stop_rate": float(np.mean([answer.stopped for answer in answers])),
        "mean_answer_tokens": float(np.mean([answer.tokens for answer in answers])),
    }


def judge(report: dict[str, Any], gate: Gate) -> dict[str, Any]:
    """Whether the tuned model may become champion, and why."""
    low = report["improvement"]["perplexity_reduction"]["low"]
    stops = report["tuned"]["stop_rate"]
    rules = {
        f"perplexity reduction at least {low:.3f} (95 %), {gate.min_perplexity_reduction} required": (
            low >= gate.min_perplexity_reduction
        ),
        f"stop rate {stops:.3f}, {gate.min_stop_rate} required": stops >= gate.min_stop_rate,
    }
    passed = all(rules.values())
    failed = [rule for rule, held in rules.items() if not held]
    return {
        "passed": passed,
        "reason": f"{'passed' if passed else 'failed'}: {'; '.join(failed or rules)}",
    }


def predictions(
    rows: list[dict[str, Any]], measured: dict[str, Measured], sampled: list[str]
) -> list[dict[str, Any]]:
    """One row a test row: the question, its reference, both models' answers and figures."""
    table = []
    for i, row in enumerate(rows):
        line = {
            key: row[column]
            for key, column in zip(TEXTS, ("instruction", "input", "output"), strict=False)
        }
        line["sampled"] = sampled[i] if i < len(sampled) else None
        for name, (scores, answers, rouge) in measured.items():
            line |= {name: answers[i].text, f"{name}_stopped": answers[i].stopped}
            line |= {f"{name}_loss": scores.nll[i] / scores.tokens[i], f"{name}_rouge_l": rouge[i]}
        table.append(line)
    return table


def samples_page(table: list[dict[str, Any]], count: int) -> Path:
    """The first rows as text to read, for the run's page in MLflow."""
    path = Path("reports/samples.md")
    parts = [
        f"Question: {row['question']}\n\nReference: {row['reference']}\n\nBase: {row['base']}\n\n"
        f"Tuned: {row['tuned']}\n\nTuned, sampled: {row['sampled']}\n"
        for row in table[:count]
    ]
    write_text(path, "\n---\n\n".join(parts))
    return path


if __name__ == "__main__":
    run(main)
