"""Pointwise functions of the fused layers in plain torch: the reference, and the CPU implementation."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fintune.model.attention import softcapped

HeadNorms = tuple[Tensor, Tensor]  # the RMS norms' weights of q and k, (head size,) each


def drop(x: Tensor, p: float, seed: int) -> Tensor:
    """Zero values of x with probability p; the same seed drops the same values."""
    return x * _keep_mask(x, p, seed)


def add_dropped_product(
    x: Tensor, left: Tensor, right: Tensor, scale: float, p: float, seed: int
) -> None:
    """Add scale * left @ right to x, except where `drop` with the same seed zeroes values of x's shape."""
    x.addcmul_(left @ right, _keep_mask(x, p, seed).to(x.dtype), value=scale)


def _keep_mask(x: Tensor, p: float, seed: int) -> Tensor:
    generator = torch.Generator(x.device).manual_seed(int(seed))
    kept = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    return kept.bernoulli_(1 - p, generator=generator)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute x / rms(x) * weight over the last dimension, in float32; a float32 weight is not rounded to."""
    x32 = x.float()
    normal = x32 * _inverse_rms(x32, eps)
    return normal.to(torch.promote_types(x.dtype, weight.dtype)).mul_(weight).to(x.dtype)


def rms_norm_backward(
    x: Tensor, weight: Tensor, eps: float, dy: Tensor, skip: Tensor | None
) -> Tensor:
    """Compute the gradient of x; `skip`, if given, is the residual connection's, and is added."""
    x32, g = x.float(), (dy * weight).float()
    r = _inverse_rms(x32, eps)
    along = (g * x32).mean(-1, keepdim=True) * r * r
    dx = g.addcmul_(x32, along, value=-1).mul_(r)
    return (dx if skip is None else dx.add_(skip)).to(x.dtype)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square()
    return torch.rsqrt(square / x.shape[-1] + eps)


def rotate(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
    norms: HeadNorms | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Apply `norms`, if any, and the rotary embedding to q and k.

    Returns:
        (tokens, heads + 2 kv_heads, head size) from (tokens, outputs).
    """
    q, k, v = _heads(qkv, heads, kv_heads)
    if norms:
        q, k = rms_norm(q, norms[0], eps), rms_norm(k, norms[1], eps)
    return torch.cat((_turn(q, cos, sin), _turn(k, cos, sin), v), dim=1)


def rotate_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cos: Tensor,
    sin: Tensor,
    qkv: Tensor | None = None,
    norms: HeadNorms | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Compute the gradient of `rotate`'s input, (tokens, outputs); with `norms` it needs that input."""
    tokens, (heads, kv_heads) = dq.shape[0], (dq.shape[1], dk.shape[1])
    dq, dk = _turn(dq, cos, -sin), _turn(dk, cos, -sin)
    if norms and qkv is not None:
        q, k, _ = _heads(qkv, heads, kv_heads)
        dq = rms_norm_backward(q, norms[0], eps, dq, None)
        dk = rms_norm_backward(k, norms[1], eps, dk, None)
    return torch.cat((dq, dk, dv), dim=1).view(tokens, -1)


def _heads(qkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    x = qkv.view(qkv.shape[0], heads + 2 * kv_heads, -1)
    return x[:, :heads], x[:, heads : heads + kv_heads], x[:, heads + kv_heads :]


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (tokens, heads, size) by angles whose cos and sin are (tokens, size), both halves equal."""
    half = x.shape[-1] // 2
    c, s = cos[:, None, :half].float(), sin[:, None, :half].float()
    first, second = x[..., :half].float(), x[..., half:].float()
    turned = (first * c).addcmul_(second, s, value=-1), (second * c).addcmul_(first, s)
    return torch.cat(turned, dim=-1).to(x.dtype)


def attend_to_cache(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    positions: Tensor,
    window: int | None,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Compute attention of the last token of each row to itself and all before it, from the KV cache.

    Args:
        q: (rows, heads, size).
        keys: (slots, length, kv_heads, size), as `values`: the KV cache.
        slots: (rows,): the slot of each row.
        positions: (rows,): of the last token in its slot.
        window: the number of tokens attended to, the last included; None for all.
        softcap: scores are limited to it by a tanh.

    Returns:
        (rows, heads, size).
    """
    rows, heads, size = q.shape
    kv_heads, longest = keys.shape[2], int(positions.max()) + 1
    k, v = (cache[slots, :longest].transpose(1, 2) for cache in (keys, values))
    place = torch.arange(longest, device=q.device)
    seen = place <= positions[:, None]
    if window is not None:
        seen &= place > positions[:, None] - window
    # query heads that share a key head are treated as queries at the same position
    grouped = q.view(rows, kv_heads, heads // kv_heads, size)
    if softcap:
        out = softcapped(grouped, k, v, seen[:, None, None], scale, softcap)
    else:
        out = torch.nn.functional.scaled_dot_product_attention(
            grouped, k, v, seen[:, None, None], scale=scale
        )
    return out.reshape(rows, heads, size)


def gated(gate_up: Tensor, gelu: bool) -> Tensor:
    """Compute SwiGLU, silu(gate) * up, or with GELU in its tanh form GeGLU; (tokens, 2 n) to (tokens, n)."""
    gate, up = (half.float() for half in gate_up.chunk(2, dim=-1))
    return _activation(gate, gelu).mul_(up).to(gate_up.dtype)


def gated_backward(gate_up: Tensor, dy: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """Recompute the output, (tokens, n), and compute the gradient of the input, (tokens, 2 n)."""
    gate, up = (half.float() for half in gate_up.chunk(2, dim=-1))
    active, dy32 = _activation(gate, gelu), dy.float()
    gradient = torch.empty_like(gate_up)
    d_gate, d_up = gradient.chunk(2, dim=-1)
    if gelu:
        d_gate.copy_(torch.ops.aten.gelu_backward(dy32 * up, gate, approximate="tanh"))
    else:
        d_gate.copy_(torch.ops.aten.silu_backward(dy32 * up, gate))
    torch.mul(dy32, active, out=d_up)
    return active.mul_(up).to(dy.dtype), gradient


def _activation(gate: Tensor, gelu: bool) -> Tensor:
    return functional.gelu(gate, approximate="tanh") if gelu else functional.silu(gate)


def cross_entropy_(logits: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    """Compute each token's loss in nats, float32, and overwrite its logits with the loss's gradient.

    Args:
        logits: (tokens, vocabulary), before the softcap.
        targets: (tokens,); one below 0 has neither loss nor gradient.
        softcap: logits are limited to it by a tanh; None for no limit.
    """
    limited, slope = logits.float(), None
    if softcap:
        limited = softcap * torch.tanh(limited / softcap)
        slope = 1 - (limited / softcap).square()
    log_sum = limited.logsumexp(dim=-1, keepdim=True)
    without, targets = (targets < 0).nonzero()[:, 0], targets.clamp(min=0)
    losses = (log_sum - limited.gather(1, targets[:, None]))[:, 0].index_fill_(0, without, 0)
    gradient = limited.sub_(log_sum).exp_()
    gradient.scatter_add_(1, targets[:, None], gradient.new_full((len(targets), 1), -1.0))
    gradient.index_fill_(0, without, 0)
    if slope is not None:
        gradient *= slope
    logits.copy_(gradient)
    return losses


def functions_for(x: Tensor) -> Any:
    """Return the module of pointwise functions for this tensor's device: the kernels or this one."""
    if x.is_cuda:
        from fintune.model.fused import kernels

        return kernels
    return sys.modules[__name__]
