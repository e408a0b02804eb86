"""Causal attention on packed sequences, registered with transformers."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from fintune.model.adapter import base_of


@dataclass(frozen=True)
class PackedSequences:
    """The boundaries of documents packed end to end.

    `cu_seqlens`: int32, (documents + 1,), the start of each document, then the end. `max_seqlen`: tokens of
    the longest document.
    """

    cu_seqlens: torch.Tensor
    max_seqlen: int
    masks: dict[int | None, Any] = field(default_factory=dict, compare=False)  # by window


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute causal attention within each document of a packed row; other inputs go to SDPA.

    SDPA would need a dense mask and quadratic time in the packed length. A GPU runs torch's varlen flash
    kernels instead, a CPU one SDPA call on the documents, padded.

    Args:
        query: (1, heads, tokens, head size); `key` and `value` may have fewer heads.
        cu_seq_lens_q: as `PackedSequences.cu_seqlens`; None where rows are not packed.

    Returns:
        (1, tokens, heads, head size), and no attention weights.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    packed = PackedSequences(cu_seq_lens_q, max_length_q)
    return attend(q, k, v, packed, sliding_window, scaling, softcap)[None], None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: PackedSequences,
    window: int | None,
    scale: float | None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Compute causal attention within each document.

    Args:
        query: (tokens, heads, head size); `key` and `value` may have fewer heads.
        window: the number of tokens that each one attends to, itself included; None for all before it.
        softcap: scores are limited to it by a tanh (Gemma 2); None for no limit.

    Returns:
        (tokens, heads, head size).
    """
    if query.is_cuda and query.dtype != torch.float32:  # flash kernels only take 16 bits
        if softcap:
            return _flex(query, key, value, packed, window, scale, softcap)
        return _varlen(query, key, value, packed, window, scale)
    return _padded(query, key, value, packed, window, scale, softcap)


def _padded(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: PackedSequences,
    window: int | None,
    scale: float | None,
    softcap: float | None,
) -> torch.Tensor:
    """Run one SDPA call on documents padded at their ends, which causal attention never reads.

    Neither a CPU nor float32 on a GPU has a varlen kernel, and one call per document costs more than the
    padding.
    """
    repeats = query.shape[1] // key.shape[1]  # enable_gqa takes a slow path on a CPU
    key, value = (states.repeat_interleave(repeats, dim=1) for states in (key, value))
    cu_seqlens, max_seqlen = packed.cu_seqlens, packed.max_seqlen
    place = torch.arange(max_seqlen, device=cu_seqlens.device)
    starts, lengths = cu_seqlens[:-1, None].long(), cu_seqlens.diff()[:, None]
    inside = place < lengths
    where = (starts + place).clamp(max=len(query) - 1).flatten()
    shape = (len(starts), max_seqlen, *query.shape[1:])
    q, k, v = (s.index_select(0, where).view(shape).transpose(1, 2) for s in (query, key, value))
    mask = None
    if softcap or (window is not None and max_seqlen > window):
        mask = q.new_ones(max_seqlen, max_seqlen, dtype=torch.bool).tril()
        mask = mask.triu(1 - (window or max_seqlen))
    if softcap and mask is not None:
        output = softcapped(q, k, v, mask, scale or q.shape[-1] ** -0.5, softcap)
    else:
        output = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale
        )
    flat = output.transpose(1, 2).flatten(0, 1)
    return flat.index_select(0, inside.flatten().nonzero().flatten())


def softcapped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """Compute attention whose scores are limited by a tanh; (..., queries, size), True in `mask` is seen."""
    scores = softcap * torch.tanh(query @ key.transpose(-1, -2) * (scale / softcap))
    weights = scores.float().masked_fill(~mask, -torch.inf).softmax(dim=-1)
    return weights.to(value.dtype) @ value


def _flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: PackedSequences,
    window: int | None,
    scale: float | None,
    softcap: float,
) -> torch.Tensor:
    """Run torch's flex attention, the only kernel with a softcap; compiled at its first call."""
    if window is not None and window >= packed.max_seqlen:
        window = None
    if window not in packed.masks:
        packed.masks[window] = _block_mask(packed.cu_seqlens, len(query), window)
    q, k, v = (states.transpose(0, 1)[None] for states in (query, key, value))
    output = _compiled_flex(scale, softcap)(q, k, v, packed.masks[window])
    return output[0].transpose(0, 1)  # type: ignore[no-any-return]


def _block_mask(cu_seqlens: torch.Tensor, tokens: int, window: int | None) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    place = torch.arange(tokens, device=cu_seqlens.device)
    document = torch.bucketize(place, cu_seqlens[1:], right=True)

    def seen(_batch: Any, _head: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        same = (document[q] == document[k]) & (q >= k)
        return same if window is None else same & (q - k < window)

    return create_block_mask(seen, None, None, tokens, tokens, device=cu_seqlens.device)


# the fastest of 13 for heads of 256 on an H100: 2.9 ms a layer instead of the default's 4.1
BACKWARD_TILES = {f"bwd_BLOCK_{side}": 32 for side in ("M1", "N1", "M2", "N2")} | {
    "bwd_num_stages": 2, "bwd_num_warps": 4
}  # fmt: skip


@cache
def _compiled_flex(scale: float | None, softcap: float) -> Any:
    """Compile flex attention for any number of tokens; both numbers are constants to the compiler.

    `dynamic=True` would turn them into variables, which the kernel does not take.
    """
    from torch.nn.attention.flex_attention import flex_attention

    def limited(score: torch.Tensor, *_: Any) -> torch.Tensor:
        return softcap * torch.tanh(score / softcap)

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any) -> Any:
        options: Any = BACKWARD_TILES if q.shape[-1] > 128 else None
        return flex_attention(
            q, k, v, limited, mask, scale, enable_gqa=True, kernel_options=options
        )

    return torch.compile(attention, fullgraph=True)


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: PackedSequences,
    window: int | None,
    scale: float | None,
) -> torch.Tensor:
    """Run torch's varlen flash kernels; before torch 2.12 they support GQA without an option."""
    from torch.nn.attention.varlen import varlen_attn

    options: Any = {"enable_gqa": True} if _needs_enable_gqa() else {}
    cu_seqlens, max_seqlen = packed.cu_seqlens, packed.max_seqlen
    seen = (window - 1 if window and window < max_seqlen else -1, 0)
    output: Any = varlen_attn(
        query,
        key,
        value,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        scale=scale,
        window_size=seen,
        **options,
    )
    return output  # type: ignore[no-any-return]


@cache
def _needs_enable_gqa() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _mask_unless_packed(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Return no mask for packed rows, whose documents `packed_attention` separates by cu_seqlens.

    transformers recognizes packed rows by their positions, and then does not allow skipping the mask.
    """
    if kwargs.get("attention_mask") is None and not kwargs.get("allow_is_causal_skip", True):
        return None
    return sdpa_mask(*args, **kwargs)


ATTENTION = "packed"
AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, _mask_unless_packed)


@contextmanager
def using_attention(model: Any, name: str) -> Iterator[None]:
    """Compute a model's attention with this implementation for a while."""
    plain = base_of(model)
    before = plain.config._attn_implementation
    plain.set_attn_implementation(name)
    try:
        yield
    finally:
        plain.set_attn_implementation(before)
