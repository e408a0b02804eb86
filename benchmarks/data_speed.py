"""Measure fetch, split and format on made rows, beside plain pandas and `datasets.map`.

python benchmarks/data_speed.py --rows 10000 100000 1000000 --out benchmarks/data_speed.json

Questions and answers are sentences of random words, common ones more often, from the shipped texts. Of
twenty rows one repeats another, two ask its question again, and one asks it in nearly the same words. Each
part runs in a process of its own, and keeps what outlasts a kill, as its stage does. Seconds hold reading and
writing, not imports; memory is the most that its processes had together, each page that they share counted
once (PSS), looked at every 50 ms.
"""

import argparse
import datetime
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
INSTRUCTION = "Answer the question as an adviser would."
OURS = ("fetch", "split", "format without tokens", "format")
OTHERS = ("pandas", "datasets")
PARTS = (*OURS, *OTHERS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--others-up-to", type=int, default=1_000_000)
    parser.add_argument("--base", type=Path, default=ROOT / "assets/demo-base")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.part:
        os.chdir(given.folder)
        measure(given.part, given.base)
        return
    results = []
    for rows in given.rows:
        with tempfile.TemporaryDirectory() as name:
            make(Path(name) / "made.jsonl", rows)
            parts = [p for p in given.parts if p in OURS or rows <= given.others_up_to]
            found = {part: run(part, Path(name), given.base) for part in parts}
        results.append(summary(rows, found))
        print(json.dumps(results[-1], indent=1), flush=True)
        report = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": " ".join(["python", "benchmarks/data_speed.py", *sys.argv[1:]]),
            "machine": f"{os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB",
            "load_average": [round(load, 1) for load in os.getloadavg()],
            "versions": {
                "python": platform.python_version(),
                **{n: version(n) for n in ("numpy", "pyarrow", "tokenizers", "pandas", "datasets")},
            },
            "results": results,
        }
        if given.out:
            given.out.write_text(json.dumps(report, indent=1) + "\n")


