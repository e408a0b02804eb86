"""The forecast of time against what was measured."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fintune.errors import UserError
from fintune.forecast.machine import Machine, known_machine
from fintune.forecast.seconds import Run, as_time, stage_seconds, step_seconds, training_seconds
from fintune.forecast.workload import Workload
from fintune.model.sizes import ModelSize
from fintune.params import read_params
from fintune.training.plan import Plan
from fintune.training.rates import plan_rounds

ROOT = Path(__file__).parents[2]
RECIPE = read_params(ROOT / "recipes/mistral-7b.yaml")
DEMO = read_params(ROOT / "recipes/demo.yaml")
TUNED = tuple(RECIPE.train.lora.target_modules)
SIZE_7B = ModelSize(4096, 14336, 32, 4096, 1024, 32, 32064, 16, TUNED)
SIZES = {
    "mistral-7b": SIZE_7B,
    "llama3.2-1b": ModelSize(2048, 8192, 16, 2048, 512, 32, 128256, 16, TUNED, True),
    "smollm2-135m": ModelSize(576, 1536, 30, 576, 192, 9, 49216, 16, TUNED, True),
}
DEMO_SIZE = ModelSize(256, 768, 6, 256, 128, 4, 6144, 32, TUNED)
H100, H200 = (known_machine(gpu, None, 1, "auto") for gpu in ("h100", "h200"))
TWO_CORES = Machine("2 CPU cores", 170e9, 0, 8, False, torch.float32, False, 1)
BYTES_7B = 14_483_000_000
FIQA = Workload(5504, 306, 306, [263], [190])
BENCHMARKS = ROOT / "benchmarks"


def plan(**changes: Any) -> Plan:
    made = Plan("varlen", "fused", "none", "once", False, False, 20_000, 1, {})
    return replace(made, **changes)


def speed(
    size: ModelSize, made: Plan, dropout: float = 0.0, rows: int = 32, on: Machine = H100
) -> float:
    """Return tokens a second with FiQA's lengths."""
    lora = RECIPE.train.lora.model_copy(update={"dropout": dropout})
    train = RECIPE.train.model_copy(update={"lora": lora})
    tokens = rows * 258.75
    return tokens / step_seconds(Run(size, made, on, 0), train, tokens, 0.6)


def measured(file: str, name: str, part: str | None = None) -> float:
    record = json.loads((BENCHMARKS / file).read_text())
    settings = (record[part] if part else record)["settings"]
    (found,) = [each for each in settings if each["name"] == name]
    return float(found["tokens_per_second"])


@pytest.mark.parametrize(
    ("name", "made", "dropout"),
    [
        ("fused", plan(), 0.0),
        ("fused-dropout", plan(), 0.1),
        ("fused-always", plan(dequantize="always"), 0.0),
        ("fused-selective", plan(checkpointing="selective", dequantize="always"), 0.0),
        ("fused-full", plan(checkpointing="full", dequantize="always"), 0.0),
        ("plain", plan(kernels="plain", dequantize="always"), 0.0),
    ],
)
def test_training_of_a_7b_is_as_fast_as_measured(name: str, made: Plan, dropout: float) -> None:
    expected = measured("training_speed.json", name)
    assert speed(SIZE_7B, made, dropout) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("base", "name", "made", "dropout"),
    [
        ("llama3.2-1b", "fused", plan(graphs=True), 0.0),
        ("llama3.2-1b", "fused-fp8", plan(graphs=True, fp8=True), 0.0),
        ("llama3.2-1b", "fused-fp8-dropout", plan(graphs=True, fp8=True), 0.1),
        ("llama3.2-1b-before", "fused-launched", plan(), 0.0),
        ("smollm2-135m", "fused", plan(graphs=True), 0.0),
        ("smollm2-135m", "fused-dropout", plan(graphs=True), 0.1),
        ("smollm2-135m-before", "fused-launched", plan(), 0.0),
    ],
)
def test_small_bases_are_as_fast_as_measured(
    base: str, name: str, made: Plan, dropout: float
) -> None:
    expected = measured("training_speed_small.json", name, base)
    size = SIZES[base.removesuffix("-before")]
    assert speed(size, made, dropout) == pytest.approx(expected, rel=0.3)


