"""Measure the cost of a merge and its effect: time, memory, losses, logits, greedy answers.

    python benchmarks/merge_cost.py --adapter models/adapter \\
        --rows data/formatted/test.parquet data/formatted/validation.parquet --out FILE

or, for a base of another size with a random adapter (see random_base.py):

    python benchmarks/merge_cost.py --base base7b --source fiqa_qa.parquet --out FILE

The adapter is merged as in `merge_export`, into the weights that it was trained on and into the base's
original ones, in each type. Each merge runs in a process of its own. Its memory is the peak of private
memory (RssAnon, sampled every 20 ms) and of resident memory, mapped pages of the base included (VmHWM).
The merged model is loaded by transformers and compared with the adapter on its base as trained: losses on
the rows, logits of eight, and greedy answers to the first prompts, token by token.
"""

import argparse
import json
import multiprocessing
import re
import shlex
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.quantization_cost import LIBRARIES, read_recipe
from benchmarks.random_base import random_adapter
from benchmarks.training_speed import version
from fintune.data.formatting import format_row
from fintune.data.prompt import encode, end_token_id, load_tokenizer
from fintune.data.tables import read_rows, read_source
from fintune.export.gguf.check import compare
from fintune.export.gguf.llama_cpp import Completion
from fintune.generation.decoding import Decoding
from fintune.generation.generate import Answer, generate
from fintune.hardware import DTYPES, GIB, compute_dtype, device, free_memory, hardware
from fintune.merging.merge import merge_into_folder
from fintune.model.adapter import (
    AdapterInfo,
    load_adapter,
    read_training,
    save_adapter,
    write_training,
)
from fintune.model.base import load_base, load_plain
from fintune.model.likelihood import answer_logits, likelihood
from fintune.params import Base
from fintune.stage import run, write_json

LOGIT_ROWS = 8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapter", type=Path, help="a trained one")
    parser.add_argument("--rows", type=Path, nargs="+", help="tables with prompt and completion")
    parser.add_argument("--base", type=Path, help="instead: put a random adapter on this base")
    parser.add_argument("--source", type=Path, help="and take rows with instruction, input, output")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16"], choices=DTYPES)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--loss-rows", type=int, default=64)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        adapter = arguments.adapter or Path(scratch) / "adapter"
        if arguments.base:
            make_adapter(arguments.base, adapter)
        trained = read_training(adapter)
        tokenizer = load_tokenizer(trained.base, "new")
        rows = (
            [row for table in arguments.rows for row in read_rows(table, ["prompt", "completion"])]
            if arguments.rows
            else formatted(tokenizer, arguments.source)
        )
        tokens = [encode(tokenizer, row["prompt"], row["completion"]) for row in rows]
        prompts = [list(p) for p in dict.fromkeys(tuple(prompt) for prompt, _ in tokens)]
        prompts = prompts[: arguments.prompts]
        how = (tokenizer, tokens[: arguments.loss_rows], prompts, arguments.new_tokens)
        base = load_base(trained.base, tokenizer, trained.train["quantization"], trained.dtype)
        tuned = load_adapter(base, adapter)
        reference = look_at(tuned, *how)
        with tuned.disable_adapter():
            base_loss = likelihood(tuned, how[1], "base").loss
        del base, tuned
        free_memory()
        report: dict[str, Any] = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["python", *sys.argv]),
            "hardware": hardware(),
            "versions": {name: version(name) for name in LIBRARIES},
            "prompts": len(prompts),
            "base_loss": base_loss,
            "adapter_loss": reference["loss"],
            "merged": [],
        }
        for weights in ("trained_on", "original"):
            for dtype in arguments.dtypes:
                report["merged"].append(
                    {"weights": weights, "dtype": dtype}
                    | merged(trained, adapter, weights, dtype, reference, *how)
                )
                write_json(arguments.out, report)
                print(json.dumps(report["merged"][-1]), flush=True)


