"""Triton kernels of the fused layers: each reads its inputs once and writes its output once.

Imported only on a GPU, where torch includes Triton. Every public function but `dequantize_and_add` has a
documented counterpart of the same name in ops.py, which also runs on a CPU. Seeds are int64 tensors of one
value, so that a captured graph draws anew at each replay.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class NestedState:
    """The scales of a doubly quantized bitsandbytes weight (Dettmers et al. 2023)."""

    absmax: Tensor  # uint8, one for each block of 64 weights
    code: Tensor  # float32, (256,): the values of absmax's bytes
    scales: Tensor  # float32, one for each 256 blocks
    offset: float
    values: Tensor  # float32, (16,): the values of the 4-bit codes

    @classmethod
    def of(cls, state: Any) -> "NestedState":
        """Read a quantized weight's `quant_state`; forces a device sync."""
        if not state.nested or state.blocksize != 64 or state.state2.blocksize != 256:
            raise ValueError("only doubly quantised weights in blocks of 64 are read here")
        inner = state.state2
        return cls(state.absmax, inner.code, inner.absmax, float(state.offset), state.code)


def dequantize_and_add(
    packed: Tensor,
    state: NestedState,
    lora: tuple[Tensor, Tensor] | None,
    scaling: float,
    out: Tensor,
    eight: tuple[Tensor, int, Tensor, Tensor] | None = None,
) -> None:
    """Write W + scaling B A to `out`, (outputs, inputs), rounded once.

    Args:
        packed: uint8, two weights a byte, row by row, the first in the high half.
        lora: A, (rank, inputs), and B, (outputs, rank), in float32 or in 16 bits.
        eight: for FP8 codes in `out`, what they are also written to, transposed, the step between its rows,
            and the scales of the rows of both.
    """
    rows, columns = out.shape
    a, b = lora or (state.values, state.values)
    rank = a.shape[0] if lora else 0
    width = max(16, triton.next_power_of_2(rank)) if lora else 0
    grid = (triton.cdiv(rows, TILE["ROWS"]), triton.cdiv(columns, 64 * TILE["BLOCKS"]))
    _dequantize_and_add[grid](
        packed, state.absmax, state.code, state.scales, state.offset, state.values, a, b, out,
        rows, columns, scaling, *(eight or (out, 0, out, out)), RANK=rank, WIDTH=width,
        EIGHT=eight is not None, **TILE,
    )  # fmt: skip


TILE = {"ROWS": 64, "BLOCKS": 1, "KIND": tl.float16, "num_warps": 4}  # measured on an H200


def drop(x: Tensor, p: float, seed: Tensor) -> Tensor:
    y = torch.empty_like(x)
    grid = (triton.cdiv(x.numel(), COLUMNS),)
    _drop[grid](x, y, x.numel(), p, seed, QUARTER=COLUMNS // 4)
    return y


def add_dropped_product(
    x: Tensor, left: Tensor, right: Tensor, scale: float, p: float, seed: Tensor
) -> None:
    rows, columns = x.shape
    rank = left.shape[1]
    _add_dropped_product[(triton.cdiv(rows, 32), triton.cdiv(columns, 128))](
        x, left, right, rows, columns, scale, p, seed,
        RANK=rank, WIDTH=max(16, triton.next_power_of_2(rank)), ROWS=32, QUARTER=32,
    )  # fmt: skip


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = torch.empty_like(x)
    width = triton.next_power_of_2(x.shape[1])
    _rms_norm[(x.shape[0],)](x, weight, y, x.shape[1], eps, WIDTH=width, num_warps=8)
    return y


def rms_norm_backward(
    x: Tensor, weight: Tensor, eps: float, dy: Tensor, skip: Tensor | None
) -> Tensor:
    dx = torch.empty_like(x)
    width = triton.next_power_of_2(x.shape[1])
    _rms_norm_backward[(x.shape[0],)](
        x, weight, dy.contiguous(), dx if skip is None else skip.contiguous(), dx, x.shape[1], eps,
        WIDTH=width, SKIP=skip is not None, num_warps=8,
    )  # fmt: skip
    return dx


def rotate(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
) -> Tensor:
    size = qkv.shape[1] // (heads + 2 * kv_heads)
    out = qkv.new_empty(qkv.shape[0], heads + 2 * kv_heads, size)
    step = size * (heads + 2 * kv_heads)
    k = qkv[:, heads * size :]
    v = k[:, kv_heads * size :]
    of_q, of_k = norms or (cos, cos)
    _turn[_per_head(out)](
        qkv, k, v, step, step, step, cos, sin, out, heads, kv_heads, 1.0, qkv, of_q, of_k, eps,
        NORM="before" if norms else "", HALF=size // 2, WIDTH=triton.next_power_of_2(size // 2),
        HEADS=HEADS,
    )  # fmt: skip
    return out


def rotate_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cos: Tensor,
    sin: Tensor,
    qkv: Tensor | None = None,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
) -> Tensor:
    tokens, heads, size = dq.shape
    kv_heads = dk.shape[1]
    out = dq.new_empty(tokens, heads + 2 * kv_heads, size)
    parts = [part.contiguous() for part in (dq, dk, dv)]
    of_q, of_k = norms or (cos, cos)
    _turn[_per_head(out)](
        *parts, heads * size, kv_heads * size, kv_heads * size, cos, sin, out, heads, kv_heads, -1.0,
        out if qkv is None else qkv, of_q, of_k, eps,
        NORM="after" if norms else "", HALF=size // 2, WIDTH=triton.next_power_of_2(size // 2),
        HEADS=HEADS,
    )  # fmt: skip
    return out.flatten(1)