def test_fp8_and_several_gpus_are_as_fast_as_measured() -> None:
    """docs/performance.md and docs/scale.md have the figures."""
    assert speed(SIZE_7B, plan(fp8=True)) == pytest.approx(24_600, rel=0.1)
    assert speed(SIZE_7B, plan(fp8=True), 0.1) == pytest.approx(22_100, rel=0.15)
    assert speed(SIZE_7B, plan(), on=H200) == pytest.approx(18_272, rel=0.1)
    assert speed(SIZE_7B, plan(processes=2), on=H200) == pytest.approx(33_473, rel=0.12)
    assert speed(SIZE_7B, plan(processes=2), rows=64, on=H200) == pytest.approx(36_151, rel=0.1)
    assert speed(SIZE_7B, plan(fp8=True), on=H200) == pytest.approx(25_652, rel=0.1)
    of_two = plan(fp8=True, processes=2)
    assert speed(SIZE_7B, of_two, rows=64, on=H200) == pytest.approx(50_251, rel=0.1)


def forecast(size: ModelSize, made: Plan, on: Machine, base_bytes: int, recipe: Any) -> Any:
    work = FIQA if recipe is RECIPE else Workload(1998, 154, 306, [90], [20])
    run = Run(size, made, on, base_bytes)
    parts = (recipe.evaluate, recipe.generation, recipe.merge_export)
    stages = stage_seconds(run, recipe.train, work, *parts)
    return training_seconds(run, recipe.train, work), sum(stages.values())


def test_training_by_the_recipe_takes_as_long_as_measured() -> None:
    """98.8 s on one H100, in bfloat16 with dropout."""
    training, _ = forecast(SIZE_7B, plan(), H100, BYTES_7B, RECIPE)
    assert training == pytest.approx(98.8, rel=0.1)


def test_the_recipe_takes_as_long_as_measured() -> None:
    """The base there has random weights, whose answers never end, and a tokenizer of more tokens a row."""
    record = json.loads((BENCHMARKS / "whole_run.json").read_text())
    run, work = Run(SIZE_7B, plan(fp8=True), H100, BYTES_7B), Workload(5489, 308, 300, [317], [384])
    generation = RECIPE.generation.model_copy(update={"max_new_tokens": 384})
    parts = (RECIPE.evaluate, generation, RECIPE.merge_export)
    stages = stage_seconds(run, RECIPE.train, work, *parts)
    assert sum(stages.values()) == pytest.approx(record["seconds"], rel=0.1)
    for name in ("train", "evaluate", "merge_export"):
        assert stages[name] == pytest.approx(record["stage_seconds"][name], rel=0.3), name


def test_the_demo_takes_as_long_as_measured() -> None:
    """187 s on two idle cores, of which 96 s of training."""
    made = plan(attention="sdpa", tokens_per_pass=1624)
    training, everything = forecast(DEMO_SIZE, made, TWO_CORES, 15_700_000, DEMO)
    assert training == pytest.approx(96, rel=0.15)
    assert everything == pytest.approx(187, rel=0.15)


def test_a_7b_without_a_gpu_takes_weeks() -> None:
    made = plan(checkpointing="full", dequantize="always")
    _, everything = forecast(SIZE_7B, made, TWO_CORES, BYTES_7B, RECIPE)
    assert "weeks" in as_time(everything)


def test_times_are_written_as_a_person_would() -> None:
    written = [as_time(seconds) for seconds in (4.4, 95, 900, 9000, 300_000, 1_814_400)]
    assert written == ["4 s", "1 min 35 s", "15 min", "2.5 h", "3.5 days", "3.0 weeks"]


def test_an_unknown_gpu_is_named_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"--gpu: h101: not known; give one of h100, .*rtx4090"):
        known_machine("h101", None, 1, "auto")


def test_a_search_for_the_learning_rate_is_in_the_forecast() -> None:
    run = Run(SIZE_7B, plan(), H100, BYTES_7B)
    twice = RECIPE.train.model_copy(update={"epochs": 2.0})
    plain = training_seconds(run, twice, FIQA)
    auto = twice.model_copy(update={"learning_rate": "auto"})
    steps = sum(each.steps for each in plan_rounds(344))
    step = step_seconds(run, auto, 32 * FIQA.tokens, FIQA.answer_tokens / FIQA.tokens)
    searched = training_seconds(run, auto, FIQA)
    assert searched == pytest.approx(plain + steps * step) and plain < searched < 1.15 * plain
    few = auto.model_copy(update={"max_steps": 10})
    with pytest.raises(UserError, match=r"train.learning_rate: auto: .* this training's 10 "):
        training_seconds(run, few, FIQA)
