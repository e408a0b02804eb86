"""Train the small base model: tensors in, weights and figures out."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MistralForCausalLM

from tools.base_model import IGNORED, head_loss, hidden_states, summed_nats, windows
from tools.corpus import IntArray

ESTIMATE_AT = 50  # steps after which speed is measured and the schedule may be shortened
FINAL_RATE = 0.1  # of the peak learning rate, at the end of the cosine


@dataclass(frozen=True)
class TrainingSettings:
    """Training settings; ``steps`` sets the schedule, ``minutes`` can only shorten it."""

    steps: int
    minutes: float
    rows: int  # sequences in a step
    context: int  # tokens in a sequence
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    dropout: float
    seed: int
    log_steps: int
    compile: bool


@dataclass
class TrainingResult:
    """The result; ``history`` has (step, training loss, validation loss) in nats per token."""

    steps_planned: int
    steps_done: int = 0
    best_step: int = 0
    best_loss: float = math.inf
    seconds: float = 0.0
    history: list[tuple[int, float, float]] = field(default_factory=list)
    best_weights: dict[str, Tensor] = field(default_factory=dict)


def learning_rate_at(step: int, steps: int, settings: TrainingSettings) -> float:
    """Compute linear warm-up, then a cosine to ``FINAL_RATE`` of the peak; ``step`` counts from 0.

    The warm-up does not depend on ``steps``: a schedule shortened during it equals the schedule of
    a run with fewer steps from the start.
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    cosine = (1 + math.cos(math.pi * min(1.0, done))) / 2
    return settings.learning_rate * (FINAL_RATE + (1 - FINAL_RATE) * cosine)


def steps_that_fit(planned: int, seconds_per_step: float, seconds_left: float) -> int:
    """Return the number of steps, at most ``planned``, that fit the time left after ``ESTIMATE_AT``."""
    return min(planned, ESTIMATE_AT + max(1, int(seconds_left / seconds_per_step)))


def add_residual_dropout(model: MistralForCausalLM, probability: float) -> None:
    """Add dropout to the embedding and to each residual branch, in training mode only.

    Mistral's config only has attention dropout, and a small text seen for many epochs needs more.
    Hooks leave the saved config unchanged.
    """

    def drop(module: nn.Module, _: Any, output: Tensor) -> Tensor:
        return F.dropout(output, probability, training=module.training)

    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "o_proj", "down_proj")):
            module.register_forward_hook(drop)


def make_optimizer(model: MistralForCausalLM, settings: TrainingSettings) -> torch.optim.AdamW:
    """Create AdamW with weight decay on the matrices and none on the norms."""
    matrices = [weight for weight in model.parameters() if weight.ndim >= 2]
    vectors = [weight for weight in model.parameters() if weight.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    fused = model.device.type == "cuda"
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=fused)


def train_model(
    model: MistralForCausalLM,
    train: IntArray,
    validation: IntArray,
    bos_id: int,
    settings: TrainingSettings,
    log: Callable[[str], None] = print,
) -> TrainingResult:
    """Train in place on random windows of ``train``; keep the weights with the best validation loss.

    ``train`` and ``validation`` are streams ``[tokens]``. All data and offsets are on the model's
    device, and after the speed estimate the host syncs only every ``log_steps`` steps.
    """
    device = model.device
    torch.manual_seed(settings.seed)
    if settings.dropout:
        add_residual_dropout(model, settings.dropout)
    loss_of = head_loss
    if settings.compile:
        # All layers share one compilation; compiling the whole model takes longer and makes
        # transformers build a dense mask, which rules out the fast attention kernels.
        for layer in model.model.layers:
            layer.compile(dynamic=False)
        loss_of = torch.compile(head_loss, dynamic=False)
    data = torch.from_numpy(train).to(device)
    span = torch.arange(settings.context + 1, device=device)
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (settings.steps, settings.rows)
    offsets = torch.randint(len(train) - settings.context, shape, generator=generator).to(device)
    validation_rows = windows(validation, settings.context, bos_id)
    validation_tokens = int((validation_rows[1] != IGNORED).sum())
    optimizer = make_optimizer(model, settings)
    result = TrainingResult(steps_planned=settings.steps)
    step_tokens = settings.rows * settings.context
    clock = _Clock(device)
    running = torch.zeros((), device=device)
    since, since_step = 0.0, 0
    step = 0
    model.train()
    while step < result.steps_planned:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, result.steps_planned, settings)
        rows = data[offsets[step, :, None] + span]
        with autocast(device):
            hidden = hidden_states(model, rows[:, :-1])
            loss = loss_of(hidden, model.lm_head.weight, rows[:, 1:]) / step_tokens
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running += loss.detach()
        step += 1
        if step == 10:
            since, since_step = clock.seconds(), step
        if step == ESTIMATE_AT:
            pace = (clock.seconds() - since) / (step - since_step)
            # A tenth is reserved for validation and slow phases.
            left = settings.minutes * 60 * 0.9 - clock.seconds()
            result.steps_planned = steps_that_fit(settings.steps, pace, left)
            log(
                f"{1000 * pace:.1f} ms a step, {step_tokens / pace:,.0f} tokens/s: "
                f"{settings.steps:,} steps take about {settings.steps * pace / 60:.1f} minutes; "
                f"doing {result.steps_planned:,}"
            )
        if step % settings.log_steps == 0 or step == result.steps_planned:
            seconds = clock.seconds()
            with autocast(device):
                held_out = summed_nats(model, *validation_rows) / validation_tokens
            model.train()
            mean = float(running) / (step - result.steps_done)
            running.zero_()
            if held_out < result.best_loss:
                result.best_loss, result.best_step = held_out, step
                result.best_weights = {
                    name: value.detach().clone() for name, value in model.state_dict().items()
                }
            rate = (step - result.steps_done) * step_tokens / (seconds - result.seconds)
            result.history.append((step, mean, held_out))
            result.steps_done, result.seconds = step, clock.seconds()
            left = (result.steps_planned - step) * step_tokens / rate / 60
            log(
                f"step {step:6,}  train {mean:.4f}  validation {held_out:.4f}  "
                f"{rate:,.0f} tokens/s  {left:.1f} minutes left"
            )
            if result.seconds > settings.minutes * 60:
                log(f"stopped: {settings.minutes} minutes are over")
                break
    return result


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """Use bf16 on a GPU and float32 on a CPU, where bf16 is often emulated and slow."""
    if device.type == "cuda":
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return nullcontext()


class _Clock:
    """A clock that syncs the device before it is read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = time.perf_counter()

    def seconds(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - self._start