HEADS = 8  # heads of one token that a program rotates


def _per_head(out: Tensor) -> tuple[int, int]:
    return out.shape[0], triton.cdiv(out.shape[1], HEADS)


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
    rows, heads, size = q.shape
    length, kv_heads = keys.shape[1:3]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    repeats = heads // kv_heads
    _attend_to_cache[(rows, kv_heads)](
        q, q.stride(0), keys, values, slots, positions, out, length, kv_heads, window or length, scale,
        softcap or 0.0, CAPPED=bool(softcap), REPEATS=repeats,
        QUERIES=max(16, triton.next_power_of_2(repeats)), SIZE=size,
        WIDTH=max(16, triton.next_power_of_2(size)), PLACES=64, num_warps=4,
    )  # fmt: skip
    return out


def gated(gate_up: Tensor, gelu: bool) -> Tensor:
    tokens, columns = gate_up.shape[0], gate_up.shape[1] // 2
    y = gate_up.new_empty(tokens, columns)
    _gated[(tokens, triton.cdiv(columns, COLUMNS))](gate_up, y, columns, GELU=gelu, COLUMNS=COLUMNS)
    return y


def gated_backward(gate_up: Tensor, dy: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    tokens, columns = dy.shape
    value, out = torch.empty_like(dy), torch.empty_like(gate_up)
    _gated_backward[(tokens, triton.cdiv(columns, COLUMNS))](
        gate_up, dy, value, out, columns, GELU=gelu, COLUMNS=COLUMNS
    )
    return value, out


COLUMNS = 1024  # of one token per program


def cross_entropy_(logits: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    _cross_entropy[(len(logits),)](
        logits, logits.stride(0), targets, losses, logits.shape[1], softcap or 0.0,
        CAPPED=bool(softcap), COLUMNS=4096, num_warps=8,
    )  # fmt: skip
    return losses


@triton.jit
def _random(seed, four):
    """Draw uniform numbers in [0, 1), four for each of `four`, adjacent in the last dimension."""
    a, b, c, d = tl.rand4x(tl.load(seed), four, n_rounds=7)  # Philox 4x32-7 (Salmon et al. 2011)
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit(do_not_specialize=["values"])
def _drop(x, y, values, p, seed, QUARTER: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * QUARTER
    place = 4 * first + tl.arange(0, 4 * QUARTER)
    inside = place < values
    kept = _random(seed, first + tl.arange(0, QUARTER)) >= p
    found = tl.load(x + place, mask=inside, other=0.0)
    tl.store(y + place, tl.where(kept, found, 0.0), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _add_dropped_product(
    x, left, right, rows, columns, scale, p, seed,
    RANK: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, QUARTER: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * 4 * QUARTER + tl.arange(0, 4 * QUARTER)
    r = tl.arange(0, WIDTH)
    kept = (row[:, None] < rows) & (r[None, :] < RANK)
    left_tile = tl.load(left + row[:, None] * RANK + r[None, :], mask=kept, other=0.0)
    kept = (r[:, None] < RANK) & (column[None, :] < columns)
    right_tile = tl.load(right + r[:, None] * columns + column[None, :], mask=kept, other=0.0)
    product = scale * tl.dot(left_tile, right_tile, input_precision="ieee")
    place = row[:, None] * columns + column[None, :]
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    fours = tl.program_id(1) * QUARTER + tl.arange(0, QUARTER)
    kept = inside & (_random(seed, row[:, None] * (columns // 4) + fours[None, :]) >= p)
    found = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    total = tl.where(kept, found + product, found)
    tl.store(x + place, total.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm(x, weight, y, columns, eps, WIDTH: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * columns
    column = tl.arange(0, WIDTH)
    inside = column < columns
    x32 = tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32)
    normal = x32 * tl.rsqrt(tl.sum(x32 * x32, axis=0) / columns + eps)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    kind = y.dtype.element_ty
    if weight.dtype.element_ty != tl.float32:
        normal = normal.to(kind).to(tl.float32)
    tl.store(y + start + column, (normal * w).to(kind), mask=inside)


@triton.jit
def _rms_norm_backward(
    x, weight, dy, skip, dx, columns, eps, WIDTH: tl.constexpr, SKIP: tl.constexpr
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * columns
    column = tl.arange(0, WIDTH)
    inside = column < columns
    x32 = tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(dy + start + column, mask=inside, other=0.0).to(tl.float32) * w
    r = tl.rsqrt(tl.sum(x32 * x32, axis=0) / columns + eps)
    found = r * (g - x32 * r * r * (tl.sum(g * x32, axis=0) / columns))
    if SKIP:
        found += tl.load(skip + start + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + start + column, found.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _turn(
    q, k, v, q_step, k_step, v_step, cos, sin, out, heads, kv_heads, direction,
    qkv, q_norm, k_norm, eps,
    NORM: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Rotate, and normalize q and k before, or compute the gradient of that norm after."""
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    place = tl.arange(0, WIDTH)[None, :]
    inside = place < HALF
    of_q, of_k = inside & (head < heads), inside & (head >= heads) & (head < heads + kv_heads)
    of_v = inside & (head >= heads + kv_heads) & (head < heads + 2 * kv_heads)
    in_q = q + token * q_step + head * 2 * HALF + place
    in_k = k + token * k_step + (head - heads) * 2 * HALF + place
    in_v = v + token * v_step + (head - heads - kv_heads) * 2 * HALF + place
    first = tl.load(in_q, mask=of_q, other=0.0).to(tl.float32)
    first += tl.load(in_k, mask=of_k, other=0.0).to(tl.float32)
    first += tl.load(in_v, mask=of_v, other=0.0).to(tl.float32)
    second = tl.load(in_q + HALF, mask=of_q, other=0.0).to(tl.float32)
    second += tl.load(in_k + HALF, mask=of_k, other=0.0).to(tl.float32)
    second += tl.load(in_v + HALF, mask=of_v, other=0.0).to(tl.float32)
    angle = token * 2 * HALF + place
    turned = head < heads + kv_heads
    if NORM != "":
        first_w = tl.load(q_norm + place + 0 * head, mask=of_q, other=0.0).to(tl.float32)
        first_w += tl.load(k_norm + place + 0 * head, mask=of_k, other=0.0).to(tl.float32)
        second_w = tl.load(q_norm + HALF + place + 0 * head, mask=of_q, other=0.0).to(tl.float32)
        second_w += tl.load(k_norm + HALF + place + 0 * head, mask=of_k, other=0.0).to(tl.float32)
        row = qkv + token * 2 * HALF * (heads + 2 * kv_heads) + head * 2 * HALF + place
        first_x = tl.load(row, mask=of_q | of_k, other=0.0).to(tl.float32)
        second_x = tl.load(row + HALF, mask=of_q | of_k, other=0.0).to(tl.float32)
        squares = tl.sum(first_x * first_x, axis=1) + tl.sum(second_x * second_x, axis=1)
        r = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
    if NORM == "before":
        first = tl.where(turned, first * r * first_w, first)
        second = tl.where(turned, second * r * second_w, second)
    c = tl.where(turned, tl.load(cos + angle, mask=inside, other=1.0).to(tl.float32), 1.0)
    s = tl.where(turned, tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32), 0.0)
    s *= direction
    target = out + token * 2 * HALF * (heads + 2 * kv_heads) + head * 2 * HALF + place
    kept = inside & (head < heads + 2 * kv_heads)
    kind = out.dtype.element_ty
    one, other = first * c - second * s, second * c + first * s
    if NORM == "after":
        g, h = one * first_w, other * second_w
        shared = (tl.sum(g * first_x, axis=1) + tl.sum(h * second_x, axis=1))[:, None] / (2 * HALF)
        one = tl.where(turned, r * (g - first_x * r * r * shared), one)
        other = tl.where(turned, r * (h - second_x * r * r * shared), other)
    tl.store(target, one.to(kind), mask=kept)
    tl.store(target + HALF, other.to(kind), mask=kept)


@triton.jit
def _limit(x, softcap):
    """Compute softcap * tanh(x / softcap)."""
    return softcap * (2 * tl.sigmoid(2 * x / softcap) - 1)


@triton.jit
def _cross_entropy(
    logits, step, targets, losses, columns, softcap, CAPPED: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Compute the loss of one token, then its gradient over its logits."""
    row = logits + tl.program_id(0).to(tl.int64) * step
    target = tl.load(targets + tl.program_id(0))
    counts = target >= 0
    wanted = tl.load(row + target, mask=counts, other=0.0).to(
        tl.float32
    )  # before it is overwritten
    if CAPPED:
        wanted = _limit(wanted, softcap)
    highest = -float("inf")
    total = 0.0
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        x = tl.load(row + column, mask=column < columns, other=0.0).to(tl.float32)
        if CAPPED:
            x = _limit(x, softcap)
        x = tl.where(column < columns, x, -float("inf"))
        above = tl.maximum(highest, tl.max(x, axis=0))
        total = total * tl.exp(highest - above) + tl.sum(tl.exp(x - above), axis=0)
        highest = above
    log_sum = highest + tl.log(total)
    tl.store(losses + tl.program_id(0), tl.where(counts, log_sum - wanted, 0.0))
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        x = tl.load(row + column, mask=column < columns, other=0.0).to(tl.float32)
        if CAPPED:
            x = _limit(x, softcap)
        gradient = tl.exp(x - log_sum) - tl.where(column == target, 1.0, 0.0)
        if CAPPED:
            gradient *= 1 - (x / softcap) * (x / softcap)
        gradient = tl.where(counts, gradient, 0.0)
        tl.store(row + column, gradient.to(logits.dtype.element_ty), mask=column < columns)


@triton.jit
def _attend_to_cache(
    q, q_step, keys, values, slots, positions, out, length, kv_heads, window, scale, softcap,
    CAPPED: tl.constexpr, REPEATS: tl.constexpr, QUERIES: tl.constexpr, SIZE: tl.constexpr,
    WIDTH: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Attend from one row, for the heads of one key head; an online softmax over tiles of PLACES tokens."""
    row, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot, last = tl.load(slots + row), tl.load(positions + row)
    head = kv_head * REPEATS + tl.arange(0, QUERIES)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    own = (tl.arange(0, QUERIES)[:, None] < REPEATS) & (column < SIZE)
    query = tl.load(q + row * q_step + head * SIZE + column, mask=own, other=0.0)
    highest = tl.full((QUERIES,), -float("inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    found = tl.zeros((QUERIES, WIDTH), tl.float32)
    start = tl.maximum(last + 1 - window, 0)
    while start <= last:
        place = start + tl.arange(0, PLACES)
        where = ((slot * length + place)[:, None] * kv_heads + kv_head) * SIZE + column
        kept = (place <= last)[:, None] & (column < SIZE)
        key = tl.load(keys + where, mask=kept, other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        if CAPPED:
            score = _limit(score, softcap)
        score = tl.where((place <= last)[None, :], score, -float("inf"))
        above = tl.maximum(highest, tl.max(score, axis=1))
        weight = tl.exp(score - above[:, None])
        shrink = tl.exp(highest - above)
        value = tl.load(values + where, mask=kept, other=0.0)
        product = tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        found = found * shrink[:, None] + product
        total = total * shrink + tl.sum(weight, axis=1)
        highest = above
        start += PLACES
    target = out + (row * kv_heads * REPEATS + head) * SIZE + column
    tl.store(target, (found / total[:, None]).to(out.dtype.element_ty), mask=own)


@triton.jit
def _argument(gate, GELU: tl.constexpr):
    """Compute u and its derivative, where the activation of x is x * sigmoid(u)."""
    if GELU:
        square = gate * gate
        u = 1.5957691216057308 * gate * (1 + 0.044715 * square)
        slope = 1.5957691216057308 * (1 + 0.134145 * square)
    else:
        u = gate
        slope = gate * 0 + 1
    return u, slope


@triton.jit
def _gated(gate_up, y, columns, GELU: tl.constexpr, COLUMNS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    gate = tl.load(gate_up + token * 2 * columns + column, mask=inside).to(tl.float32)
    up = tl.load(gate_up + token * 2 * columns + columns + column, mask=inside).to(tl.float32)
    u, _ = _argument(gate, GELU)
    value = gate * tl.sigmoid(u) * up
    tl.store(y + token * columns + column, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _gated_backward(
    gate_up, dy, value, out, columns, GELU: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    gate = tl.load(gate_up + token * 2 * columns + column, mask=inside).to(tl.float32)
    up = tl.load(gate_up + token * 2 * columns + columns + column, mask=inside).to(tl.float32)
    g = tl.load(dy + token * columns + column, mask=inside).to(tl.float32)
    u, slope = _argument(gate, GELU)
    sigmoid = tl.sigmoid(u)
    active = gate * sigmoid
    kind = out.dtype.element_ty
    tl.store(value + token * columns + column, (active * up).to(kind), mask=inside)
    d_gate = g * up * (sigmoid + active * (1 - sigmoid) * slope)
    tl.store(out + token * 2 * columns + column, d_gate.to(kind), mask=inside)
    tl.store(out + token * 2 * columns + columns + column, (g * active).to(kind), mask=inside)


@triton.jit
def _dequantize_and_add(
    packed, absmax, code, scales, offset, values, a, b, out,
    rows, columns, scaling, other, step, row_scale, column_scale,
    RANK: tl.constexpr, WIDTH: tl.constexpr, EIGHT: tl.constexpr, ROWS: tl.constexpr,
    BLOCKS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Compute one tile of ROWS rows and BLOCKS blocks of 64 columns."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * BLOCKS
    block = first + tl.arange(0, BLOCKS)
    inside = (row[:, None] < rows) & (block[None, :] * 64 < columns)
    number = row[:, None].to(tl.int64) * (columns // 64) + block[None, :]
    scale = tl.load(code + tl.load(absmax + number, mask=inside, other=0).to(tl.int32))
    scale = scale * tl.load(scales + number // 256, mask=inside, other=0.0) + offset
    place = number[:, :, None] * 32 + tl.arange(0, 32)[None, None, :]
    pair = tl.load(packed + place, mask=inside[:, :, None], other=0).to(tl.int32)
    high = tl.load(values + (pair >> 4)) * scale[:, :, None]
    low = tl.load(values + (pair & 15)) * scale[:, :, None]
    weight = tl.reshape(tl.interleave(high, low), (ROWS, BLOCKS * 64))
    column = first * 64 + tl.arange(0, BLOCKS * 64)
    if WIDTH > 0:
        r = tl.arange(0, WIDTH)
        kept = (r[:, None] < RANK) & (column[None, :] < columns)
        a_tile = tl.load(a + r[:, None] * columns + column[None, :], mask=kept, other=0.0)
        kept = (row[:, None] < rows) & (r[None, :] < RANK)
        b_tile = tl.load(b + row[:, None] * RANK + r[None, :], mask=kept, other=0.0)
        weight += scaling * tl.dot(b_tile.to(KIND), a_tile.to(KIND))
    if EIGHT:
        store_codes(
            weight, row, column, rows, columns, out, other, step, row_scale, column_scale, 448.0
        )
        return
    target = row[:, None].to(tl.int64) * columns + column[None, :]
    kept = (row[:, None] < rows) & (column[None, :] < columns)
    tl.store(out + target, weight.to(out.dtype.element_ty), mask=kept)


@triton.jit
def store_codes(
    weight, row, column, rows, columns, codes, other, step, row_scale, column_scale, largest
):  # fmt: skip
    """Store a tile of weights in FP8, by the scales of its rows, and transposed by those of its columns."""
    kept = (row[:, None] < rows) & (column[None, :] < columns)
    kind = codes.dtype.element_ty
    by_row = weight / tl.load(row_scale + row, mask=row < rows, other=1.0)[:, None]
    by_row = tl.minimum(tl.maximum(by_row, -largest), largest).to(kind)
    tl.store(codes + row[:, None].to(tl.int64) * columns + column[None, :], by_row, mask=kept)
    by_column = weight / tl.load(column_scale + column, mask=column < columns, other=1.0)[None, :]
    by_column = tl.minimum(tl.maximum(by_column, -largest), largest).to(kind)
    target = other + column[:, None].to(tl.int64) * step + row[None, :]
    tl.store(target, tl.trans(by_column), mask=tl.trans(kept))
