"""Train with Unsloth and record when its steps ended; run by training_speed.py in a process of its own.

Unsloth patches torch, transformers and TRL, so it must be imported before them, and it needs older
versions of some, so nothing of this project is imported here but the clock.
"""

import argparse
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from unsloth import FastLanguageModel  # isort: skip
import torch
from datasets import Dataset
from step_times import Times  # beside this program
from trl import SFTConfig, SFTTrainer

LIBRARIES = (
    "unsloth", "unsloth_zoo", "torch", "transformers", "peft", "trl", "datasets", "bitsandbytes",
    "triton", "xformers",
)  # fmt: skip
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = 8192  # of a packed row; one per step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True, help="JSON: prompt and completion ids")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--rows-per-step", type=int, help="whole rows, instead of packed ones")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rows = json.loads(arguments.rows.read_text())
    result = train(arguments.base, rows, arguments.steps, arguments.rows_per_step)
    arguments.out.write_text(json.dumps(result))


def train(base: Path, rows: list[Any], steps: int, rows_per_step: int | None) -> dict[str, Any]:
    """Train; return the tokens of every step and the times when the first half and the second ended.

    Raises:
        ValueError: Unsloth turned packing off or padded the rows.
    """
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(base), max_seq_length=TOKENS, dtype=torch.bfloat16, load_in_4bit=True,
        use_gradient_checkpointing=False,
    )  # fmt: skip
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=32, lora_dropout=0.0, bias="none", target_modules=LAYERS,
        use_gradient_checkpointing=False, random_state=0,
    )  # fmt: skip
    data = [{"input_ids": p + c, "completion_mask": [0] * len(p) + [1] * len(c)} for p, c in rows]
    times = Times()
    trainer = SFTTrainer(
        model,
        SFTConfig(
            "trainer", per_device_train_batch_size=rows_per_step or 1, gradient_accumulation_steps=1,
            max_steps=steps, learning_rate=2e-4, logging_steps=steps // 2, report_to="none",
            save_strategy="no", packing=rows_per_step is None, padding_free=True,
            max_length=TOKENS, completion_only_loss=True, gradient_checkpointing=False, bf16=True,
            optim="adamw_torch_fused", dataloader_num_workers=0, disable_tqdm=True, seed=0,
        ),
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
        callbacks=[times],
    )  # fmt: skip
    if not trainer.args.padding_free or trainer.args.packing != (rows_per_step is None):
        raise ValueError("Unsloth has turned packing off")
    batches = watch_batches(trainer.data_collator)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    if any(batch.lines != 1 for batch in batches):
        raise ValueError("Unsloth has padded the rows")
    batches = batches[:steps]  # the loader prefetches
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return {
        "ends": times.ends,
        "step_tokens": [batch.tokens for batch in batches],
        "step_rows": [batch.rows for batch in batches],
        "answer_share": sum(b.answer_tokens for b in batches) / sum(b.tokens for b in batches),
        "losses": losses,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
        "versions": {name: version(name) for name in LIBRARIES if installed(name)},
        "attention": attention(),
    }


@dataclass(frozen=True)
class Batch:
    """The size of a step's batch; packed rows are one line."""

    lines: int
    rows: int
    tokens: int
    answer_tokens: int


def watch_batches(collator: Any) -> list[Batch]:
    """Return a list that grows with each batch that the collator makes, in order."""
    batches: list[Batch] = []
    collate = collator.torch_call

    def note(examples: list[Any]) -> Any:
        batch = collate(examples)
        ids, rows = batch["input_ids"], int((batch["position_ids"] == 0).sum())
        batches.append(Batch(len(ids), rows, ids.numel(), int((batch["labels"] >= 0).sum())))
        return batch

    collator.torch_call = note
    return batches


def installed(library: str) -> bool:
    try:
        version(library)
    except ImportError:  # PackageNotFoundError is a subclass
        return False
    return True


def attention() -> str:
    """Return the attention backend that Unsloth uses for packed rows."""
    from unsloth.utils.attention_dispatch import select_attention_backend

    return str(select_attention_backend(use_varlen=True))


if __name__ == "__main__":
    main()
