"""Trainings that are killed, moved or diverge: same result, or the step and the way out in words."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fintune.errors import UserError
from fintune.params import Base
from fintune.training.callbacks import StepTimer
from fintune.training.quantization import quantization_cost
from fintune.training.train import TrainingResult
from fintune.training.trainer import AnswerTrainer
from support.training import PARAMS, Killed, kill_at, remembered, trainable, tune


def fit(
    base: Base, tokenizer: Any, rows: Any, scratch: Path, losses: Any = None, **changes: Any
) -> TrainingResult:
    """Train with dropout, which depends on the random state; `losses` are planted validation losses."""
    lora = PARAMS.lora.model_copy(update={"dropout": 0.1})
    defaults = {"schedule": "constant", "max_steps": 6, "validate_every_steps": 2, "lora": lora}
    params = PARAMS.model_copy(update=defaults | changes)
    planted = (lambda _, step: {"loss": losses[step]}) if losses else None
    return tune(base, tokenizer, rows, params, scratch, planted)


@pytest.fixture(scope="module")
def whole(
    base: Base, tokenizer: Any, rows: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., TrainingResult]:
    """Return a function that trains to the end, without a kill."""
    folder = tmp_path_factory.mktemp
    return remembered(lambda **given: fit(base, tokenizer, rows, folder("whole"), **given))


def test_a_killed_training_goes_on_between_two_validations(
    base: Base, tokenizer: Any, rows: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"validate_every_steps": 4, "checkpoint_every_steps": 1}
    whole = fit(base, tokenizer, rows, tmp_path / "whole", **changes)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, "training_step", 4, False)
        fit(base, tokenizer, rows, tmp_path / "killed", **changes)
    again = fit(base, tokenizer, rows, tmp_path / "killed", **changes)
    assert torch.equal(trainable(again.model), trainable(whole.model))
    assert len(again.step_tokens) == 3  # of six
    assert again.metrics["best_step"] in (4, 6)


EARLY = {2: 1.0, 4: 2.0, 6: 3.0, 8: 0.5, 10: 0.4, 12: 0.3}  # patience 2 ends it at step 6


@pytest.mark.parametrize(
    ("name", "call", "after"),
    [
        ("_save_checkpoint", 1, True),
        ("training_step", 4, True),
        ("evaluate", 2, True),
        ("_save_checkpoint", 2, False),
        ("_save_checkpoint", 3, True),  # all steps are done
    ],
)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"keep": "last"},
        {"schedule": "cosine"},
        {"checkpoint_every_steps": 3},
        {"losses": EARLY, "early_stopping_patience": 2, "max_steps": 12},
    ],
    ids=["constant", "last", "cosine", "between", "early"],
)
def test_a_killed_training_does_the_steps_that_were_asked_for(
    base: Base,
    tokenizer: Any,
    rows: list[Any],
    whole: Callable[..., TrainingResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    call: int,
    after: bool,
    changes: dict[str, Any],
) -> None:
    changes = {"epochs": 9.0, "max_steps": 5, **changes}  # an epoch has six steps
    expected = whole(**changes)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, name, call, after)
        fit(base, tokenizer, rows, tmp_path / "before", **changes)
    shutil.move(tmp_path / "before", tmp_path / "moved")  # the project may have been, too
    again = fit(base, tokenizer, rows, tmp_path / "moved", **changes)
    assert torch.equal(trainable(again.model), trainable(expected.model))
    assert again.curve == expected.curve
    assert again.metrics["steps"] == expected.metrics["steps"] == (6 if "losses" in changes else 5)
    for key in ("train_loss", "validation_loss", "best_step"):
        assert again.metrics[key] == expected.metrics[key], key
    for key in ("seconds", "tokens_per_second", "mfu"):
        assert again.metrics[key] > 0, key


def test_a_checkpoint_holds_the_time_and_tokens_of_the_steps_before_it(
    base: Base,
    tokenizer: Any,
    rows: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timers = []
    made = StepTimer.__init__
    monkeypatch.setattr(
        StepTimer, "__init__", lambda self, *on: timers.append(self) or made(self, *on)
    )
    whole = fit(base, tokenizer, rows, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, "_save_checkpoint", 2, True)
        fit(base, tokenizer, rows, tmp_path / "killed")
    fit(base, tokenizer, rows, tmp_path / "killed")
    expected, killed, again = timers
    assert (again.steps, again.tokens) == (expected.steps, expected.tokens)
    assert again.tokens == sum(whole.step_tokens) and again.answer_tokens == expected.answer_tokens
    assert again.seconds > killed.seconds > 0


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_learning_rate_that_breaks_the_weights_stops_at_once(
    base: Base, tokenizer: Any, rows: list[Any], tmp_path: Path, schedule: str
) -> None:
    with pytest.raises(UserError) as caught:
        fit(base, tokenizer, rows, tmp_path, learning_rate=1e30, schedule=schedule)
    assert "is nan at step 2; lower train.learning_rate (1e+30)" in str(caught.value)
    assert "no adapter is written" in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_first_loss_that_is_not_finite_is_named_with_the_best_step_before(
    base: Base,
    tokenizer: Any,
    rows: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    value: float,
) -> None:
    gradients, calls = AnswerTrainer._gradients, [0]

    def planted(self: Any, *args: Any) -> torch.Tensor:
        calls[0] += 1
        return gradients(self, *args) + (value if calls[0] == 4 else 0)

    monkeypatch.setattr(AnswerTrainer, "_gradients", planted)
    with pytest.raises(UserError, match=f"the loss is {value} at step 4; lower") as caught:
        fit(base, tokenizer, rows, tmp_path)
    assert "that of step 2, with" in str(caught.value)
    kept = tmp_path / "checkpoint-2"
    assert str(kept) in str(caught.value) and (kept / "adapter_model.safetensors").is_file()
    assert calls[0] == 4 and not (tmp_path / "checkpoint-4").exists()


def test_gradients_that_explode_are_named(
    base: Base, tokenizer: Any, rows: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = AnswerTrainer._gradients

    def exploding(self: Any, *args: Any) -> torch.Tensor:
        loss = gradients(self, *args)
        if self.state.global_step == 2:
            next(p for p in self.model.parameters() if p.grad is not None).grad.fill_(math.inf)
        return loss

    monkeypatch.setattr(AnswerTrainer, "_gradients", exploding)
    with pytest.raises(UserError, match=r"the gradient's norm is (nan|inf) at step 3; lower"):
        fit(base, tokenizer, rows, tmp_path)


def test_a_validation_that_is_not_finite_is_named(
    base: Base, tokenizer: Any, rows: list[Any], tmp_path: Path
) -> None:
    losses = {2: 1.0, 4: math.nan}
    with pytest.raises(UserError, match=r"the validation loss is nan at step 4; .*\n.* step 2"):
        fit(base, tokenizer, rows, tmp_path, losses)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_broken_base_is_named(
    tiny_base: Path, tokenizer: Any, rows: list[Any], tmp_path: Path, quantization: str
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    model.get_input_embeddings().weight.data[:, 0] = math.nan
    model.save_pretrained(tmp_path / "base")
    broken = Base(model=str(tmp_path / "base"), revision=None)
    params = PARAMS.model_copy(update={"quantization": quantization})
    with pytest.raises(UserError, match=r"base\.model.*not finite"):
        quantization_cost(broken, params, tokenizer, rows, tmp_path)
        fit(broken, tokenizer, rows, tmp_path / "scratch", quantization="none")


def test_an_adapter_with_a_weight_that_is_not_finite_is_refused(
    base: Base, tokenizer: Any, rows: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaking(self: Any, *_: Any) -> None:
        weight = next(p for p in self.model.parameters() if p.requires_grad)
        weight.data.flatten()[0] = math.inf

    monkeypatch.setattr(AnswerTrainer, "_load_best_model", breaking)
    with pytest.raises(UserError, match="has weights that are not finite; the adapter is not"):
        fit(base, tokenizer, rows, tmp_path)


@pytest.mark.parametrize(("loss", "warned"), [(20.0, True), (1.0, False)])
def test_a_training_that_learned_nothing_is_warned_of(
    base: Base,
    tokenizer: Any,
    rows: list[Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    loss: float,
    warned: bool,
) -> None:
    fit(base, tokenizer, rows, tmp_path, dict.fromkeys((2, 4, 6), loss), learning_rate=0.3)
    assert ("nothing was learned; lower train.learning_rate (0.3)" in caplog.text) == warned


def test_a_checkpoint_that_was_partly_written_is_left_out(
    base: Base, tokenizer: Any, rows: list[Any], tmp_path: Path
) -> None:
    whole = fit(base, tokenizer, rows, tmp_path)
    state = tmp_path / "checkpoint-6/trainer_state.json"
    state.write_text(state.read_text()[:100])
    again = fit(base, tokenizer, rows, tmp_path)
    assert json.loads(state.read_text())["global_step"] == 6
    assert torch.equal(trainable(again.model), trainable(whole.model))
