"""A training by several processes is that of one: rows, losses, adapter, also after a kill."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from fintune import processes
from fintune.errors import UserError
from fintune.model.likelihood import likelihood
from fintune.model.sharding import is_sharded
from fintune.params import Base
from fintune.training.trainer import AnswerTrainer, split_evenly
from support.processes import in_processes
from support.training import PARAMS, Killed, kill_at, remembered, trainable, tune


def fit(base: Base, tokenizer: Any, rows: Any, scratch: Path, **changes: Any) -> dict[str, Any]:
    """Train for a few steps; return what must not depend on the number of processes."""
    params = PARAMS.model_copy(update={"rows_per_step": 6, "validate_every_steps": 2} | changes)
    sharded = params.parallel == "fsdp" and processes.count() > 1
    logged: list[tuple[int, dict[str, float]]] = []
    result = tune(
        base,
        tokenizer,
        rows,
        params,
        scratch,
        validate=lambda model, _: {"loss": likelihood(model, rows[:9], "v").loss},
        on_log=lambda step, values: logged.append((step, values)),
        sharded=sharded,
    )
    assert is_sharded(result.model) == sharded
    if sharded:  # each layer has been left, and a process holds its part of the weights
        named = result.model.named_parameters()
        large = [w for n, w in named if ".layers." in n and n.endswith("base_layer.weight")]
        assert len(large) == 14 and all(isinstance(weight, DTensor) for weight in large)
        shares = {weight.numel() / weight.to_local().numel() for weight in large}
        assert shares == {processes.count()}
    return {
        "losses": [values["loss"] for _, values in logged if "loss" in values],
        "validation": [v["validation_loss"] for _, v in logged if "validation_loss" in v],
        "adapter": trainable(result.model),
        "step_tokens": result.step_tokens,
        "metrics": result.metrics,
        "kernels": result.plan.kernels,
    }


def assert_same(
    found: dict[str, Any],
    expected: dict[str, Any],
    within: float = 1e-5,
    weights: float | None = None,
) -> None:
    for name in ("losses", "validation"):
        assert len(found[name]) == len(expected[name]) > 0
        assert found[name] == pytest.approx(expected[name], abs=within), name
    assert torch.allclose(found["adapter"], expected["adapter"], rtol=0, atol=weights or within)
    assert found["step_tokens"] == expected["step_tokens"]
    assert found["metrics"]["train_loss"] == pytest.approx(expected["metrics"]["train_loss"])


@pytest.fixture(scope="module")
def whole(
    base: Base, tokenizer: Any, rows: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Any]]:
    """Return a function that trains in this process alone."""
    folder = tmp_path_factory.mktemp
    return remembered(lambda **given: fit(base, tokenizer, rows, folder("whole"), **given))


WAYS: dict[str, dict[str, Any]] = {
    "fused": {"tokens_per_pass": 100},
    "4 bits": {"quantization": "nf4"},
    "plain": {"kernels": "plain", "checkpointing": "full"},
    "padded": {"attention": "padded"},
    "fewer rows than processes": {"rows_per_step": 1},
    "decay": {"weight_decay": 0.1, "keep": "last"},
    "fsdp": {"parallel": "fsdp"},
    "fsdp, 4 bits": {"parallel": "fsdp", "quantization": "nf4", "checkpointing": "full"},
    "fsdp, passes": {"parallel": "fsdp", "tokens_per_pass": 60, "rows_per_step": 5},
    "fsdp, plain": {"parallel": "fsdp", "kernels": "plain"},
    "fsdp, padded 4 bits": {
        **{"parallel": "fsdp", "attention": "padded", "quantization": "nf4"},
        "checkpointing": "full",
    },
}


@pytest.mark.parametrize("changes", WAYS.values(), ids=WAYS)
def test_two_processes_train_as_one(
    base: Base,
    tokenizer: Any,
    rows: list[Any],
    whole: Callable[..., dict[str, Any]],
    tmp_path: Path,
    changes: dict[str, Any],
) -> None:
    alone = whole(**changes)

    def work() -> dict[str, Any]:
        return fit(base, tokenizer, rows, tmp_path / "two", **changes)

    first, second = in_processes(2, work, tmp_path / "results")
    assert_same(first, alone)
    assert torch.equal(first["adapter"], second["adapter"])
    assert first["metrics"]["processes"] == 2 and alone["metrics"]["processes"] == 1
    assert first["metrics"]["best_step"] == second["metrics"]["best_step"]


@pytest.mark.parametrize("way", ["fused", "fsdp", "fsdp, 4 bits"])
def test_eight_processes_train_as_one(
    base: Base,
    tokenizer: Any,
    rows: list[Any],
    whole: Callable[..., dict[str, Any]],
    tmp_path: Path,
    way: str,
) -> None:
    """Some of them have no row of a step."""
    alone = whole(**WAYS[way])

    def work() -> dict[str, Any]:
        return fit(base, tokenizer, rows, tmp_path / "eight", **WAYS[way])

    for each in in_processes(8, work, tmp_path / "results"):
        # sums of eight parts round otherwise, and Adam's first steps enlarge what is near zero
        assert_same(each, alone, weights=2e-5)
        assert each["metrics"]["processes"] == 8


def test_a_sharded_layer_is_whole_only_while_it_is_computed(
    base: Base, tokenizer: Any, rows: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> list[int]:
        step, whole = AnswerTrainer.training_step, []

        def noting(self: Any, *arguments: Any) -> Any:
            loss = step(self, *arguments)
            named = self.model.named_parameters()
            large = [w for n, w in named if ".layers." in n and n.endswith("base_layer.weight")]
            whole.append(sum(not isinstance(weight, DTensor) for weight in large))
            return loss

        monkeypatch.setattr(AnswerTrainer, "training_step", noting)
        fit(base, tokenizer, rows, tmp_path / "scratch", parallel="fsdp", max_steps=2)
        return whole

    assert in_processes(2, work, tmp_path / "results") == [[0, 0], [0, 0]]


def test_a_killed_training_goes_on_with_another_number_of_processes(
    base: Base, tokenizer: Any, rows: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"max_steps": 6, "schedule": "cosine"}
    alone = fit(base, tokenizer, rows, tmp_path / "one", **changes)

    def killed() -> None:
        kill_at(monkeypatch, "training_step", 4, True)
        with pytest.raises(Killed):
            fit(base, tokenizer, rows, tmp_path / "killed", **changes)

    in_processes(2, killed, tmp_path / "results")
    assert_last(fit(base, tokenizer, rows, tmp_path / "killed", **changes), alone)

    def work() -> dict[str, Any]:
        return fit(base, tokenizer, rows, tmp_path / "again", **changes)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, "training_step", 4, True)
        work()
    assert_last(in_processes(3, work, tmp_path / "results")[0], alone)


def assert_last(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Hold a training that went on against one that was not killed."""
    assert torch.allclose(found["adapter"], expected["adapter"], rtol=0, atol=1e-5)
    assert 0 < len(found["losses"]) < len(expected["losses"])
    assert found["losses"] == pytest.approx(expected["losses"][-len(found["losses"]) :], abs=1e-5)
    for name in ("train_loss", "validation_loss", "steps"):
        assert found["metrics"][name] == pytest.approx(expected["metrics"][name], abs=1e-5), name