def make_adapter(base_folder: Path, adapter: Path) -> None:
    """Save a random adapter for a 4-bit base."""
    base = Base(model=str(base_folder), revision=None)
    tokenizer = load_tokenizer(base, "new")
    model = random_adapter(load_base(base, tokenizer, "nf4", compute_dtype("auto")), tokenizer)
    save_adapter(model, adapter)
    recipe = read_recipe(
        Path("recipes/mistral-7b.yaml"), [f"base.model={base_folder}", "base.revision=null"]
    )
    write_training(adapter, base, recipe.train.model_dump(), "")
    del model
    free_memory()


def formatted(tokenizer: Any, source: Path) -> list[dict[str, Any]]:
    found = (
        format_row(tokenizer, row, 512, "truncate")[0] for row in read_source(str(source))[:400]
    )
    return [row for row in found if row]


def look_at(
    model: Any, tokenizer: Any, rows: Any, prompts: list[list[int]], limit: int
) -> dict[str, Any]:
    """Collect the loss, logits and answers of a model."""
    return {
        "loss": likelihood(model, rows, "loss").loss,
        "logits": answer_logits(model, rows[:LOGIT_ROWS]),
        "answers": generate(
            model, tokenizer, prompts, Decoding(end_token_id(tokenizer), limit), "answers"
        ),
    }


def merged(
    trained: AdapterInfo,
    adapter: Path,
    weights: str,
    dtype: str,
    reference: dict[str, Any],
    *how: Any,
) -> dict[str, Any]:
    """Merge in a new process and compare the result with `reference`."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        nf4_compute_dtype = trained.nf4_compute_dtype if weights == "trained_on" else None
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=merge_and_measure,
            args=(sender, trained, adapter, Path(folder), dtype, nf4_compute_dtype),
        )
        process.start()
        sender.close()  # so that recv() fails if the process does
        cost = receiver.recv()
        process.join()
        sizes = [file.stat().st_size for file in Path(folder).glob("*.safetensors")]
        seen = look_at(load_plain(Path(folder)), *how)
    pairs = zip(reference["logits"], seen["logits"], strict=True)
    same = compare(*(greedy(how[0], each["answers"]) for each in (reference, seen)))
    return {
        **cost,
        "shards": len(sizes),
        "largest_shard_gib": max(sizes) / GIB,
        "loss": seen["loss"],
        "max_logit_difference": max(float((a - b).abs().max()) for a, b in pairs),
        "equal_tokens": same.equal_tokens,
        "equal_answers": same.equal_answers,
        "equal_choices": same.equal_choices,
    }


def merge_and_measure(
    sender: Any,
    trained: AdapterInfo,
    adapter: Path,
    folder: Path,
    dtype: str,
    nf4_compute_dtype: torch.dtype | None,
) -> None:
    """Merge in this process and send the seconds, without imports, and the memory."""
    tokenizer = load_tokenizer(trained.base, "new")
    torch.zeros(1, device=device())
    private, done = [status("RssAnon")], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            private[0] = max(private[0], status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    before, begun = status("RssAnon"), time.perf_counter()
    merge_into_folder(trained.base, tokenizer, adapter, folder, DTYPES[dtype], nf4_compute_dtype)
    seconds = time.perf_counter() - begun
    done.set()
    watcher.join()
    sender.send(
        {
            "seconds": seconds,
            "private_memory_gib": private[0],
            "private_memory_before_gib": before,
            "resident_memory_gib": status("VmHWM"),
        }
    )


def status(name: str) -> float:
    """Read a size from /proc/self/status, in GiB."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 / GIB if found else 0.0


def greedy(tokenizer: Any, answers: list[Answer]) -> list[Completion]:
    """Convert answers to tokens, with -1 as the end token of a stopped one."""
    ids = [tokenizer(each.text, add_special_tokens=False)["input_ids"] for each in answers]
    return [
        Completion([], tokens + [-1] * each.stopped, each.text)
        for tokens, each in zip(ids, answers, strict=True)
    ]


if __name__ == "__main__":
    run(main)
