"""The forward and backward pass of a base with LoRA, in fewer and larger kernels.

The mathematics is the same as in transformers and PEFT; the activations are read and written less often.
Layers that read the same input (q, k, v and gate, up) are one matrix product. On a 4-bit base without
dropout, the adapter is added to the weights while they are dequantized, W + (alpha / r) B A, so that the
forward pass needs no separate LoRA products. Norms, rotary embedding, gated activations, the loss and their
gradients are one kernel each on a GPU (kernels.py). Cheap values are recomputed in the backward pass instead
of saved. families.py tells the supported families apart.

Adding the adapter to the weights loses no precision compared with a separate product: the sum is taken
in float32 and rounded once. Dequantized weights fall anywhere between two bfloat16 numbers, so an update
smaller than their distance still moves the right share of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.autograd import Function
from transformers import PreTrainedModel

from fintune.hardware import GIB
from fintune.model.adapter import base_of
from fintune.model.attention import PackedSequences
from fintune.model.batch import CHUNK, MicroBatch
from fintune.model.fused.families import make_layers
from fintune.model.fused.layers import CheckpointedLayer, Rotary
from fintune.model.fused.ops import functions_for
from fintune.model.fused.projections import Seed, active_adapter, state_of
from fintune.model.sharding import Shards, is_sharded

ALIGNMENT = 64  # matrix products whose sizes or offsets are not multiples of it use slow kernels


class _AnswerLoss(Function):
    """Summed cross-entropy; computes loss and gradient together, chunk by chunk, and saves no logits."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        rows: Tensor,
        targets: Tensor,
        weight: Tensor,
        indices: Tensor,
        softcap: float | None,
    ) -> Tensor:
        total, *gradients = _loss_and_gradients(states, rows, targets, weight, indices, softcap)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        d_states, d_rows = ctx.saved_tensors
        return d_states * gradients[0], d_rows * gradients[0], None, None, None, None


