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
from fintune.training import learning_rate
from fintune.training import rates as search
from fintune.training.rates import (
    COARSE,
    FINE,
    SHARE,
    best_of,
    factor,
    lowest_point,
    plan_rounds,
    rate_for,
    score,
)
from fintune.training.train import TrainingResult
from fintune.training.trainer import AnswerTrainer
from support.processes import in_processes
from support.training import PARAMS, Killed, kill_at, remembered, trainable, tune

STEPS = 40
TESTED = 0.5  # a share that lets a short training search


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "SHARE", TESTED)


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
    for steps in [*range(120, 700), 1000, 5000, 100_000]:
        rounds = plan_rounds(steps)
        assert sum(each.steps for each in rounds) <= SHARE * steps == 0.15 * steps
        assert [each.candidates for each in rounds] == [len(COARSE), len(FINE)]
    deep = [plan_rounds(steps)[-1].until for steps in (120, 172, 306, 500, 1000)]
    assert deep == sorted(deep) and deep[0] == 5
    with pytest.raises(UserError, match=r"this training's 119 .* \(120 or more are needed\)"):
        plan_rounds(119)


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
    (_, first, _), (_, until, _) = plan_rounds(STEPS)
    training = result.step_tokens
    assert done[searched:] == training
    # the first step is the same for all; every candidate has the rows of the training's first steps
    expected = training[:1] + len(COARSE) * training[1:first] + len(FINE) * training[1:until]
    assert done[:searched] == expected and len(set(training[:until])) > 1


@pytest.mark.parametrize(
    ("call", "kept"), [(1, 0), (2, 0), (3, 1), (6, 4), (8, 5), (11, 6), (18, 7)]
)
@pytest.mark.usefixtures("short")
def test_a_killed_search_goes_on_and_finds_the_same(
    base: Base,
    tokenizer: Any,
    rows: list[Any],
    whole: Callable[..., TrainingResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: int,
    kept: int,
) -> None:
    expected = whole()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, "training_step", call, False)
        fit(base, tokenizer, rows, tmp_path / "killed")
    file = tmp_path / "killed" / learning_rate.FILE
    assert len(json.loads(file.read_text())["candidates"] if file.is_file() else []) == kept
    trained: list[float] = []
    go_on = learning_rate._Candidates.train
    with monkeypatch.context() as patch:
        patch.setattr(
            learning_rate._Candidates,
            "train",
            lambda self, rate, steps: trained.append(rate) or go_on(self, rate, steps),
        )
        again = fit(base, tokenizer, rows, tmp_path / "killed")
    assert expected.search is not None and again.search is not None
    assert again.search.rate == expected.search.rate
    assert again.search.losses == expected.search.losses
    assert torch.equal(trainable(again.model), trainable(expected.model))
    assert len(trained) == sum(each.candidates for each in plan_rounds(STEPS)) - kept


@pytest.mark.usefixtures("short")
def test_a_training_that_goes_on_does_not_search_again(
    base: Base, tokenizer: Any, rows: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"checkpoint_every_steps": 10}
    whole = fit(base, tokenizer, rows, tmp_path / "whole", **changes)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, "training_step", 18 + 26, False)
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
    monkeypatch.setattr(learning_rate, "COARSE", (*COARSE[:4], 1e30))
    found = fit(base, tokenizer, rows, tmp_path).search
    assert found is not None and found.rate <= 2 * COARSE[3]
    assert [row["learning_rate"] for row in found.losses if row["loss"] is None] == [1e30]
    again = learning_rate._read(tmp_path / learning_rate.FILE)[0]
    assert [rate for (_, rate), losses in again.items() if None in losses] == [1e30]
    monkeypatch.setattr(learning_rate, "COARSE", tuple(10.0**n for n in range(30, 35)))
    with pytest.raises(UserError, match=r"no rate from 1e\+30 to 1e\+34 had a finite loss"):
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


def test_a_candidates_rate_rises_and_falls_to_zero() -> None:
    assert [factor(step, 8) for step in range(9)] == pytest.approx(
        [1 / 2, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]
    )
    assert [factor(step, 2) for step in range(3)] == [1, 1, 0]


@pytest.mark.parametrize("lowest", [1e-3, 1.3e-3, 7.5e-4])
def test_the_rate_is_the_lowest_point_of_a_parabola(lowest: float) -> None:
    scores = {rate: 2 + math.log(rate / lowest) ** 2 for rate in (2e-3, 5e-4, 1e-3)}
    assert lowest_point(scores, 9.0) == pytest.approx(lowest, rel=1e-3)


def test_a_rate_that_is_worse_than_no_training_counts_as_none() -> None:
    even = lowest_point({1e-3: 3.0, 2e-3: 2.0, 4e-3: 3.0}, 3.0)
    assert even == pytest.approx(2e-3)
    for bad in (99.0, math.inf):
        assert lowest_point({1e-3: 3.0, 2e-3: 2.0, 4e-3: bad}, 3.0) == even
        assert 1e-3 < lowest_point({1e-3: 2.5, 2e-3: 2.0, 4e-3: bad}, 3.0) < even


def test_the_rate_is_at_an_end_or_between_equals() -> None:
    assert lowest_point({1e-3: 3.0, 2e-3: 2.0, 4e-3: 1.5}, 9.0) == 4e-3
    assert lowest_point({1e-3: 1.0, 2e-3: 2.0, 4e-3: 3.5}, 9.0) == 1e-3
    assert lowest_point({1e-3: 2.0, 2e-3: 2.0, 4e-3: 2.0}, 9.0) in (1e-3, 2e-3)
    assert lowest_point({1e-3: 9.0, 2e-3: 8.0, 4e-3: 9.5}, 3.0) == 2e-3  # none learns
    assert best_of({4e-3: 2.0, 1e-3: 1.0, 2e-3: math.inf}) == 1e-3


def test_longer_trainings_have_lower_rates() -> None:
    assert rate_for(8, 3e-3, 8) == 3e-3
    assert rate_for(8 * 27, 3e-3, 8) == 1e-3
    assert rate_for(8 * 1000, 3e-3, 8) == 3e-4
