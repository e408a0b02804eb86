"""Trainings of the tiny base: parameters, texts, one call of `train`, and a kill at a chosen moment."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from fintune.model.adapter import add_adapter
from fintune.model.base import load_base
from fintune.model.likelihood import likelihood
from fintune.params import Base, Lora, Train
from fintune.training.train import TrainingResult, train
from fintune.training.trainer import AnswerTrainer

Result = TypeVar("Result")
PARAMS = Train(
    quantization="none",
    precision="float32",
    lora=Lora(
        r=4,
        alpha=8,
        dropout=0.0,
        target_modules=[f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")],
    ),
    learning_rate=1e-2,
    schedule="linear",
    warmup_fraction=0.0,
    weight_decay=0.0,
    max_grad_norm=1.0,
    epochs=1.0,
    max_steps=4,
    rows_per_step=4,
    parallel="auto",
    processes="auto",
    attention="auto",
    kernels="auto",
    checkpointing="auto",
    dequantize="auto",
    products="auto",
    tokens_per_pass="auto",
    validate_every_steps=2,
    checkpoint_every_steps=None,
    early_stopping_patience=None,
    keep="best_loss",
    end_token="new",
    seed=0,
)
TEXTS = [
    (f"Instruction: Add.\nInput: {a} and {b}?\n<response>", f"{a + b}" * (1 + a) + "<response|end>")
    for a in range(6)
    for b in range(4)
]


class Killed(Exception):
    """Stands for a kill at a chosen moment."""


def adapted(base: Base, tokenizer: Any, params: Train, shardable: bool = False) -> Any:
    """Load a base and add a new adapter."""
    model = load_base(base, tokenizer, params.quantization, torch.float32, shardable=shardable)
    return add_adapter(model, tokenizer, params.lora, params.seed)


def tune(
    base: Base,
    tokenizer: Any,
    rows: Sequence[Any],
    params: Train,
    scratch: Path,
    validate: Callable[[Any, int], dict[str, float]] | None = None,
    on_log: Callable[[int, dict[str, float]], None] = lambda *_: None,
    sharded: bool = False,
) -> TrainingResult:
    """Train a new adapter; unless told otherwise, it is validated by the loss of four rows."""

    def loss(model: Any, _: int) -> dict[str, float]:
        return {"loss": likelihood(model, rows[:4], "validate").loss}

    model = adapted(base, tokenizer, params, shardable=params.parallel == "fsdp")
    return train(
        model,
        tokenizer,
        rows,
        params,
        torch.float32,
        validate=validate or loss,
        scratch=scratch,
        on_log=on_log,
        sharded=sharded,
    )


def remembered(work: Callable[..., Result]) -> Callable[..., Result]:
    """Return a function that does the same work once: what several tests compare with."""
    found: dict[str, Result] = {}

    def once(**changes: Any) -> Result:
        key = repr(sorted(changes.items()))
        if key not in found:
            found[key] = work(**changes)
        return found[key]

    return once


def trainable(model: Any) -> torch.Tensor:
    """Return a copy of all trainable weights."""
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def kill_at(monkeypatch: pytest.MonkeyPatch, name: str, call: int, after: bool) -> None:
    """Raise at the n-th call of a method of the trainer, before or after it did its work."""
    method, calls = getattr(AnswerTrainer, name), [0]

    def dying(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call and not after:
            raise Killed
        found = method(self, *args, **kwargs)
        if calls[0] == call:
            raise Killed
        return found

    monkeypatch.setattr(AnswerTrainer, name, dying)
