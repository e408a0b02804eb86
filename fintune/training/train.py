"""Fine-tune with TRL: packed rows, resumable after a kill."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback
from trl import SFTConfig

from fintune.hardware import GIB, free_memory_gib, has_fp8, matmul_flops, peak_memory_gib
from fintune.hub.models import check_positions
from fintune.model.batch import TokenRow, lengths_of
from fintune.model.conformance import agreement_of, fused_differs
from fintune.model.sharding import shard, sharded_gib
from fintune.model.sizes import ModelSize
from fintune.params import Train
from fintune.processes import check_same, count, of_all, of_first, rank
from fintune.training.callbacks import CURVE, Bar, Patience, StepTimer
from fintune.training.checkpoints import last_checkpoint, resume
from fintune.training.curve import curve_of
from fintune.training.divergence import check_weights, warn_of_guessing
from fintune.training.learning_rate import find_rate
from fintune.training.plan import Plan, plan_execution
from fintune.training.rates import Found, plan_rounds
from fintune.training.trainer import AnswerTrainer, to_float32

log = logging.getLogger("fintune")

POINTS = 100  # minimum of the loss curve, if there are as many steps
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


@dataclass(frozen=True)
class TrainingResult:
    """The tuned model, its loss curve and the cost of the run.

    `curve` has one row per logged step: step, loss, validation_loss, validation_answers, learning_rate
    (None where not measured). `step_tokens` are the tokens of each step, of all processes;
    `largest_micro_batch` is the largest number of tokens in a micro-batch of this one. `metrics` are
    the keys of reports/train.json.
    """

    model: PeftModel
    plan: Plan
    curve: list[dict[str, float | None]]
    step_tokens: list[int]
    largest_micro_batch: int
    metrics: dict[str, float]
    search: Found | None  # of the learning rate

    @property
    def computed(self) -> dict[str, str | float]:
        """Return what `auto` chose of the parameters that change what is learned."""
        rate = {"learning_rate": self.search.rate} if self.search else {}
        return {**rate, **({"products": "fp8"} if self.plan.fp8 else {})}

    @property
    def record(self) -> dict[str, Any]:
        """Return what the run's record keeps of a search for the learning rate."""
        return {"learning_rate_search": asdict(self.search)} if self.search else {}

    @property
    def tags(self) -> dict[str, str]:
        """Return what the run's record says of the processes, and of a searched learning rate."""
        rate = {"learning_rate": f"{self.search.rate:g}"} if self.search else {}
        return {"processes": str(self.plan.processes), "parallel": self.plan.parallel, **rate}


def train(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TokenRow],
    params: Train,
    dtype: torch.dtype,
    validate: Callable[[PeftModel, int], dict[str, float]],
    scratch: Path,
    on_log: Callable[[int, dict[str, float]], None],
    sharded: bool = False,
) -> TrainingResult:
    """Fine-tune an adapter; resume from the last checkpoint in `scratch` if there is one.

    All processes of the stage call this, with the same arguments. Each optimizer step sees `rows_per_step`
    rows. Its loss is the mean over their answer tokens, no matter how the rows are split into processes and
    micro-batches, and whether they are packed or padded.

    Args:
        model: the base with a new adapter.
        rows: prompt and completion token ids of the training rows.
        dtype: autocast type of the matrix products; float32 disables autocast.
        validate: returns the model's `loss` after a step on the validation rows, in nats per answer token,
            and with `keep: best_answers`, at the last step at least, the score of its `answers`, higher for
            better ones.
        scratch: folder for checkpoints; the caller removes it once the adapter is safe.
        on_log: called with the step and the values measured there.
        sharded: share the base's weights among the processes.

    Raises:
        UserError: a loss, a gradient or a weight is not finite; or the training has too few steps for
            `learning_rate: auto`.
    """
    steps, per_step = total_steps(params, len(rows)), params.rows_per_step
    automatic = params.learning_rate == "auto"
    if automatic:
        plan_rounds(steps)  # fail fast if there are too few
    log.info("%d rows, %d steps of %d rows", len(rows), steps, per_step)
    plan = make_plan(model, params, rows, dtype, sharded)
    log.info("plan: %s", plan)
    trainable, total = model.get_nb_trainable_parameters()
    if sharded:
        shard(model)
    arguments = _arguments(params, len(rows), dtype, scratch, plan)
    timer = StepTimer(on_log, params.checkpoint_every_steps)
    stopping = [Patience(params.early_stopping_patience)] if params.early_stopping_patience else []
    trainer = AnswerTrainer(
        validate=validate,
        plan=plan,
        dtype=dtype,
        timer=timer,
        model=model,
        args=arguments,
        rows=rows,
        processing_class=tokenizer,
        callbacks=[timer, *stopping],
    )
    for printing in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(printing)
    trainer.add_callback(Bar)
    to_float32(trainer.model)
    search = find_rate(trainer, steps, scratch) if automatic else None
    rate = trainer.args.learning_rate = search.rate if search else float(params.learning_rate)
    ceiling = matmul_flops(dtype)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    checkpoint = of_first(last_checkpoint(scratch) if rank() == 0 else None)
    check_same({"the checkpoints that they see": checkpoint is None or checkpoint.is_dir()})
    if not (checkpoint and resume(trainer, checkpoint)):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    check_weights(trainer.model)
    kept = _kept(trainer.state, params.keep)
    vocabulary = model.get_base_model().get_input_embeddings().weight.shape[0]
    warn_of_guessing(kept["validation_loss"], vocabulary, rate)
    history = trainer.state.log_history
    losses = [(e["step"], e["loss"]) for e in history if "loss" in e]
    flops = _size(model, params).flops(timer.tokens, timer.answer_tokens)
    return TrainingResult(
        model=trainer.model,
        plan=plan,
        curve=curve_of(history),
        step_tokens=trainer.step_tokens,
        largest_micro_batch=trainer.largest_micro_batch,
        metrics={
            "train_loss": _step_weighted_mean(losses),
            **kept,
            "learning_rate": rate,
            **({"search_steps": search.steps, "search_seconds": search.seconds} if search else {}),
            "steps": trainer.state.global_step,
            "seconds": timer.seconds,
            "validation_seconds": timer.aside["validation"],
            "checkpoint_seconds": timer.aside["checkpoint"],
            "tokens_per_second": timer.tokens / timer.seconds,
            "rows_per_second": timer.steps * params.rows_per_step / timer.seconds,
            "mfu": flops / timer.seconds / ceiling / count(),
            "processes": count(),
            "peak_memory_gib": max(of_all(max(timer.peak_gib, peak_memory_gib()))),
            "predicted_memory_gib": plan.peak_gib,
            "trainable_parameters": trainable,
            "trainable_percent": 100 * trainable / total,
        },
        search=search,
    )


