"""The forward and backward pass of a Llama-like model with LoRA, in fewer and larger pieces.

The mathematics is that of transformers and PEFT; what changes is how often the activations travel
through memory. Layers that read the same input (q, k, v and gate, up) are one matrix product. On a 4-bit
base the adapter is added to the weights while they are dequantised, W + (alpha / r) B A, so that the
activations never meet it in the forward pass. Norms, rotary embedding, SwiGLU and their gradients are
one kernel each on a GPU (kernels.py). Cheap values are computed again in the backward pass instead of
being kept.

Adding the adapter to the weights loses nothing that the separate product keeps: the sum is taken in
float32 and rounded once, and since dequantised weights lie nowhere in particular between two
bfloat16 numbers, an update smaller than their distance moves the right share of them.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from torch import Tensor
from torch.autograd import Function
from transformers import PreTrainedModel

from fintune.modeling import attend
from fintune.preflight import CHUNK, GIB

ARCHITECTURES = ("mistral", "llama")
ALIGNMENT = 64  # products whose sizes or starts are no multiples of it take slow kernels


def unsupported(model: PeftModel | PreTrainedModel) -> str | None:
    """Why this model cannot be computed here, or None if it can."""
    config = base_of(model).config
    if config.model_type not in ARCHITECTURES:
        return f"a base of type {config.model_type}"
    if config.hidden_act != "silu":
        return f"the activation {config.hidden_act}"
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in LINEAR and getattr(module, "bias", None) is not None:
            return f"a bias in {name}"
    return None


def base_of(model: Any) -> Any:
    """transformers' own model, whose layers an adapter may sit in."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Workspace:
    """One buffer for the weights of the product at hand; a stream runs one product after another."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def take(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """An uninitialised (rows, columns) view; valid until the next call."""
        size = rows * columns
        if self._buffer is None or self._buffer.numel() < size:
            self._buffer = None
            self._buffer = like.new_empty(size)
        return self._buffer[:size].view(rows, columns)


class Projections:
    """Linear layers that read the same input, with or without LoRA, as one product.

    `parameters` are A and B of each layer that has them; gradients come in that order. Ranks and
    outputs of the layers lie side by side in `down`, (ranks, inputs), and `up`, (outputs, ranks),
    which is zero where a rank belongs to another layer; both are copies in the activations' type.
    `refresh` takes over the parameters' values. With `keep`, 4-bit weights are dequantised there and
    stay in 16 bits; otherwise each product makes them anew.
    """

    def __init__(
        self,
        modules: Sequence[Any],
        dtype: torch.dtype,
        workspace: Workspace,
        keep: bool,
        training: bool,
    ) -> None:
        self.bases = [getattr(module, "base_layer", module) for module in modules]
        self.outputs = [base.out_features for base in self.bases]
        self.inputs: int = self.bases[0].in_features
        self.quantized = hasattr(self.bases[0].weight, "quant_state")
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
        self.folds = bool(present) and self.quantized and not self.dropout
        device = self.bases[0].weight.device
        ranks = sum(pair[0].shape[0] for pair in self.loras if pair)
        self.down = torch.zeros(ranks, self.inputs, dtype=dtype, device=device)
        self.up = torch.zeros(sum(self.outputs), ranks, dtype=dtype, device=device)
        self.rows = _side_by_side(self.outputs)
        self.ranks = _side_by_side([pair[0].shape[0] if pair else 0 for pair in self.loras])
        self.copies = self._of_parameters(self.down, self.up)
        if self.quantized and device.type == "cuda":
            from fintune import kernels  # needs Triton, which comes with torch for GPUs only

            self.states = [kernels.NestedState.of(base.weight.quant_state) for base in self.bases]
        self.kept: Tensor | None = None
        if keep and self.quantized:
            self.kept = torch.empty(sum(self.outputs), self.inputs, dtype=dtype, device=device)
            self._fill(self.kept)

    def refresh(self) -> None:
        """Follow parameters that have changed, once `copies` have."""
        if self.kept is not None and self.folds:
            self._fill(self.kept)

    def _of_parameters(self, down: Tensor, up: Tensor) -> list[Tensor]:
        """The parts of tensors of `down`'s and `up`'s shapes that belong to `parameters`, in their order."""
        parts = []
        for pair, rows, ranks in zip(self.loras, self.rows, self.ranks, strict=True):
            if pair:
                parts += [down[ranks], up[rows, ranks]]
        return parts

    def _blocks(self, like: Tensor) -> list[tuple[slice, Tensor]]:
        """Weights, (outputs, inputs), with the outputs that they belong to."""
        if not self.quantized:
            return [(r, base.weight) for r, base in zip(self.rows, self.bases, strict=True)]
        whole = self.kept
        if whole is None:
            whole = self.workspace.take(sum(self.outputs), self.inputs, like)
            self._fill(whole)
        return [(slice(0, len(whole)), whole)]

    @torch.no_grad()
    def _fill(self, whole: Tensor) -> None:
        """Dequantise the weights, (outputs, inputs), and add the adapter where it is folded in."""
        for i, (r, base, pair) in enumerate(zip(self.rows, self.bases, self.loras, strict=True)):
            pair = pair if self.folds else None
            if whole.is_cuda:
                from fintune.kernels import dequantize_and_add

                dequantize_and_add(base.weight, self.states[i], pair, self.scaling, whole[r])
            else:
                weight = dequantize(base)
                if pair:
                    weight.addmm_(pair[1].float(), pair[0].float(), alpha=self.scaling)
                whole[r] = weight

    def forward(self, x: Tensor, seed: int) -> Tensor:
        """(tokens, inputs) to (tokens, outputs)."""
        blocks = self._blocks(x)
        y = x.new_empty(x.shape[0], sum(self.outputs))
        for rows, weight in blocks:
            torch.mm(x, weight.t(), out=y[:, rows])
        if self.parameters and not self.folds:
            y.addmm_(self._dropped(x, seed) @ self.down.t(), self.up.t(), alpha=self._alpha)
        return y

    def input_gradient(self, dy: Tensor, seed: int) -> Tensor:
        """(tokens, outputs) to (tokens, inputs)."""
        (rows, weight), *others = self._blocks(dy)
        dx = dy[:, rows] @ weight
        for rows, weight in others:
            dx.addmm_(dy[:, rows], weight)
        if self.parameters and not self.folds:
            inner = dy @ self.up
            if self.dropout:
                arguments = (dx, inner, self.down, self._alpha, self.dropout, seed)
                functions_for(dx).add_dropped_product(*arguments)
            else:
                dx.addmm_(inner, self.down, alpha=self._alpha)
        return dx

    def parameter_gradients(self, x: Tensor, dy: Tensor, seed: int) -> list[Tensor]:
        """The gradients of `parameters`, from the input and the gradient of the output."""
        if not self.parameters:
            return []
        x = self._dropped(x, seed)
        d_down = (dy @ self.up).t() @ x
        d_up = dy.t() @ (x @ self.down.t())
        return [part.float() * self._alpha for part in self._of_parameters(d_down, d_up)]

    @property
    def _alpha(self) -> float:
        return self.scaling / (1 - self.dropout)

    def _dropped(self, x: Tensor, seed: int) -> Tensor:
        return functions_for(x).drop(x, self.dropout, seed) if self.dropout else x


def active_adapter(module: Any) -> str | None:
    """The adapter that a layer of PEFT's computes with; None where it is switched off, or has none."""
    if not getattr(module, "active_adapters", None) or module.disable_adapters:
        return None
    name: str = module.active_adapters[0]
    mine = getattr(module, "lora_A", None) or getattr(module, "token_indices", {})
    return name if name in mine else None


