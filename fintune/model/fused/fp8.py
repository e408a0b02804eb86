"""Matrix products of 8-bit floating-point numbers (e4m3), with a scale for each row of both factors.

Runs on GPUs from compute capability 8.9 on. Imported only on a GPU, where torch includes Triton.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fintune.model.fused import kernels

KIND = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3 (Micikevicius et al. 2022)
MOST_AT_ONCE = 16_384  # columns of a row whose values fit into registers


class Codes(NamedTuple):
    """A matrix in FP8: codes, (rows, columns), times the scale of each row, (rows, 1) in float32."""

    codes: Tensor
    scale: Tensor

    @classmethod
    def empty(cls, rows: int, columns: int, device: torch.device) -> "Codes":
        codes = torch.empty(rows, columns, dtype=KIND, device=device)
        return cls(codes, torch.empty(rows, 1, dtype=torch.float32, device=device))


def product(x: Codes, weight: Codes) -> Tensor:
    """Multiply x, (tokens, inputs), by weight, (outputs, inputs); (tokens, outputs) in bfloat16."""
    y: Tensor = torch._scaled_mm(
        x.codes,
        weight.codes.t(),
        scale_a=x.scale,
        scale_b=weight.scale.t(),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return y


def quantize(x: Tensor) -> Codes:
    """Quantize the rows of (tokens, columns)."""
    found = Codes.empty(*x.shape, x.device)
    _quantize[(x.shape[0],)](
        x,
        x.stride(0),
        *found,
        x.shape[1],
        LARGEST,
        WIDTH=min(4096, triton.next_power_of_2(x.shape[1])),
        num_warps=8,
    )
    return found


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, plain: bool = False, p: float = 0.0, seed: int = 0
) -> tuple[Tensor | None, Codes]:
    """Normalize as `kernels.rms_norm` does.

    Returns:
        The result in 16 bits, if `plain`, without what `kernels.drop` zeroes; and all of it in FP8.
    """
    y = torch.empty_like(x) if plain else None
    found = Codes.empty(*x.shape, x.device)
    width = triton.next_power_of_2(x.shape[1])
    _rms_norm[(x.shape[0],)](
        x, weight, x if y is None else y, *found, x.shape[1], eps, p, seed, LARGEST,
        PLAIN=plain, DROP=p > 0, QUARTER=width // 4, num_warps=8,
    )  # fmt: skip
    return y, found


def gated(
    gate_up: Tensor, gelu: bool, plain: bool = False, p: float = 0.0, seed: int = 0
) -> tuple[Tensor | None, Codes]:
    """Compute `kernels.gated`; return what `rms_norm` does."""
    tokens, columns = gate_up.shape[0], gate_up.shape[1] // 2
    y = gate_up.new_empty(tokens, columns) if plain else None
    found = Codes.empty(tokens, columns, gate_up.device)
    _gated[(tokens,)](
        gate_up, gate_up if y is None else y, *found, columns, p, seed, LARGEST,
        GELU=gelu, PLAIN=plain, DROP=p > 0, **_row(columns, 16),
    )  # fmt: skip
    return y, found


def gated_backward(
    gate_up: Tensor, dy: Tensor, gelu: bool, p: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor, Codes]:
    """Compute `kernels.gated_backward`, the first result as dropped, and the second also in FP8."""
    tokens, columns = dy.shape
    value, out = torch.empty_like(dy), torch.empty_like(gate_up)
    found = Codes.empty(*gate_up.shape, dy.device)
    _gated_backward[(tokens,)](
        gate_up, dy, value, out, *found, columns, p, seed, LARGEST,
        GELU=gelu, DROP=p > 0, **_row(columns, 32),
    )  # fmt: skip
    return value, out, found


class Weights:
    """A group's weights, W + (alpha / r) B A, in FP8: by row for the product, transposed for its gradient.

    The scales are those of W, with room for the adapter.
    """

    def __init__(self, whole: Tensor) -> None:
        rows, columns = whole.shape
        self.forward = Codes.empty(rows, columns, whole.device)
        self.backward = Codes.empty(columns, rows, whole.device)
        for codes, dim in ((self.forward, 1), (self.backward, 0)):
            largest = torch.linalg.vector_norm(whole, float("inf"), dim=dim, dtype=torch.float32)
            codes.scale.copy_(largest.clamp_(min=1e-12).mul_(ROOM / LARGEST)[:, None])
        self.fill(slice(0, rows), whole)

    def fill(self, rows: slice, whole: Tensor) -> None:
        """Quantize some rows of W anew, from (rows, inputs) in 16 bits."""
        forward, backward = self.forward, self.backward
        _both[(triton.cdiv(whole.shape[0], 64), triton.cdiv(whole.shape[1], 64))](
            whole, forward.codes[rows], backward.codes[:, rows], forward.scale[rows], backward.scale,
            *whole.shape, backward.codes.shape[1], LARGEST, TILE=64,
        )  # fmt: skip

    def fill_from(
        self,
        rows: slice,
        packed: Tensor,
        state: "kernels.NestedState",
        lora: tuple[Tensor, Tensor] | None,
        scaling: float,
    ) -> None:
        """Quantize some rows of W + scaling B A anew, from 4-bit weights as `dequantize_and_add` reads them."""
        forward, backward = self.forward, self.backward
        kernels.dequantize_and_add(
            packed, state, lora, scaling, forward.codes[rows],
            (backward.codes[:, rows], backward.codes.shape[1], forward.scale[rows], backward.scale),
        )  # fmt: skip


ROOM = 1.25  # for what the adapter adds to the largest weight of a row; larger ones are cut off


def _row(columns: int, warps: int) -> dict[str, int | bool]:
    """Return how a program reads a row: at once, its values kept in registers, or twice, in parts."""
    width = triton.next_power_of_2(columns)
    whole = width <= MOST_AT_ONCE
    return {
        "ONCE": whole,
        "QUARTER": (width if whole else 2048) // 4,
        "num_warps": warps if whole else 8,
    }


@triton.jit
def _scale_of(largest, scale, token, LARGEST):
    """Store a row's scale; return the factor of its values."""
    largest = tl.maximum(largest, 1e-12)
    tl.store(scale + token, largest / LARGEST)
    return LARGEST / largest


