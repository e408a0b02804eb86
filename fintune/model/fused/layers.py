"""A decoder layer with hand-written forward and backward passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fintune.model.attention import PackedSequences
from fintune.model.attention import attend as attend_packed
from fintune.model.fused.projections import Projections

Rotary = tuple[Tensor, Tensor]  # cos and sin of each token's angles, (tokens, head size) each


@dataclass
class Layer:
    """A decoder layer's weights, sizes and settings."""

    qkv: Projections
    output: Projections
    gate_up: Projections
    down: Projections
    norms: tuple[Tensor, Tensor]
    eps: float
    heads: int
    kv_heads: int
    window: int | None
    keeps_gate_up: bool  # save the outputs of gate and up for the backward pass
    run: Any  # the module of pointwise functions: kernels.py on a GPU, else ops.py

    def __call__(self, x: Tensor, packed: PackedSequences, rotary: Rotary, seed: int) -> Tensor:
        """Run the layer; (tokens, hidden) to (tokens, hidden)."""
        out: Tensor = _FeedForward.apply(
            self.attention(x, packed, rotary, seed), self, seed + 2, *self.of_feed_forward
        )
        return out

    def attention(self, x: Tensor, packed: PackedSequences, rotary: Rotary, seed: int) -> Tensor:
        """Run the attention block, residual connection included."""
        q, k, v, x = _QueryKeyValue.apply(x, self, rotary, seed, *self.qkv.parameters)
        scale = q.shape[-1] ** -0.5
        attended = attend_packed(q, k, v, packed, self.window, scale)
        out: Tensor = _Output.apply(attended.flatten(1), x, self, seed + 1, *self.output.parameters)
        return out

    @property
    def of_attention(self) -> tuple[Tensor, ...]:
        return (*self.qkv.parameters, *self.output.parameters)

    @property
    def of_feed_forward(self) -> tuple[Tensor, ...]:
        return (*self.gate_up.parameters, *self.down.parameters)

    def feed_forward_gradients(
        self, x: Tensor, gate_up: Tensor | None, dy: Tensor, seed: int
    ) -> tuple[Tensor, list[Tensor]]:
        """Compute the gradients of x and of `of_feed_forward`; recompute `gate_up` if it is None."""
        normal = self.run.rms_norm(x, self.norms[1], self.eps)
        if gate_up is None:
            gate_up = self.gate_up.forward(normal, seed)
        d_middle = self.down.input_gradient(dy, seed + 1)
        middle, d_gate_up = self.run.swiglu_backward(gate_up, d_middle)
        del gate_up, d_middle
        of_down = self.down.parameter_gradients(middle, dy, seed + 1)
        del middle
        of_gate_up = self.gate_up.parameter_gradients(normal, d_gate_up, seed)
        del normal
        d_normal = self.gate_up.input_gradient(d_gate_up, seed)
        del d_gate_up
        dx = self.run.rms_norm_backward(x, self.norms[1], self.eps, d_normal, dy)
        return dx, [*of_gate_up, *of_down]

    def infer(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        """Run the layer without gradients; `attend` maps q, k and v to each token's attention output."""
        normal = self.run.rms_norm(x, self.norms[0], self.eps)
        turned = self.run.rotate(self.qkv.forward(normal, 0), cos, sin, self.heads, self.kv_heads)
        attended = attend(*turned.split([self.heads, self.kv_heads, self.kv_heads], dim=1))
        x = self.output.forward(attended.flatten(1), 0).add_(x)
        normal = self.run.rms_norm(x, self.norms[1], self.eps)
        middle = self.run.swiglu(self.gate_up.forward(normal, 0))
        return self.down.forward(middle, 0).add_(x)


class _QueryKeyValue(Function):
    """Norm, q, k, v and rotary embedding; also returns the residual, so that its gradient is added here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Layer, rotary: Rotary, seed: int, *_: Tensor) -> Any:
        normal = layer.run.rms_norm(x, layer.norms[0], layer.eps)
        qkv = layer.qkv.forward(normal, seed)
        turned = layer.run.rotate(qkv, *rotary, layer.heads, layer.kv_heads)
        ctx.save_for_backward(x)
        ctx.layer, ctx.rotary, ctx.seed = layer, rotary, seed
        q, k, v = turned.split([layer.heads, layer.kv_heads, layer.kv_heads], dim=1)
        return q, k, v, x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        dq, dk, dv, skip = gradients
        (x,), layer, rotary = ctx.saved_tensors, ctx.layer, ctx.rotary
        d_qkv = layer.run.rotate_backward(dq, dk, dv, *rotary)
        normal = layer.run.rms_norm(x, layer.norms[0], layer.eps)
        of_parameters = layer.qkv.parameter_gradients(normal, d_qkv, ctx.seed)
        d_normal = layer.qkv.input_gradient(d_qkv, ctx.seed)
        dx = layer.run.rms_norm_backward(x, layer.norms[0], layer.eps, d_normal, skip)
        return dx, None, None, None, *of_parameters


class _Output(Function):
    """The attention's output layer, added to the residual."""

    @staticmethod
    def forward(ctx: Any, attended: Tensor, x: Tensor, layer: Layer, seed: int, *_: Tensor) -> Any:
        ctx.save_for_backward(attended)
        ctx.layer, ctx.seed = layer, seed
        return layer.output.forward(attended, seed).add_(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (dy,), (attended,), layer = gradients, ctx.saved_tensors, ctx.layer
        of_parameters = layer.output.parameter_gradients(attended, dy, ctx.seed)
        return layer.output.input_gradient(dy, ctx.seed), dy, None, None, *of_parameters


class _FeedForward(Function):
    """Norm, gate, up, SwiGLU and down, added to the residual."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Layer, seed: int, *_: Tensor) -> Any:
        normal = layer.run.rms_norm(x, layer.norms[1], layer.eps)
        gate_up = layer.gate_up.forward(normal, seed)
        del normal
        middle = layer.run.swiglu(gate_up)
        ctx.save_for_backward(x, gate_up if layer.keeps_gate_up else None)
        ctx.layer, ctx.seed = layer, seed
        if not layer.keeps_gate_up:
            del gate_up
        return layer.down.forward(middle, seed + 1).add_(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, gate_up = ctx.saved_tensors
        dx, of_parameters = ctx.layer.feed_forward_gradients(x, gate_up, gradients[0], ctx.seed)
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
        seed: int,
        *_: Tensor,
    ) -> Any:
        ctx.save_for_backward(x)
        ctx.layer, ctx.packed, ctx.rotary, ctx.seed = layer, packed, rotary, seed
        return layer(x, packed, rotary, seed)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        layer, x = ctx.layer, ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            middle = layer.attention(x, ctx.packed, ctx.rotary, ctx.seed)
        d_middle, of_feed_forward = layer.feed_forward_gradients(
            middle.detach(), None, gradients[0], ctx.seed + 2
        )
        dx, *of_attention = torch.autograd.grad(middle, [x, *layer.of_attention], d_middle)
        return dx, None, None, None, None, *of_attention, *of_feed_forward