def _side_by_side(sizes: Sequence[int]) -> list[slice]:
    return [slice(a, b) for a, b in pairwise([0, *accumulate(sizes)])]


def dequantize(base: Any) -> Tensor:
    """4 bits to float32 on a CPU, where bitsandbytes packs weights anew that evaluation has used."""
    weight = base.weight
    if getattr(weight.quant_state, "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(
            weight.data, weight.quant_state
        )
    return dequantize_4bit(weight.data, weight.quant_state).float()


def drop(x: Tensor, share: float, seed: int) -> Tensor:
    """x with a share of its values set to zero; the seed draws the same ones again."""
    return x * _kept(x, share, seed)


def add_dropped_product(
    x: Tensor, left: Tensor, right: Tensor, scale: float, share: float, seed: int
) -> None:
    """Add scale * left @ right to x where `drop` with the same seed keeps values of x's shape."""
    x.addcmul_(left @ right, _kept(x, share, seed).to(x.dtype), value=scale)


def _kept(x: Tensor, share: float, seed: int) -> Tensor:
    generator = torch.Generator(x.device).manual_seed(seed)
    kept = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    return kept.bernoulli_(1 - share, generator=generator)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, in float32 inside."""
    wide = x.float()
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normal.to(x.dtype)


def rms_norm_backward(x: Tensor, weight: Tensor, eps: float, dy: Tensor, skip: Tensor) -> Tensor:
    """The gradient of x, plus that of the residual connection around it."""
    wide, g = x.float(), (dy * weight).float()
    r = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    dx = r * (g - wide * r * r * (g * wide).mean(-1, keepdim=True))
    return (skip.float() + dx).to(x.dtype)


def rotate(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, groups: int) -> Tensor:
    """Rotary embedding of q and k; (tokens, outputs) to (tokens, heads + 2 groups, head size)."""
    x = qkv.view(qkv.shape[0], heads + 2 * groups, -1)
    turned, v = x[:, : heads + groups], x[:, heads + groups :]
    return torch.cat((_turn(turned, cos, sin), v), dim=1)


def rotate_backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gradients of q, k and v, turned back and side by side: (tokens, outputs)."""
    parts = (_turn(dq, cos, -sin), _turn(dk, cos, -sin), dv)
    return torch.cat(parts, dim=1).view(dq.shape[0], -1)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(tokens, heads, size) by angles whose cosines and sines are (tokens, size), halves equal."""
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
    """What the newest token of each row sees, itself and all before it.

    Args:
        q: (rows, heads, size).
        keys: (slots, length, groups, size), as `values`: those of the tokens so far.
        slots: (rows,): which slot holds each row.
        positions: (rows,): of the newest token in its slot.
        window: how many tokens are seen, the newest included; None for all.

    Returns:
        (rows, heads, size).
    """
    rows, heads, size = q.shape
    groups, longest = keys.shape[2], int(positions.max()) + 1
    k, v = (cache[slots, :longest].transpose(1, 2) for cache in (keys, values))
    place = torch.arange(longest, device=q.device)
    seen = place <= positions[:, None]
    if window is not None:
        seen &= place > positions[:, None] - window
    # heads that share a key are queries at the same place
    out = torch.nn.functional.scaled_dot_product_attention(
        q.view(rows, groups, heads // groups, size), k, v, seen[:, None, None], scale=scale
    )
    return out.reshape(rows, heads, size)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up; (tokens, 2 n) to (tokens, n)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate.float()) * up).to(gate_up.dtype)


def swiglu_backward(gate_up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """The value again, (tokens, n), and the gradient of the input, (tokens, 2 n)."""
    gate, up = (half.float() for half in gate_up.chunk(2, dim=-1))
    wide, sigmoid = dy.float(), torch.sigmoid(gate)
    silu = gate * sigmoid
    d_gate = wide * up * (sigmoid + silu * (1 - sigmoid))
    value = (silu * up).to(dy.dtype)
    return value, torch.cat((d_gate, wide * silu), dim=-1).to(dy.dtype)


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
    groups: int
    window: int | None
    keeps_middle: bool  # whether the outputs of gate and up are kept for the backward pass
    run: Any  # where rms_norm and the others are taken from: kernels.py on a GPU, else this module

    def __call__(self, x: Tensor, place: Place, seed: int) -> Tensor:
        """(tokens, hidden) to (tokens, hidden)."""
        out: Tensor = _FeedForward.apply(
            self.attention(x, place, seed), self, seed + 2, *self.of_feed_forward
        )
        return out

    def attention(self, x: Tensor, place: Place, seed: int) -> Tensor:
        """The first half, residual included."""
        q, k, v, x = _QueryKeyValue.apply(x, self, place, seed, *self.qkv.parameters)
        scale = q.shape[-1] ** -0.5
        seen = attend(q, k, v, place.bounds, place.longest, self.window, scale)
        out: Tensor = _Output.apply(seen.flatten(1), x, self, seed + 1, *self.output.parameters)
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
        """Of x, and of `of_feed_forward`; without `gate_up` that product is made again."""
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

    def infer(self, x: Tensor, cos: Tensor, sin: Tensor, look: Callable[..., Tensor]) -> Tensor:
        """The same without gradients; `look` takes q, k and v and gives what each token has seen."""
        normal = self.run.rms_norm(x, self.norms[0], self.eps)
        turned = self.run.rotate(self.qkv.forward(normal, 0), cos, sin, self.heads, self.groups)
        seen = look(*turned.split([self.heads, self.groups, self.groups], dim=1))
        x = self.output.forward(seen.flatten(1), 0).add_(x)
        normal = self.run.rms_norm(x, self.norms[1], self.eps)
        middle = self.run.swiglu(self.gate_up.forward(normal, 0))
        return self.down.forward(middle, 0).add_(x)


@dataclass(frozen=True)
class Place:
    """Where the tokens of packed rows belong: angles of each, and the bounds of the documents."""

    cos: Tensor  # (tokens, head size)
    sin: Tensor
    bounds: Tensor  # int32, (documents + 1,)
    longest: int


class _QueryKeyValue(Function):
    """Norm, q, k, v and rotary embedding; hands the residual on, so that its gradient is added here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Layer, place: Place, seed: int, *_: Tensor) -> Any:
        normal = layer.run.rms_norm(x, layer.norms[0], layer.eps)
        qkv = layer.qkv.forward(normal, seed)
        turned = layer.run.rotate(qkv, place.cos, place.sin, layer.heads, layer.groups)
        ctx.save_for_backward(x)
        ctx.layer, ctx.place, ctx.seed = layer, place, seed
        q, k, v = turned.split([layer.heads, layer.groups, layer.groups], dim=1)
        return q, k, v, x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        dq, dk, dv, skip = gradients
        (x,), layer, place = ctx.saved_tensors, ctx.layer, ctx.place
        d_qkv = layer.run.rotate_backward(dq, dk, dv, place.cos, place.sin)
        normal = layer.run.rms_norm(x, layer.norms[0], layer.eps)
        of_parameters = layer.qkv.parameter_gradients(normal, d_qkv, ctx.seed)
        d_normal = layer.qkv.input_gradient(d_qkv, ctx.seed)
        dx = layer.run.rms_norm_backward(x, layer.norms[0], layer.eps, d_normal, skip)
        return dx, None, None, None, *of_parameters


