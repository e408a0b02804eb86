"""Fine-tuning with TRL: answer-only loss, packed rows, checkpoints that survive a kill."""

import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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

from fintune.fused import FusedModel, unsupported
from fintune.params import Train, UserError
from fintune.preflight import (
    CHUNK,
    Plan,
    Shape,
    free_memory_gib,
    matmul_flops,
    plan_execution,
)
from fintune.scoring import Pass, TokenRow, batches_by_length, lay_out

log = logging.getLogger("fintune")
POINTS = 100  # of the loss curve, at least, where there are as many steps
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


@dataclass(frozen=True)
class TrainingResult:
    """The tuned model, its loss curve and what the run cost.

    `curve` holds one row a logged step: step, loss, validation_loss, learning_rate (None where not
    measured at that step). `step_tokens` are those of each step's rows, `largest_pass` the most tokens
    that went through the model at once. `metrics` are the keys of reports/train.json.
    """

    model: PeftModel
    plan: Plan
    curve: list[dict[str, float | None]]
    step_tokens: list[int]
    largest_pass: int
    metrics: dict[str, float]


def divide(lengths: Sequence[int], limit: int, padded: bool) -> list[list[int]]:
    """Rows of a step in passes of at most `limit` tokens, padding included, as equal as they get.

    A row that is longer by itself makes a pass of its own; no row is cut.
    """
    if padded:
        return list(batches_by_length(lengths, limit, rows=len(lengths)))
    count = max(1, math.ceil(sum(lengths) / limit))
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while True:
        passes: list[list[int]] = [[] for _ in range(count)]
        sizes = [0] * count
        for i in longest_first:
            least = sizes.index(min(sizes))
            passes[least].append(i)
            sizes[least] += lengths[i]
        if count >= len(lengths) or max(sizes) <= max(limit, max(lengths)):
            return [sorted(rows) for rows in passes if rows]
        count += 1


