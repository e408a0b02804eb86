"""Matrix products of 8-bit floating-point numbers (e4m3), with a scale for each row of both factors.

Runs on GPUs from compute capability 8.9 on. Imported only on a GPU, where torch includes Triton.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fintune.model.fused import fp8_kernels, kernels

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
    found = Codes.empty(x.shape[0], x.shape[1], x.device)
    fp8_kernels.quantize[(x.shape[0],)](
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
    x: Tensor,
    weight: Tensor,
    eps: float,
    plain: bool = False,
    p: float = 0.0,
    seed: Tensor | int = 0,
) -> tuple[Tensor | None, Codes]:
    """Normalize as `kernels.rms_norm` does.

    Returns:
        The result in 16 bits, if `plain`, without what `kernels.drop` zeroes; and all of it in FP8.
    """
    y = torch.empty_like(x) if plain else None
    found = Codes.empty(x.shape[0], x.shape[1], x.device)
    width = triton.next_power_of_2(x.shape[1])
    fp8_kernels.rms_norm[(x.shape[0],)](
        x, weight, x if y is None else y, *found, x.shape[1], eps, p, seed, LARGEST,
        PLAIN=plain, DROP=p > 0, QUARTER=width // 4, num_warps=8,
    )  # fmt: skip
    return y, found


def gated(
    gate_up: Tensor, gelu: bool, plain: bool = False, p: float = 0.0, seed: Tensor | int = 0
) -> tuple[Tensor | None, Codes]:
    """Compute `kernels.gated`; return what `rms_norm` does."""
    tokens, columns = gate_up.shape[0], gate_up.shape[1] // 2
    y = gate_up.new_empty(tokens, columns) if plain else None
    found = Codes.empty(tokens, columns, gate_up.device)
    fp8_kernels.gated[(tokens,)](
        gate_up, gate_up if y is None else y, *found, columns, p, seed, LARGEST,
        GELU=gelu, PLAIN=plain, DROP=p > 0, **_row(columns, 16),
    )  # fmt: skip
    return y, found


def gated_backward(
    gate_up: Tensor, dy: Tensor, gelu: bool, p: float = 0.0, seed: Tensor | int = 0
) -> tuple[Tensor, Tensor, Codes]:
    """Compute `kernels.gated_backward`, the first result as dropped, and the second also in FP8."""
    tokens, columns = dy.shape
    value, out = torch.empty_like(dy), torch.empty_like(gate_up)
    found = Codes.empty(tokens, 2 * columns, dy.device)
    fp8_kernels.gated_backward[(tokens,)](
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
        for codes, values in ((self.forward, whole), (self.backward, whole.t())):
            scaled = (values.float() / codes.scale).clamp_(-LARGEST, LARGEST)
            codes.codes.copy_(scaled)

    def fill(
        self,
        rows: slice,
        packed: Tensor,
        state: "kernels.NestedState",
        lora: tuple[Tensor, Tensor] | None,
        scaling: float,
    ) -> None:
        """Quantize some rows of W + scaling B A anew; the arguments are those of `dequantize_and_add`."""
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
