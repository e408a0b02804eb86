"""The fused layers against transformers' and PEFT's own, and against float64."""

import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import silu

from fintune.data.prompt import encode, end_token_id
from fintune.generation.decoding import Decoding
from fintune.generation.generate import generate
from fintune.hardware import has_fp8
from fintune.model.adapter import add_adapter
from fintune.model.base import load_base
from fintune.model.batch import pack
from fintune.model.fused.families import unsupported
from fintune.model.fused.graphs import Graphs
from fintune.model.fused.model import FusedModel
from fintune.model.fused.ops import (
    cross_entropy_,
    gated,
    gated_backward,
    rms_norm,
    rms_norm_backward,
    rotate,
    rotate_backward,
)
from fintune.model.likelihood import likelihood
from fintune.params import Base, Lora

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TEXTS = [
    (f"Input: {n}?\n<response>", f"{n} is " + "so " * n + "<response|end>") for n in range(1, 9)
]


def distance(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Compute the relative distance in the Frobenius norm."""
    return float((ours.double() - reference.double()).norm() / reference.double().norm())


def adapted(
    base: Base, tokenizer: Any, quantization: str = "none", tuned: list[str] = ALL, **changes: Any
) -> Any:
    """Build a model in training mode with random adapter and token rows."""
    lora = Lora(r=4, alpha=8, dropout=changes.pop("dropout", 0.0), target_modules=tuned)
    model = load_base(base, tokenizer, quantization, changes.pop("dtype", torch.float32))
    for name, value in changes.items():
        setattr(model.config, name, value)
        for layer in model.get_decoder().layers:
            setattr(layer.self_attn, name, value)
    model = add_adapter(model, tokenizer, lora, 0).train()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return model


def plain_loss(model: Any, part: Any) -> torch.Tensor:
    """Run each document separately through the unmodified model, in the type of its weights."""
    total = torch.zeros((), dtype=torch.float64)
    starts = part.packed.cu_seqlens.tolist()
    where, targets = part.predicting.tolist(), part.targets.tolist()
    for start, end in pairwise(starts):
        logits = model(part.ids[:, start:end], use_cache=False).logits[0]
        mine = [(w - start, t) for w, t in zip(where, targets, strict=True) if start <= w < end]
        places, wanted = (torch.tensor(column) for column in zip(*mine, strict=True))
        loss = torch.nn.functional.cross_entropy(logits[places], wanted, reduction="sum")
        total = total + loss
    return total


def fused_loss(model: Any, part: Any, checkpointing: str, keep: bool = False) -> torch.Tensor:
    return loss_of(FusedModel(model, torch.float32, checkpointing, keep), part)


def loss_of(fused: FusedModel, part: Any) -> torch.Tensor:
    states = fused.hidden_states(part.ids[0], part.positions[0], part.packed)
    return fused.answer_loss(states.index_select(0, part.predicting), part.targets)


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tuned": ["q_proj", "v_proj"]},
        {"tuned": ["up_proj", "o_proj"]},
        {"quantization": "nf4"},
        {"quantization": "nf4", "keep": True},
        {"quantization": "nf4", "keep": True, "tuned": ["k_proj", "down_proj"]},
        {"sliding_window": 5},
    ],
    ids=str,
)
def test_loss_and_gradients_are_the_plain_model_s(
    base: Base, tokenizer: Any, changes: dict[str, Any], checkpointing: str
) -> None:
    """In float64 without 4-bit weights; bitsandbytes computes those in float32 at most."""
    keep = changes.get("keep", False)
    changes = {key: value for key, value in changes.items() if key != "keep"}
    model = adapted(base, tokenizer, **changes)
    part = pack([encode(tokenizer, *t) for t in TEXTS], torch.device("cpu"))
    loss = fused_loss(model, part, checkpointing, keep)
    ours = gradients(model, loss)
    if "quantization" not in changes:
        model = model.double()
    reference = plain_loss(model, part)
    expected = gradients(model, reference)
    assert loss.item() == pytest.approx(reference.item(), rel=2e-6)
    assert set(ours) == set(expected)
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        assert distance(ours[name], gradient) < 2e-5, name


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_cached_weights_follow_the_optimizer(base: Base, tokenizer: Any, dropout: float) -> None:
    model = adapted(base, tokenizer, "nf4", dropout=dropout)
    part = pack([encode(tokenizer, *t) for t in TEXTS], torch.device("cpu"))
    cached = FusedModel(model, torch.float32, cache_weights=True)
    anew = FusedModel(model, torch.float32, cache_weights=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    seen = []
    for _ in range(3):
        losses = []
        for fused in (cached, anew):
            torch.manual_seed(3)
            losses.append(loss_of(fused, part))
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
        seen.append(losses[0].item())
        optimizer.zero_grad()
        (losses[0] / 100).backward()
        optimizer.step()
        cached.sync_parameters()
        anew.sync_parameters()
    assert len(set(seen)) == 3


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_it_computes_with_the_adapter_that_is_switched_on(
    base: Base, tokenizer: Any, quantization: str, tmp_path: Path
) -> None:
    model = adapted(base, tokenizer, quantization).eval()
    part = pack([encode(tokenizer, *t) for t in TEXTS], torch.device("cpu"))

    def losses() -> tuple[float, float]:
        fused = FusedModel(model, torch.float32, training=False)
        return loss_of(fused, part).item(), plain_loss(model, part).item()

    tuned = losses()
    with model.disable_adapter():
        bare = losses()
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(0.5)
    model.load_adapter(str(tmp_path), "other")
    halved = losses()
    model.set_adapter("other")
    other = losses()
    for ours, plain in (tuned, bare, halved, other):
        assert ours == pytest.approx(plain, rel=1e-5)
    assert other == pytest.approx(tuned, rel=1e-4)
    assert len({round(ours, 3) for ours, _ in (tuned, bare, halved)}) == 3


def test_documents_do_not_see_each_other(base: Base, tokenizer: Any) -> None:
    model = adapted(base, tokenizer)
    rows = [encode(tokenizer, *text) for text in TEXTS[:3]]
    other = [encode(tokenizer, *text) for text in (TEXTS[0], TEXTS[5], TEXTS[2])]
    fused = FusedModel(model, torch.float32, "none")
    found = []
    for group in (rows, other):
        part = pack(group, torch.device("cpu"))
        states = fused.hidden_states(part.ids[0], part.positions[0], part.packed)
        starts = part.packed.cu_seqlens.tolist()
        found.append((states[: starts[1]], states[starts[2] :]))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_dropout_keeps_the_mean_and_its_gradient_is_of_the_same_draw(
    base: Base, tokenizer: Any, quantization: str
) -> None:
    model = adapted(base, tokenizer, quantization, dropout=0.3)
    part = pack([encode(tokenizer, *t) for t in TEXTS], torch.device("cpu"))
    torch.manual_seed(5)
    losses = [fused_loss(model, part, "none").item() for _ in range(60)]
    assert len(set(losses)) == 60
    without = fused_loss(adapted(base, tokenizer, quantization), part, "none").item()
    error = torch.tensor(losses).std() / 60**0.5
    assert abs(sum(losses) / 60 - without) < 4 * error + 0.01 * without

    def drawn(checkpointing: str = "none") -> torch.Tensor:
        torch.manual_seed(7)
        return fused_loss(model, part, checkpointing)

    ours = gradients(model, drawn())
    again = gradients(model, drawn("full"))
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or "lora_" not in name:
            continue
        assert torch.allclose(ours[name], again[name], rtol=1e-4, atol=1e-6), name
        step = 1e-2 * ours[name] / ours[name].norm()
        with torch.no_grad():
            parameter += step
            above = drawn().double()
            parameter -= 2 * step
            below = drawn().double()
            parameter += step
        slope = float(above - below) / 2e-2
        assert slope == pytest.approx(float(ours[name].norm()), rel=0.05, abs=2e-3), name


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_each_backward_function_is_the_derivative() -> None:
    """Against autograd on the forward functions, in float64 where they support it."""
    torch.manual_seed(0)
    x, weight, dy, skip = random(5, 16), random(16), random(5, 16), random(5, 16)
    check(lambda t: rms_norm(t, weight.float(), 1e-5), x, dy,
          lambda t, g: rms_norm_backward(t, weight.float(), 1e-5, g, torch.zeros_like(t)))  # fmt: skip
    shifted = rms_norm_backward(*(t.float() for t in (x, weight)), 1e-5, dy.float(), skip.float())
    bare = rms_norm_backward(*(t.float() for t in (x, weight)), 1e-5, dy.float(), skip.float() * 0)
    assert torch.allclose(shifted - bare, skip.float(), atol=1e-5)
    gate_up = random(5, 16).float()
    for gelu, act in (
        (False, silu),
        (True, lambda t: torch.nn.functional.gelu(t, approximate="tanh")),
    ):
        check(lambda t, g=gelu: gated(t, g), random(5, 16), random(5, 8),
              lambda t, d, g=gelu: gated_backward(t, d, g)[1])  # fmt: skip
        expected = act(gate_up[:, :8]) * gate_up[:, 8:]
        assert torch.allclose(gated(gate_up, gelu), expected, atol=1e-6)
        found = gated_backward(gate_up, gate_up[:, :8], gelu)[0]
        assert torch.allclose(found, expected, atol=1e-6)
    angle = random(5, 4).float()
    cos, sin = (torch.cat((f(angle), f(angle)), dim=-1) for f in (torch.cos, torch.sin))
    check(lambda t: rotate(t, cos, sin, 2, 1), random(5, 32), random(5, 4, 8),
          lambda t, g: rotate_backward(g[:, :2], g[:, 2:3], g[:, 3:], cos, sin))  # fmt: skip
    norms = (random(8).float(), random(8).float())
    check(lambda t: rotate(t, cos, sin, 2, 1, norms, 1e-5), random(5, 32), random(5, 4, 8),
          lambda t, g: rotate_backward(g[:, :2], g[:, 2:3], g[:, 3:], cos, sin, t, norms, 1e-5))  # fmt: skip


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_loss_leaves_its_gradient(softcap: float | None) -> None:
    torch.manual_seed(0)
    logits, targets = random(6, 50).float().requires_grad_(), torch.randint(0, 50, (6,))
    limited = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = torch.nn.functional.cross_entropy(limited, targets, reduction="none")
    expected.sum().backward()
    found = logits.detach().clone()
    assert torch.allclose(cross_entropy_(found, targets, softcap), expected, atol=1e-5)
    assert logits.grad is not None and torch.allclose(found, logits.grad, atol=1e-6)


def check(
    forward: Callable[..., torch.Tensor],
    x: torch.Tensor,
    dy: torch.Tensor,
    backward: Callable[..., Any],
) -> None:
    x = x.float().requires_grad_()
    forward(x).backward(dy.float())
    assert x.grad is not None
    assert distance(backward(x.detach(), dy.float()), x.grad) < 1e-6


def test_other_architectures_are_named(base: Base, tokenizer: Any) -> None:
    model = adapted(base, tokenizer)
    assert unsupported(model) is None
    model.get_base_model().config.model_type = "gpt_neox"
    assert unsupported(model) == "a base of type gpt_neox"


KERNELS = """
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from fintune.model.fused import kernels
from fintune.model.fused import ops as fused

torch.manual_seed(0)
if torch.cuda.is_available():
    torch.set_default_device("cuda")

def compare(name, ours, reference, limit):
    error = float((ours.double() - reference.double()).norm() / reference.double().norm())
    assert error < limit, (name, error)

for rows, columns, rank in ((40, 320, 4), (64, 256, 0), (33, 64, 20)):
    packed, state = quantize_4bit(
        torch.randn(rows, columns) * 0.02, quant_type="nf4", compress_statistics=True
    )
    lora = (torch.randn(rank, columns) * 0.1, torch.randn(rows, rank) * 0.1) if rank else None
    out = torch.full((rows, columns), float("nan"))
    kernels.dequantize_and_add(packed, kernels.NestedState.of(state), lora, 0.5, out)
    expected = dequantize_4bit(packed, state).double()
    if lora:
        expected = expected + 0.5 * lora[1].double() @ lora[0].double()
    compare("dequantize_and_add", out, expected, 1e-3)

seed, other = torch.tensor(11), torch.tensor(12)
for rows, columns, rank in ((40, 320, 4), (33, 100, 20)):  # in fours
    x, left, right = torch.randn(rows, columns), torch.randn(rows, rank), torch.randn(rank, columns)
    ones = kernels.drop(torch.ones_like(x), 0.3, seed)
    assert set(ones.unique().tolist()) == {0.0, 1.0}
    assert abs(float(ones.mean()) - 0.7) < 0.03
    assert torch.equal(kernels.drop(x, 0.3, seed), x * ones)
    assert not torch.equal(kernels.drop(x, 0.3, other), x * ones)
    expected = x.double() + 2.0 * ones.double() * (left.double() @ right.double())
    kernels.add_dropped_product(x, left, right, 2.0, 0.3, seed)
    compare("add_dropped_product", x, expected, 1e-6)

for tokens, hidden, heads, groups, size in ((5, 48, 3, 1, 8), (7, 64, 4, 4, 16), (3, 96, 9, 3, 12)):
    x, dy, skip = (torch.randn(tokens, hidden) for _ in range(3))
    arguments = (x, torch.randn(hidden), 1e-5)
    compare("rms_norm", kernels.rms_norm(*arguments), fused.rms_norm(*arguments), 1e-6)
    for added in (skip, None):
        found = kernels.rms_norm_backward(*arguments, dy, added)
        compare("rms_norm_backward", found, fused.rms_norm_backward(*arguments, dy, added), 1e-6)
    angle = torch.randn(tokens, size // 2)
    cos, sin = (torch.cat((f(angle), f(angle)), dim=1) for f in (torch.cos, torch.sin))
    qkv = torch.randn(tokens, (heads + 2 * groups) * size)
    arguments = (qkv, cos, sin, heads, groups)
    compare("rotate", kernels.rotate(*arguments), fused.rotate(*arguments), 1e-6)
    parts = torch.randn(tokens, heads + 2 * groups, size).split([heads, groups, groups], dim=1)
    arguments = (*parts, cos, sin)
    found = kernels.rotate_backward(*arguments)
    compare("rotate_backward", found, fused.rotate_backward(*arguments), 1e-6)
    norms = (torch.randn(size), torch.randn(size))
    arguments = (qkv, cos, sin, heads, groups, norms, 1e-5)
    compare("rotate with norms", kernels.rotate(*arguments), fused.rotate(*arguments), 1e-6)
    arguments = (*parts, cos, sin, qkv, norms, 1e-5)
    found = kernels.rotate_backward(*arguments)
    compare("rotate_backward with norms", found, fused.rotate_backward(*arguments), 1e-6)
    gate_up, dy = torch.randn(tokens, 2 * hidden), torch.randn(tokens, hidden)
    for gelu in (False, True):
        compare("gated", kernels.gated(gate_up, gelu), fused.gated(gate_up, gelu), 1e-6)
        found = kernels.gated_backward(gate_up, dy, gelu)
        expected = fused.gated_backward(gate_up, dy, gelu)
        compare("gated_backward", found[0], expected[0], 1e-6)
        compare("gated_backward", found[1], expected[1], 1e-6)
for softcap, columns in ((None, 5000), (2.0, 4097)):
    logits, targets = 3 * torch.randn(6, columns + 7), torch.randint(0, columns, (6,))
    targets[3] = -1
    found, expected = logits.clone()[:, :columns], logits.clone()[:, :columns]
    losses = kernels.cross_entropy_(found, targets, softcap)
    compare("losses", losses, fused.cross_entropy_(expected, targets, softcap), 1e-6)
    compare("their gradient", found, expected, 1e-5)
    assert losses[3] == 0 and not found[3].any()
SHAPES = (5, 8, 2, 16, None, None), (3, 6, 6, 24, 40, 1.5), (2, 4, 1, 128, 7, None), (3, 4, 2, 256, None, 2.0)
for rows, heads, groups, size, window, softcap in SHAPES:
    q = torch.randn(rows, heads + 2 * groups, size)[:, :heads]
    keys, values = torch.randn(2, rows + 1, 150, groups, size).unbind()
    slots = torch.randperm(rows + 1)[:rows]
    positions = torch.randint(0, 150, (rows,))
    positions[0] = 0
    arguments = (q, keys, values, slots, positions, window, 0.3, softcap)
    found, expected = kernels.attend_to_cache(*arguments), fused.attend_to_cache(*arguments)
    compare("attend_to_cache", found, expected, 1e-5)

def plain(codes):
    return codes.codes.float() * codes.scale

if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9):
    from fintune.model.fused import fp8

    CODES = 0.04  # e4m3 has three bits after the first
    for columns in (96, 512, 16_448):  # a row at once, and in parts
        x, weight, dy = (torch.randn(n, columns).bfloat16() for n in (7, 1, 7))
        found = fp8.quantize(x)
        compare("quantize", plain(found), x, CODES)
        assert (found.codes.float().abs().amax(1) == fp8.LARGEST).all()
        gate_up = torch.randn(7, 2 * columns).bfloat16()
        d_gated = kernels.gated_backward(gate_up, dy, False)
        for p in (0.0, 0.3):
            dropped = lambda y: kernels.drop(y, p, seed) if p else y
            expected = kernels.rms_norm(x, weight[0], 1e-5)
            found = fp8.rms_norm(x, weight[0], 1e-5, True, p, seed)
            compare("fp8.rms_norm", found[0], dropped(expected), 0.01)
            compare("fp8.rms_norm", plain(found[1]), expected, CODES)
            for gelu in (False, True):
                expected = kernels.gated(gate_up, gelu)
                found = fp8.gated(gate_up, gelu, True, p, seed)
                compare("fp8.gated", found[0], dropped(expected), 0.01)
                compare("fp8.gated", plain(found[1]), expected, CODES)
            found = fp8.gated_backward(gate_up, dy, False, p, seed)
            compare("fp8.gated_backward", found[0], dropped(d_gated[0]), 0.01)
            compare("fp8.gated_backward", found[1], d_gated[1], 0.01)
            compare("fp8.gated_backward", plain(found[2]), d_gated[1], CODES)
        assert fp8.gated(gate_up, False)[0] is None
    first, second = 64, 48  # two layers in one product
    weight = (torch.randn(first + second, 256) * 0.02).bfloat16()
    codes = fp8.Weights(weight)
    for rows in (slice(0, first), slice(first, first + second)):
        packed, state = quantize_4bit(weight[rows], quant_type="nf4", compress_statistics=True)
        height = rows.stop - rows.start
        lora = torch.randn(4, 256) * 0.1, torch.randn(height, 4) * 0.1
        codes.fill(rows, packed, kernels.NestedState.of(state), lora, 0.5)
        weight[rows] = dequantize_4bit(packed, state) + (0.5 * lora[1] @ lora[0]).bfloat16()
    compare("fp8.Weights.forward", plain(codes.forward), weight, CODES)
    compare("fp8.Weights.backward", plain(codes.backward).t(), weight, CODES)
    x, dy = torch.randn(33, 256).bfloat16(), torch.randn(33, first + second).bfloat16()
    found = fp8.product(fp8.quantize(x), codes.forward)
    compare("fp8.product", found, x.float() @ weight.float().t(), 0.06)
    found = fp8.product(fp8.quantize(dy), codes.backward)
    compare("fp8.product", found, dy.float() @ weight.float(), 0.06)
print("equal")
"""


@pytest.mark.gpu
@pytest.mark.skipif(not has_fp8(), reason="no GPU with FP8 products")
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_products_in_fp8_are_near_those_in_16_bits(
    base: Base, tokenizer: Any, checkpointing: str, dropout: float
) -> None:
    """Loss and gradients; later only gradients differ, and the loss follows the optimizer's steps."""
    model = adapted(base, tokenizer, "nf4", dtype=torch.bfloat16, dropout=dropout).to("cuda")
    part = pack([encode(tokenizer, *t) for t in TEXTS], torch.device("cuda"))
    exact, coarse = (
        FusedModel(model, torch.bfloat16, checkpointing, cache_weights=True, fp8=fp8)
        for fp8 in (False, True)
    )
    for _ in range(2):
        for limit in (0.02, 1e-4):
            torch.manual_seed(3)
            expected = gradients(model, loss := loss_of(exact, part))
            torch.manual_seed(3)
            found = gradients(model, ours := loss_of(coarse, part))
            assert ours.item() == pytest.approx(loss.item(), rel=limit)
            apart = {name: distance(found[name], each) for name, each in expected.items()}
            assert 0 < max(apart.values()) < 0.2, apart
            coarse.forward_in_16_bits()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data *= 1.2
        exact.sync_parameters()
        coarse = FusedModel(model, torch.bfloat16, checkpointing, cache_weights=True, fp8=True)


@pytest.mark.gpu
@pytest.mark.skipif(not has_fp8(), reason="no GPU with FP8 products")
def test_an_evaluation_in_fp8_is_near_one_in_16_bits(base: Base, tokenizer: Any) -> None:
    model = adapted(base, tokenizer, "nf4", dtype=torch.bfloat16).to("cuda")
    rows = [encode(tokenizer, *t) for t in TEXTS]
    exact, coarse = (likelihood(model, rows, "", fp8=fp8) for fp8 in (False, True))
    assert 0 < abs(coarse.loss - exact.loss) < 0.05
    decoding = Decoding(end_token_id(tokenizer), 6)
    prompts = [prompt for prompt, _ in rows]
    fine, rough = (
        generate(model, tokenizer, prompts, decoding, "", fp8=fp8) for fp8 in (False, True)
    )
    assert sum(a == b for a, b in zip(fine, rough, strict=True)) >= len(rows) / 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_captured_passes_have_the_gradients_of_others(
    base: Base, tokenizer: Any, quantization: str, dropout: float
) -> None:
    """Before the first capture, at a graph's first use and later, with other rows and parameters."""
    longer = [(f"{question} {'really ' * 30}", answer) for question, answer in TEXTS]
    how: Any = {"dtype": torch.bfloat16, "dropout": dropout}
    model = adapted(base, tokenizer, quantization, **how).to("cuda")
    fused, shown = (FusedModel(model, torch.bfloat16, cache_weights=True) for _ in range(2))
    graphs = Graphs(fused, model.parameters(), len(TEXTS), longest=256)
    for number, texts in enumerate([TEXTS, TEXTS, TEXTS[2:5], TEXTS[:1], longer]):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data *= 1.1
        part = pack([encode(tokenizer, *t) for t in texts], torch.device("cuda"))
        shown.sync_parameters()
        torch.manual_seed(number)
        loss = loss_of(shown, part)
        expected, value = torch.autograd.grad(loss, graphs.parameters), loss.item()
        del loss  # with it, what autograd keeps of the parameters on this stream
        graphs.sync_parameters()
        graphs.begin()
        torch.manual_seed(number)
        ours = graphs.loss(part, 0.5)
        assert ours.item() == pytest.approx(0.5 * value, rel=1e-3)
        for parameter, gradient in zip(graphs.parameters, expected, strict=True):
            assert (parameter.grad - 0.5 * gradient).norm() <= 0.02 * gradient.norm(), number
    assert len(graphs.captured) == 2


@pytest.mark.gpu
def test_the_gpu_kernels_compute_what_the_cpu_functions_do() -> None:
    """On a GPU, or interpreted on the CPU if Triton is installed."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", KERNELS],
        env=os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}),
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "equal", done.stderr
