"""Measure the cost of a 4-bit base: LoRA on unquantized weights against QLoRA, over several seeds.

    python benchmarks/quantization_cost.py --recipe recipes/fiqa-small.yaml --seeds 0 1 2 \\
        --out benchmarks/quantization_cost.json
    python benchmarks/quantization_cost.py --recipe recipes/fiqa-small.yaml --source qa.parquet \\
        --seeds 0 --out try.json --set train.max_steps=8 evaluate.max_rows=16

Run from the project's root; it only writes the file named by --out, after every run. With the same seed,
both kinds start from the same adapter and see the same rows in the same order, so that only the
quantization differs; the seed also draws the sampled answers. Unquantized weights have 16 bits on a GPU
and 32 on a CPU. On a GPU, peak_memory_gib is that of the run; on a CPU it is the peak of the process so
far, which says nothing about a single run.
"""

import argparse
import shlex
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fintune.data.prompt import encode, end_token_id, load_tokenizer
from fintune.data.sources import fetch_records
from fintune.data.splitting import split_rows
from fintune.data.tables import SPLITS, read_rows
from fintune.errors import UserError
from fintune.evaluation.measure import ModelResult
from fintune.evaluation.rows import Chosen
from fintune.evaluation.statistics import summarize
from fintune.evaluation.sums import metric_sums
from fintune.evaluation.validation import validator
from fintune.generation.decoding import Decoding
from fintune.generation.generate import generate
from fintune.hardware import compute_dtype, free_memory
from fintune.hub.models import check_base
from fintune.model.adapter import add_adapter, load_adapter, save_adapter
from fintune.model.base import load_base
from fintune.model.batch import TokenRow
from fintune.model.likelihood import likelihood
from fintune.params import Params, Train, read_params
from fintune.stage import log, run, write_json
from fintune.training.train import TrainingResult, train
from stages.format import format_rows

LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes")
QUANTIZATIONS = ("none", "nf4")
SAMPLING = {"temperature": 1.0, "top_p": 1.0}  # the model's full distribution
OF_ANSWERS = ("rouge_l", "stop_rate", "mean_answer_tokens")
WARM_UP_STEPS = 3  # the first steps also load kernels
COLUMNS = {
    "base": ("base", "none"),
    "base nf4": ("base", "nf4"),
    "LoRA": ("tuned", "none"),
    "QLoRA": ("tuned", "nf4"),
}
LINES = (
    *("loss", "perplexity", "token_accuracy", "rouge_l", "sampled_rouge_l"),
    *("stop_rate", "sampled_stop_rate", "mean_answer_tokens", "sampled_mean_answer_tokens"),
    *("validation_loss", "seconds", "tokens_per_second", "peak_memory_gib"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--source", help="a file or URL in place of the recipe's fetch.source")
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", dest="changes")
    arguments = parser.parse_args()
    source = [f"fetch.source={arguments.source}"] if arguments.source else []
    params = read_recipe(arguments.recipe, [*source, *arguments.changes])
    check_base(params.base)
    tokenizer = load_tokenizer(params.base, "new")
    rows = read_splits(params, tokenizer)
    tokens = {
        name: [encode(tokenizer, row["prompt"], row["completion"]) for row in part]
        for name, part in rows.items()
    }
    report = describe_setting(params, tokens) | {"runs": []}
    plan = [("base", q, params.evaluate.seed) for q in QUANTIZATIONS]
    plan += [("tuned", q, seed) for seed in arguments.seeds for q in QUANTIZATIONS]
    for number, (name, quantization, seed) in enumerate(plan, start=1):
        log.info("%d of %d: %s, %s, seed %d", number, len(plan), name, quantization, seed)
        here = vary(params, quantization=quantization, seed=seed)
        with tempfile.TemporaryDirectory() as folder:
            cost = {}
            if name == "base":
                first = vary(here, max_steps=WARM_UP_STEPS)
                fine_tune(first, tokenizer, tokens, rows["validation"], Path(folder))
            else:
                cost = fine_tune(here, tokenizer, tokens, rows["validation"], Path(folder))
            adapter = Path(folder) / "adapter" if name == "tuned" else None
            values = measure(here, tokenizer, tokens["test"], rows["test"], adapter)
        run_of = {"model": name, "quantization": quantization, "seed": seed}
        report["runs"].append(run_of | values | cost)
        write_json(arguments.out, report)
        free_memory()
    print(table(report["runs"]))


def describe_setting(params: Params, tokens: dict[str, list[TokenRow]]) -> dict[str, Any]:
    """Describe the setting: hardware, versions, parameters, rows.

    The share of references that fit into max_new_tokens is the stop rate of a model that samples like
    the data.
    """
    limit = params.generation.max_new_tokens
    fitting = sum(len(completion) <= limit for _, completion in tokens["test"])
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "dtype": str(compute_dtype(params.train.precision)).removeprefix("torch."),
        "versions": {name: version(name) for name in LIBRARIES},
        "parameters": params.model_dump(exclude={"merge_export"}),
        "rows": {name: len(part) for name, part in tokens.items()},
        "references_within_max_new_tokens": fitting / len(tokens["test"]),
    }


def read_recipe(path: Path, changes: list[str]) -> Params:
    """Read the recipe with `section.key=value` changes, validated like params.yaml.

    Raises:
        UserError: the recipe is missing or invalid, or a change has an unknown key or an invalid value.
    """
    read_params(path)
    raw = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    for change in changes:
        key, equals, value = change.partition("=")
        *parents, last = key.split(".")
        section = raw
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if not equals or not isinstance(section, dict) or last not in section:
            raise UserError(f"--set {change}: write section.key=value with a key of {path}")
        section[last] = YAML(typ="safe").load(value)
    with tempfile.TemporaryDirectory() as folder:
        changed = Path(folder) / path.name
        YAML(typ="safe").dump(raw, changed)
        return read_params(changed)


def vary(params: Params, **changes: Any) -> Params:
    """Replace values in `train`."""
    return params.model_copy(update={"train": params.train.model_copy(update=changes)})


def read_splits(params: Params, tokenizer: Any) -> dict[str, list[dict[str, Any]]]:
    """Read the formatted rows of train, validation and test, the last cut to `evaluate.max_rows`."""
    with tempfile.TemporaryDirectory() as name:
        raw, split, target = (
            Path(name) / part for part in ("raw/qa.parquet", "split", "formatted")
        )
        fetch_records(params.fetch, raw)
        split_rows(raw, split, params.split)
        rows = {}
        for each in SPLITS:
            source, formatted = split / f"{each}.parquet", target / f"{each}.parquet"
            format_rows(tokenizer, source, formatted, params.format, each)
            rows[each] = read_rows(formatted)
    return rows | {"test": rows["test"][: params.evaluate.max_rows]}


def fine_tune(
    params: Params,
    tokenizer: Any,
    tokens: dict[str, list[TokenRow]],
    validation: list[dict[str, Any]],
    folder: Path,
) -> dict[str, float]:
    """Train an adapter, write it to `folder`/adapter and return the keys of reports/train.json."""
    dtype = compute_dtype(params.train.precision)
    model = load_base(params.base, tokenizer, params.train.quantization, dtype)
    result = train_adapter(model, params.train, tokenizer, tokens, validation, folder)
    save_adapter(result.model, folder / "adapter")
    metrics = result.metrics
    del model, result
    free_memory()
    return metrics


def train_adapter(
    model: Any,
    settings: Train,
    tokenizer: Any,
    tokens: dict[str, list[TokenRow]],
    validation: list[dict[str, Any]],
    scratch: Path,
) -> TrainingResult:
    """Train a new adapter on a base as the train stage does, without MLflow."""
    return train(
        add_adapter(model, tokenizer, settings.lora, settings.seed),
        tokenizer,
        tokens["train"],
        settings,
        compute_dtype(settings.precision),
        validate=validator(settings, tokenizer, validation, tokens),
        scratch=scratch,
        on_log=lambda step, values: None,
    )


def measure(
    params: Params,
    tokenizer: Any,
    rows: list[TokenRow],
    test: list[dict[str, Any]],
    adapter: Path | None,
) -> dict[str, float]:
    """Compute the evaluate stage's metrics, and `sampled_*` of answers drawn at temperature 1.

    The adapter is loaded from its folder as in that stage: a model that was just trained still has the
    trainer's autocast. Without a folder, the base is measured.
    """
    dtype = compute_dtype(params.train.precision)
    model: Any = load_base(params.base, tokenizer, params.train.quantization, dtype)
    if adapter:
        model = load_adapter(model, adapter)
    scores = likelihood(model, rows, "likelihood")
    prompts, end = [prompt for prompt, _ in rows], end_token_id(tokenizer)
    limit, rows_per_batch = params.generation.max_new_tokens, params.evaluate.rows_per_batch
    chosen = Chosen(test, [row["input"] for row in test], [[row["output"]] for row in test])
    described = []
    for title, sampling in (("greedy answers", {}), ("sampled answers", SAMPLING)):
        decoding = Decoding(end, limit, seed=params.train.seed, **sampling)
        answers = generate(model, tokenizer, prompts, decoding, title, rows_per_batch)
        result = ModelResult(scores, [[answer] for answer in answers], answers, None)
        sums, _ = metric_sums(result, chosen, None)
        described.append(
            {key: value for key, value in summarize(sums).items() if value is not None}
        )
    greedy, sampled = described
    return greedy | {f"sampled_{key}": sampled[key] for key in OF_ANSWERS}


def table(runs: list[dict[str, Any]]) -> str:
    """Format the mean of each figure and, over several seeds, its lowest and highest value."""
    lines = [f"{'':<27}" + "".join(f"{column:>30}" for column in COLUMNS)]
    for key in LINES:
        cells = []
        for kind in COLUMNS.values():
            of_kind = [r for r in runs if (r["model"], r["quantization"]) == kind]
            cells.append(spread([r[key] for r in of_kind if key in r]))
        lines.append(f"{key:<27}" + "".join(f"{cell:>30}" for cell in cells))
    plain, quantized = (
        {r["seed"]: r["loss"] for r in runs if (r["model"], r["quantization"]) == ("tuned", q)}
        for q in QUANTIZATIONS
    )
    cost = spread([quantized[seed] - plain[seed] for seed in plain])
    return "\n".join([*lines, f"QLoRA's loss minus LoRA's, seed by seed: {cost}"])


def spread(values: list[float]) -> str:
    """Format mean and range, a single value without a range, and no values as an empty string."""
    if not values:
        return ""
    mean = sum(values) / len(values)
    return f"{mean:.4g}" + (f" ({min(values):.4g} – {max(values):.4g})" if len(values) > 1 else "")


if __name__ == "__main__":
    run(main)
