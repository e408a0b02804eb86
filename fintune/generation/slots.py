"""Continuous batching: a free slot takes the next prompt."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fintune.generation.decoding import SETTINGS, Decoding, TokenDraw, table
from fintune.hardware import GIB, room_gib
from fintune.model.adapter import base_of
from fintune.model.attention import PackedSequences
from fintune.model.fused.families import head_size
from fintune.model.fused.model import FusedModel, cached_weights_gib

MOST_ROWS = {"cuda": 512, "cpu": 64}  # if memory allows; more are hardly faster
FEWEST_ROWS = 32  # smaller batches are padded to this size
STEPS_BETWEEN_CHECKS = 8  # checking which answers have ended forces a device sync
PREFILL_TOKENS = 16_384  # of prompts in one prefill


@dataclass(frozen=True)
class Prompt:
    """A prompt's tokens with its index, decoding and random numbers, (max_new_tokens,)."""

    index: int
    tokens: list[int]
    decoding: Decoding
    uniforms: Tensor


@torch.no_grad()
def generate_with_slots(
    model: Any,
    prompts: Sequence[Prompt],
    ends: list[int],
    rows: int | str,
    finish: Callable[[int, list[int]], None],
    fp8: bool = False,
) -> None:
    """Generate answers, longest prompts first; a free slot takes the next one."""
    waiting = sorted(prompts, key=lambda prompt: len(prompt.tokens))
    limit = waiting[0].decoding.max_new_tokens
    length = len(waiting[-1].tokens) + limit
    draw = TokenDraw([prompt.decoding for prompt in prompts])
    count, cache = _room(model, length, min(len(prompts), _most(model, rows)), draw.samples)
    dtype = base_of(model).get_output_embeddings().weight.dtype
    fused = FusedModel(model, dtype, cache_weights=cache, training=False, fp8=fp8)
    slots = DecodingSlots(fused, count, length, ends, limit, draw)
    owner: dict[int, int] = {}
    while waiting or owner:
        free = [slot for slot in range(count) if slot not in owner]
        # a prefill costs as much as several decode steps: wait until several slots are free
        if waiting and len(free) >= min(len(waiting), max(1, count // 8)):
            taken = {slot: waiting.pop() for slot in free[: len(waiting)]}
            owner |= {slot: prompt.index for slot, prompt in taken.items()}
            slots.read(taken)
        slots.advance(sorted(owner), STEPS_BETWEEN_CHECKS)
        for slot, new in slots.ended(owner):
            finish(owner.pop(slot), new)


def _most(model: Any, rows: int | str) -> int:
    return MOST_ROWS[model.device.type] if rows == "auto" else int(rows)


def _room(model: Any, length: int, wanted: int, samples: bool) -> tuple[int, bool]:
    """Return how many slots of `length` tokens fit, and whether 16-bit weights can be cached beside them."""
    config = base_of(model).config
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size(config)
    width = base_of(model).get_output_embeddings().weight.dtype.itemsize
    scores = 40 if samples else 12  # bytes a token of the vocabulary; sorting takes the most
    a_slot = (length * values * width + scores * config.vocab_size) / GIB
    cached = cached_weights_gib(model)
    free = 0.9 * room_gib() - 1
    cache = free - cached >= min(wanted, FEWEST_ROWS) * a_slot
    fitting = int((free - cached * cache) / a_slot)
    return max(1, min(wanted, fitting)), cache


class DecodingSlots:
    """KV cache and state of the rows being decoded.

    The last token of a row is not in the cache yet: the next decode step adds it and predicts the one after.
    One spare slot absorbs the padding of smaller batches.
    """

    def __init__(
        self,
        fused: FusedModel,
        count: int,
        length: int,
        ends: Sequence[int],
        limit: int,
        draw: TokenDraw,
    ) -> None:
        self.fused, self.limit, self.draw = fused, limit, draw
        self.spare = count
        embedding = fused.embedding
        shape = (count + 1, length, fused.layers[0].kv_heads, fused.layers[0].head_size)
        self.keys = [embedding.new_zeros(shape) for _ in fused.layers]
        self.values = [embedding.new_zeros(shape) for _ in fused.layers]

        def numbers(*sizes: int) -> Tensor:
            return torch.zeros(*sizes, dtype=torch.long, device=embedding.device)

        self.last_token, self.positions, self.num_generated = (numbers(count + 1) for _ in range(3))
        self.answers = numbers(count + 1, self.limit + 1)  # last column: overflow
        self.active = numbers(count + 1).bool()
        self.ends = torch.tensor(ends, device=embedding.device)
        self.chosen = numbers(count) + self.spare
        self.uniforms = torch.zeros(count + 1, self.limit + 1, device=embedding.device)
        self.settings = torch.ones(count + 1, len(SETTINGS), device=embedding.device)
        vocabulary = len(fused.head) if draw.penalizes else 0
        self.seen = numbers(count + 1, vocabulary).bool()
        self._graphs: dict[int, Any] = {}

    def read(self, prompts: Mapping[int, Prompt]) -> None:
        """Start rows in the given slots: prefill all tokens of their prompts but the last."""
        device = self.last_token.device
        where = torch.tensor(list(prompts), device=device)
        tokens = [prompt.tokens for prompt in prompts.values()]
        self.last_token[where] = torch.tensor([ids[-1] for ids in tokens], device=device)
        self.positions[where] = torch.tensor([len(ids) - 1 for ids in tokens], device=device)
        self.uniforms[where, :-1] = torch.stack([p.uniforms for p in prompts.values()]).to(device)
        self.settings[where] = table([p.decoding for p in prompts.values()]).to(device)
        if self.draw.penalizes:
            self.seen[where] = False
            lengths = torch.tensor([len(ids) for ids in tokens], device=device)
            every = torch.tensor([token for ids in tokens for token in ids], device=device)
            self.seen[where.repeat_interleave(lengths), every] = True
        self.num_generated[where] = 0
        self.active[where] = True
        part: list[tuple[int, list[int]]] = []
        for slot, prompt in zip(prompts, tokens, strict=True):
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
        rotary = self.fused.angles(x, positions)
        for layer, keys, values in zip(self.fused.layers, self.keys, self.values, strict=True):

            def cached_attention(
                q: Tensor, k: Tensor, v: Tensor, to: Any = (keys, values, layer)
            ) -> Tensor:
                to[0].flatten(0, 1).index_copy_(0, where, k)
                to[1].flatten(0, 1).index_copy_(0, where, v)
                return to[2].attend(q, k, v, packed)  # type: ignore[no-any-return]

            x = layer.infer(x, rotary, cached_attention)

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
        rotary = self.fused.angles(x, positions)
        for layer, keys, values in zip(self.fused.layers, self.keys, self.values, strict=True):

            def cached_attention(
                q: Tensor, k: Tensor, v: Tensor, to: Any = (keys, values, layer)
            ) -> Tensor:
                to[0].index_put_((slots, positions), k)
                to[1].index_put_((slots, positions), v)
                layer = to[2]
                return layer.run.attend_to_cache(  # type: ignore[no-any-return]
                    q, to[0], to[1], slots, positions, layer.window, layer.scale, layer.softcap
                )

            x = layer.infer(x, rotary, cached_attention)
        logits = self.fused.logits(self.fused.body.norm(x))
        drawn = self.uniforms[slots, num_generated]
        new = self.draw(logits, self.seen[slots], self.settings[slots], drawn)
        if self.draw.penalizes:
            self.seen.index_put_((slots, new), torch.ones_like(active))
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