class _Output(Function):
    """The attention's output layer, added to the residual."""

    @staticmethod
    def forward(ctx: Any, seen: Tensor, x: Tensor, layer: Layer, seed: int, *_: Tensor) -> Any:
        ctx.save_for_backward(seen)
        ctx.layer, ctx.seed = layer, seed
        return layer.output.forward(seen, seed).add_(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (dy,), (seen,), layer = gradients, ctx.saved_tensors, ctx.layer
        of_parameters = layer.output.parameter_gradients(seen, dy, ctx.seed)
        return layer.output.input_gradient(dy, ctx.seed), dy, None, None, *of_parameters


class _FeedForward(Function):
    """Norm, gate, up, SwiGLU and down, added to the residual."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Layer, seed: int, *_: Tensor) -> Any:
        normal = layer.run.rms_norm(x, layer.norms[1], layer.eps)
        gate_up = layer.gate_up.forward(normal, seed)
        del normal
        middle = layer.run.swiglu(gate_up)
        ctx.save_for_backward(x, gate_up if layer.keeps_middle else None)
        ctx.layer, ctx.seed = layer, seed
        if not layer.keeps_middle:
            del gate_up
        return layer.down.forward(middle, seed + 1).add_(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, gate_up = ctx.saved_tensors
        dx, of_parameters = ctx.layer.feed_forward_gradients(x, gate_up, gradients[0], ctx.seed)
        return dx, None, None, *of_parameters


class _Again(Function):
    """A layer of which only the input is kept; all but its last product is computed again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Layer, place: Place, seed: int, *_: Tensor) -> Any:
        ctx.save_for_backward(x)
        ctx.layer, ctx.place, ctx.seed = layer, place, seed
        return layer(x, place, seed)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        layer, x = ctx.layer, ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            middle = layer.attention(x, ctx.place, ctx.seed)
        d_middle, of_feed_forward = layer.feed_forward_gradients(
            middle.detach(), None, gradients[0], ctx.seed + 2
        )
        dx, *of_attention = torch.autograd.grad(middle, [x, *layer.of_attention], d_middle)
        return dx, None, None, None, *of_attention, *of_feed_forward