class AnswerTrainer(SFTTrainer):
    """SFTTrainer whose step costs less, with token-weighted validation and small checkpoints."""

    def __init__(
        self,
        *,
        validate: Callable[[PeftModel], float],
        plan: Plan,
        dtype: torch.dtype,
        watch: "Watch",
        rows: Sequence[TokenRow],
        **kwargs: Any,
    ) -> None:
        numbers = Dataset.from_dict({"row": range(len(rows))})
        super().__init__(
            **kwargs,
            train_dataset=numbers,
            eval_dataset=numbers.take(1),  # not read, but the Trainer wants one to validate
            data_collator=lambda chosen: {"step": Step([rows[each["row"]] for each in chosen])},
        )
        self._validate = validate
        self.watch = watch
        self.plan = plan
        self.limit = plan.tokens_per_pass
        self.step_tokens: list[int] = []
        self.largest_pass = 0
        self.answer_tokens = 0
        self.model.train()  # here and after a validation: it takes milliseconds
        self.fused = None
        if plan.kernels == "fused":
            keep = plan.dequantize == "once"
            self.fused = FusedModel(self.model, dtype, plan.checkpointing, keep)

    def training_step(self, model: Any, inputs: dict[str, Any], *_: Any) -> torch.Tensor:
        """One optimizer step's gradients: the mean over the answer tokens of all its rows.

        If memory runs out, the step begins again with passes of half the size, and so do all later ones;
        rows and loss stay the same.
        """
        rows: list[TokenRow] = inputs["step"].rows
        answers = sum(len(completion) for _, completion in rows)
        lengths = [len(prompt) + len(completion) for prompt, completion in rows]
        if self.fused:
            self.fused.follow()
        while True:
            try:
                loss = self._gradients(rows, lengths, answers)
                break
            except torch.OutOfMemoryError:
                smaller = min(self.limit, sum(lengths)) // 2
                if len(divide(lengths, self.limit, self._padded)) == len(rows):
                    raise UserError(
                        f"train: not enough memory for a single row ({max(lengths):,} tokens); set "
                        "train.checkpointing: full, or a smaller format.max_tokens"
                    ) from None
                log.warning(
                    "warning: out of memory with %s tokens a pass; going on with %s, the result is the same",
                    f"{self.limit:,}",
                    f"{smaller:,}",
                )
                self.limit = smaller
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        self.step_tokens.append(sum(lengths))
        self.answer_tokens += answers
        return loss

    @property
    def _padded(self) -> bool:
        return self.plan.attention == "padded"

    def _gradients(self, rows: list[TokenRow], lengths: list[int], answers: int) -> torch.Tensor:
        total = torch.zeros((), device=self.args.device)
        for members in divide(lengths, self.limit, self._padded):
            part = lay_out([rows[i] for i in members], self._padded, self.args.device)
            self.largest_pass = max(self.largest_pass, part.ids.numel())
            loss = (self._fused_loss if self.fused else self._plain_loss)(part) / answers
            self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def _fused_loss(self, part: Pass) -> torch.Tensor:
        assert self.fused is not None and part.bounds is not None
        states = self.fused.hidden_states(part.ids[0], part.positions[0], part.bounds, part.longest)
        return self.fused.answer_loss(states.index_select(0, part.predicting), part.targets)

    def _plain_loss(self, part: Pass) -> torch.Tensor:
        """Summed nats through transformers' and PEFT's own layers.

        The head is applied to the answer's positions in chunks that are computed again in the backward
        pass, so that the logits never lie in memory together.
        """
        plain = self.model.get_base_model()
        body, head = plain.get_decoder(), plain.get_output_embeddings()
        packed = {}
        if part.bounds is not None:
            packed = {
                "cu_seq_lens_q": part.bounds,
                "cu_seq_lens_k": part.bounds,
                "max_length_q": part.longest,
                "max_length_k": part.longest,
            }
        with self.accelerator.autocast():
            hidden = body(
                input_ids=part.ids,
                position_ids=part.positions,
                attention_mask=part.mask,
                use_cache=False,
                **packed,
            ).last_hidden_state
            states = hidden.flatten(0, 1).index_select(0, part.predicting)
            return torch.stack(
                [
                    checkpoint(_summed_loss, head, *chunk, use_reentrant=False)
                    for chunk in zip(states.split(CHUNK), part.targets.split(CHUNK), strict=True)
                ]
            ).sum()

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The validation loss per token; the Trainer's own averages batches of unequal size."""
        with self.watch.pause():
            metrics = {"eval_loss": self._validate(self.model)}
        self.model.train()
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self.watch.pause():
            super()._save_checkpoint(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Adapter and token rows only: no whole embedding, and no pickled arguments."""
        self.model.save_pretrained(output_dir or self.args.output_dir, save_embedding_layers=False)


@dataclass(frozen=True)
class Step:
    """The rows of one optimizer step; accelerate leaves it alone, so lengths stay known to the host."""

    rows: list[TokenRow]


def _summed_loss(head: Any, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Nats over the targets; `states` is (tokens, hidden)."""
    logits = head(states).float()
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


class Watch(TrainerCallback):
    """Times the steps, hands each logged value on, and validates and saves at the very end.

    `seconds` are those of the steps, from the beginning of the first one. The device is waited for only
    where something else begins, so that it never idles in order to be timed.
    """

    def __init__(self, on_log: Callable[[int, dict[str, float]], None]) -> None:
        self.on_log_values = on_log
        self.seconds = 0.0
        self.steps = 0
        self._begun: float | None = None
        self._aside = 0.0

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Stop the clock for a validation or a checkpoint; every training ends with one."""
        begun = _now()
        self.seconds = begun - (self._begun or begun) - self._aside
        yield
        self._aside += _now() - begun

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._begun = self._begun or _now()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps += 1
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        values = {name: float(logs[key]) for key, name in CURVE.items() if key in logs}
        if values:
            self.on_log_values(state.global_step, values)


def _now() -> float:
    """Seconds, when the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


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
    plan = make_plan(model, params, rows, dtype)
    log.info("plan: %s", plan)
    arguments = _arguments(params, len(rows), dtype, scratch, plan)
    watch = Watch(on_log)
    stopping = (
        [EarlyStoppingCallback(params.early_stopping_patience)]
        if params.early_stopping_patience
        else []
    )
    trainer = AnswerTrainer(
        validate=validate,
        plan=plan,
        dtype=dtype,
        watch=watch,
        model=model,
        args=arguments,
        rows=rows,
        processing_class=tokenizer,
        callbacks=[watch, *stopping],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Bar)
    _to_float32(trainer.model)
    ceiling = matmul_flops(dtype)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer.train(resume_from_checkpoint=last_checkpoint(scratch))
    history = trainer.state.log_history
    losses = [(e["step"], e["loss"]) for e in history if "loss" in e]
    trainable, total = model.get_nb_trainable_parameters()
    tokens = sum(trainer.step_tokens)
    flops = _shape(model, params).flops(tokens, trainer.answer_tokens)
    return TrainingResult(
        model=trainer.model,
        plan=plan,
        curve=_curve(history),
        step_tokens=trainer.step_tokens,
        largest_pass=trainer.largest_pass,
        metrics={
            "train_loss": _step_weighted_mean(losses),
            "validation_loss": float(trainer.state.best_metric),
            "best_step": trainer.state.best_global_step,
            "steps": trainer.state.global_step,
            "seconds": watch.seconds,
            "tokens_per_second": tokens / watch.seconds,
            "rows_per_second": watch.steps * params.rows_per_step / watch.seconds,
            "mfu": flops / watch.seconds / ceiling,
            "peak_memory_gib": peak_memory_gib(),
            "predicted_memory_gib": plan.peak_gib,
            "trainable_parameters": trainable,
            "trainable_percent": 100 * trainable / total,
        },
    )


def make_plan(
    model: PeftModel, params: Train, rows: Sequence[TokenRow], dtype: torch.dtype
) -> Plan:
    """How to compute the steps with this model on this hardware; nothing is allocated."""
    return plan_execution(
        _shape(model, params),
        params,
        [len(prompt) + len(completion) for prompt, completion in rows],
        dtype.itemsize,
        free_memory_gib(),
        torch.cuda.is_available(),
        unsupported(model),
    )


def _shape(model: PeftModel, params: Train) -> Shape:
    return Shape.of(model.get_base_model().config, params.lora)


def total_steps(params: Train, rows: int) -> int:
    """Optimizer steps of a run: `epochs` over the rows, or `max_steps` where that ends earlier."""
    steps = math.ceil(params.epochs * math.ceil(rows / params.rows_per_step))
    return min(steps, params.max_steps or steps)


def _arguments(
    params: Train, rows: int, dtype: torch.dtype, scratch: Path, plan: Plan
) -> SFTConfig:
    steps = total_steps(params, rows)
    on_gpu = torch.cuda.is_available()
    return SFTConfig(
        output_dir=str(scratch),
        per_device_train_batch_size=params.rows_per_step,  # a step's passes are made in the step
        max_steps=steps,
        learning_rate=params.learning_rate,
        lr_scheduler_type=SCHEDULES[params.schedule],
        warmup_steps=round(params.warmup_fraction * steps),
        weight_decay=params.weight_decay,
        max_grad_norm=params.max_grad_norm,
        optim="adamw_torch_fused" if on_gpu else "adamw_torch",
        max_length=None,
        gradient_checkpointing=plan.kernels == "plain" and plan.checkpointing == "full",
        logging_nan_inf_filter=False,  # it waits for the device at every step
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
        logging_steps=max(1, steps // POINTS),  # each waits for the device
        report_to="none",
        seed=params.seed,
        data_seed=params.seed,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        dataloader_pin_memory=False,  # each pass pins its own
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
