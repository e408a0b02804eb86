"""Measure the speed of an evaluation: answers, likelihood, and the evaluate stage on a table of questions.

    python benchmarks/random_base.py --tokenizer FOLDER --out base7b
    python benchmarks/evaluation_speed.py --base base7b --source fiqa_qa.parquet \\
        --out benchmarks/evaluation_speed.json

The base is in 4 bits, with an adapter on all projections whose B is not zero. Answers: a fixed number of
new tokens per prompt, by this project in one call: greedy, cold (compiling kernels, capturing CUDA graphs)
and warm, and with samplers; and greedy by transformers' own loop in batches of 256. Agreement: the share
of answers, and of their first words, that equal those of that loop; random weights give nearly equal
probabilities to thousands of tokens, so rounding error decides. Then the measurements of the evaluate
stage, without its page and MLflow: likelihood and answers of base and tuned model, and the text metrics.
Random weights never end an answer, so this is the worst case.
"""

import argparse
import shlex
import sys
import tempfile
import time
from dataclasses import replace
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
from fintune.evaluation.rows import Chosen
from fintune.evaluation.sums import metric_sums
from fintune.generation.decoding import GREEDY, Decoding, title
from fintune.generation.generate import Answer, generate
from fintune.hardware import GIB, compute_dtype, free_memory
from fintune.model.adapter import save_adapter, write_training
from fintune.model.base import load_base
from fintune.params import Base, Generation, Sampler
from fintune.stage import run, write_json

SAMPLERS: tuple[dict[str, float], ...] = (
    {"temperature": 1.0},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 0.7, "top_p": 0.95},
    {"temperature": 1.0, "min_p": 0.1, "repetition_penalty": 1.05},
    {"temperature": 0.7, "top_p": 0.95, "repetition_penalty": 1.1},
)


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
    parser.add_argument(
        "--samplers-only", action="store_true", help="without transformers' loop and the stage"
    )
    arguments = parser.parse_args()
    params = read_recipe(
        Path("recipes/mistral-7b.yaml"), [f"base.model={arguments.base}", "base.revision=null"]
    )
    base = Base(model=str(arguments.base), revision=None)
    tokenizer, dtype = load_tokenizer(base, "new"), compute_dtype("auto")
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
    if arguments.samplers_only:
        return
    report["answers"] |= agreement(model, tokenizer, prompts, arguments.new_tokens)
    write_json(arguments.out, report)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, Path(folder))
        write_training(Path(folder), base, params.train.model_dump(), "")
        del model
        free_memory()
        report["stage"] = stage(Path(folder), rows, params)
    write_json(arguments.out, report)
    print(report["stage"])


def answers(model: Any, tokenizer: Any, prompts: list[list[int]], limit: int) -> dict[str, Any]:
    """Measure the tokens per second of greedy answers, cold and warm, and of sampled ones."""
    greedy = Decoding(end_token_id(tokenizer), limit)
    report: dict[str, Any] = {"prompts": len(prompts), "new_tokens": limit}
    report["cold"], _ = speed(model, tokenizer, prompts, greedy)
    report["warm"], _ = speed(model, tokenizer, prompts, greedy)
    for settings in SAMPLERS:
        decoding = replace(greedy, **settings)
        report[title(decoding.settings)], _ = speed(model, tokenizer, prompts, decoding)
    return report


def agreement(model: Any, tokenizer: Any, prompts: list[list[int]], limit: int) -> dict[str, Any]:
    """Measure transformers' own loop, and its agreement with this project's answers."""
    greedy = Decoding(end_token_id(tokenizer), limit)
    few = prompts[:256]
    _, ours = speed(model, tokenizer, few, greedy)
    measured, plain = speed(model, tokenizer, few, greedy, 256, "plain")
    pairs = list(zip(ours, plain, strict=True))
    words = [(a.text.split(), b.text.split()) for a, b in pairs]
    return {
        "transformers_256": measured,
        "equal_answers": sum(a == b for a, b in pairs) / len(pairs),
        "equal_first_words": sum(a[:1] == b[:1] for a, b in words) / len(pairs),
    }


def speed(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    decoding: Decoding,
    rows: int | str = "auto",
    kernels: str = "fused",
) -> tuple[dict[str, float], list[Answer]]:
    """Measure one call of `generate`; return its speed and the answers."""
    reset_peak()
    begun = time.perf_counter()
    found = generate(model, tokenizer, prompts, decoding, "answers", rows, kernels)
    seconds, tokens = time.perf_counter() - begun, sum(answer.tokens for answer in found)
    measured = {"tokens_per_second": tokens / seconds, "seconds": seconds, "tokens": tokens}
    return measured | {"peak_memory_gib": peak()}, found


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
    test = Chosen(rows, [row["input"] for row in rows], [[row["output"]] for row in rows])
    greedy = Generation(decoding=Sampler(**GREEDY), max_new_tokens=params.generation.max_new_tokens)
    reset_peak()
    begun = time.perf_counter()
    try:
        measured = measuring.measure(adapter, None, test, test, [], params.evaluate, greedy)
    finally:
        measuring.likelihood, measuring.generate_answers = originals
    middle = time.perf_counter()
    for result in measured.results.values():
        metric_sums(result, test, None)
    tokens = 2 * sum(row["tokens"] for row in rows)
    return {
        "questions": len(rows),
        "max_new_tokens": greedy.max_new_tokens,
        "answer_tokens": sum(a.tokens for s in measured.results.values() for a in s.greedy),
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