def test_only_the_first_process_writes(
    base: Base, tokenizer: Any, rows: list[Any], tmp_path: Path
) -> None:
    def work() -> list[str]:
        folder = tmp_path / f"process-{processes.rank()}"
        # each has its own folder here, so that what it writes is known
        found = fit(base, tokenizer, rows, folder, keep="last", max_steps=2)
        assert math.isfinite(found["metrics"]["validation_loss"])
        return sorted(path.name for path in folder.glob("checkpoint-*"))

    assert in_processes(2, work, tmp_path / "results") == [["checkpoint-2"], []]


def test_dropout_differs_between_processes_and_the_order_of_the_rows_does_not(
    base: Base, tokenizer: Any, rows: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> tuple[list[int], list[int]]:
        seeds, tokens = [], []
        gradients = AnswerTrainer._gradients

        def noting(self: Any, rows: Any, *arguments: Any) -> Any:
            seeds.append(torch.initial_seed())
            return gradients(self, rows, *arguments)

        monkeypatch.setattr(AnswerTrainer, "_gradients", noting)
        lora = PARAMS.lora.model_copy(update={"dropout": 0.1})
        found = fit(base, tokenizer, rows, tmp_path / "scratch", lora=lora)
        tokens = found["step_tokens"]
        return seeds, tokens

    (first, tokens), (second, same_tokens) = in_processes(2, work, tmp_path / "results")
    assert not set(first) & set(second) and len(set(first)) == len(first)
    assert tokens == same_tokens


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_a_step_is_split_evenly_and_no_row_is_lost(parts: int) -> None:
    lengths = [5, 100, 30, 31, 8, 60, 7, 44]
    split = split_evenly(lengths, parts)
    assert sorted(i for part in split for i in part) == list(range(len(lengths)))
    sizes = [sum(lengths[i] for i in part) for part in split]
    assert max(sizes) - min(sizes) <= max(lengths)


def test_another_number_of_processes_than_was_asked_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"3 processes are asked for, and 2 were started"):
        in_processes(2, lambda: None, tmp_path, wanted=3)
    with pytest.raises(AssertionError, match=r"1 process is asked for, and 2 were started"):
        in_processes(2, lambda: None, tmp_path, wanted=1)


def test_processes_that_differ_are_refused(tmp_path: Path) -> None:
    def work() -> str:
        with pytest.raises(UserError, match=r"differ in the data: [01] and [01]") as error:
            processes.check_same({"the data": processes.rank()})
        return str(error.value)

    assert all("a file system that all" in text for text in in_processes(2, work, tmp_path))
