"""Measure the speed of a training step in this project, TRL and Unsloth, and the floor set by the hardware.

    python benchmarks/random_base.py --tokenizer FOLDER --out base7b
    python benchmarks/training_speed.py --base base7b --out benchmarks/training_speed.json
    python benchmarks/training_speed.py --base base7b --out try.json --settings fused fused-full
    python benchmarks/training_speed.py --base base7b --out try.json --settings unsloth --unsloth-site FOLDER

All settings see the same rows in steps of 32, with the lengths of FiQA's rows under Mistral's tokenizer
(log-normal, mean 260 tokens, maximum 1,024; the tokens themselves are random). Token counts exclude
padding, and a step's time includes the optimizer's. As in a long training run, losses are not read at
every step, which would force a device sync, but in the middle and at the end; the second half is timed.
With FP8 products, whose last quarter of the steps is slower, both kinds of steps are timed and weighted.
The floor is the base's matrix products alone, forward and for the gradient of the input, for the tokens of
one step, in the unfused shapes. A second floor adds the head's products for the answers' tokens, a twelfth
of the work where the vocabulary is large. MFU is relative to one large matrix product. Losses of random
weights mean nothing, except that equivalent settings have equal losses.

Unsloth is measured where it is installed, in a process of its own (unsloth_steps.py). It needs older
libraries than this project: `pip install --target FOLDER unsloth` keeps them apart. It packs rows to
8,192 tokens in its own order (`unsloth`) or gets the same 32 rows per step (`unsloth-rows`).
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.step_times import Times, synchronize
from fintune.data.prompt import load_tokenizer
from fintune.hardware import GIB, free_memory, matmul_flops
from fintune.model.adapter import add_adapter
from fintune.model.base import load_base
from fintune.model.batch import CHUNK, TokenRow
from fintune.model.sizes import ModelSize
from fintune.params import Base, Lora, Train
from fintune.stage import log, run, write_json
from fintune.training import plan as planning
from fintune.training import train as training
from fintune.training.memory import estimate_memory_gib
from fintune.training.train import train
from fintune.training.trainer import COARSE

LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "triton")
ROWS_PER_STEP = 32
ANSWERS = 0.83  # of the tokens
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OURS: dict[str, dict[str, Any]] = {
    "fused": {"checkpointing": "none", "dequantize": "once"},
    "fused-launched": {"checkpointing": "none", "dequantize": "once", "graphs": False},
    "fused-always": {"checkpointing": "none"},
    "fused-selective": {"checkpointing": "selective"},
    "fused-full": {"checkpointing": "full"},
    "fused-full-8k": {"checkpointing": "full", "tokens_per_pass": 8192},
    "fused-full-once": {"checkpointing": "full", "dequantize": "once"},
    "fused-dropout": {"checkpointing": "none", "dequantize": "once", "dropout": 0.1},
    "fused-fp8": {"checkpointing": "none", "products": "fp8"},
    "fused-fp8-dropout": {"checkpointing": "none", "products": "fp8", "dropout": 0.1},
    "fused-launched-dropout": {
        "checkpointing": "none",
        "dequantize": "once",
        "dropout": 0.1,
        "graphs": False,
    },
    "fused-16-bit": {"checkpointing": "none", "quantization": "none"},
    "fused-8-gib": {
        "checkpointing": "auto",
        "dequantize": "auto",
        "tokens_per_pass": "auto",
        "memory_gib": 8,
    },
    "fused-oom": {"checkpointing": "full", "memory_gib": 8},  # must halve its micro-batches
    "plain": {"checkpointing": "none", "kernels": "plain"},
    "plain-full": {"checkpointing": "full", "kernels": "plain"},
}
TRL: dict[str, dict[str, Any]] = {
    "seed": {
        "at_once": 2,
        "padding_free": False,
        "dropout": 0.1,
        "dtype": torch.float16,
        "steps": 4,
    },
    "trl-packed": {"at_once": 32, "padding_free": True, "dropout": 0.0, "dtype": torch.bfloat16},
}
UNSLOTH: dict[str, list[str]] = {
    "unsloth": [],
    "unsloth-rows": ["--rows-per-step", str(ROWS_PER_STEP)],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    names = [*OURS, *TRL, *UNSLOTH]
    parser.add_argument("--settings", nargs="+", default=names, choices=names)
    parser.add_argument("--steps", type=int, default=20, help="an even number")
    parser.add_argument(
        "--unsloth-site", type=Path, help="folder of Unsloth and the libraries that it wants"
    )
    arguments = parser.parse_args()
    base = Base(model=str(arguments.base), revision=None)
    rows = draw_rows((arguments.steps + 1) * ROWS_PER_STEP)
    tokens = sum(len(p) + len(c) for p, c in rows) / len(rows) * ROWS_PER_STEP
    shape = shape_of(base)
    ceiling = matmul_flops(torch.bfloat16)
    report: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "versions": {name: version(name) for name in LIBRARIES},
        "tokens_a_step": tokens,
        "matmul_tflops": ceiling / 1e12,
        "floor_tokens_per_second": floor(shape, round(tokens)),
        "floor_with_head_tokens_per_second": floor(shape, round(tokens), head=True),
        "settings": [],
    }
    print(f"floor {report['floor_tokens_per_second']:,.0f} tokens/s", flush=True)
    for name in arguments.settings:
        free_memory()
        begun = time.perf_counter()
        if name in UNSLOTH and not unsloth_is_installed(arguments.unsloth_site):
            report["settings"].append({"name": name, "error": "not installed"})
            print(name, "not installed", flush=True)
            continue
        try:
            measured = measure(name, base, rows, arguments.steps, arguments.unsloth_site)
        except Exception as error:  # a failing setting is also a result
            log.exception("%s", name)
            measured = {"error": f"{type(error).__name__}: {error}"}
        else:
            speed = measured["tokens_per_second"]
            measured["of_floor"] = speed / report["floor_tokens_per_second"]
            with_head = speed / report["floor_with_head_tokens_per_second"]
            measured["of_floor_with_head"] = with_head
            measured["mfu"] = speed * shape.flops(1000, round(1000 * ANSWERS)) / 1000 / ceiling
        report["settings"].append({"name": name} | measured)
        write_json(arguments.out, report)
        print(name, {k: v for k, v in measured.items() if k != "losses"}, flush=True)
        print(
            f"  losses {measured.get('losses', [])[:4]}, {time.perf_counter() - begun:.0f} s",
            flush=True,
        )
    report["floor_tokens_per_second_again"] = floor(shape, round(tokens))
    write_json(arguments.out, report)
    print(table(report))


def draw_rows(count: int) -> list[TokenRow]:
    """Draw random tokens in rows whose lengths are distributed like FiQA's."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.empty(count).log_normal_(3.770, 0.171, generator=generator)
    answers = torch.empty(count).log_normal_(5.07, 0.78, generator=generator)
    rows = []
    for p, a in zip(prompts.round().int().tolist(), answers.round().int().tolist(), strict=True):
        ids = torch.randint(5, 31_000, (p + max(2, min(a, 1024 - p)),), generator=generator)
        rows.append((ids[:p].tolist(), ids[p:].tolist()))
    return rows


