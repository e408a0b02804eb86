"""A model's forward pass with its own layers and its own head, on packed or padded rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPast

from fintune.model.adapter import base_of
from fintune.model.batch import CHUNK, MicroBatch


class PlainModel:
    """Hidden states of a batch, and the logits of chosen ones, as the model's own forward computes them.

    Logits are computed for the tokens that predict an answer alone. What a family does to them, such as a
    scale, a cap or a bias, stands in its forward, which therefore runs on states that are given to it.
    """

    def __init__(self, model: Any) -> None:
        self.plain = base_of(model)
        self.body = self.plain.get_decoder()
        if self.body is self.plain:
            self.body = self.plain.model

    def answer_states(self, part: MicroBatch) -> Tensor:
        """Return the normalized hidden states that predict answers, (answer tokens, hidden)."""
        packed = {}
        if part.packed is not None:
            packed = {
                "position_ids": part.positions,
                "cu_seq_lens_q": part.packed.cu_seqlens,
                "cu_seq_lens_k": part.packed.cu_seqlens,
                "max_length_q": part.packed.max_seqlen,
                "max_length_k": part.packed.max_seqlen,
            }
        hidden: Tensor = self.body(
            input_ids=part.ids, attention_mask=part.mask, use_cache=False, **packed
        ).last_hidden_state
        return hidden.flatten(0, 1).index_select(0, part.predicting)

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits of hidden states: (tokens, vocabulary) from (tokens, hidden)."""
        ids = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
        with _answering(self.body, _States(last_hidden_state=states[None])):
            logits: Tensor = self.plain(input_ids=ids, use_cache=False).logits
        return logits[0]

    def answer_loss(self, states: Tensor, targets: Tensor) -> Tensor:
        """Return the summed loss of the answers in nats.

        Logits are recomputed in the backward pass, so that only one chunk of them is in memory.
        """
        chunks = zip(states.split(CHUNK), targets.split(CHUNK), strict=True)
        return torch.stack(
            [checkpoint(self._summed_loss, *chunk, use_reentrant=False) for chunk in chunks]
        ).sum()

    def _summed_loss(self, states: Tensor, targets: Tensor) -> Tensor:
        logits = self.logits(states).float()
        return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


class _States(BaseModelOutputWithPast):
    """Hidden states as a body returns them; what else a family returns is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def _answering(module: torch.nn.Module, output: Any) -> Iterator[None]:
    """Make a module return this output."""
    own = vars(module).get("forward")
    module.forward = lambda *_, **__: output
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
