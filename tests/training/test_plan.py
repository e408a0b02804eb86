"""The execution plan: choices of `auto`, refusals, and the accuracy of the memory estimate."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from fintune.errors import UserError
from fintune.model.sizes import ModelSize
from fintune.params import Train
from fintune.training.memory import estimate_memory_gib
from fintune.training.plan import Plan, fits_whole, plan_execution

ROOT = Path(__file__).parents[2]
RECIPE = Train.model_validate(
    YAML(typ="safe").load((ROOT / "recipes/mistral-7b.yaml").read_text())["train"]
)
SIZE = ModelSize(
    hidden=4096,
    intermediate_size=14336,
    layers=32,
    q_dim=4096,
    kv_dim=1024,
    heads=32,
    vocabulary=32002,
    rank=16,
    tuned=tuple(RECIPE.lora.target_modules),
)
LENGTHS = [60, 120, 200, 260, 340, 600] * 500


def plan(
    free_gib: float,
    on_gpu: bool = True,
    unsupported: str | None = None,
    size: ModelSize = SIZE,
    has_fp8: bool = False,
    processes: int = 1,
    sharded: bool = False,
    **changes: Any,
) -> Plan:
    params = RECIPE.model_copy(update=changes)
    how: dict[str, Any] = {"has_fp8": has_fp8, "processes": processes, "sharded": sharded}
    return plan_execution(size, params, LENGTHS, 2, free_gib, on_gpu, unsupported, **how)


def test_processes_share_the_rows_of_a_step_and_sharded_ones_the_base() -> None:
    alone = plan(139, tokens_per_pass=100_000)
    two = plan(139, tokens_per_pass=100_000, processes=2)
    assert two.memory["activations"] == pytest.approx(alone.memory["activations"] / 2, rel=0.01)
    assert two.memory["weights"] == alone.memory["weights"]
    assert (alone.parallel, two.parallel) == ("none", "ddp")
    whole = plan(139, dequantize="always").memory["weights"]
    shared = plan(139, processes=4, sharded=True)
    tables = 2 * SIZE.vocabulary * SIZE.hidden * 2 / 2**30
    share = 1 / 4 + 2 / SIZE.layers  # two layers are whole
    assert shared.memory["weights"] == pytest.approx((whole - tables) * share + tables, abs=0.01)
    assert shared.parallel == "fsdp" and shared.dequantize == "always"
    with pytest.raises(UserError, match="not with fsdp"):
        plan(139, processes=4, sharded=True, dequantize="once")
    assert not plan(139, processes=4, sharded=True, has_fp8=True).fp8


def test_a_base_is_sharded_where_the_smallest_execution_does_not_fit() -> None:
    sixteen = RECIPE.model_copy(update={"quantization": "none"})
    assert fits_whole(SIZE, RECIPE, 600, 2, 8.0) and not fits_whole(SIZE, RECIPE, 600, 2, 4.0)
    assert fits_whole(SIZE, sixteen, 600, 2, 24.0) and not fits_whole(SIZE, sixteen, 600, 2, 13.0)


def test_large_bases_are_multiplied_in_fp8_where_the_gpu_can() -> None:
    """Where its codes take the place of the 16-bit weights: not in little memory, and not without 4 bits."""
    assert plan(139, has_fp8=True).fp8 and "products in FP8" in str(plan(139, has_fp8=True))
    assert plan(139, has_fp8=True).peak_gib == plan(139).peak_gib
    assert not plan(139).fp8
    assert not plan(16, has_fp8=True).fp8
    assert not plan(139, has_fp8=True, products="bfloat16").fp8
    assert not plan(139, has_fp8=True, quantization="none").fp8
    assert not plan(139, has_fp8=True, kernels="plain").fp8
    small = replace(SIZE, hidden=576, intermediate_size=1536, q_dim=576, kv_dim=192)
    assert not plan(139, has_fp8=True, size=small).fp8
    assert plan(139, has_fp8=True, size=small, products="fp8").fp8


def test_passes_of_small_bases_are_captured_on_a_gpu() -> None:
    small = replace(SIZE, hidden=2048, intermediate_size=8192, q_dim=2048, kv_dim=512, layers=16)
    assert plan(139, size=small).graphs and "CUDA graphs" in str(plan(139, size=small))
    assert not plan(139).graphs
    assert not plan(139, size=small, on_gpu=False).graphs
    assert not plan(139, size=small, kernels="plain").graphs
    assert not plan(139, size=small, checkpointing="full").graphs


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"has_fp8": False}, "it needs a GPU from Ada or Hopper on"),
        ({"kernels": "plain"}, "only fused kernels"),
        ({"quantization": "none"}, "16-bit weights of a 4-bit base"),
        ({"dequantize": "always"}, "dequantize: once"),
        ({"size": replace(SIZE, intermediate_size=14_340)}, "no multiples of 16"),
    ],
)
def test_fp8_that_cannot_be_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=rf"train\.products: fp8: .*{reason}.*; set auto"):
        plan(139, **{"has_fp8": True, "products": "fp8"} | changes)


def test_the_shape_counts_what_mistral_has() -> None:
    assert SIZE.linear_weights == 6_979_321_856  # 7,241,732,096 less embedding, head and norms
    assert SIZE.adapter_weights == 41_943_040


def test_more_memory_never_means_more_work() -> None:
    plans = [plan(free) for free in (7, 8, 12, 16, 24, 40, 80, 139)]
    modes = [("full", "selective", "none").index(p.checkpointing) for p in plans]
    assert modes[0] == 0
    assert modes[-1] == 2
    assert plans[-1].passes == 1
    for free, p in zip((7, 8, 12, 16, 24, 40, 80, 139), plans, strict=True):
        assert p.peak_gib < free
        assert p.kernels == "fused"
        assert p.attention == "varlen"


def test_few_large_passes_are_better_than_less_work_in_many_small_ones() -> None:
    """Measured in 8 GiB: full in two micro-batches 9,300 tokens/s, selective in eight 6,600."""
    chosen = plan(8)
    assert chosen.checkpointing == "full"
    assert chosen.passes <= 4


def test_it_says_what_it_chose() -> None:
    text = str(plan(139))
    assert "varlen attention, fused kernels, checkpointing none, dequantize once, 1 pass" in text
    for part in ("weights 16.8", "adapter and optimizer", "activations", "logits"):
        assert part in text


def test_every_choice_can_be_overridden() -> None:
    chosen = plan(
        139, checkpointing="full", tokens_per_pass=1000, kernels="plain", attention="sdpa"
    )
    assert (chosen.checkpointing, chosen.tokens_per_pass) == ("full", 1000)
    assert (chosen.kernels, chosen.attention) == ("plain", "sdpa")
    assert chosen.passes > 5
    assert plan(139, attention="padded").kernels == "plain"


def test_kept_weights_need_a_4_bit_base_and_room() -> None:
    small = plan(139, dequantize="always").memory["weights"]
    assert plan(139, dequantize="once").memory["weights"] == pytest.approx(small + 13, abs=0.1)
    assert plan(16).dequantize == plan(139, quantization="none").dequantize == "always"
    with pytest.raises(UserError, match=r"train\.dequantize: once: only fused kernels"):
        plan(139, dequantize="once", kernels="plain")


def test_no_row_is_cut_by_a_small_pass() -> None:
    """A limit below the longest row is estimated with that row."""
    small, row = plan(139, tokens_per_pass=10), plan(139, tokens_per_pass=600)
    assert small.peak_gib == row.peak_gib


def test_without_a_gpu() -> None:
    assert plan(64, on_gpu=False).attention == "sdpa"
    with pytest.raises(UserError, match=r"train\.attention: varlen needs a GPU"):
        plan(64, on_gpu=False, attention="varlen")


def test_other_architectures_take_the_plain_layers() -> None:
    assert plan(139, unsupported="a base of type gpt_neox").kernels == "plain"
    with pytest.raises(UserError, match=r"train\.kernels: fused: .* a base of type gpt_neox"):
        plan(139, unsupported="a base of type gpt_neox", kernels="fused")


def test_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"weights take 3\.8 GiB and 3\.0 GiB are free; .*smaller base"
    ):
        plan(3.0)
    with pytest.raises(UserError, match=r"weights take 13\.5 GiB"):
        plan(10, quantization="none")


def test_too_little_for_the_rest_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    chosen = plan(4.5)
    assert chosen.checkpointing == "full"
    assert "GiB at least and 4.5 GiB are free" in caplog.text


def test_the_estimate_is_within_a_tenth_of_the_measured_peaks() -> None:
    """Of the runs recorded by `benchmarks/training_speed.py`, except the one that ran out of memory."""
    last = json.loads((ROOT / "benchmarks/training_speed.json").read_text())
    compared = set()
    for setting in last["settings"]:
        name = setting["name"]
        if not name.startswith("fused") or name == "fused-oom":
            continue
        mode = setting["plan"].split("checkpointing ")[1].split(",")[0]
        parts = estimate_memory_gib(
            SIZE,
            "none" if name == "fused-16-bit" else "nf4",
            2,
            "fused",
            mode,
            "dequantize once" in setting["plan"],
            setting["largest_pass_tokens"],
        )
        assert sum(parts.values()) == pytest.approx(setting["peak_memory_gib"], rel=0.1), name
        compared.add(name)
    assert len(compared) >= 7
