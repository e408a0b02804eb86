"""The search for the learning rate: its share of the steps, its judgement, and the training after it."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fintune.errors import UserError
from fintune.params import Base
from fintune.training import halving, learning_rate
from fintune.training.halving import RATES, SHARE, best_rate, plan_rounds, score, survivors
from fintune.training.train import TrainingResult
from fintune.training.trainer import AnswerTrainer
from support.processes import in_processes
from support.training import PARAMS, Killed, kill_at, remembered, trainable, tune

STEPS = 40
TESTED = 0.5  # a share that lets a short training search


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halving, "SHARE", TESTED)
    monkeypatch.setattr(halving, "LEAST", 4)


def fit(base: Base, tokenizer: Any, rows: Any, scratch: Path, **changes: Any) -> TrainingResult:
    """Train with dropout, which depends on the random state."""
    lora = PARAMS.lora.model_copy(update={"dropout": 0.1})
    defaults = {"learning_rate": "auto", "max_steps": STEPS, "epochs": 99.0, "lora": lora}
    defaults |= {"schedule": "cosine", "warmup_fraction": 0.05, "validate_every_steps": 20}
    return tune(base, tokenizer, rows, PARAMS.model_copy(update=defaults | changes), scratch)


@pytest.fixture(scope="module")
def whole(
    base: Base, tokenizer: Any, rows: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., TrainingResult]:
    """Return a function that trains with a search, without a kill."""
    folder = tmp_path_factory.mktemp
    return remembered(lambda **given: fit(base, tokenizer, rows, folder("whole"), **given))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kernels": "plain", "schedule": "constant"},
        {"attention": "padded", "weight_decay": 0.1},
        {"quantization": "nf4", "keep": "last", "checkpoint_every_steps": 20},
    ],
    ids=["fused", "plain", "padded", "4 bits"],
)
@pytest.mark.usefixtures("short")
def test_the_training_is_that_with_the_found_rate_as_a_number(
    base: Base,
    tokenizer: Any,
    rows: list[Any],
    whole: Callable[..., TrainingResult],
    tmp_path: Path,
    changes: dict[str, Any],
) -> None:
    found = whole(**changes)
    assert found.search is not None
    rate = found.search.rate
    plain = fit(base, tokenizer, rows, tmp_path / "number", learning_rate=rate, **changes)
    assert plain.search is None
    assert torch.equal(trainable(found.model), trainable(plain.model))
    assert found.curve == plain.curve and found.step_tokens == plain.step_tokens
    assert found.largest_micro_batch == plain.largest_micro_batch
    assert found.metrics["learning_rate"] == plain.metrics["learning_rate"] == rate
    assert found.computed == {"learning_rate": rate} and plain.computed == {}
    assert max(point["learning_rate"] or 0 for point in found.curve) == pytest.approx(rate, rel=0.1)


def test_a_search_takes_its_share_of_the_steps_at_most() -> None:
    for steps in [*range(234, 700), 1000, 5000, 100_000]:
        rounds = plan_rounds(steps)
        assert sum(each.steps for each in rounds) <= SHARE * steps == 0.15 * steps
        assert rounds[0].candidates == len(RATES)
    deep = [plan_rounds(steps)[-1].until for steps in (234, 306, 500, 1000)]
    assert deep == sorted(deep) and deep[0] == 8
    with pytest.raises(UserError, match=r"this training's 233 .* \(234 or more are needed\)"):
        plan_rounds(233)


@pytest.mark.usefixtures("short")
def test_the_steps_that_are_done_are_those_of_the_plan(
    base: Base, tokenizer: Any, rows: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []
    step = AnswerTrainer.training_step

    def counted(self: Any, model: Any, inputs: Any, *more: Any) -> Any:
        done.append(sum(len(p) + len(c) for p, c in inputs["step"].rows))
        return step(self, model, inputs, *more)

    monkeypatch.setattr(AnswerTrainer, "training_step", counted)
    result = fit(base, tokenizer, rows, tmp_path)
    assert result.search is not None
    searched = len(done) - STEPS
    assert searched == result.search.steps == result.metrics["search_steps"] <= TESTED * STEPS
    assert result.metrics["steps"] == STEPS and len(result.step_tokens) == STEPS
    (_, first, _), (going_on, until, _) = plan_rounds(STEPS)
    training = result.step_tokens
    assert done[searched:] == training
    # the first step is the same for all; every candidate has the rows of the training's first steps
    expected = training[:1] + len(RATES) * training[1:first] + going_on * training[first:until]
    assert done[:searched] == expected and len(set(training[:until])) > 1


@pytest.mark.parametrize("call", [1, 7, 12, 17, 19])
@pytest.mark.usefixtures("short")
def test_a_killed_search_goes_on_and_finds_the_same(
    base: Base,
    tokenizer: Any,
    rows: list[Any],
    whole: Callable[..., TrainingResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: int,
) -> None:
    expected = whole()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, "training_step", call, False)
        fit(base, tokenizer, rows, tmp_path / "killed")
    file = tmp_path / "killed" / learning_rate.FILE
    measured = json.loads(file.read_text())["losses"] if file.is_file() else {}
    rounds = min(10, max(0, call - 2)), max(0, (call - 12) // 2)  # the first step is that of all
    assert len(measured) == rounds[0]
    assert sum(len(losses) > 2 for losses in measured.values()) == rounds[1]
    trained: list[float] = []
    go_on = learning_rate._Candidates.train
    with monkeypatch.context() as patch:
        patch.setattr(
            learning_rate._Candidates,
            "train",
            lambda self, rate, until: trained.append(rate) or go_on(self, rate, until),
        )
        again = fit(base, tokenizer, rows, tmp_path / "killed")
    assert expected.search is not None and again.search is not None
    assert again.search.rate == expected.search.rate
    assert again.search.losses == expected.search.losses
    assert torch.equal(trainable(again.model), trainable(expected.model))
    assert len(trained) == sum(each.candidates for each in plan_rounds(STEPS)) - sum(rounds)


@pytest.mark.usefixtures("short")
def test_a_training_that_goes_on_does_not_search_again(
    base: Base, tokenizer: Any, rows: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"checkpoint_every_steps": 10}
    whole = fit(base, tokenizer, rows, tmp_path / "whole", **changes)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, "training_step", 19 + 26, False)
        fit(base, tokenizer, rows, tmp_path / "killed", **changes)
    with monkeypatch.context() as patch:
        patch.delattr(learning_rate._Candidates, "train")
        again = fit(base, tokenizer, rows, tmp_path / "killed", **changes)
    assert torch.equal(trainable(again.model), trainable(whole.model))
    assert again.curve == whole.curve
    assert len(again.step_tokens) == STEPS - 20


@pytest.mark.usefixtures("short")
def test_candidates_that_diverge_drop_out(
    base: Base, tokenizer: Any, rows: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = (*RATES[:7], 1e28, 1e29, 1e30)
    monkeypatch.setattr(learning_rate, "RATES", rates)
    found = fit(base, tokenizer, rows, tmp_path).search
    assert found is not None and found.rate <= RATES[6]
    lost = [row["learning_rate"] for row in found.losses if row["loss"] is None]
    assert 1e30 in lost and not set(lost) & set(RATES)
    again = learning_rate._read(tmp_path / learning_rate.FILE)[0]
    assert None in again[1e30] and list(again) == list(rates)
    monkeypatch.setattr(learning_rate, "RATES", tuple(10.0**n for n in range(27, 37)))
    with pytest.raises(UserError, match=r"no rate from 1e\+\d\d to 1e\+\d\d had a finite loss"):
        fit(base, tokenizer, rows, tmp_path / "none")


@pytest.mark.usefixtures("short")
def test_two_processes_find_what_one_finds(
    base: Base, tokenizer: Any, rows: list[Any], tmp_path: Path
) -> None:
    changes = {"lora": PARAMS.lora, "kernels": "plain"}
    alone = fit(base, tokenizer, rows, tmp_path / "one", **changes)

    def work() -> dict[str, Any]:
        result = fit(base, tokenizer, rows, tmp_path / "two", **changes)
        assert result.search is not None
        return {"rate": result.search.rate, "adapter": trainable(result.model)}

    first, second = in_processes(2, work, tmp_path / "results")
    assert alone.search is not None
    assert first["rate"] == second["rate"] == alone.search.rate
    assert torch.equal(first["adapter"], second["adapter"])


def test_rates_are_judged_by_the_later_half_of_their_losses() -> None:
    assert score([9.0, 9.0, 1.0, 3.0]) == 2.0
    assert score([9.0, 4.0, 2.0]) == 3.0
    assert score([1.0, None, 1.0]) == math.inf


@pytest.mark.parametrize(("best", "first"), [(0, 0), (1, 0), (4, 2), (8, 6), (9, 6)])
def test_the_best_candidate_goes_on_with_its_neighbours(best: int, first: int) -> None:
    scores = {rate: abs(place - best) + 1.0 for place, rate in enumerate(RATES)}
    backwards = dict(reversed(scores.items()))
    assert survivors(scores) == survivors(backwards) == list(RATES[first : first + 4])


@pytest.mark.parametrize("lowest", [1e-3, 1.7e-3, 7e-4])
def test_the_rate_is_the_lowest_point_of_a_parabola(lowest: float) -> None:
    scores = {rate: 2 + math.log(rate / lowest) ** 2 for rate in (4e-4, 8e-4, 1.6e-3, 3.2e-3)}
    assert best_rate(scores, 40) == best_rate(scores, 99) == pytest.approx(lowest, rel=0.05)
    assert best_rate(scores, 8) == best_rate(scores, 16) == pytest.approx(0.4 * lowest, rel=0.05)
    assert best_rate(scores, 16) < best_rate(scores, 24) < best_rate(scores, 40)


def test_the_rate_is_beside_the_best_candidate() -> None:
    assert best_rate({1e-3: 3.0, 2e-3: 2.0, 4e-3: 1.5}, 40) == 4e-3
    assert best_rate({1e-3: 3.0, 2e-3: 2.0, 4e-3: math.inf}, 40) == 1.4e-3
    assert best_rate({1e-3: 3.0, 2e-3: 2.0, 4e-3: 1e9}, 40) == 1.4e-3
    assert best_rate({1e-3: 2.0, 2e-3: 2.0, 4e-3: 2.0}, 40) in (1e-3, 2e-3)
