"""Continuous batching: a free slot takes the next prompt."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from fintune.generation.decoding import Decoding
from fintune.hardware import GIB, room_gib
from fintune.model.attention import PackedSequences, attend
from fintune.model.base import base_of
from fintune.model.fused.model import FusedModel, cached_weights_gib

MOST_ROWS = {"cuda": 512, "cpu": 64}  # if memory allows; more are hardly faster
FEWEST_ROWS = 32  # smaller batches are padded to this size
STEPS_BETWEEN_CHECKS = 8  # checking which answers have ended forces a device sync
PREFILL_TOKENS = 16_384  # of prompts in one prefill


@torch.no_grad()
def generate_with_slots(
    model: Any,
    prompts: Sequence[tuple[int, list[int]]],
    ends: list[int],
    decoding: Decoding,
    rows: int | str,
    finish: Callable[[int, list[int]], None],
) -> None:
    """Generate answers, longest prompts first; a free slot takes the next one."""
    waiting = sorted(prompts, key=lambda prompt: len(prompt[1]))
    length = len(waiting[-1][1]) + decoding.max_new_tokens
    count, cache = _room(model, length, min(len(prompts), _most(model, rows)))
    dtype = base_of(model).get_output_embeddings().weight.dtype
    fused = FusedModel(model, dtype, cache_weights=cache, training=False)
    slots = DecodingSlots(fused, count, length, ends, decoding.max_new_tokens)
    if not decoding.is_greedy:
        slots.sample = _sampler(decoding)
    owner: dict[int, int] = {}
    while waiting or owner:
        free = [slot for slot in range(count) if slot not in owner]
        # a prefill costs as much as several decode steps: wait until several slots are free
        if waiting and len(free) >= min(len(waiting), max(1, count // 8)):
            taken = [(slot, *waiting.pop()) for slot in free[: len(waiting)]]
            owner.update({slot: i for slot, i, _ in taken})
            slots.read([(slot, prompt) for slot, _, prompt in taken])
        slots.advance(sorted(owner), STEPS_BETWEEN_CHECKS)
        for slot, new in slots.ended(owner):
            finish(owner.pop(slot), new)


def _most(model: Any, rows: int | str) -> int:
    return MOST_ROWS[model.device.type] if rows == "auto" else int(rows)


def _room(model: Any, length: int, wanted: int) -> tuple[int, bool]:
    """Return how many slots of `length` tokens fit, and whether 16-bit weights can be cached beside them."""
    config = base_of(model).config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * size
    width = base_of(model).get_output_embeddings().weight.dtype.itemsize
    a_slot = (length * values * width + 12 * config.vocab_size) / GIB
    cached = cached_weights_gib(model)
    free = 0.9 * room_gib() - 1
    cache = free - cached >= min(wanted, FEWEST_ROWS) * a_slot
    fitting = int((free - cached * cache) / a_slot)
    return max(1, min(wanted, fitting)), cache


def _argmax(logits: Tensor) -> Tensor:
    return logits.argmax(dim=-1)


def _sampler(decoding: Decoding) -> Callable[[Tensor], Tensor]:
    """Build a function that draws tokens, (rows,), from logits, (rows, vocabulary)."""
    warm = TemperatureLogitsWarper(decoding.temperature)
    cut = TopPLogitsWarper(decoding.top_p)

    def draw(logits: Tensor) -> Tensor:
        nothing: Any = None
        probabilities = cut(nothing, warm(nothing, logits.float())).softmax(dim=-1)
        # exponential race: unlike torch.multinomial, without a device sync
        return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(dim=-1)

    return draw


class DecodingSlots:
    """KV cache and state of the rows being decoded.

    The last token of a row is not in the cache yet: the next decode step adds it and predicts the one after.
    One spare slot absorbs the padding of smaller batches.
    """

    def __init__(
        self, fused: FusedModel, count: int, length: int, ends: Sequence[int], limit: int
    ) -> None:
        self.fused, self.limit = fused, limit
        self.spare = count
        table = fused.embedding
        kv_heads, size = (
            fused.layers[0].kv_heads,
            fused.layers[0].qkv.outputs[1] // fused.layers[0].kv_heads,
        )
        shape = (count + 1, length, kv_heads, size)
        self.keys = [table.new_zeros(shape) for _ in fused.layers]
        self.values = [table.new_zeros(shape) for _ in fused.layers]

        def numbers(*sizes: int) -> Tensor:
            return torch.zeros(*sizes, dtype=torch.long, device=table.device)

        self.last_token, self.positions, self.num_generated = (numbers(count + 1) for _ in range(3))
        self.answers = numbers(count + 1, limit + 1)  # last column: overflow
        self.active = numbers(count + 1).bool()
        self.ends = torch.tensor(ends, device=table.device)
        self.chosen = numbers(count) + self.spare
        self.sample: Callable[[Tensor], Tensor] = _argmax
        self._graphs: dict[int, Any] = {}

    def read(self, prompts: Sequence[tuple[int, list[int]]]) -> None:
        """Start rows in the given slots: prefill all tokens of their prompts but the last."""
        device = self.last_token.device
        where = torch.tensor([slot for slot, _ in prompts], device=device)
        self.last_token[where] = torch.tensor([prompt[-1] for _, prompt in prompts], device=device)
        self.positions[where] = torch.tensor([len(p) - 1 for _, p in prompts], device=device)
        self.num_generated[where] = 0
        self.active[where] = True
        part: list[tuple[int, list[int]]] = []
        for slot, prompt in prompts:
            if part and sum(len(ids) for _, ids in part) + len(prompt) > PREFILL_TOKENS:
                self._read_together(part)
                part = []
            if len(prompt) > 1:
                part.append((slot, prompt[:-1]))
        if part:
            self._read_together(part)

    def _read_together(self, prompts: Sequence[tuple[int, list[int]]]) -> None:
        device, length = self.last_token.device, self.keys[0].shape[1]
        lengths = [len(prompt) for _, prompt in prompts]
        ids = torch.tensor([token for _, prompt in prompts for token in prompt], device=device)
        positions = torch.cat([torch.arange(n) for n in lengths]).to(device)
        starts = torch.tensor([slot * length for slot, _ in prompts])
        where = starts.repeat_interleave(torch.tensor(lengths)).to(device) + positions
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
        packed = PackedSequences(cu_seqlens, max(lengths))
        x = self.fused.embed(ids)
        cos, sin = self.fused.angles(x, positions)
        for layer, keys, values in zip(self.fused.layers, self.keys, self.values, strict=True):

            def cached_attention(
                q: Tensor, k: Tensor, v: Tensor, to: Any = (keys, values, layer)
            ) -> Tensor:
                to[0].flatten(0, 1).index_copy_(0, where, k)
                to[1].flatten(0, 1).index_copy_(0, where, v)
                return attend(q, k, v, packed, to[2].window, q.shape[-1] ** -0.5)

            x = layer.infer(x, cos, sin, cached_attention)

    def advance(self, slots: Sequence[int], steps: int) -> None:
        """Run `steps` decode steps on these slots; those that have ended do not change."""
        size = self.spare
        while size // 2 >= max(len(slots), FEWEST_ROWS):
            size //= 2
        filled = [*slots, *[self.spare] * (size - len(slots))]
        self.chosen[:size] = torch.tensor(filled, device=self.chosen.device)
        step = self._graph(size) if self.chosen.is_cuda else lambda: self._step(self.chosen[:size])
        for _ in range(steps):
            step()

    def _graph(self, size: int) -> Callable[[], None]:
        """Capture the decode step for this batch size as a CUDA graph, after warm-up on the spare slot."""
        if size not in self._graphs:
            rows = self.chosen[:size].clone()
            self.chosen[:size] = self.spare
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    self._step(self.chosen[:size])
            torch.cuda.current_stream().wait_stream(side)
            pool = next(iter(self._graphs.values())).pool() if self._graphs else None
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._step(self.chosen[:size])
            self.chosen[:size] = rows
            self._graphs[size] = graph
        return self._graphs[size].replay  # type: ignore[no-any-return]

    def _step(self, slots: Tensor) -> None:
        """Decode one token for each of `slots`, (rows,)."""
        positions, num_generated, active = (
            self.positions[slots],
            self.num_generated[slots],
            self.active[slots],
        )
        x = self.fused.embed(self.last_token[slots])
        cos, sin = self.fused.angles(x, positions)
        for layer, keys, values in zip(self.fused.layers, self.keys, self.values, strict=True):

            def cached_attention(
                q: Tensor, k: Tensor, v: Tensor, to: Any = (keys, values, layer)
            ) -> Tensor:
                to[0].index_put_((slots, positions), k)
                to[1].index_put_((slots, positions), v)
                layer, scale = to[2], q.shape[-1] ** -0.5
                return layer.run.attend_to_cache(  # type: ignore[no-any-return]
                    q, to[0], to[1], slots, positions, layer.window, scale
                )

            x = layer.infer(x, cos, sin, cached_attention)
        new = self.sample(self.fused.logits(self.fused.body.norm(x)))
        self.answers[slots, num_generated] = new
        ended = (new[:, None] == self.ends).any(dim=1) | (num_generated + 1 >= self.limit)
        self.last_token[slots] = new
        self.positions[slots] = positions + active
        self.num_generated[slots] = num_generated + active
        self.active[slots] = active & ~ended

    def ended(self, slots: Sequence[int] | dict[int, int]) -> list[tuple[int, list[int]]]:
        """Return those of these slots that have ended, with their answers' tokens, end token included."""
        active, num_generated = self.active.tolist(), self.num_generated.tolist()
        done = [slot for slot in slots if not active[slot]]
        answers = self.answers[torch.tensor(done, dtype=torch.long)].tolist() if done else []
        return [(slot, new[: num_generated[slot]]) for slot, new in zip(done, answers, strict=True)]
