"""A decoder layer with hand-written forward and backward passes.

Optional parts are those of the supported families: RMS norms of the heads of q and k (Qwen 3, Gemma 3), RMS
norms of a block's output (Gemma 2 and 3), attention scores limited by a tanh (Gemma 2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fintune.model.attention import PackedSequences
from fintune.model.attention import attend as attend_packed
from fintune.model.fused.ops import HeadNorms
from fintune.model.fused.projections import Projections, Seed

# cos and sin of each token's angles, (tokens, head size) each, by the kind of a layer
Rotary = Mapping[str | None, tuple[Tensor, Tensor]]
Seeds = Sequence[Seed]  # of the inputs of qkv, output, gate_up and down


@dataclass
class Layer:
    """A decoder layer's weights, sizes and settings."""

    qkv: Projections
    output: Projections
    gate_up: Projections
    down: Projections
    norms: tuple[Tensor, Tensor]  # of the inputs of attention and feed-forward
    after: tuple[Tensor, Tensor] | None  # norms of their outputs
    head_norms: HeadNorms | None
    eps: float
    heads: int
    kv_heads: int
    head_size: int
    scale: float  # of the attention scores
    softcap: float | None
    window: int | None
    kind: str | None  # tells which angles it has
    gelu: bool  # GeGLU instead of SwiGLU
    keeps_gate_up: bool  # save the outputs of gate and up for the backward pass
    run: Any  # the module of pointwise functions: kernels.py on a GPU, else ops.py

    @property
    def eight(self) -> Any:
        """Return the module of FP8 functions, or None where the products are in 16 bits."""
        if not self.down.eight:
            return None
        from fintune.model.fused import fp8

        return fp8

    def into(
        self, projections: Projections, block: int, x: Tensor, seed: Seed
    ) -> tuple[Tensor, Tensor | None]:
        """Normalize a block's input and multiply it; return what `Projections.forward` does."""
        if projections.coarse:
            how = (projections.reads_plain, projections.dropout, seed)
            normal, codes = self.eight.rms_norm(x, self.norms[block], self.eps, *how)
            return projections.forward(normal, seed, codes)
        return projections.forward(self.run.rms_norm(x, self.norms[block], self.eps), seed)

    def read(self, projections: Projections, block: int, x: Tensor, seed: Seed) -> Tensor:
        """Normalize a block's input again, as dropped for the adapter."""
        if self.eight and projections.dropout:
            how = (True, projections.dropout, seed)
            normal: Tensor = self.eight.rms_norm(x, self.norms[block], self.eps, *how)[0]
            return normal
        return projections.dropped(self.run.rms_norm(x, self.norms[block], self.eps), seed)

    def out_of(self, gate_up: Tensor, seed: Seed) -> tuple[Tensor, Tensor | None]:
        """Compute the gated product and multiply it; return what `Projections.forward` does."""
        if self.down.coarse:
            how = (self.down.reads_plain, self.down.dropout, seed)
            middle, codes = self.eight.gated(gate_up, self.gelu, *how)
            return self.down.forward(middle, seed, codes)
        return self.down.forward(self.run.gated(gate_up, self.gelu), seed)

    def __call__(self, x: Tensor, packed: PackedSequences, rotary: Rotary, seeds: Seeds) -> Tensor:
        """Run the layer; (tokens, hidden) to (tokens, hidden)."""
        out: Tensor = _FeedForward.apply(
            self.attention(x, packed, rotary, seeds), self, seeds[2:], *self.of_feed_forward
        )
        return out

    def attention(self, x: Tensor, packed: PackedSequences, rotary: Rotary, seeds: Seeds) -> Tensor:
        """Run the attention block, residual connection included."""
        q, k, v, x = _QueryKeyValue.apply(
            x, self, rotary[self.kind], seeds[0], *self.qkv.parameters
        )
        attended = self.attend(q, k, v, packed)
        out: Tensor = _Output.apply(attended.flatten(1), x, self, seeds[1], *self.output.parameters)
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor, packed: PackedSequences) -> Tensor:
        """Compute attention within each document; (tokens, heads, head size) of each."""
        return attend_packed(q, k, v, packed, self.window, self.scale, self.softcap)

    def turn(self, qkv: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Normalize and rotate the heads; (tokens, outputs) to (tokens, heads + 2 kv_heads, head size)."""
        turned: Tensor = self.run.rotate(
            qkv, *rotary, self.heads, self.kv_heads, self.head_norms, self.eps
        )
        return turned

    def split(self, turned: Tensor) -> tuple[Tensor, ...]:
        """Split (tokens, heads + 2 kv_heads, head size) into q, k and v."""
        return turned.split([self.heads, self.kv_heads, self.kv_heads], dim=1)

    def add(self, block: int, y: Tensor, x: Tensor) -> Tensor:
        """Add a block's output to the residual x, normalized where the family does so; may overwrite y."""
        if self.after:
            y = self.run.rms_norm(y, self.after[block], self.eps)
        return y.add_(x)

    def output_gradient(self, block: int, y: Tensor | None, dy: Tensor) -> Tensor:
        """Compute the gradient of a block's output `y` before its norm, if it has one."""
        if not self.after or y is None:
            return dy
        gradient: Tensor = self.run.rms_norm_backward(y, self.after[block], self.eps, dy, None)
        return gradient

    @property
    def of_attention(self) -> tuple[Tensor, ...]:
        return (*self.qkv.parameters, *self.output.parameters)

    @property
    def of_feed_forward(self) -> tuple[Tensor, ...]:
        return (*self.gate_up.parameters, *self.down.parameters)

    def feed_forward_gradients(
        self,
        x: Tensor,
        gate_up: Tensor | None,
        y: Tensor | None,
        between: Sequence[Tensor | None],
        dy: Tensor,
        seeds: Seeds,
    ) -> tuple[Tensor, list[Tensor]]:
        """Compute the gradients of x and of `of_feed_forward`.

        Args:
            gate_up: recomputed if it is None.
            y: the output before its norm; recomputed if it is None and the layer has such a norm.
            between: the second results of `into` and `out_of`; recomputed where None.
        """
        if gate_up is None:
            gate_up, _ = self.into(self.gate_up, 1, x, seeds[0])
        if self.after and y is None:
            y, _ = self.out_of(gate_up, seeds[1])
        d_out = self.output_gradient(1, y, dy)
        d_middle, inner = self.down.input_gradient(d_out, seeds[1])
        codes = None
        if self.eight:
            how = (self.gelu, self.down.dropout, seeds[1])
            middle, d_gate_up, codes = self.eight.gated_backward(gate_up, d_middle, *how)
        else:
            middle, d_gate_up = self.run.gated_backward(gate_up, d_middle, self.gelu)
            middle = self.down.dropped(middle, seeds[1])
        del gate_up, d_middle
        of_down = self.down.parameter_gradients(middle, d_out, inner, between[1])
        del middle
        d_normal, inner = self.gate_up.input_gradient(d_gate_up, seeds[0], codes)
        del codes
        normal = self.read(self.gate_up, 1, x, seeds[0])
        of_gate_up = self.gate_up.parameter_gradients(normal, d_gate_up, inner, between[0])
        del normal, d_gate_up
        dx = self.run.rms_norm_backward(x, self.norms[1], self.eps, d_normal, dy)
        return dx, [*of_gate_up, *of_down]

    def infer(self, x: Tensor, rotary: Rotary, attend: Callable[..., Tensor]) -> Tensor:
        """Run the layer without gradients; `attend` maps q, k and v to each token's attention output."""
        qkv, _ = self.into(self.qkv, 0, x, 0)
        attended = attend(*self.split(self.turn(qkv, rotary[self.kind])))
        x = self.add(0, self.output.forward(attended.flatten(1), 0)[0], x)
        gate_up, _ = self.into(self.gate_up, 1, x, 0)
        return self.add(1, self.out_of(gate_up, 0)[0], x)


class _QueryKeyValue(Function):
    """Norm, q, k, v and rotary embedding; also returns the residual, so that its gradient is added here."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layer: Layer, rotary: tuple[Tensor, Tensor], seed: Seed, *_: Tensor
    ) -> Any:
        qkv, between = layer.into(layer.qkv, 0, x, seed)
        ctx.save_for_backward(x, qkv if layer.head_norms else None, between)
        ctx.layer, ctx.rotary, ctx.seed = layer, rotary, seed
        q, k, v = layer.split(layer.turn(qkv, rotary))
        return q, k, v, x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        dq, dk, dv, skip = gradients
        (x, qkv, between), layer = ctx.saved_tensors, ctx.layer
        d_qkv = layer.run.rotate_backward(dq, dk, dv, *ctx.rotary, qkv, layer.head_norms, layer.eps)
        d_normal, inner = layer.qkv.input_gradient(d_qkv, ctx.seed)
        normal = layer.read(layer.qkv, 0, x, ctx.seed)
        of_parameters = layer.qkv.parameter_gradients(normal, d_qkv, inner, between)
        dx = layer.run.rms_norm_backward(x, layer.norms[0], layer.eps, d_normal, skip)
        return dx, None, None, None, *of_parameters


class _Output(Function):
    """The attention's output layer, added to the residual."""

    @staticmethod
    def forward(ctx: Any, attended: Tensor, x: Tensor, layer: Layer, seed: Seed, *_: Tensor) -> Any:
        y, between = layer.output.forward(attended, seed)
        ctx.save_for_backward(attended, y if layer.after else None, between)
        ctx.layer, ctx.seed = layer, seed
        return layer.add(0, y, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (dy,), (attended, y, between), layer = gradients, ctx.saved_tensors, ctx.layer
        d_out = layer.output_gradient(0, y, dy)
        dx, inner = layer.output.input_gradient(d_out, ctx.seed)
        attended = layer.output.dropped(attended, ctx.seed)
        of_parameters = layer.output.parameter_gradients(attended, d_out, inner, between)
        return dx, dy, None, None, *of_parameters


class _FeedForward(Function):
    """Norm, gate, up, their gated product and down, added to the residual."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Layer, seeds: Seeds, *_: Tensor) -> Any:
        gate_up, between = layer.into(layer.gate_up, 1, x, seeds[0])
        kept = gate_up if layer.keeps_gate_up else None
        y, between_of_down = layer.out_of(gate_up, seeds[1])
        del gate_up
        ctx.save_for_backward(x, kept, y if layer.after else None, between, between_of_down)
        ctx.layer, ctx.seeds = layer, seeds
        return layer.add(1, y, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (x, gate_up, y, *between), layer = ctx.saved_tensors, ctx.layer
        how = (x, gate_up, y, between, gradients[0], ctx.seeds)
        dx, of_parameters = layer.feed_forward_gradients(*how)
        return dx, None, None, *of_parameters


class CheckpointedLayer(Function):
    """Gradient checkpointing of a whole layer: saves only the input, recomputes all but the last product."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        layer: Layer,
        packed: PackedSequences,
        rotary: Rotary,
        seeds: Seeds,
        *_: Tensor,
    ) -> Any:
        ctx.save_for_backward(x)
        ctx.layer, ctx.packed, ctx.rotary, ctx.seeds = layer, packed, rotary, seeds
        return layer(x, packed, rotary, seeds)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        layer, x = ctx.layer, ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            middle = layer.attention(x, ctx.packed, ctx.rotary, ctx.seeds)
        d_middle, of_feed_forward = layer.feed_forward_gradients(
            middle.detach(), None, None, (None, None), gradients[0], ctx.seeds[2:]
        )
        dx, *of_attention = torch.autograd.grad(middle, [x, *layer.of_attention], d_middle)
        return dx, None, None, None, None, *of_attention, *of_feed_forward
