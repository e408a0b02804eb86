"""Linear layers with LoRA that read the same input, as one matrix product."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor

from fintune.model.fused.ops import functions_for

Seed = int | Tensor  # of one dropout: a number, or on a GPU an int64 tensor of one value


class Workspace:
    """One buffer for the dequantized weights of the current product; products of a stream run in sequence."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def take(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """Return an uninitialized (rows, columns) view; valid until the next call."""
        size = rows * columns
        if self._buffer is None or self._buffer.numel() < size:
            self._buffer = None
            self._buffer = like.new_empty(size)
        return self._buffer[:size].view(rows, columns)


class Projections:
    """Linear layers that read the same input, with or without LoRA, as one product.

    `parameters` are A and B of each layer with LoRA; gradients have the same order. `down`, (ranks, inputs),
    and `up`, (outputs, ranks), concatenate them in the activations' type; `up` is zero where a rank belongs
    to another layer. `copies` are the parts of both that `FusedModel.sync_parameters` updates. With
    `cache_weights`, 4-bit weights are dequantized once and after each update of a merged adapter, otherwise
    for each product. With `fp8`, both products are in FP8 and have their own weights.
    """

    def __init__(
        self,
        modules: Sequence[Any],
        dtype: torch.dtype,
        workspace: Workspace,
        cache_weights: bool,
        training: bool,
        fp8: bool = False,
    ) -> None:
        self.bases = [getattr(module, "base_layer", module) for module in modules]
        self.outputs = [base.out_features for base in self.bases]
        self.bias = _bias(self.bases, dtype)
        self.inputs: int = self.bases[0].in_features
        self.quantized = state_of(self.bases[0]) is not None
        self.workspace = workspace
        tuned = [(m, active_adapter(m)) for m in modules]
        self.loras = [
            (m.lora_A[name].weight, m.lora_B[name].weight) if name else None for m, name in tuned
        ]
        self.parameters: tuple[Tensor, ...] = tuple(p for pair in self.loras if pair for p in pair)
        present = [(m, name) for m, name in tuned if name]
        self.scaling: float = present[0][0].scaling[present[0][1]] if present else 0.0
        self.dropout: float = 0.0
        if present and training:
            self.dropout = getattr(present[0][0].lora_dropout[present[0][1]], "p", 0.0)
        self.merges_lora = bool(present) and self.quantized and not self.dropout
        device = self.bases[0].weight.device
        ranks = sum(pair[0].shape[0] for pair in self.loras if pair)
        self.down = torch.zeros(ranks, self.inputs, dtype=dtype, device=device)
        self.up = torch.zeros(sum(self.outputs), ranks, dtype=dtype, device=device)
        self.rows = _slices(self.outputs)
        self.ranks = _slices([pair[0].shape[0] if pair else 0 for pair in self.loras])
        self.copies = self._of_parameters(self.down, self.up)
        # a float32 tensor: scaling by it also converts the product to float32, in one kernel
        self.factor = torch.full((1,), self._alpha, dtype=torch.float32, device=device)
        if self.quantized and device.type == "cuda":
            from fintune.model.fused import (
                kernels,  # needs Triton, which only GPU builds of torch include
            )

            self.states = [kernels.NestedState.of(state_of(base)) for base in self.bases]
        self.cached_weights: Tensor | None = None
        self.eight: Any = None  # the module fp8's Weights
        self.coarse = fp8  # the forward product is in FP8, not only that of the gradient
        if fp8:
            self.eight = self._in_fp8(dtype)
        elif cache_weights and self.quantized:
            self.cached_weights = torch.empty(
                sum(self.outputs), self.inputs, dtype=dtype, device=device
            )
            self._fill(self.cached_weights)

    @property
    def reads_plain(self) -> bool:
        """Return whether the product reads its input in the activations' type, although it is in FP8."""
        return bool(self.parameters) and not self.merges_lora

    def refresh(self) -> None:
        """Refill the cached weights after the parameters have changed."""
        if self.cached_weights is not None and self.merges_lora:
            self._fill(self.cached_weights)
        if self.eight and self.merges_lora:
            for i, (rows, base) in enumerate(zip(self.rows, self.bases, strict=True)):
                lora = self.loras[i]
                self.eight.fill(rows, base.weight, self.states[i], lora, self.scaling)

    @torch.no_grad()
    def _in_fp8(self, dtype: torch.dtype) -> Any:
        from fintune.model.fused.fp8 import Weights

        whole = torch.empty(sum(self.outputs), self.inputs, dtype=dtype, device=self.down.device)
        for rows, weight in self._blocks(whole):
            whole[rows] = weight
        return Weights(whole)

    def _of_parameters(self, down: Tensor, up: Tensor) -> list[Tensor]:
        """Return views into tensors of `down`'s and `up`'s shapes that match `parameters`, in their order."""
        parts = []
        for pair, rows, ranks in zip(self.loras, self.rows, self.ranks, strict=True):
            if pair:
                parts += [down[ranks], up[rows, ranks]]
        return parts

    def _blocks(self, like: Tensor) -> list[tuple[slice, Tensor]]:
        """Return weights, (outputs, inputs), each with its slice of the outputs."""
        if not self.quantized:
            return [(r, base.weight) for r, base in zip(self.rows, self.bases, strict=True)]
        whole = self.cached_weights
        if whole is None:
            whole = self.workspace.take(sum(self.outputs), self.inputs, like)
            self._fill(whole)
        return [(slice(0, len(whole)), whole)]

    @torch.no_grad()
    def _fill(self, whole: Tensor) -> None:
        """Dequantize the weights, (outputs, inputs), and add the adapter where it is merged."""
        for i, (r, base, pair) in enumerate(zip(self.rows, self.bases, self.loras, strict=True)):
            pair = pair if self.merges_lora else None
            if whole.is_cuda:
                from fintune.model.fused.kernels import dequantize_and_add

                codes = base.weight
                if codes.dtype != torch.uint8:  # several in a number that FSDP can share out
                    codes = codes.view(torch.uint8)
                dequantize_and_add(codes, self.states[i], pair, self.scaling, whole[r])
            else:
                weight = _dequantize(base)
                if pair:
                    weight.addmm_(pair[1].float(), pair[0].float(), alpha=self.scaling)
                whole[r] = weight

    def forward(self, x: Any, seed: Seed, codes: Any = None) -> tuple[Tensor, Tensor | None]:
        """Multiply; (tokens, inputs) to (tokens, outputs).

        Args:
            codes: x in FP8, if it is at hand; x is as dropped then.

        Returns:
            It, and what is between A and B, (tokens, ranks), if the adapter is not merged.
        """
        if self.coarse:
            from fintune.model.fused import fp8

            y = fp8.product(codes or fp8.quantize(x), self.eight.forward)
            if self.bias is not None:
                y += self.bias
        else:
            blocks = self._blocks(x)
            y = x.new_empty(x.shape[0], sum(self.outputs))
            for rows, weight in blocks:
                if self.bias is None:
                    torch.mm(x, weight.t(), out=y[:, rows])
                else:
                    torch.addmm(self.bias[rows], x, weight.t(), out=y[:, rows])
        if not self.reads_plain:
            return y, None
        between = (self.dropped(x, seed) if codes is None else x) @ self.down.t()
        return y.addmm_(between, self.up.t(), alpha=self._alpha), between

    def input_gradient(
        self, dy: Tensor, seed: Seed, codes: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the input's gradient; (tokens, outputs) to (tokens, inputs).

        Returns:
            It, and the gradient between A and B, (tokens, ranks), for `parameter_gradients`.
        """
        inner = dy @ self.up if self.parameters else None
        if self.eight:
            from fintune.model.fused import fp8

            dx = fp8.product(codes or fp8.quantize(dy), self.eight.backward)
        else:
            (rows, weight), *others = self._blocks(dy)
            dx = dy[:, rows] @ weight
            for rows, weight in others:
                dx.addmm_(dy[:, rows], weight)
        if self.reads_plain and inner is not None:
            if self.dropout:
                arguments = (dx, inner, self.down, self._alpha, self.dropout, seed)
                functions_for(dx).add_dropped_product(*arguments)
            else:
                dx.addmm_(inner, self.down, alpha=self._alpha)
        return dx, inner

    def parameter_gradients(
        self, x: Tensor, dy: Tensor, inner: Tensor | None, between: Tensor | None
    ) -> list[Tensor]:
        """Compute the gradients of `parameters`.

        Args:
            x: the input, as dropped.
            inner: the second result of `input_gradient`.
            between: the second result of `forward`; computed again if it is None.
        """
        if inner is None:
            return []
        d_up = dy.t() @ (x @ self.down.t() if between is None else between)
        return [part * self.factor for part in self._of_parameters(inner.t() @ x, d_up)]

    @property
    def _alpha(self) -> float:
        return self.scaling / (1 - self.dropout)

    def dropped(self, x: Tensor, seed: Seed) -> Tensor:
        """Return the adapter's input: x after dropout."""
        return functions_for(x).drop(x, self.dropout, seed) if self.dropout else x


def active_adapter(module: Any) -> str | None:
    """Return the active adapter of a PEFT layer; None if it is disabled or there is none."""
    if not getattr(module, "active_adapters", None) or module.disable_adapters:
        return None
    name: str = module.active_adapters[0]
    mine = getattr(module, "lora_A", None) or getattr(module, "token_indices", {})
    return name if name in mine else None


def _bias(bases: Sequence[Any], dtype: torch.dtype) -> Tensor | None:
    """Return the biases of all outputs, (outputs,); zero for a layer without, None if none has any."""
    found = [base.bias for base in bases]
    if all(bias is None for bias in found):
        return None
    return torch.cat(
        [
            torch.zeros(base.out_features, dtype=dtype, device=base.weight.device)
            if base.bias is None
            else base.bias.detach().to(dtype)
            for base in bases
        ]
    )


def _slices(sizes: Sequence[int]) -> list[slice]:
    return [slice(a, b) for a, b in pairwise([0, *accumulate(sizes)])]


def state_of(module: Any) -> Any:
    """Return the quantization state of a layer with 4-bit weights, else None; a sharded weight has none."""
    weight = getattr(module, "weight", None)
    return getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)


def _dequantize(base: Any) -> Tensor:
    """Dequantize to float32 on a CPU, where bitsandbytes repacks weights that evaluation has used."""
    weight, state = base.weight, state_of(base)
    if getattr(state, "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        weight.data, state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
        weight.quant_state = state
    return dequantize_4bit(weight.data, state).float()
