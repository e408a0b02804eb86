"""Measure the speed of an evaluation: answers, likelihood, and the evaluate stage on a table of questions.

    python benchmarks/random_base.py --tokenizer FOLDER --out base7b
    python benchmarks/evaluation_speed.py --base base7b --source fiqa_qa.parquet \\
        --out benchmarks/evaluation_speed.json

The base is in 4 bits, with an adapter on all projections whose B is not zero. Answers: a fixed number of
new tokens per prompt, by this project in one call, cold (compiling kernels, capturing CUDA graphs) and
warm, and by transformers' own loop in batches of 256. Agreement: the share of answers, and of their first
words, that equal those of that loop; random weights give nearly equal probabilities to thousands of
tokens, so rounding error decides. Then the measurements of the evaluate stage, without its page and
MLflow: likelihood and answers of base and tuned model, and the text metrics. Random weights never end an
answer, so this is the worst case.
"""

import argparse
import shlex
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fintune.evaluation.measure as measuring
from benchmarks.quantization_cost import LIBRARIES, read_recipe
from benchmarks.random_base import random_adapter
from benchmarks.training_speed import version
from fintune.data.formatting import format_row
from fintune.data.prompt import encode, end_token_id, load_tokenizer
from fintune.data.tables import read_source
from fintune.generation.decoding import Decoding
from fintune.generation.generate import generate
from fintune.hardware import GIB, compute_dtype, free_memory
from fintune.model.adapter import save_adapter, write_training
from fintune.model.base import load_base
from fintune.params import Base
from fintune.stage import run, write_json


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--source", type=Path, required=True, help="instruction, input, output")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--questions", type=int, default=1711)
    arguments = parser.parse_args()
    params = read_recipe(
        Path("recipes/mistral-7b.yaml"), [f"base.model={arguments.base}", "base.revision=null"]
    )
    base = Base(model=str(arguments.base), revision=None)
    tokenizer, dtype = load_tokenizer(base), compute_dtype("auto")
    rows = [
        formatted
        for row in read_source(str(arguments.source))[: 2 * arguments.questions]
        if (formatted := format_row(tokenizer, row, params.format.max_tokens, "truncate")[0])
    ][: arguments.questions]
    report: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "versions": {name: version(name) for name in LIBRARIES},
    }
    model = load_base(base, tokenizer, "nf4", dtype)
    model = random_adapter(model, tokenizer)
    prompts = [encode(tokenizer, row["prompt"], "")[0] for row in rows[: arguments.prompts]]
    report["answers"] = answers(model, tokenizer, prompts, arguments.new_tokens)
    write_json(arguments.out, report)
    print(report["answers"], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, Path(folder))
        write_training(Path(folder), base, params.train.model_dump(), "")
        del model
        free_memory()
        report["stage"] = stage(Path(folder), rows, params)
    write_json(arguments.out, report)
    print(report["stage"])


def answers(model: Any, tokenizer: Any, prompts: list[list[int]], limit: int) -> dict[str, Any]:
    """Measure tokens per second of each engine, and their agreement."""
    end, found = end_token_id(tokenizer), {}
    report: dict[str, Any] = {"prompts": len(prompts), "new_tokens": limit}
    for name, at_once, kernels, count in (
        ("cold", "auto", "fused", len(prompts)),
        ("warm", "auto", "fused", len(prompts)),
        ("transformers_256", 256, "plain", min(256, len(prompts))),
    ):
        reset_peak()
        begun = time.perf_counter()
        found[name] = generate(
            model, tokenizer, prompts[:count], Decoding(end, limit), name, at_once, kernels
        )
        seconds = time.perf_counter() - begun
        tokens = sum(answer.tokens for answer in found[name])
        speed = {"tokens_per_second": tokens / seconds, "seconds": seconds, "tokens": tokens}
        report[name] = speed | {"peak_memory_gib": peak()}
    pairs = list(zip(found["warm"], found["transformers_256"], strict=False))
    words = [(ours.text.split(), plain.text.split()) for ours, plain in pairs]
    report["equal_answers"] = sum(ours == plain for ours, plain in pairs) / len(pairs)
    report["equal_first_words"] = sum(a[:1] == b[:1] for a, b in words) / len(pairs)
    return report


def stage(adapter: Path, rows: list[dict[str, Any]], params: Any) -> dict[str, Any]:
    """Time the measurements of the evaluate stage, by part."""
    took: dict[str, float] = {}

    def timed(name: str, call: Any) -> Any:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            begun = time.perf_counter()
            result = call(*arguments, **named)
            took[name] = took.get(name, 0.0) + time.perf_counter() - begun
            return result

        return wrapped

    originals = measuring.likelihood, measuring.generate_answers
    measuring.likelihood = timed("likelihood", measuring.likelihood)
    measuring.generate_answers = timed("answers", measuring.generate_answers)
    references = [[row["output"]] for row in rows]
    reset_peak()
    begun = time.perf_counter()
    try:
        measured = measuring.measure(adapter, None, rows, references, [], params.evaluate)
    finally:
        measuring.likelihood, measuring.generate_answers = originals
    middle = time.perf_counter()
    for result in measured.results.values():
        measuring.metric_sums(result, rows, references, None)
    tokens = 2 * sum(row["tokens"] for row in rows)
    return {
        "questions": len(rows),
        "max_new_tokens": params.evaluate.max_new_tokens,
        "answer_tokens": sum(a.tokens for s in measured.results.values() for a in s.answers),
        "seconds": time.perf_counter() - begun,
        "text_metrics_seconds": time.perf_counter() - middle,
        **{f"{name}_seconds": seconds for name, seconds in took.items()},
        "likelihood_tokens_per_second": tokens / took["likelihood"],
        "peak_memory_gib": peak(),
    }


def reset_peak() -> None:
    free_memory()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak() -> float:
    return torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else 0.0


if __name__ == "__main__":
    run(main)
