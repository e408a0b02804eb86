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
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from torch import Tensor
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from fintune.modeling import attend
from fintune.preflight import CHUNK

ARCHITECTURES = ("mistral", "llama")
ALIGNMENT = 64  # products whose sizes or starts are no multiples of it take slow kernels


def unsupported(model: PeftModel) -> str | None:
    """Why this model cannot be computed here, or None if it can."""
    config = model.get_base_model().config
    if config.model_type not in ARCHITECTURES:
        return f"a base of type {config.model_type}"
    if config.hidden_act != "silu":
        return f"the activation {config.hidden_act}"
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in LINEAR and getattr(module, "bias", None) is not None:
            return f"a bias in {name}"
    return None


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
    """

    def __init__(self, modules: Sequence[Any], dtype: torch.dtype, workspace: Workspace) -> None:
        self.bases = [getattr(module, "base_layer", module) for module in modules]
        self.outputs = [base.out_features for base in self.bases]
        self.inputs: int = self.bases[0].in_features
        self.quantized = hasattr(self.bases[0].weight, "quant_state")
        self.workspace = workspace
        tuned = [m if hasattr(m, "lora_A") else None for m in modules]
        self.loras = [
            (m.lora_A["default"].weight, m.lora_B["default"].weight) if m else None for m in tuned
        ]
        self.parameters: tuple[Tensor, ...] = tuple(p for pair in self.loras if pair for p in pair)
        present = [m for m in tuned if m]
        self.scaling: float = present[0].scaling["default"] if present else 0.0
        self.dropout: float = (
            getattr(present[0].lora_dropout["default"], "p", 0.0) if present else 0
        )
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
        whole = self.workspace.take(sum(self.outputs), self.inputs, like)
        for i, (r, base, pair) in enumerate(zip(self.rows, self.bases, self.loras, strict=True)):
            pair = pair if self.folds else None
            if like.is_cuda:
                from fintune.kernels import dequantize_and_add

                dequantize_and_add(base.weight, self.states[i], pair, self.scaling, whole[r])
            else:
                weight = _dequantize(base)
                whole[r] = weight.addmm_(pair[1], pair[0], alpha=self.scaling) if pair else weight
        return [(slice(0, len(whole)), whole)]

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
                add_dropped_product(dx, inner, self.down, self._alpha, self.dropout, seed)
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
        return drop(x, self.dropout, seed) if self.dropout else x


def _side_by_side(sizes: Sequence[int]) -> list[slice]:
    return [slice(a, b) for a, b in pairwise([0, *accumulate(sizes)])]


def _dequantize(base: Any) -> Tensor:
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
        q, k, v, x = _QueryKeyValue.apply(x, self, place, seed, *self.qkv.parameters)
        scale = q.shape[-1] ** -0.5
        seen = attend(q, k, v, place.bounds, place.longest, self.window, scale)
        x = _Output.apply(seen.flatten(1), x, self, seed + 1, *self.output.parameters)
        parameters = (*self.gate_up.parameters, *self.down.parameters)
        out: Tensor = _FeedForward.apply(x, self, seed + 2, *parameters)
        return out


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
        (dy,), (x, gate_up), layer, seed = gradients, ctx.saved_tensors, ctx.layer, ctx.seed
        normal = layer.run.rms_norm(x, layer.norms[1], layer.eps)
        if gate_up is None:
            gate_up = layer.gate_up.forward(normal, seed)
        d_middle = layer.down.input_gradient(dy, seed + 1)
        middle, d_gate_up = layer.run.swiglu_backward(gate_up, d_middle)
        del gate_up, d_middle
        of_down = layer.down.parameter_gradients(middle, dy, seed + 1)
        del middle
        of_gate_up = layer.gate_up.parameter_gradients(normal, d_gate_up, seed)
        del normal
        d_normal = layer.gate_up.input_gradient(d_gate_up, seed)
        del d_gate_up
        dx = layer.run.rms_norm_backward(x, layer.norms[1], layer.eps, d_normal, dy)
        return dx, None, None, *of_gate_up, *of_down


class _AnswerLoss(Function):
    """Summed cross-entropy; the gradient is made chunk by chunk with the value, no logits are kept."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, rows: Tensor, targets: Tensor, weight: Tensor, indices: Tensor
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=states.device)
        d_states, d_rows = torch.empty_like(states), torch.zeros_like(rows)
        own = rows.to(states.dtype)
        vocabulary = weight.shape[0]
        stride = -(-vocabulary // ALIGNMENT) * ALIGNMENT
        even = vocabulary // ALIGNMENT * ALIGNMENT
        for x, target, dx in zip(
            states.split(CHUNK), targets.split(CHUNK), d_states.split(CHUNK), strict=True
        ):
            logits = x.new_empty(len(x), stride)[:, :vocabulary]
            torch.mm(x, weight[:even].t(), out=logits[:, :even])
            torch.mm(x, weight[even:].t(), out=logits[:, even:])
            logits.index_copy_(1, indices, x @ own.t())
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


class FusedModel:
    """A PEFT model's fast path for training on packed rows; uses its weights and leaves it as it is.

    Args:
        model: the base with LoRA on any of the seven projections and trainable token rows.
        dtype: of the activations.
        checkpointing: `none`; `selective` computes gate and up again in the backward pass; `full`
            computes a whole layer again.
    """

    def __init__(self, model: PeftModel, dtype: torch.dtype, checkpointing: str) -> None:
        plain: Any = model.get_base_model()
        config, self.body = plain.config, plain.get_decoder()
        device = next(self.body.parameters()).device
        workspace = Workspace()
        group = functools.partial(Projections, dtype=dtype, workspace=workspace)
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
        groups = [p for x in self.layers for p in (x.qkv, x.output, x.gate_up, x.down)]
        self.copies = [view for p in groups for view in p.copies]
        self.parameters = [parameter for p in groups for parameter in p.parameters]
        self.drops = any(p.dropout for p in groups)
        self.embedding, self.embedding_rows, self.tokens = _table(plain.get_input_embeddings())
        head = plain.get_output_embeddings()
        tied = config.tie_word_embeddings
        self.head, self.head_rows, _ = _table(plain.get_input_embeddings() if tied else head)
        self.indices = torch.tensor(
            self.tokens, device=device
        )  # made in a step, it would wait there

    def hidden_states(self, ids: Tensor, positions: Tensor, bounds: Tensor, longest: int) -> Tensor:
        """The last hidden states of packed rows, (tokens, hidden).

        Args:
            ids: (tokens,); `positions`, (tokens,), count from 0 in each document.
            bounds: int32, (documents + 1,): where each document starts, then the end.
            longest: tokens of the longest document.
        """
        with torch.no_grad():
            torch._foreach_copy_(self.copies, self.parameters)
        x = torch.nn.functional.embedding(ids, self.embedding)
        for token, row in zip(self.tokens, self.embedding_rows, strict=True):
            x = torch.where((ids == token)[:, None], row.to(x.dtype), x)
        cos, sin = self.body.rotary_emb(x, positions[None])
        place = Place(cos[0], sin[0], bounds, longest)
        seed = (
            int(torch.randint(2**48, ())) if self.drops else 0
        )  # drawn from the trainer's generator
        for number, layer in enumerate(self.layers):
            run = (layer, x, place, seed + 4 * number)
            if self.checkpointing == "full" and torch.is_grad_enabled():
                x = checkpoint(*run, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(*run[1:])
        normal: Tensor = self.body.norm(x)
        return normal

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


def _table(module: Any) -> tuple[Tensor, Tensor, list[int]]:
    """Weight, trained rows and their token ids of an embedding or head wrapped by PEFT."""
    tokens = module.token_adapter
    weight = tokens.base_layer.weight
    return weight, tokens.trainable_tokens_delta["default"], tokens.token_indices["default"]