def shape_of(base: Base) -> ModelSize:
    from transformers import AutoConfig

    lora = Lora(r=16, alpha=32, dropout=0.0, target_modules=LAYERS)
    return ModelSize.of(AutoConfig.from_pretrained(base.model), lora)


def floor(shape: ModelSize, tokens: int, head: bool = False) -> float:
    """Measure tokens per second of the base's matrix products alone, each in its own shape."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    make = lambda *size: torch.randn(*size, device=device, dtype=torch.bfloat16)  # noqa: E731

    def of(rows: int, inputs: int, outputs: int) -> float:
        x, weight, dy = make(rows, inputs), make(outputs, inputs), make(rows, outputs)
        return timed(lambda: x @ weight.t()) + timed(lambda: dy @ weight)

    seconds = shape.layers * sum(of(tokens, *sizes) for sizes in shape.linears.values())
    if head:
        answers = round(tokens * ANSWERS)
        parts = [min(CHUNK, answers - start) for start in range(0, answers, CHUNK)]
        seconds += sum(of(part, shape.hidden, shape.vocabulary) for part in parts)
    return tokens / seconds


def timed(call: Callable[[], Any], repeats: int = 20) -> float:
    """Measure the seconds per call, the median of three series."""
    for _ in range(3):
        call()
    series = []
    for _ in range(3):
        synchronize()
        begun = time.perf_counter()
        for _ in range(repeats):
            call()
        synchronize()
        series.append((time.perf_counter() - begun) / repeats)
    return statistics.median(series)


def measure(
    name: str, base: Base, rows: list[TokenRow], steps: int, unsloth_site: Path | None
) -> dict[str, Any]:
    """Measure tokens and rows per second in the second half of the steps, warm-up time and peak memory."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if name in TRL:
        settings = dict(TRL[name])
        steps = settings.pop("steps", steps)
        ends, step_tokens, losses, more = trl_steps(base, rows, steps, **settings)
    elif name in UNSLOTH:
        ends, step_tokens, losses, more = unsloth_steps(
            base, rows, steps, UNSLOTH[name], unsloth_site
        )
    else:
        ends, step_tokens, losses, more = our_steps(base, rows, steps, **OURS[name])
    half = steps // 2
    counted = step_tokens[half:]
    seconds = ends[steps] - ends[half]
    if "fp8" in name:
        early, late = fp8_times(ends, step_tokens, steps)
        more |= {"tokens_per_second_of_fp8_steps": 1 / early, "of_16_bit_steps": 1 / late}
        seconds = fp8_seconds(ends, step_tokens, steps)
    step_rows = more.pop("step_rows", [ROWS_PER_STEP] * steps)
    steady = seconds / len(counted)
    return {
        "tokens_per_second": sum(counted) / seconds,
        "rows_per_second": sum(step_rows[half:steps]) / seconds,
        "step_seconds": steady,
        "warm_up_seconds": ends[half] - ends[0] - half * steady,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / GIB,
        "losses": losses,
    } | more