@triton.jit
def _quantize(x, step, codes, scale, columns, LARGEST, WIDTH: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    largest = 0.0
    for first in range(0, columns, WIDTH):
        column = first + tl.arange(0, WIDTH)
        value = tl.load(x + token * step + column, mask=column < columns, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(value), axis=0))
    factor = _scale_of(largest, scale, token, LARGEST)
    for first in range(0, columns, WIDTH):
        column = first + tl.arange(0, WIDTH)
        value = tl.load(x + token * step + column, mask=column < columns, other=0.0).to(tl.float32)
        code = (value * factor).to(codes.dtype.element_ty)
        tl.store(codes + token * columns + column, code, mask=column < columns)


@triton.jit
def _without_dropped(
    value, token, first, columns, p, seed, DROP: tl.constexpr, QUARTER: tl.constexpr
):  # fmt: skip
    """Zero what `kernels.drop` would zero in columns of a token, from `first` on."""
    if DROP:
        four = (token * columns + first) // 4 + tl.arange(0, QUARTER)
        value = tl.where(kernels._random(seed, four) >= p, value, 0.0)
    return value


@triton.jit(do_not_specialize=["seed"])
def _rms_norm(
    x, weight, y, codes, scale, columns, eps, p, seed, LARGEST,
    PLAIN: tl.constexpr, DROP: tl.constexpr, QUARTER: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, 4 * QUARTER)
    inside = column < columns
    x32 = tl.load(x + token * columns + column, mask=inside, other=0.0).to(tl.float32)
    normal = x32 * tl.rsqrt(tl.sum(x32 * x32, axis=0) / columns + eps)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    kind = x.dtype.element_ty
    if weight.dtype.element_ty != tl.float32:
        normal = normal.to(kind).to(tl.float32)
    value = (normal * w).to(kind).to(tl.float32)
    if PLAIN:
        kept = _without_dropped(value, token, 0, columns, p, seed, DROP, QUARTER)
        tl.store(y + token * columns + column, kept.to(kind), mask=inside)
    factor = _scale_of(tl.max(tl.abs(value), axis=0), scale, token, LARGEST)
    code = (value * factor).to(codes.dtype.element_ty)
    tl.store(codes + token * columns + column, code, mask=inside)


