"""Triton kernels that also write what they compute in FP8, with the scale of each row; fp8.py calls them."""

import triton
import triton.language as tl

from fintune.model.fused import kernels


@triton.jit
def _scale_of(largest, scale, token, LARGEST):
    """Store a row's scale; return the factor of its values."""
    largest = tl.maximum(largest, 1e-12)
    tl.store(scale + token, largest / LARGEST)
    return LARGEST / largest


@triton.jit
def quantize(x, step, codes, scale, columns, LARGEST, WIDTH: tl.constexpr):
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


@triton.jit
def rms_norm(
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


@triton.jit
def gated(
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


@triton.jit
def gated_backward(
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
