"""Causal attention on packed rows, registered with transformers."""

import inspect
from functools import cache
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask


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
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document of a packed row; other inputs go to sdpa.

    A packed row through sdpa takes a dense mask and time in the square of its length. Here a GPU runs
    torch's variable-length flash kernels, and a CPU runs sdpa on the documents side by side.

    Args:
        query: (1, heads, tokens, head size); `key` and `value` may have fewer heads.
        cu_seq_lens_q: int32, (documents + 1,): where each document starts, then the end; TRL's
            collator makes it when rows are packed.

    Returns:
        (1, tokens, heads, head size), and no attention weights.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    return attend(q, k, v, cu_seq_lens_q, max_length_q, sliding_window, scaling)[None], None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    window: int | None,
    scale: float | None,
) -> torch.Tensor:
    """Causal attention within each document.

    Args:
        query: (tokens, heads, head size); `key` and `value` may have fewer heads.
        bounds: int32, (documents + 1,): where each document starts, then the end.
        longest: tokens of the longest document.
        window: how many tokens each one sees, itself included; None for all before it.

    Returns:
        (tokens, heads, head size).
    """
    if query.is_cuda and query.dtype != torch.float32:  # flash kernels take 16 bits alone
        return _varlen(query, key, value, bounds, longest, window, scale)
    return _side_by_side(query, key, value, bounds, longest, window, scale)


def _side_by_side(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    window: int | None,
    scale: float | None,
) -> torch.Tensor:
    """One sdpa call on documents padded at their ends, where no earlier token looks.

    A CPU has no variable-length kernel, nor has a GPU one for float32, and a call for each document costs
    more than the padding.
    """
    repeats = query.shape[1] // key.shape[1]  # enable_gqa would take the slow path of a CPU
    key, value = (states.repeat_interleave(repeats, dim=1) for states in (key, value))
    place = torch.arange(longest, device=bounds.device)
    starts, lengths = bounds[:-1, None].long(), bounds.diff()[:, None]
    inside = place < lengths
    where = (starts + place).clamp(max=len(query) - 1).flatten()
    shape = (len(starts), longest, *query.shape[1:])
    q, k, v = (s.index_select(0, where).view(shape).transpose(1, 2) for s in (query, key, value))
    mask = None
    if window is not None and longest > window:
        mask = q.new_ones(longest, longest, dtype=torch.bool).tril().triu(1 - window)
    output = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale
    )
    flat = output.transpose(1, 2).flatten(0, 1)
    return flat.index_select(0, inside.flatten().nonzero().flatten())


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    window: int | None,
    scale: float | None,
) -> torch.Tensor:
    """torch's flash kernels; before torch 2.12 they take fewer key heads without being told."""
    from torch.nn.attention.varlen import varlen_attn

    options: Any = {"enable_gqa": True} if _must_be_told_of_groups() else {}
    seen = (window - 1 if window and window < longest else -1, 0)
    output: Any = varlen_attn(
        query,
        key,
        value,
        bounds,
        bounds,
        longest,
        longest,
        scale=scale,
        window_size=seen,
        **options,
    )
    return output  # type: ignore[no-any-return]


@cache
def _must_be_told_of_groups() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _mask_unless_packed(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """No mask for packed rows, which `packed_attention` keeps apart by their bounds.

    transformers finds them by their positions, and forbids then to leave the mask to sdpa.
    """
    if kwargs.get("attention_mask") is None and not kwargs.get("allow_is_causal_skip", True):
        return None
    return sdpa_mask(*args, **kwargs)


ATTENTION = "packed"
AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, _mask_unless_packed)
