"""Compare the training losses of the fused kernels with those of padded rows and plain layers.

    python benchmarks/loss_trajectory.py --out benchmarks/loss_trajectory.json

Trains the demo (its base, questions and parameters) for 50 steps in each setting, from the same adapter
and with the same rows in the same order. In float32 (a CPU), only the order of summation differs. In
bfloat16 (a GPU), plain layers on packed rows also differ from plain layers on padded ones, which shows
the effect of rounding error alone. Finally measures the speed of TRL's own trainer on padded rows. Run
from the project's root.
"""

import argparse
import shlex
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.quantization_cost import read_recipe, read_splits, vary
from fintune.data.prompt import encode, load_tokenizer
from fintune.hardware import compute_dtype
from fintune.model.adapter import add_adapter
from fintune.model.base import load_base
from fintune.model.batch import TokenRow
from fintune.params import Params
from fintune.stage import run, write_json
from fintune.training.train import train

SETTINGS: dict[str, dict[str, Any]] = {
    "padded, plain": {"attention": "padded", "kernels": "plain", "checkpointing": "none"},
    "packed, plain": {"attention": "auto", "kernels": "plain", "checkpointing": "none"},
    "packed, fused": {"attention": "auto", "kernels": "fused", "checkpointing": "none"},
    "packed, fused, full checkpointing, small passes": {
        "attention": "auto",
        "kernels": "fused",
        "checkpointing": "full",
        "tokens_per_pass": 512,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", dest="changes")
    arguments = parser.parse_args()
    params = read_recipe(Path("recipes/demo.yaml"), arguments.changes)
    dtype = compute_dtype(params.train.precision)
    tokenizer = load_tokenizer(params.base, "new")
    rows = [
        encode(tokenizer, row["prompt"], row["completion"])
        for row in read_splits(params, tokenizer)["train"]
    ]
    report: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "dtype": str(dtype),
        "torch": torch.__version__,
        "losses": {},
        "rows_per_second": {},
        "largest_difference": {},
    }
    for name, changes in SETTINGS.items():
        here = vary(params, max_steps=arguments.steps, **changes).train
        losses: list[float] = []
        model = load_base(params.base, tokenizer, here.quantization, dtype)
        with tempfile.TemporaryDirectory() as folder:
            result = train(
                add_adapter(model, tokenizer, here.lora, here.seed),
                tokenizer,
                rows,
                here,
                dtype,
                validate=lambda *_: {"loss": 0.0},
                scratch=Path(folder),
                on_log=lambda _, values, to=losses: to.extend(
                    [values["loss"]] if "loss" in values else []
                ),
            )
        report["losses"][name] = losses
        report["rows_per_second"][name] = result.metrics["rows_per_second"]
        first = report["losses"]["padded, plain"]
        furthest = max(abs(a - b) for a, b in zip(losses, first, strict=True))
        report["largest_difference"][name] = furthest
        print(
            f"{name}: {losses[0]:.5f} to {losses[-1]:.5f}, at most {furthest:.2g} from the first, "
            f"{result.metrics['rows_per_second']:.1f} rows/s",
            flush=True,
        )
        write_json(arguments.out, report)
    report["rows_per_second"]["TRL as it comes, padded"] = trl_rows_per_second(
        params, tokenizer, rows, arguments.steps
    )
    write_json(arguments.out, report)
    print(f"TRL as it comes: {report['rows_per_second']['TRL as it comes, padded']:.1f} rows/s")


def trl_rows_per_second(params: Params, tokenizer: Any, rows: list[TokenRow], steps: int) -> float:
    """Measure the speed of TRL's SFTTrainer with PEFT's LoRA and the same effective batch."""
    settings, dtype = params.train, compute_dtype(params.train.precision)
    data = [{"input_ids": p + c, "completion_mask": [0] * len(p) + [1] * len(c)} for p, c in rows]
    lora = settings.lora
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            load_base(params.base, tokenizer, settings.quantization, dtype),
            SFTConfig(
                folder,
                per_device_train_batch_size=settings.rows_per_step,
                max_steps=steps,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                completion_only_loss=True,
                gradient_checkpointing=False,
                bf16=dtype == torch.bfloat16,
                use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=Dataset.from_list(data),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                r=lora.r,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=list(lora.target_modules),
                task_type="CAUSAL_LM",
            ),
        )
        done = trainer.train()
    return float(done.metrics["train_samples_per_second"])


if __name__ == "__main__":
    run(main)
