"""Fine-tuning with TRL: answer-only loss, packed rows, checkpoints that survive a kill."""

import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.checkpoint import checkpoint
from transformers import (
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    ProgressCallback,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from fintune.params import Train

log = logging.getLogger("fintune")
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
CHUNK = 1024  # answer tokens whose logits are held at once
IGNORED = -100  # the label of a token that takes no part in the loss

TokenRow = tuple[list[int], list[int]]  # prompt ids, completion ids


@dataclass(frozen=True)
class TrainingResult:
    """The tuned model, its loss curve and what the run cost.

    `curve` holds one row a logged step: step, loss, validation_loss, learning_rate (None where not
    measured at that step). `metrics` are the keys of reports/train.json.
    """

    model: PeftModel
    curve: list[dict[str, float | None]]
    metrics: dict[str, float]


class AnswerTrainer(SFTTrainer):
    """SFTTrainer with a loss that costs less, token-weighted validation and small checkpoints."""

    def __init__(self, *, validate: Callable[[PeftModel], float], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._validate = validate
        self.real_tokens = torch.zeros((), dtype=torch.long, device=self.args.device)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any) -> torch.Tensor:
        """Count the tokens that are no padding, without waiting for the device."""
        mask = inputs.get("attention_mask")
        self.real_tokens += inputs["input_ids"].numel() if mask is None else mask.sum()
        loss: torch.Tensor = super().training_step(model, inputs, *args)
        return loss

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> torch.Tensor:
        """The sum over the answer tokens divided by their number in the whole step.

        TRL's loss also takes each token's entropy and rank, which is half of the time of a small
        model's step. The head is applied to the answer's positions in chunks that are computed again
        in the backward pass, so that the logits never lie in memory together.
        """
        labels = inputs.pop("labels")
        plain = model.get_base_model()
        body, head = plain.get_decoder(), plain.get_output_embeddings()
        with self.accelerator.autocast():
            hidden = body(**inputs, use_cache=False).last_hidden_state
            answer = labels[:, 1:] != IGNORED
            states, targets = hidden[:, :-1][answer], labels[:, 1:][answer]
            loss = torch.stack(
                [
                    checkpoint(_summed_loss, head, *chunk, use_reentrant=False)
                    for chunk in zip(states.split(CHUNK), targets.split(CHUNK), strict=True)
                ]
            ).sum()
        return loss / num_items_in_batch

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The validation loss per token; the Trainer's own averages batches of unequal size."""
        metrics = {"eval_loss": self._validate(self.model)}
        self.model.train()
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Adapter and token rows only: no whole embedding, and no pickled arguments."""
        self.model.save_pretrained(output_dir or self.args.output_dir, save_embedding_layers=False)


def _summed_loss(head: Any, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Nats over the targets; `states` is (tokens, hidden)."""
    logits = head(states).float()
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


class Watch(TrainerCallback):
    """Times the steps, hands each logged value on, and validates and saves at the very end."""

    def __init__(self, on_log: Callable[[int, dict[str, float]], None]) -> None:
        self.on_log_values = on_log
        self.seconds = 0.0
        self.steps = 0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds += time.perf_counter() - self._begun
        self.steps += 1
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        values = {name: float(logs[key]) for key, name in CURVE.items() if key in logs}
        if values:
            self.on_log_values(state.global_step, values)


class Bar(ProgressCallback):
    """The Trainer's progress bar with the losses in it, instead of a printed line a step."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: dict[str, str] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.shown |= {name: f"{logs[key]:.3f}" for key, name in SHOWN.items() if key in logs}
        if self.training_bar is not None:
            self.training_bar.set_postfix(self.shown)


SHOWN = {"loss": "loss", "eval_loss": "validation"}
CURVE = {"loss": "loss", "eval_loss": "validation_loss", "learning_rate": "learning_rate"}


def train(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TokenRow],
    params: Train,
    dtype: torch.dtype,
    validate: Callable[[PeftModel], float],
    scratch: Path,
    on_log: Callable[[int, dict[str, float]], None],
) -> TrainingResult:
    """Fine-tune an adapter; goes on from the last checkpoint in `scratch` where there is one.

    Each optimizer step sees `rows_per_step` rows and its loss is the mean over their answer tokens,
    however the rows are divided into passes and whether they are packed or padded.

    Args:
        model: the base with a new adapter.
        rows: prompt and completion token ids of the training rows.
        dtype: autocast type of the matrix products; float32 for none.
        validate: gives the model's loss on the validation rows, in nats per answer token.
        scratch: where checkpoints go; removed by the caller once the adapter is safe.
        on_log: called with the step and the values measured there.
    """
    arguments = _arguments(params, len(rows), dtype, scratch)
    watch = Watch(on_log)
    stopping = (
        [EarlyStoppingCallback(params.early_stopping_patience)]
        if params.early_stopping_patience
        else []
    )
    trainer = AnswerTrainer(
        validate=validate,
        model=model,
        args=arguments,
        train_dataset=_dataset(rows),
        eval_dataset=_dataset(
            rows[:1]
        ),  # not read: `evaluate` above validates; the Trainer wants one
        processing_class=tokenizer,
        callbacks=[watch, *stopping],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Bar)
    _to_float32(trainer.model)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer.train(resume_from_checkpoint=last_checkpoint(scratch))
    history = trainer.state.log_history
    losses = [(e["step"], e["loss"]) for e in history if "loss" in e]
    trainable, total = model.get_nb_trainable_parameters()
    return TrainingResult(
        model=trainer.model,
        curve=_curve(history),
        metrics={
            "train_loss": _step_weighted_mean(losses),
            "validation_loss": float(trainer.state.best_metric),
            "best_step": trainer.state.best_global_step,
            "steps": trainer.state.global_step,
            "seconds": watch.seconds,
            "tokens_per_second": int(trainer.real_tokens) / max(watch.seconds, 1e-9),
            "rows_per_second": watch.steps * params.rows_per_step / max(watch.seconds, 1e-9),
            "peak_memory_gib": peak_memory_gib(),
            "trainable_parameters": trainable,
            "trainable_percent": 100 * trainable / total,
        },
    )


def total_steps(params: Train, rows: int) -> int:
    """Optimizer steps of a run: `epochs` over the rows, or `max_steps` where that ends earlier."""
    steps = math.ceil(params.epochs * math.ceil(rows / params.rows_per_step))
    return min(steps, params.max_steps or steps)


def _arguments(params: Train, rows: int, dtype: torch.dtype, scratch: Path) -> SFTConfig:
    steps = total_steps(params, rows)
    on_gpu = torch.cuda.is_available()
    return SFTConfig(
        output_dir=str(scratch),
        per_device_train_batch_size=params.rows_per_pass,
        gradient_accumulation_steps=params.rows_per_step // params.rows_per_pass,
        max_steps=steps,
        learning_rate=params.learning_rate,
        lr_scheduler_type=SCHEDULES[params.schedule],
        warmup_steps=round(params.warmup_fraction * steps),
        weight_decay=params.weight_decay,
        max_grad_norm=params.max_grad_norm,
        optim="adamw_torch_fused" if on_gpu else "adamw_torch",
        padding_free=params.packing,
        max_length=None,
        gradient_checkpointing=params.gradient_checkpointing,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=not on_gpu,
        eval_strategy="steps",
        eval_steps=params.validate_every_steps,
        save_strategy="steps",
        save_steps=params.validate_every_steps,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=max(1, steps // 200),
        report_to="none",
        seed=params.seed,
        data_seed=params.seed,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_pin_memory=on_gpu,
    )


def _dataset(rows: Sequence[TokenRow]) -> Dataset:
    """Token ids with labels; the prompt's labels are ignored, the end token's is not."""
    return Dataset.from_list(
        [
            {
                "input_ids": prompt + completion,
                "labels": [IGNORED] * len(prompt) + completion,
            }
            for prompt, completion in rows
        ]
    )


def _to_float32(model: torch.nn.Module) -> None:
    """TRL casts an adapter on a 4-bit base to bfloat16, where small steps round to nothing."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _curve(history: list[dict[str, Any]]) -> list[dict[str, float | None]]:
    by_step: dict[int, dict[str, float]] = {}
    for entry in history:
        values = {name: entry[key] for key, name in CURVE.items() if key in entry}
        if values:
            by_step.setdefault(entry["step"], {}).update(values)
    return [
        {"step": step, **{name: values.get(name) for name in CURVE.values()}}
        for step, values in sorted(by_step.items())
    ]


def _step_weighted_mean(losses: list[tuple[int, float]]) -> float:
    """The mean loss over all steps, from means logged over runs of steps."""
    total, previous = 0.0, 0
    for step, loss in losses:
        total += loss * (step - previous)
        previous = step
    return total / max(previous, 1)


def peak_memory_gib() -> float:
    """The most memory held so far: on the GPU if there is one, else by this process."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated()) / 2**30
    import resource
    import sys

    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def fingerprint(files: Sequence[Path], settings: dict[str, Any]) -> str:
    """Name a training run by what determines it: inputs, parameters, code and library versions."""
    import peft
    import transformers
    import trl

    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in files:
        digest.update(path.read_bytes())
    for module in (torch, transformers, trl, peft):
        digest.update(f"{module.__name__} {module.__version__}".encode())
    return digest.hexdigest()[:16]


def last_checkpoint(scratch: Path) -> str | None:
    """The newest whole checkpoint; what a kill left half written is removed."""
    found = sorted(scratch.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for folder in reversed(found):
        try:
            json.loads((folder / "trainer_state.json").read_text())  # the last file of a save
        except (OSError, ValueError):
            shutil.rmtree(folder)
        else:
            log.info("going on from %s", folder)
            return str(folder)
    return None