def make_plan(
    model: PeftModel,
    params: Train,
    rows: Sequence[TokenRow],
    dtype: torch.dtype,
    sharded: bool = False,
) -> Plan:
    """Plan the steps for this model and hardware, without allocating memory.

    Raises:
        UserError: a row is longer than the base can read, or as `plan_execution` raises.
    """
    agreement = agreement_of(model.get_base_model().config)
    frozen = (p for p in model.parameters() if not p.requires_grad)
    lengths = lengths_of(rows)
    base_gib = sum(p.numel() * p.element_size() for p in frozen) / GIB
    if sharded:
        shared = sharded_gib(model)
        layers = model.get_base_model().config.get_text_config().num_hidden_layers
        base_gib += shared * (1 / count() + 2 / layers - 1)
    check_positions(model.get_base_model().config.to_dict(), max(lengths))
    return plan_execution(
        _size(model, params),
        params,
        lengths,
        dtype.itemsize,
        min(of_all(free_memory_gib())) / (1 if torch.cuda.is_available() else count()),
        torch.cuda.is_available(),
        fused_differs(model),
        agreement.differences.get("packed rows"),
        base_gib,
        dtype == torch.bfloat16 and all(of_all(has_fp8())),
        count(),
        sharded,
    )


def _size(model: PeftModel, params: Train) -> ModelSize:
    return ModelSize.of(model.get_base_model().config, params.lora)


def total_steps(params: Train, rows: int) -> int:
    """Return the optimizer steps of a run: `epochs` over the rows, or `max_steps` if that is fewer."""
    steps = math.ceil(params.epochs * math.ceil(rows / params.rows_per_step))
    return min(steps, params.max_steps or steps)


def _arguments(
    params: Train, rows: int, dtype: torch.dtype, scratch: Path, plan: Plan
) -> SFTConfig:
    steps = total_steps(params, rows)
    on_gpu = torch.cuda.is_available()
    arguments = SFTConfig(
        output_dir=str(scratch),
        per_device_train_batch_size=params.rows_per_step,  # the step splits them into micro-batches
        max_steps=steps,
        lr_scheduler_type=SCHEDULES[params.schedule],
        warmup_steps=round(params.warmup_fraction * steps),
        weight_decay=params.weight_decay,
        max_grad_norm=params.max_grad_norm,
        optim="adamw_torch_fused",
        max_length=None,
        gradient_checkpointing=plan.kernels == "plain" and plan.checkpointing == "full",
        logging_nan_inf_filter=False,  # a device sync at every step
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=not on_gpu,
        eval_strategy="steps",
        eval_steps=params.validate_every_steps,
        save_strategy="steps",
        save_steps=params.validate_every_steps,
        save_total_limit=2,
        load_best_model_at_end=params.keep != "last",
        metric_for_best_model="eval_answers" if params.keep == "best_answers" else "eval_loss",
        greater_is_better=params.keep == "best_answers",
        logging_steps=max(1, steps // POINTS),  # each forces a device sync
        report_to="none",
        seed=params.seed,
        data_seed=params.seed,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        dataloader_pin_memory=False,  # each micro-batch is pinned separately
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # of several visible ones, a process uses one
    return arguments


def _kept(state: Any, keep: str) -> dict[str, float]:
    """Return the step whose weights are kept, and what its validation measured."""
    step = state.global_step if keep == "last" else state.best_global_step
    found = next(e for e in state.log_history if e["step"] == step and "eval_loss" in e)
    names = {name: key for key, name in CURVE.items() if key.startswith("eval_") and key in found}
    return {"best_step": step, **{name: float(found[key]) for name, key in names.items()}}


def _step_weighted_mean(losses: list[tuple[int, float]]) -> float:
    """Compute the mean loss over all steps from means logged over several steps each."""
    total, previous = 0.0, 0
    for step, loss in losses:
        total += loss * (step - previous)
        previous = step
    return total / max(previous, 1)
