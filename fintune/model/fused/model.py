"""The forward and backward pass of a Llama-like model with LoRA, in fewer and larger kernels.

The mathematics is the same as in transformers and PEFT; the activations are read and written less often.
Layers that read the same input (q, k, v and gate, up) are one matrix product. On a 4-bit base without
dropout, the adapter is added to the weights while they are dequantized, W + (alpha / r) B A, so that the
forward pass needs no separate LoRA products. Norms, rotary embedding, SwiGLU and their gradients are one
kernel each on a GPU (kernels.py). Cheap values are recomputed in the backward pass instead of saved.

Adding the adapter to the weights loses no precision compared with a separate product: the sum is taken
in float32 and rounded once. Dequantized weights fall anywhere between two bfloat16 numbers, so an update
smaller than their distance still moves the right share of the weights.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.autograd import Function
from transformers import PreTrainedModel

from fintune.hardware import GIB
from fintune.hub.models import ARCHITECTURES
from fintune.model.adapter import base_of
from fintune.model.attention import PackedSequences
from fintune.model.batch import CHUNK
from fintune.model.fused.layers import CheckpointedLayer, Layer
from fintune.model.fused.ops import functions_for
from fintune.model.fused.projections import Projections, Workspace, active_adapter
from fintune.model.sizes import LINEAR

ALIGNMENT = 64  # matrix products whose sizes or offsets are not multiples of it use slow kernels


def unsupported(model: PeftModel | PreTrainedModel) -> str | None:
    """Return why this model is not supported, or None if it is."""
    config = base_of(model).config
    if config.model_type not in ARCHITECTURES:
        return f"a base of type {config.model_type}"
    if config.hidden_act != "silu":
        return f"the activation {config.hidden_act}"
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in LINEAR and getattr(module, "bias", None) is not None:
            return f"a bias in {name}"
    return None


class _AnswerLoss(Function):
    """Summed cross-entropy; computes loss and gradient together, chunk by chunk, and saves no logits."""

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
            logits32 = logits.float()
            log_sum = logits32.logsumexp(dim=-1, keepdim=True)
            total += (log_sum - logits32.gather(1, target[:, None])).sum()
            logits32 = logits32.sub_(log_sum).exp_()
            logits32.scatter_add_(1, target[:, None], logits32.new_full((len(x), 1), -1.0))
            logits.copy_(logits32)
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
    """Compute logits, (tokens, vocabulary); the rows `own` replace the rows `indices` of `weight`."""
    vocabulary = len(weight)
    stride = -(-vocabulary // ALIGNMENT) * ALIGNMENT
    even = vocabulary // ALIGNMENT * ALIGNMENT
    logits = states.new_empty(len(states), stride)[:, :vocabulary]
    torch.mm(states, weight[:even].t(), out=logits[:, :even])
    torch.mm(states, weight[even:].t(), out=logits[:, even:])
    return logits.index_copy_(1, indices, states @ own.t())


def cached_weights_gib(model: Any) -> float:
    """Return the size in GiB of a 4-bit base's weights when cached in the type of its head."""
    plain = base_of(model)
    width = plain.get_output_embeddings().weight.dtype.itemsize
    return sum(
        module.in_features * module.out_features * width / GIB
        for module in plain.get_decoder().modules()
        if hasattr(getattr(module, "weight", None), "quant_state")
    )


