"""Measure training on several GPUs: this project's against one GPU, and against TRL with accelerate.

    python benchmarks/random_base.py --tokenizer FOLDER --out base7b
    python benchmarks/parallel_speed.py --base base7b --out benchmarks/parallel_speed.json
    python benchmarks/parallel_speed.py --base base7b --out try.json --settings one ddp --processes 2 4

Each setting is a job of its own, started by torchrun, with the rows of training_speed.py. `ddp` and `fsdp`
have the effective batch of `one`, 32 rows a step; the grown ones have 32 for each process. TRL is as it
comes, with packed rows and this project's attention. The second half of the steps is timed. Jobs run beside
each other where there are GPUs for both. `fsdp-24-gib` is for a base that does not fit in 24 GiB, such as
`random_base.py --shape llama2-13b`, whose 16-bit weights take as much; `fsdp-planned-grown` is for
`llama3-70b`, whose 4-bit weights one GPU holds while they are loaded.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fintune.stage import prepare, write_json

ONE = {"checkpointing": "none", "dequantize": "once"}
FP8 = {"checkpointing": "none", "products": "fp8"}
SHARED = {"checkpointing": "none", "parallel": "fsdp"}
DDP = {"parallel": "ddp"}
OURS: dict[str, dict[str, Any]] = {
    "one": ONE,
    "ddp": ONE | DDP,
    "ddp-grown": ONE | DDP,
    "one-fp8": FP8,
    "ddp-fp8": FP8 | DDP,
    "ddp-fp8-grown": FP8 | DDP,
    "fsdp": SHARED,
    "fsdp-grown": SHARED,
    "one-16-bit": {"checkpointing": "none", "quantization": "none"},
    "fsdp-16-bit": SHARED | {"quantization": "none"},
    "fsdp-24-gib": SHARED
    | {"quantization": "none", "checkpointing": "full", "memory_gib": 24, "rows_per_step": 16},
    "fsdp-planned-grown": SHARED | {"checkpointing": "auto", "tokens_per_pass": "auto"},
}
TRL = {  # whether the base is sharded
    "trl-one": False,
    "trl-ddp": False,
    "trl-ddp-grown": False,
    "trl-fsdp": True,
    "trl-fsdp-grown": True,
}
USUAL = [*(name for name in OURS if name not in ("fsdp-24-gib", "fsdp-planned-grown")), *TRL]
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "trl", "bitsandbytes")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--settings", nargs="+", default=USUAL, choices=[*OURS, *TRL])
    parser.add_argument("--processes", type=int, nargs="+", default=[2])
    parser.add_argument("--steps", type=int, default=20, help="an even number")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a job's process: the setting
    given = parser.parse_args()
    if given.one:
        measure(given.one, given.base, given.steps, given.out)
        return
    report: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "versions": {name: version(name) for name in LIBRARIES},
        "settings": [],
    }
    jobs = [(name, 1) for name in given.settings if "one" in name]
    jobs += [(n, number) for number in given.processes for n in given.settings if "one" not in n]
    for together in side_by_side(jobs, gpus()):
        with ThreadPoolExecutor(len(together)) as pool:
            found = pool.map(lambda made: job(made[0], made[1], given), together)
        for (name, places), measured in zip(together, found, strict=True):
            report["settings"].append({"name": name, "processes": len(places)} | measured)
            print(json.dumps(report["settings"][-1]), flush=True)
        write_json(given.out, report)
    base = {"fp8": "one-fp8", "16-bit": "one-16-bit", "trl": "trl-one"}
    speeds = {s["name"]: s.get("tokens_per_second") for s in report["settings"]}
    for setting in report["settings"]:
        kind = next((base[key] for key in base if key in setting["name"]), "one")
        if speeds.get(kind) and "tokens_per_second" in setting:
            setting["times_one_gpu"] = setting["tokens_per_second"] / speeds[kind]
    write_json(given.out, report)
    print(json.dumps(report, indent=2))


def gpus() -> int:
    """Return the number of GPUs, without a process's context on one."""
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    return len(listed.stdout.splitlines())


def side_by_side(jobs: list[tuple[str, int]], number: int) -> list[list[tuple[str, list[int]]]]:
    """Place jobs on GPUs: in a list each are those that run beside each other, with their GPUs."""
    placed: list[list[tuple[str, list[int]]]] = []
    taken = number
    for name, wanted in jobs:
        if taken + wanted > number:
            placed.append([])
            taken = 0
        placed[-1].append((name, list(range(taken, taken + wanted))))
        taken += wanted
    return placed


