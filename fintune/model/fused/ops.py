"""Pointwise functions of the fused layers in plain torch: the reference, and the CPU implementation."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor


def drop(x: Tensor, p: float, seed: int) -> Tensor:
    """Zero values of x with probability p; the same seed drops the same values."""
    return x * _keep_mask(x, p, seed)


def add_dropped_product(
    x: Tensor, left: Tensor, right: Tensor, scale: float, p: float, seed: int
) -> None:
    """Add scale * left @ right to x, except where `drop` with the same seed zeroes values of x's shape."""
    x.addcmul_(left @ right, _keep_mask(x, p, seed).to(x.dtype), value=scale)


def _keep_mask(x: Tensor, p: float, seed: int) -> Tensor:
    generator = torch.Generator(x.device).manual_seed(seed)
    kept = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    return kept.bernoulli_(1 - p, generator=generator)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute x / rms(x) * weight over the last dimension, in float32."""
    x32 = x.float()
    normal = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normal.to(x.dtype)


def rms_norm_backward(x: Tensor, weight: Tensor, eps: float, dy: Tensor, skip: Tensor) -> Tensor:
    """Compute the gradient of x, with the residual connection's gradient `skip` added."""
    x32, g = x.float(), (dy * weight).float()
    r = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    dx = r * (g - x32 * r * r * (g * x32).mean(-1, keepdim=True))
    return (skip.float() + dx).to(x.dtype)


def rotate(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int) -> Tensor:
    """Apply the rotary embedding to q and k; (tokens, outputs) to (tokens, heads + 2 kv_heads, head size)."""
    x = qkv.view(qkv.shape[0], heads + 2 * kv_heads, -1)
    turned, v = x[:, : heads + kv_heads], x[:, heads + kv_heads :]
    return torch.cat((_turn(turned, cos, sin), v), dim=1)


def rotate_backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the gradients of q and k back and concatenate all three: (tokens, outputs)."""
    parts = (_turn(dq, cos, -sin), _turn(dk, cos, -sin), dv)
    return torch.cat(parts, dim=1).view(dq.shape[0], -1)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (tokens, heads, size) by angles whose cos and sin are (tokens, size), both halves equal."""
    half = x.shape[-1] // 2
    c, s = cos[:, None, :half].float(), sin[:, None, :half].float()
    first, second = x[..., :half].float(), x[..., half:].float()
    turned = (first * c - second * s, second * c + first * s)
    return torch.cat(turned, dim=-1).to(x.dtype)


def attend_to_cache(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    positions: Tensor,
    window: int | None,
    scale: float,
) -> Tensor:
    """Compute attention of the last token of each row to itself and all before it, from the KV cache.

    Args:
        q: (rows, heads, size).
        keys: (slots, length, kv_heads, size), as `values`: the KV cache.
        slots: (rows,): the slot of each row.
        positions: (rows,): of the last token in its slot.
        window: the number of tokens attended to, the last included; None for all.

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
    out = torch.nn.functional.scaled_dot_product_attention(
        q.view(rows, kv_heads, heads // kv_heads, size), k, v, seen[:, None, None], scale=scale
    )
    return out.reshape(rows, heads, size)


def swiglu(gate_up: Tensor) -> Tensor:
    """Compute silu(gate) * up; (tokens, 2 n) to (tokens, n)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate.float()) * up).to(gate_up.dtype)


def swiglu_backward(gate_up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Recompute the output, (tokens, n), and compute the gradient of the input, (tokens, 2 n)."""
    gate, up = (half.float() for half in gate_up.chunk(2, dim=-1))
    dy32, sigmoid = dy.float(), torch.sigmoid(gate)
    silu = gate * sigmoid
    d_gate = dy32 * up * (sigmoid + silu * (1 - sigmoid))
    value = (silu * up).to(dy.dtype)
    return value, torch.cat((d_gate, dy32 * silu), dim=-1).to(dy.dtype)


def functions_for(x: Tensor) -> Any:
    """Return the module of pointwise functions for this tensor's device: the kernels or this one."""
    if x.is_cuda:
        from fintune.model.fused import kernels

        return kernels
    return sys.modules[__name__]