class FusedModel:
    """The fast path of a PEFT model on packed sequences; shares its weights and does not modify it.

    Args:
        model: a base, or one with LoRA on any of the seven projections and trainable token rows; computed
            with its active adapter or, in `disable_adapter()`, without.
        dtype: of the activations.
        checkpointing: `none`; `selective` recomputes gate and up in the backward pass; `full` recomputes
            whole layers.
        cache_weights: cache 4-bit weights dequantized, 2 bytes a weight; else dequantize for each product.
        training: apply LoRA's dropout.
    """

    def __init__(
        self,
        model: PeftModel | PreTrainedModel,
        dtype: torch.dtype,
        checkpointing: str = "none",
        cache_weights: bool = False,
        training: bool = True,
    ) -> None:
        plain: Any = base_of(model)
        config, self.body = plain.config, plain.get_decoder()
        device = next(self.body.parameters()).device
        workspace = Workspace()
        group = functools.partial(
            Projections,
            dtype=dtype,
            workspace=workspace,
            cache_weights=cache_weights,
            training=training,
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
                kv_heads=x.self_attn.k_proj.out_features // size,
                window=getattr(config, "sliding_window", None),
                keeps_gate_up=checkpointing != "selective",
                run=functions_for(x.input_layernorm.weight),
            )
            for x in self.body.layers
        ]
        self.projections = [p for x in self.layers for p in (x.qkv, x.output, x.gate_up, x.down)]
        pairs = [
            pair for p in self.projections for pair in zip(p.copies, p.parameters, strict=True)
        ]
        # one kernel copies many tensors only if each has the same strides as its copy
        alike = [pair for pair in pairs if pair[0].stride() == pair[1].stride()]
        others = [pair for pair in pairs if pair[0].stride() != pair[1].stride()]
        self.copies = [tuple(zip(*some, strict=True)) for some in (alike, others) if some]
        self.drops = any(p.dropout for p in self.projections)
        self.embedding, self.embedding_rows, self.tokens = _table(plain.get_input_embeddings())
        head = plain.get_output_embeddings()
        tied = config.tie_word_embeddings
        self.head, self.head_rows, _ = _table(plain.get_input_embeddings() if tied else head)
        # built here: inside a step it would force a device sync
        self.indices = torch.tensor(self.tokens, dtype=torch.long, device=device)
        self.sync_parameters()

    def hidden_states(self, ids: Tensor, positions: Tensor, packed: PackedSequences) -> Tensor:
        """Compute the last hidden states of packed sequences, (tokens, hidden).

        Args:
            ids: (tokens,); `positions`, (tokens,), count from 0 in each document.
        """
        x = self.embed(ids)
        rotary = self.angles(x, positions)
        # from torch's global generator, which the trainer seeds
        seed = int(torch.randint(2**48, ())) if self.drops else 0
        for number, layer in enumerate(self.layers):
            if self.checkpointing == "full":
                parameters = (*layer.of_attention, *layer.of_feed_forward)
                x = CheckpointedLayer.apply(
                    x, layer, packed, rotary, seed + 4 * number, *parameters
                )
            else:
                x = layer(x, packed, rotary, seed + 4 * number)
        normal: Tensor = self.body.norm(x)
        return normal

    @torch.no_grad()
    def sync_parameters(self) -> None:
        """Copy the parameters' values; call it after each optimizer step.

        Fused optimizers do not bump `Tensor._version`, so changes cannot be detected.
        """
        for copies, parameters in self.copies:
            torch._foreach_copy_(copies, parameters)
        for projections in self.projections:
            projections.refresh()

    def embed(self, ids: Tensor) -> Tensor:
        """Embed ids; (tokens,) to (tokens, hidden)."""
        x = torch.nn.functional.embedding(ids, self.embedding)
        for token, row in zip(self.tokens, self.embedding_rows, strict=True):
            x = torch.where((ids == token)[:, None], row.to(x.dtype), x)
        return x

    def angles(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Compute cosines and sines for `positions`, (tokens,), in x's type: (tokens, head size) each."""
        cos, sin = self.body.rotary_emb(x, positions[None])
        return cos[0], sin[0]

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        """Compute logits, (tokens, vocabulary), from normalized hidden states, (tokens, hidden)."""
        return logits_of(states, self.head, self.head_rows.to(states.dtype), self.indices)

    def answer_loss(self, states: Tensor, targets: Tensor) -> Tensor:
        """Compute the summed loss in nats; `states`, (answer tokens, hidden), predict `targets`."""
        loss: Tensor = _AnswerLoss.apply(states, self.head_rows, targets, self.head, self.indices)
        return loss


def _table(module: Any) -> tuple[Tensor, Tensor, list[int]]:
    """Return weight, trained rows and token ids of an embedding or head; no rows without an adapter."""
    tokens: Any = getattr(module, "token_adapter", module)
    name = active_adapter(tokens)
    if name is None:
        weight: Tensor = getattr(tokens, "base_layer", module).weight
        return weight, weight[:0], []
    rows = tokens.trainable_tokens_delta[name]
    return tokens.base_layer.weight, rows, tokens.token_indices[name]