def fp8_times(ends: dict[int, float], step_tokens: list[float], steps: int) -> tuple[float, float]:
    """Return the seconds of a token in steps in FP8, and in those with a forward pass in 16 bits."""
    tenth = steps // 10
    early = (ends[7 * tenth] - ends[2 * tenth]) / sum(step_tokens[2 * tenth : 7 * tenth])
    late = (ends[steps] - ends[steps - tenth]) / sum(step_tokens[steps - tenth : steps])
    return early, late


def fp8_seconds(ends: dict[int, float], step_tokens: list[float], steps: int) -> float:
    """Return the seconds of the second half, if three quarters of it were in FP8, as in a training."""
    early, late = fp8_times(ends, step_tokens, steps)
    return sum(step_tokens[steps // 2 : steps]) * (COARSE * early + (1 - COARSE) * late)


def our_steps(
    base: Base,
    rows: list[TokenRow],
    steps: int,
    checkpointing: str,
    kernels: str = "fused",
    tokens_per_pass: int | str = 1_000_000,
    quantization: str = "nf4",
    dropout: float = 0.0,
    dequantize: str = "always",
    products: str = "bfloat16",
    graphs: bool = True,
    memory_gib: float | None = None,
    rows_per_step: int = ROWS_PER_STEP,
    parallel: str = "none",
) -> tuple[dict[int, float], list[float], list[float], dict[str, Any]]:
    """Train with this project's trainer; return the end, tokens and loss of each step."""
    planning.MOST_WEIGHTS = 2e9 if graphs else 0
    if memory_gib:
        total = torch.cuda.mem_get_info()[1] / GIB
        torch.cuda.set_per_process_memory_fraction(memory_gib / total)
    params = Train(
        quantization=quantization, precision="bfloat16",
        lora=Lora(r=16, alpha=32, dropout=dropout, target_modules=LAYERS),
        learning_rate=2e-4, schedule="constant", warmup_fraction=0.0, weight_decay=0.0,
        max_grad_norm=1.0, epochs=9.0, max_steps=steps, rows_per_step=rows_per_step,
        parallel=parallel, processes="auto", attention="auto", kernels=kernels, checkpointing=checkpointing,
        dequantize="auto" if products == "fp8" else dequantize, products=products,
        tokens_per_pass=tokens_per_pass, validate_every_steps=steps, checkpoint_every_steps=None,
        early_stopping_patience=None,
        keep="last",
        end_token="new", seed=0,
    )  # fmt: skip
    ends, losses = {}, []
    tokenizer = load_tokenizer(base, "new")
    sharded = parallel == "fsdp"
    on = torch.device("cpu") if sharded and memory_gib else None  # it does not fit
    model = load_base(base, tokenizer, quantization, torch.bfloat16, on, sharded)
    model = add_adapter(model, tokenizer, params.lora, params.seed)

    def note(step: int, values: dict[str, float]) -> None:
        synchronize()
        if "loss" in values:
            ends[step] = time.perf_counter()
            losses.append(values["loss"])

    try:
        with tempfile.TemporaryDirectory() as folder:
            synchronize()
            training.POINTS = 10 if products == "fp8" else 2
            begun = time.perf_counter()
            result = train(
                model, tokenizer, rows, params, torch.bfloat16,
                validate=lambda *_: {"loss": 0.0}, scratch=Path(folder), on_log=note,
                sharded=sharded,
            )  # fmt: skip
    finally:
        if memory_gib:
            torch.cuda.set_per_process_memory_fraction(1.0)
    predicted = estimate_memory_gib(
        shape_of(base), quantization, 2, kernels, result.plan.checkpointing,
        result.plan.dequantize == "once", result.largest_micro_batch,
        shards=result.plan.processes if sharded else 1,
    )  # fmt: skip
    more = {
        "plan": str(result.plan),
        "largest_pass_tokens": result.largest_micro_batch,
        "predicted_memory_gib": sum(predicted.values()),  # of that micro-batch
    }
    return {0: begun} | ends, result.step_tokens, losses, more


def trl_steps(
    base: Base, rows: list[TokenRow], steps: int, padding_free: bool, dropout: float,
    dtype: torch.dtype, at_once: int,
) -> tuple[dict[int, float], list[float], list[float], dict[str, Any]]:  # fmt: skip
    """Train with TRL's own trainer in micro-batches of `at_once` rows."""
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )  # fmt: skip
    attention = (
        "packed" if padding_free else "sdpa"
    )  # this project's attention, on torch's varlen kernels
    model = AutoModelForCausalLM.from_pretrained(
        base.model, dtype=dtype, quantization_config=four_bits, device_map={"": 0},
        attn_implementation=attention,
    )  # fmt: skip
    model.resize_token_embeddings(32_002, mean_resizing=False)
    lengths = [len(p) + len(c) for p, c in rows]
    data = [{"input_ids": p + c, "completion_mask": [0] * len(p) + [1] * len(c)} for p, c in rows]
    times = Times()
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model,
            SFTConfig(
                folder, per_device_train_batch_size=at_once,
                gradient_accumulation_steps=ROWS_PER_STEP // at_once, max_steps=steps,
                learning_rate=2e-4, logging_steps=steps // 2, report_to="none", save_strategy="no",
                padding_free=padding_free, max_length=None, completion_only_loss=True,
                gradient_checkpointing=not padding_free, bf16=dtype == torch.bfloat16,
                fp16=dtype == torch.float16, disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(data),
            processing_class=load_tokenizer(base, "new"),
            peft_config=LoraConfig(
                r=16, lora_alpha=32, lora_dropout=dropout, target_modules=LAYERS,
                task_type="CAUSAL_LM",
            ),
            callbacks=[times],
        )  # fmt: skip
        for parameter in trainer.model.parameters():
            if parameter.requires_grad and dtype == torch.float16:
                parameter.data = parameter.data.float()  # required by the gradient scaler
        trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    # logged once per half of the steps, so only the sums are known
    seen = [0.0, *(float(entry["num_tokens"]) for entry in history)]
    halves = [(b - a) / (steps // 2) for a, b in pairwise(seen)]
    step_tokens = [tokens for tokens in halves for _ in range(steps // 2)]
    assert sum(lengths) >= sum(step_tokens)
    return times.ends, step_tokens, [float(entry["loss"]) for entry in history], {}


def unsloth_is_installed(site: Path | None) -> bool:
    """Return whether its process would find Unsloth, without importing it."""
    return find_spec("unsloth") is not None or bool(site and (site / "unsloth").is_dir())


def unsloth_steps(
    base: Base, rows: list[TokenRow], steps: int, options: list[str], site: Path | None
) -> tuple[dict[int, float], list[float], list[float], dict[str, Any]]:
    """Train with Unsloth in a process of its own, with `site` before the other libraries.

    Raises:
        ChildProcessError: it failed; its messages are on standard error.
    """
    paths = [str(site.resolve())] if site else []
    paths += [path for path in [os.environ.get("PYTHONPATH")] if path]
    with tempfile.TemporaryDirectory() as folder:
        given, written = Path(folder, "rows.json"), Path(folder, "steps.json")
        given.write_text(json.dumps(rows))
        program = Path(__file__).with_name("unsloth_steps.py").resolve()
        ended = subprocess.run(
            [
                sys.executable, program, "--base", Path(base.model).resolve(), "--rows", given,
                "--steps", str(steps), "--out", written, *options,
            ],
            cwd=folder,  # Unsloth writes generated code here
            stdout=sys.stderr,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(paths)}
            | {"UNSLOTH_COMPILE_LOCATION": str(Path(folder, "compiled"))}
            | {"UNSLOTH_DISABLE_STATISTICS": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        if ended.returncode:
            raise ChildProcessError(f"{program.name} ended with status {ended.returncode}")
        result = json.loads(written.read_text())
    ends = {int(step): seconds for step, seconds in result.pop("ends").items()}
    return ends, result.pop("step_tokens"), result.pop("losses"), result


def table(report: dict[str, Any]) -> str:
    """Format one line per setting."""
    titles = ("tokens/s", "rows/s", "of floor", "with head", "MFU", "GiB", "predicted", "warm-up s")
    widths = (10, 8, 10, 11, 7, 7, 11, 11)
    lines = [" " * 18 + "".join(f"{t:>{w}}" for t, w in zip(titles, widths, strict=True))]
    for s in report["settings"]:
        if "error" in s:
            lines.append(f"{s['name']:<18}{s['error'][:80]}")
            continue
        predicted = f"{s['predicted_memory_gib']:.1f}" if "predicted_memory_gib" in s else ""
        lines.append(
            f"{s['name']:<18}{s['tokens_per_second']:>10,.0f}{s['rows_per_second']:>8.1f}{s['of_floor']:>10.3f}"
            f"{s['of_floor_with_head']:>11.3f}{s['mfu']:>7.3f}{s['peak_memory_gib']:>7.1f}{predicted:>11}{s['warm_up_seconds']:>11.1f}"
        )
    again = report["floor_tokens_per_second_again"]
    lines.append(
        f"floor: {report['floor_tokens_per_second']:,.0f} tokens/s before, {again:,.0f} after"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