def summary(rows: int, found: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Return seconds, rows a second and memory of each part, and of the parts together."""
    told: dict[str, Any] = {"rows": rows, "parts": found}
    for name, last in (("without tokens", "format without tokens"), ("with tokens", "format")):
        parts = ["fetch", "split", last]
        if set(parts) <= set(found):
            seconds = sum(found[part]["seconds"] for part in parts)
            busy = sum(found[part]["cpu_seconds"] for part in parts)
            told[name] = {
                "rows_per_second": round(rows / seconds),
                "rows_per_second_of_two_free_cores_at_most": round(rows / busy * 2),
                "peak_memory_gib": max(found[part]["peak_memory_gib"] for part in parts),
            }
    return told


def make(path: Path, rows: int) -> None:
    """Write made rows as JSON Lines."""
    with path.open("w") as file:
        for row in made(rows):
            file.write(json.dumps(row) + "\n")


def made(rows: int) -> Iterator[dict[str, str]]:
    draw = random.Random(0)
    text = (ROOT / "assets/general-text.jsonl").read_text() + (
        ROOT / "assets/demo-questions.jsonl"
    ).read_text()
    words = sorted({word.strip(".,;:()\"'\\") for word in text.split() if word.isascii()})
    words = [word for word in words if word.isalpha()]
    draw.shuffle(words)
    # as in a language: the thousandth word is a thousand times rarer than the first
    weights = [1 / (rank + 3) for rank in range(len(words))]
    stock = draw.choices(words, weights, k=2**20)

    def sentence(low: int, high: int) -> list[str]:
        begin = draw.randrange(len(stock) - high)
        count = draw.randint(low, high)
        # two pieces of the stock: more different sentences than pieces
        other = draw.randrange(len(stock) - high)
        return stock[begin : begin + count // 2] + stock[other : other + count - count // 2]

    kept: list[tuple[list[str], str]] = []
    for number in range(rows):
        question, answer = sentence(7, 16), " ".join(sentence(15, 40))
        kind = number % 20
        if kept and kind in (5, 6, 11, 17):
            question, old = draw.choice(kept)
            if kind == 5:
                answer = old
            if kind == 11 and len(question) > 9:
                question = [*question[:-1], draw.choice(stock)]
        elif kind == 8:
            question = [*question, "for", f"${draw.randint(2, 900)},000", "at", f"{number % 9}.5%"]
        if len(kept) < 50_000:
            kept.append((question, answer))
        elif draw.random() < 0.02:
            kept[draw.randrange(len(kept))] = question, answer
        yield {
            "instruction": INSTRUCTION,
            "input": " ".join(question).capitalize() + "?",
            "output": answer.capitalize() + ".",
        }


def run(part: str, folder: Path, base: Path) -> dict[str, float]:
    """Run a part in a process of its own and return its figures."""
    command = [
        sys.executable,
        __file__,
        "--part",
        part,
        "--folder",
        str(folder),
        "--base",
        str(base),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL, env=environment)
        peak = 0
        while process.poll() is None:
            peak = max(peak, memory(process.pid))
            time.sleep(0.05)
        out.seek(0)
        told = out.read()
    if process.returncode:
        raise SystemExit(f"{part} failed")
    return json.loads(told) | {"peak_memory_gib": round(peak / 2**30, 3)}


def memory(pid: int) -> int:
    try:
        parent = psutil.Process(pid)
        return sum(
            each.memory_full_info().pss for each in [parent, *parent.children(recursive=True)]
        )
    except psutil.Error:
        return 0


def measure(part: str, base: Path) -> None:
    """Run a part in the folder of the made rows and print its seconds."""
    function = globals()[part.replace(" ", "_")]
    work = function(base)
    start, before = time.perf_counter(), cpu_seconds()
    work()
    seconds, used = time.perf_counter() - start, cpu_seconds() - before
    print(json.dumps({"seconds": round(seconds, 2), "cpu_seconds": round(used, 2)}))


def cpu_seconds() -> float:
    """Return the processor time of this process and of those that it has ended."""
    return sum(os.times()[:4])


def params() -> Any:
    from fintune.params import read_params

    given = (ROOT / "recipes/demo.yaml").read_text()
    Path("assets").mkdir(exist_ok=True)
    for asset in ("demo-base", "general-text.jsonl"):
        if not Path("assets", asset).exists():
            Path("assets", asset).symlink_to(ROOT / "assets" / asset)
    Path("params.yaml").write_text(given)
    return read_params()


def fetch(base: Path) -> Any:
    import stages.fetch  # noqa: F401
    from fintune import paths
    from fintune.data.parts import kept_parts
    from fintune.data.sources import fetch_records, is_large

    columns = {"instruction": "instruction", "input": "input", "output": "output"}
    given = params().fetch
    given = given.model_copy(
        update={
            "source": "made.jsonl",
            "columns": given.columns.model_copy(
                update=columns | dict.fromkeys(("result", "kind", "split"))
            ),
        }
    )

    def work() -> None:
        with kept_parts("fetch", is_large(given), [], [given.model_dump()]) as kept:
            fetch_records(given, paths.RAW_ROWS, kept)

    return work


def split(base: Path) -> Any:
    import scipy.sparse  # noqa: F401

    from fintune import paths
    from fintune.data.parts import are_many, kept_parts
    from fintune.data.splitting import describe_splits, split_rows

    fractions = {"validation_fraction": 0.1, "test_fraction": 0.1}
    given = params().split.model_copy(update=fractions)

    def work() -> None:
        inputs = [paths.RAW_ROWS]
        with kept_parts("split", are_many(inputs), inputs, [given.model_dump()]) as kept:
            split_rows(paths.RAW_ROWS, paths.SPLIT, given, kept)
            describe_splits(paths.SPLIT)

    return work


def format(base: Path, count: bool = True) -> Any:
    from stages.format import leave_torch_out

    leave_torch_out()
    from fintune import paths
    from fintune.data import formatting
    from fintune.data.parts import are_many, kept_parts
    from fintune.data.prompt import load_tokenizer
    from fintune.data.tables import SPLITS
    from fintune.params import Base

    given = params().format
    tokenizer = load_tokenizer(Base(model=str(base), revision=None), "new", given.template)
    if not count:
        formatting.count_tokens = lambda tokenizer, rows: [(1, 1)] * len(rows)

    def work() -> None:
        inputs = [paths.rows(paths.SPLIT, each) for each in SPLITS]
        with kept_parts("format", are_many(inputs), inputs, [given.model_dump()]) as kept:
            for each, source in zip(SPLITS, inputs, strict=True):
                target = paths.rows(paths.FORMATTED, each)
                formatting.format_rows(tokenizer, source, target, given, each, kept)

    return work


def format_without_tokens(base: Path) -> Any:
    return format(base, count=False)


def pandas(base: Path) -> Any:
    """The same as people write it with pandas: all in memory, near-duplicates left out."""
    import pandas as pd

    from fintune.data.prompt import render_completion, render_prompt
    from fintune.data.questions import normalize_question

    def work() -> None:
        rows = pd.read_json("made.jsonl", lines=True).dropna()
        rows = rows[(rows.input.str.strip() != "") & (rows.output.str.strip() != "")]
        rows["question"] = rows.input.map(normalize_question)
        rows = rows.drop_duplicates(["instruction", "input", "output"])
        place = pd.util.hash_array(rows.question.to_numpy(), hash_key="0123456789abcdef") / 2.0**64
        for name, part in (("test", place < 0.1), ("validation", (place >= 0.1) & (place < 0.2))):
            _write(rows[part], name, render_prompt, render_completion)
        _write(rows[place >= 0.2], "train", render_prompt, render_completion)

    def _write(rows: Any, name: str, prompt: Any, completion: Any) -> None:
        rows = rows.sample(frac=1, random_state=0)
        rows["prompt"] = rows.apply(lambda row: prompt(row.instruction, row.input), axis=1)
        rows["completion"] = rows.output.map(completion)
        rows.to_parquet(f"pandas-{name}.parquet", compression="zstd")

    return work


def datasets(base: Path) -> Any:
    """The same with `datasets` and two processes, near-duplicates and duplicates left out."""
    import hashlib

    os.environ["HF_HOME"] = str(Path.cwd() / "hf")
    import datasets as hf

    from fintune.data.prompt import render_completion, render_prompt
    from fintune.data.questions import normalize_question

    def add(row: dict[str, Any]) -> dict[str, Any]:
        digest = hashlib.sha256(normalize_question(row["input"]).encode()).digest()
        return {
            "place": int.from_bytes(digest[:4]) / 2**32,
            "prompt": render_prompt(row["instruction"], row["input"]),
            "completion": render_completion(row["output"]),
        }

    def work() -> None:
        rows = hf.load_dataset("json", data_files="made.jsonl", split="train")
        rows = rows.filter(
            lambda row: bool(row["input"].strip() and row["output"].strip()), num_proc=2
        )
        rows = rows.map(add, num_proc=2)
        for name, low, high in (("test", 0, 0.1), ("validation", 0.1, 0.2), ("train", 0.2, 1)):
            part = rows.filter(lambda row, a=low, b=high: a <= row["place"] < b, num_proc=2)
            part.shuffle(seed=0).to_parquet(f"datasets-{name}.parquet")
        shutil.rmtree("hf", ignore_errors=True)

    return work


if __name__ == "__main__":
    main()