def job(name: str, places: list[int], given: argparse.Namespace) -> dict[str, Any]:
    """Run a setting on these GPUs by torchrun; return what its first process measured."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            f"--nproc-per-node={len(places)}", __file__, "--one", name, "--base", str(given.base),
            "--steps", str(given.steps), "--out", str(out),
        ]  # fmt: skip
        # NVLink multicast is not everywhere that NVLink is
        environment = {"NCCL_NVLS_ENABLE": "0", "OMP_NUM_THREADS": "4", "GLOO_SOCKET_IFNAME": "lo"}
        environment |= os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, places))}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True)
        if out.is_file():
            found: dict[str, Any] = json.loads(out.read_text())
            return found
        sys.stderr.write(ended.stderr[-3000:])
        return {"error": ended.stderr.strip()[-300:]}


def measure(name: str, base: Path, steps: int, out: Path) -> None:
    """Train with a setting, as one of a job's processes; the first one writes what all measured."""
    ours = name in OURS
    if ours:
        prepare()  # this process sees its GPU alone, and silences its libraries
    import torch

    from benchmarks.training_speed import ROWS_PER_STEP, draw_rows, fp8_seconds, our_steps
    from fintune.hardware import hardware, peak_memory_gib
    from fintune.params import Base
    from fintune.processes import of_all, rank, start

    section = Base(model=str(base), revision=None)
    grown = int(os.environ["WORLD_SIZE"]) if "grown" in name else 1
    settings = {"rows_per_step": ROWS_PER_STEP * grown} | (OURS[name] if ours else {})
    rows_per_step = settings["rows_per_step"]
    rows = draw_rows((steps + 1) * rows_per_step)
    if ours:
        start("train", "auto")
        ends, step_tokens, losses, more = our_steps(section, rows, steps, **settings)
    else:
        ends, step_tokens, losses, more = trl_steps(section, rows, steps, TRL[name], rows_per_step)
    half = steps // 2
    seconds = ends[steps] - ends[half]
    if "fp8" in name:
        seconds = fp8_seconds(ends, step_tokens, steps)
    peaks = of_all(peak_memory_gib())
    found = {
        "device": hardware(),
        "rows_per_step": rows_per_step,
        "tokens_per_second": sum(step_tokens[half:]) / seconds,
        "step_seconds": seconds / half,
        "peak_memory_gib": max(peaks),
        "of_predicted": max(peaks) / more["predicted_memory_gib"] if ours else None,
        "losses": losses,
    }
    if rank() == 0:
        write_json(out, found | more)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def trl_steps(
    base: Any, rows: list[Any], steps: int, sharded: bool, rows_per_step: int
) -> tuple[dict[int, float], list[float], list[float], dict[str, Any]]:
    """Train with TRL and accelerate as they come; return as `our_steps` does."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    import fintune.model.attention  # noqa: F401  # registers it
    from benchmarks.step_times import Times
    from benchmarks.training_speed import LAYERS
    from fintune.data.prompt import load_tokenizer

    place, number = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(place)
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16 if sharded else torch.uint8,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        base.model, dtype=torch.bfloat16, quantization_config=four_bits, device_map={"": place},
        attn_implementation="packed",
    )  # fmt: skip
    how: dict[str, Any] = {"ddp_find_unused_parameters": False} if number > 1 else {}
    if sharded:
        layer = type(model.get_decoder().layers[0]).__name__
        how = {
            "fsdp": "full_shard auto_wrap",
            "fsdp_config": {
                "fsdp_version": 2, "transformer_layer_cls_to_wrap": [layer],
                "reshard_after_forward": True, "cpu_ram_efficient_loading": False,
                "state_dict_type": "SHARDED_STATE_DICT",
            },
        }  # fmt: skip
    data = [{"input_ids": p + c, "completion_mask": [0] * len(p) + [1] * len(c)} for p, c in rows]
    times = Times()
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model,
            SFTConfig(
                folder, per_device_train_batch_size=rows_per_step // number, max_steps=steps,
                gradient_accumulation_steps=1, learning_rate=2e-4, logging_steps=steps // 2,
                report_to="none", save_strategy="no", padding_free=True, max_length=None,
                completion_only_loss=True, gradient_checkpointing=False, bf16=True,
                disable_tqdm=True, **how,
            ),
            train_dataset=Dataset.from_list(data),
            processing_class=load_tokenizer(base, "new"),
            peft_config=LoraConfig(
                r=16, lora_alpha=32, lora_dropout=0.0, target_modules=LAYERS,
                task_type="CAUSAL_LM",
            ),
            callbacks=[times],
        )  # fmt: skip
        trainer.train()
    assert trainer.args.world_size == number, trainer.args.world_size
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    seen = float(history[-1]["num_tokens"]) - float(history[-2]["num_tokens"])
    step_tokens = [seen / (steps // 2)] * steps  # logged once per half of the steps
    more = {"model": type(trainer.model_wrapped).__name__}
    return times.ends, step_tokens, [float(entry["loss"]) for entry in history], more


if __name__ == "__main__":
    main()