@triton.jit
def _gated_value(gate_up, token, column, columns, GELU: tl.constexpr):
    inside = column < columns
    row = gate_up + token * 2 * columns + column
    gate = tl.load(row, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(row + columns, mask=inside, other=0.0).to(tl.float32)
    u, _ = kernels._argument(gate, GELU)
    return gate * tl.sigmoid(u) * up


@triton.jit
def _store_gated(
    value, factor, y, codes, token, first, columns, p, seed,
    PLAIN: tl.constexpr, DROP: tl.constexpr, QUARTER: tl.constexpr,
):  # fmt: skip
    column = first + tl.arange(0, 4 * QUARTER)
    target = token * columns + column
    tl.store(codes + target, (value * factor).to(codes.dtype.element_ty), mask=column < columns)
    if PLAIN:
        kept = _without_dropped(value, token, first, columns, p, seed, DROP, QUARTER)
        tl.store(y + target, kept.to(y.dtype.element_ty), mask=column < columns)


@triton.jit(do_not_specialize=["seed"])
def _gated(
    gate_up, y, codes, scale, columns, p, seed, LARGEST, GELU: tl.constexpr, PLAIN: tl.constexpr,
    DROP: tl.constexpr, ONCE: tl.constexpr, QUARTER: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    if ONCE:
        value = _gated_value(gate_up, token, tl.arange(0, 4 * QUARTER), columns, GELU)
        factor = _scale_of(tl.max(tl.abs(value), axis=0), scale, token, LARGEST)
        _store_gated(value, factor, y, codes, token, 0, columns, p, seed, PLAIN, DROP, QUARTER)
    else:
        largest = 0.0
        for first in range(0, columns, 4 * QUARTER):
            value = _gated_value(gate_up, token, first + tl.arange(0, 4 * QUARTER), columns, GELU)
            largest = tl.maximum(largest, tl.max(tl.abs(value), axis=0))
        factor = _scale_of(largest, scale, token, LARGEST)
        for first in range(0, columns, 4 * QUARTER):
            value = _gated_value(gate_up, token, first + tl.arange(0, 4 * QUARTER), columns, GELU)
            _store_gated(
                value, factor, y, codes, token, first, columns, p, seed, PLAIN, DROP, QUARTER
            )


@triton.jit
def _gated_gradient(gate_up, dy, token, column, columns, GELU: tl.constexpr):
    inside = column < columns
    row = gate_up + token * 2 * columns + column
    gate = tl.load(row, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(row + columns, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(dy + token * columns + column, mask=inside, other=0.0).to(tl.float32)
    u, slope = kernels._argument(gate, GELU)
    sigmoid = tl.sigmoid(u)
    active = gate * sigmoid
    d_gate = g * up * (sigmoid + active * (1 - sigmoid) * slope)
    d_up = g * active
    return active * up, d_gate, d_up, tl.max(tl.maximum(tl.abs(d_gate), tl.abs(d_up)), axis=0)


@triton.jit
def _store_gradient(d_gate, d_up, factor, out, codes, token, column, columns):
    inside = column < columns
    target = token * 2 * columns + column
    kind = out.dtype.element_ty
    code = codes.dtype.element_ty
    tl.store(out + target, d_gate.to(kind), mask=inside)
    tl.store(out + target + columns, d_up.to(kind), mask=inside)
    tl.store(codes + target, (d_gate * factor).to(code), mask=inside)
    tl.store(codes + target + columns, (d_up * factor).to(code), mask=inside)


@triton.jit(do_not_specialize=["seed"])
def _gated_backward(
    gate_up, dy, value, out, codes, scale, columns, p, seed, LARGEST, GELU: tl.constexpr,
    DROP: tl.constexpr, ONCE: tl.constexpr, QUARTER: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    if ONCE:
        column = tl.arange(0, 4 * QUARTER)
        found, d_gate, d_up, most = _gated_gradient(gate_up, dy, token, column, columns, GELU)
        found = _without_dropped(found, token, 0, columns, p, seed, DROP, QUARTER)
        target = value + token * columns + column
        tl.store(target, found.to(value.dtype.element_ty), mask=column < columns)
        factor = _scale_of(most, scale, token, LARGEST)
        _store_gradient(d_gate, d_up, factor, out, codes, token, column, columns)
        return
    largest = 0.0
    for first in range(0, columns, 4 * QUARTER):
        column = first + tl.arange(0, 4 * QUARTER)
        found, d_gate, d_up, most = _gated_gradient(gate_up, dy, token, column, columns, GELU)
        found = _without_dropped(found, token, first, columns, p, seed, DROP, QUARTER)
        target = value + token * columns + column
        tl.store(target, found.to(value.dtype.element_ty), mask=column < columns)
        largest = tl.maximum(largest, most)
    factor = _scale_of(largest, scale, token, LARGEST)
    for first in range(0, columns, 4 * QUARTER):
        column = first + tl.arange(0, 4 * QUARTER)
        _, d_gate, d_up, _ = _gated_gradient(gate_up, dy, token, column, columns, GELU)
        _store_gradient(d_gate, d_up, factor, out, codes, token, column, columns)


@triton.jit
def _both(
    whole, codes, other, row_scale, column_scale, rows, columns, step, LARGEST, TILE: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    place = row[:, None].to(tl.int64) * columns + column[None, :]
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    weight = tl.load(whole + place, mask=inside, other=0.0).to(tl.float32)
    kernels.store_codes(
        weight, row, column, rows, columns, codes, other, step, row_scale, column_scale, LARGEST
    )