@torch.no_grad()
def _loss_and_gradients(
    states: Tensor,
    rows: Tensor,
    targets: Tensor,
    weight: Tensor,
    indices: Tensor,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the summed loss in nats, and its gradients for `states` and `rows`."""
    total = torch.zeros((), dtype=torch.float32, device=states.device)
    d_states, d_rows = torch.empty_like(states), torch.zeros_like(rows)
    own = rows.to(states.dtype)
    even = len(weight) // ALIGNMENT * ALIGNMENT
    run = functions_for(states)
    for x, target, dx in zip(
        states.split(CHUNK), targets.split(CHUNK), d_states.split(CHUNK), strict=True
    ):
        logits = logits_of(x, weight, own, indices)
        total += run.cross_entropy_(logits, target, softcap).sum()
        d_own = logits.index_select(1, indices)
        d_rows += (d_own.t() @ x).to(d_rows.dtype)
        logits.index_fill_(1, indices, 0)
        torch.mm(logits[:, :even], weight[:even], out=dx)
        dx.addmm_(logits[:, even:], weight[even:]).addmm_(d_own, own)
    return total, d_states, d_rows


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
        if state_of(module)
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
        fp8: multiply by the base's 4-bit weights in FP8, on a GPU that can.
    """

    def __init__(
        self,
        model: PeftModel | PreTrainedModel,
        dtype: torch.dtype,
        checkpointing: str = "none",
        cache_weights: bool = False,
        training: bool = True,
        fp8: bool = False,
    ) -> None:
        plain: Any = base_of(model)
        config, self.body = plain.config, plain.get_decoder()
        device = next(self.body.parameters()).device
        self.checkpointing = checkpointing
        self.shards = Shards(self.body.layers) if is_sharded(model) else None
        self.layers = make_layers(
            config,
            self.body.layers,
            dtype,
            cache_weights,
            training,
            keeps_gate_up=checkpointing != "selective",
            fp8=fp8,
        )
        self.kinds = sorted({layer.kind for layer in self.layers}, key=str)
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.projections = [p for x in self.layers for p in (x.qkv, x.output, x.gate_up, x.down)]
        pairs = [
            pair for p in self.projections for pair in zip(p.copies, p.parameters, strict=True)
        ]
        # one kernel copies many tensors only if each has the same strides as its copy
        alike = [pair for pair in pairs if pair[0].stride() == pair[1].stride()]
        others = [pair for pair in pairs if pair[0].stride() != pair[1].stride()]
        self.copies = [tuple(zip(*some, strict=True)) for some in (alike, others) if some]
        self.drops = any(p.dropout for p in self.projections)
        table = plain.get_input_embeddings()
        self.embedding, self.embedding_rows, self.tokens = _table(table)
        self.embedding_scale: Tensor | None = getattr(_inner(table), "embed_scale", None)
        head = table if config.tie_word_embeddings else plain.get_output_embeddings()
        self.head, self.head_rows, _ = _table(head)
        # built here: inside a step it would force a device sync
        self.indices = torch.tensor(self.tokens, dtype=torch.long, device=device)
        self.sync_parameters()

    @property
    def forward_is_in_fp8(self) -> bool:
        """Return whether the base's products in the forward pass are in FP8."""
        return any(p.coarse for p in self.projections)

    def forward_in_16_bits(self) -> None:
        """Keep FP8 to the gradients from now on."""
        for projections in self.projections:
            projections.coarse = False

    def hidden_states(
        self, ids: Tensor, positions: Tensor, packed: PackedSequences, seed: Tensor | None = None
    ) -> Tensor:
        """Compute the last hidden states of packed sequences, (tokens, hidden).

        Args:
            ids: (tokens,); `positions`, (tokens,), count from 0 in each document.
            seed: the first seed of dropout; drawn if it is None.
        """
        x = self.embed(ids)
        rotary = self.angles(x, positions)
        for number, (layer, own) in enumerate(zip(self.layers, self._seeds(seed), strict=True)):
            if self.shards:
                x = self.shards.enter(x, number)
            if self.checkpointing == "full":
                parameters = (*layer.of_attention, *layer.of_feed_forward)
                x = CheckpointedLayer.apply(x, layer, packed, rotary, own, *parameters)
            else:
                x = layer(x, packed, rotary, own)
            if self.shards:
                x = self.shards.leave(x, number)
        normal: Tensor = self.body.norm(x)
        return normal

    def draw_seed(self) -> Tensor:
        """Draw a pass's first seed from torch's global generator, which the trainer seeds."""
        seed = torch.randint(2**48, ())
        on_gpu = self.indices.is_cuda
        return seed.pin_memory().to(self.indices.device, non_blocking=True) if on_gpu else seed

    def _seeds(self, first: Tensor | None) -> list[Sequence[Seed]]:
        """Return each layer's seeds of dropout."""
        if not self.drops:
            return [(0, 0, 0, 0)] * len(self.layers)
        first = self.draw_seed() if first is None else first
        numbers = torch.arange(4 * len(self.layers), device=first.device) + first
        seeds: Sequence[Seed] = numbers.unbind() if first.is_cuda else numbers.tolist()
        return [seeds[i : i + 4] for i in range(0, len(seeds), 4)]

    def answer_states(self, part: MicroBatch, seed: Tensor | None = None) -> Tensor:
        """Return the normalized hidden states that predict packed answers, (answer tokens, hidden)."""
        assert part.packed is not None
        states = self.hidden_states(part.ids[0], part.positions[0], part.packed, seed)
        return states.index_select(0, part.predicting)

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
        return x if self.embedding_scale is None else x * self.embedding_scale.to(x.dtype)

    def angles(self, x: Tensor, positions: Tensor) -> Rotary:
        """Compute cosines and sines for `positions`, (tokens,), in x's type, for each kind of layer."""
        angles = {}
        for kind in self.kinds:
            cos, sin = self.body.rotary_emb(x, positions[None], *([kind] if kind else []))
            angles[kind] = cos[0], sin[0]
        return angles

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        """Compute logits, (tokens, vocabulary), from normalized hidden states, (tokens, hidden)."""
        logits = logits_of(states, self.head, self.head_rows.to(states.dtype), self.indices)
        return logits.div_(self.softcap).tanh_().mul_(self.softcap) if self.softcap else logits

    def answer_loss(self, states: Tensor, targets: Tensor) -> Tensor:
        """Compute the summed loss in nats; `states`, (answer tokens, hidden), predict `targets`."""
        loss: Tensor = _AnswerLoss.apply(
            states, self.head_rows, targets, self.head, self.indices, self.softcap
        )
        return loss

    def loss_and_gradients(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute `answer_loss` and its gradients, for `states` and for the head's trained rows."""
        return _loss_and_gradients(
            states, self.head_rows, targets, self.head, self.indices, self.softcap
        )


def _table(module: Any) -> tuple[Tensor, Tensor, list[int]]:
    """Return weight, trained rows and token ids of an embedding or head; no rows without an adapter."""
    tokens: Any = getattr(module, "token_adapter", module)
    name = active_adapter(tokens)
    if name is None:
        weight: Tensor = _inner(module).weight
        return weight, weight[:0], []
    rows = tokens.trainable_tokens_delta[name]
    return tokens.base_layer.weight, rows, tokens.token_indices[name]


def _inner(module: Any) -> Any:
    """Return a table without what PEFT has put around it."""
    return getattr(getattr(module, "token_adapter", module), "base_layer", module)