class _AnswerLoss(Function):
    """Summed cross-entropy; the gradient is made chunk by chunk with the value, no logits are kept."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, rows: Tensor, targets: Tensor, weight: Tensor, indices: Tensor
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=states.device)
        d_states, d_rows = torch.empty_like(states), torch.zeros_like(rows)
        own = rows.to(states.dtype)
        even = len(weight) // ALIGNMENT * ALIGNMENT
        for x, target, dx in zip(
            states.split(CHUNK), targets.split(CHUNK), d_states.split(CHUNK), strict=True
        ):
            logits = logits_of(x, weight, own, indices)
            wide = logits.float()
            log_sum = wide.logsumexp(dim=-1, keepdim=True)
            total += (log_sum - wide.gather(1, target[:, None])).sum()
            wide = wide.sub_(log_sum).exp_()
            wide.scatter_add_(1, target[:, None], wide.new_full((len(x), 1), -1.0))
            logits.copy_(wide)
            d_own = logits.index_select(1, indices)
            d_rows += (d_own.t() @ x).to(d_rows.dtype)
            logits.index_fill_(1, indices, 0)
            torch.mm(logits[:, :even], weight[:even], out=dx)
            dx.addmm_(logits[:, even:], weight[even:]).addmm_(d_own, own)
        ctx.save_for_backward(d_states, d_rows)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        d_states, d_rows = ctx.saved_tensors
        return d_states * gradients[0], d_rows * gradients[0], None, None, None


def logits_of(states: Tensor, weight: Tensor, own: Tensor, indices: Tensor) -> Tensor:
    """(tokens, vocabulary); the rows `own` stand in the head's `weight` at `indices`."""
    vocabulary = len(weight)
    stride = -(-vocabulary // ALIGNMENT) * ALIGNMENT
    even = vocabulary // ALIGNMENT * ALIGNMENT
    logits = states.new_empty(len(states), stride)[:, :vocabulary]
    torch.mm(states, weight[:even].t(), out=logits[:, :even])
    torch.mm(states, weight[even:].t(), out=logits[:, even:])
    return logits.index_copy_(1, indices, states @ own.t())


def kept_gib(model: Any) -> float:
    """What the weights of a 4-bit base take when they are kept in 16 bits (or as wide as its head)."""
    plain = base_of(model)
    width = plain.get_output_embeddings().weight.dtype.itemsize
    return sum(
        module.in_features * module.out_features * width / GIB
        for module in plain.get_decoder().modules()
        if hasattr(getattr(module, "weight", None), "quant_state")
    )


class FusedModel:
    """A PEFT model's fast path on packed rows; uses its weights and leaves it as it is.

    Args:
        model: a base, or one with LoRA on any of the seven projections and trainable token rows; computed
            as it stands, with its active adapter or, in `disable_adapter()`, without.
        dtype: of the activations.
        checkpointing: `none`; `selective` computes gate and up again in the backward pass; `full`
            computes a whole layer again.
        keep: hold 4-bit weights in 16 bits, 2 bytes a weight, instead of dequantising for each product.
        training: whether LoRA's dropout is at work.
    """

    def __init__(
        self,
        model: PeftModel | PreTrainedModel,
        dtype: torch.dtype,
        checkpointing: str = "none",
        keep: bool = False,
        training: bool = True,
    ) -> None:
        plain: Any = base_of(model)
        config, self.body = plain.config, plain.get_decoder()
        device = next(self.body.parameters()).device
        workspace = Workspace()
        group = functools.partial(
            Projections, dtype=dtype, workspace=workspace, keep=keep, training=training
        )
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.checkpointing = checkpointing
        self.layers = [
            Layer(
                qkv=group([x.self_attn.q_proj, x.self_attn.k_proj, x.self_attn.v_proj]),
                output=group([x.self_attn.o_proj]),
                gate_up=group([x.mlp.gate_proj, x.mlp.up_proj]),
                down=group([x.mlp.down_proj]),
                norms=(x.input_layernorm.weight, x.post_attention_layernorm.weight),
                eps=config.rms_norm_eps,
                heads=x.self_attn.q_proj.out_features // size,
                groups=x.self_attn.k_proj.out_features // size,
                window=getattr(config, "sliding_window", None),
                keeps_middle=checkpointing != "selective",
                run=functions_for(x.input_layernorm.weight),
            )
            for x in self.body.layers
        ]
        self.groups = [p for x in self.layers for p in (x.qkv, x.output, x.gate_up, x.down)]
        self.copies = [view for p in self.groups for view in p.copies]
        self.parameters = [parameter for p in self.groups for parameter in p.parameters]
        self.drops = any(p.dropout for p in self.groups)
        self.embedding, self.embedding_rows, self.tokens = token_table(plain.get_input_embeddings())
        head = plain.get_output_embeddings()
        tied = config.tie_word_embeddings
        self.head, self.head_rows, _ = token_table(plain.get_input_embeddings() if tied else head)
        # made in a step, it would wait there
        self.indices = torch.tensor(self.tokens, dtype=torch.long, device=device)
        self.follow()

    def hidden_states(self, ids: Tensor, positions: Tensor, bounds: Tensor, longest: int) -> Tensor:
        """The last hidden states of packed rows, (tokens, hidden).

        Args:
            ids: (tokens,); `positions`, (tokens,), count from 0 in each document.
            bounds: int32, (documents + 1,): where each document starts, then the end.
            longest: tokens of the longest document.
        """
        x = self.embed(ids)
        place = Place(*self.angles(x, positions), bounds, longest)
        seed = (
            int(torch.randint(2**48, ())) if self.drops else 0
        )  # drawn from the trainer's generator
        for number, layer in enumerate(self.layers):
            if self.checkpointing == "full":
                parameters = (*layer.of_attention, *layer.of_feed_forward)
                x = _Again.apply(x, layer, place, seed + 4 * number, *parameters)
            else:
                x = layer(x, place, seed + 4 * number)
        normal: Tensor = self.body.norm(x)
        return normal

    @torch.no_grad()
    def follow(self) -> None:
        """Take over what an optimizer has made of the parameters; due after each of its steps.

        Nothing tells that they have changed: torch's fused optimizers leave the versions of their
        tensors as they were.
        """
        if self.parameters:
            torch._foreach_copy_(self.copies, self.parameters)
        for group in self.groups:
            group.refresh()

    def embed(self, ids: Tensor) -> Tensor:
        """(tokens,) to (tokens, hidden)."""
        x = torch.nn.functional.embedding(ids, self.embedding)
        for token, row in zip(self.tokens, self.embedding_rows, strict=True):
            x = torch.where((ids == token)[:, None], row.to(x.dtype), x)
        return x

    def angles(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for `positions`, (tokens,), in x's type: (tokens, head size) each."""
        cos, sin = self.body.rotary_emb(x, positions[None])
        return cos[0], sin[0]

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        """(tokens, vocabulary) from normalised hidden states, (tokens, hidden)."""
        return logits_of(states, self.head, self.head_rows.to(states.dtype), self.indices)

    def answer_loss(self, states: Tensor, targets: Tensor) -> Tensor:
        """The summed loss in nats; `states`, (answer tokens, hidden), predict `targets`."""
        loss: Tensor = _AnswerLoss.apply(states, self.head_rows, targets, self.head, self.indices)
        return loss


def functions_for(x: Tensor) -> Any:
    """The module with the pointwise functions for this tensor's device."""
    if x.is_cuda:
        from fintune import kernels

        return kernels
    return sys.modules[__name__]


def token_table(module: Any) -> tuple[Tensor, Tensor, list[int]]:
    """Weight, trained rows and their token ids of an embedding or head; no rows without an adapter."""
    tokens: Any = getattr(module, "token_adapter", module)
    name = active_adapter(tokens)
    if name is None:
        weight: Tensor = getattr(tokens, "base_layer", module).weight
        return weight, weight[:0], []
    rows = tokens.trainable_tokens_delta[name]
    return tokens.base_layer.weight, rows, tokens.token_indices[name]
