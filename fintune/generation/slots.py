"""Continuous batching: a slot that is free takes the next prompt."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from fintune.hardware import GIB, room_gib
from fintune.model.attention import attend
from fintune.model.base import base_of
from fintune.model.fused.model import FusedModel, kept_gib

MOST_ROWS = {"cuda": 512, "cpu": 64}  # at once, where memory allows; more hardly add to the speed
FEWEST_ROWS = 32  # fewer are computed as so many
STEPS_BETWEEN_LOOKS = 8  # looking which answers have ended waits for the device
PREFILL_TOKENS = 16_384  # of prompts that are read together


@torch.no_grad()
def generate_with_slots(
    model: Any,
    prompts: Sequence[tuple[int, list[int]]],
    ends: list[int],
    limit: int,
    rows: int | str,
    sampling: dict[str, float] | None,
    finish: Callable[[int, list[int]], None],
) -> None:
    """Longest prompts first; a slot that is free takes the next one."""
    waiting = sorted(prompts, key=lambda prompt: len(prompt[1]))
    length = len(waiting[-1][1]) + limit
    count, keep = _room(model, length, min(len(prompts), _most(model, rows)))
    dtype = base_of(model).get_output_embeddings().weight.dtype
    slots = Slots(FusedModel(model, dtype, keep=keep, training=False), count, length, ends, limit)
    if sampling:
        slots.pick = _sampler(sampling)
    owner: dict[int, int] = {}
    while waiting or owner:
        free = [slot for slot in range(count) if slot not in owner]
        # a pass through the prompts costs as much as some steps: not for every single slot
        if waiting and len(free) >= min(len(waiting), max(1, count // 8)):
            taken = [(slot, *waiting.pop()) for slot in free[: len(waiting)]]
            owner.update({slot: i for slot, i, _ in taken})
            slots.read([(slot, prompt) for slot, _, prompt in taken])
        slots.advance(sorted(owner), STEPS_BETWEEN_LOOKS)
        for slot, new in slots.ended(owner):
            finish(owner.pop(slot), new)


def _most(model: Any, rows: int | str) -> int:
    return MOST_ROWS[model.device.type] if rows == "auto" else int(rows)


def _room(model: Any, length: int, wanted: int) -> tuple[int, bool]:
    """How many slots of `length` tokens fit, and whether the weights are kept in 16 bits beside them."""
    config = base_of(model).config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * size
    width = base_of(model).get_output_embeddings().weight.dtype.itemsize
    a_slot = (length * values * width + 12 * config.vocab_size) / GIB
    kept = kept_gib(model)
    free = 0.9 * room_gib() - 1
    keep = free - kept >= min(wanted, FEWEST_ROWS) * a_slot
    fitting = int((free - kept * keep) / a_slot)
    return max(1, min(wanted, fitting)), keep


def _most_likely(logits: Tensor) -> Tensor:
    return logits.argmax(dim=-1)


def _sampler(sampling: dict[str, float]) -> Callable[[Tensor], Tensor]:
    """Draws from the likeliest tokens that make up `top_p` at this temperature."""
    warm = TemperatureLogitsWarper(float(sampling["temperature"]))
    cut = TopPLogitsWarper(float(sampling["top_p"]))

    def draw(logits: Tensor) -> Tensor:
        nothing: Any = None
        shares = cut(nothing, warm(nothing, logits.float())).softmax(dim=-1)
        # the first of exponential clocks with these rates; multinomial would look at the shares first
        return (shares / torch.empty_like(shares).exponential_()).argmax(dim=-1)

    return draw


class Slots:
    """Rows that are being answered: the keys and values of their tokens, and where each one is.

    The newest token of a row is not among its keys yet: the next step reads it, and finds the one
    after it. One slot more than asked for takes what is computed to fill up a batch.
    """

    def __init__(
        self, fused: FusedModel, count: int, length: int, ends: Sequence[int], limit: int
    ) -> None:
        self.fused, self.limit = fused, limit
        self.spare = count
        table = fused.embedding
        groups, size = (
            fused.layers[0].groups,
            fused.layers[0].qkv.outputs[1] // fused.layers[0].groups,
        )
        shape = (count + 1, length, groups, size)
        self.keys = [table.new_zeros(shape) for _ in fused.layers]
        self.values = [table.new_zeros(shape) for _ in fused.layers]

        def numbers(*sizes: int) -> Tensor:
            return torch.zeros(*sizes, dtype=torch.long, device=table.device)

        self.newest, self.positions, self.written = (numbers(count + 1) for _ in range(3))
        self.answers = numbers(count + 1, limit + 1)  # the last column is no answer's
        self.active = numbers(count + 1).bool()
        self.ends = torch.tensor(ends, device=table.device)
        self.chosen = numbers(count) + self.spare
        self.pick: Callable[[Tensor], Tensor] = _most_likely
        self._graphs: dict[int, Any] = {}

    def read(self, prompts: Sequence[tuple[int, list[int]]]) -> None:
        """Start rows in the slots named: all tokens of their prompts but the last become keys and values."""
        device = self.newest.device
        where = torch.tensor([slot for slot, _ in prompts], device=device)
        self.newest[where] = torch.tensor([prompt[-1] for _, prompt in prompts], device=device)
        self.positions[where] = torch.tensor([len(p) - 1 for _, p in prompts], device=device)
        self.written[where] = 0
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
        device, length = self.newest.device, self.keys[0].shape[1]
        lengths = [len(prompt) for _, prompt in prompts]
        ids = torch.tensor([token for _, prompt in prompts for token in prompt], device=device)
        positions = torch.cat([torch.arange(n) for n in lengths]).to(device)
        starts = torch.tensor([slot * length for slot, _ in prompts])
        where = starts.repeat_interleave(torch.tensor(lengths)).to(device) + positions
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
        x = self.fused.embed(ids)
        cos, sin = self.fused.angles(x, positions)
        for layer, keys, values in zip(self.fused.layers, self.keys, self.values, strict=True):

            def look(q: Tensor, k: Tensor, v: Tensor, to: Any = (keys, values, layer)) -> Tensor:
                to[0].flatten(0, 1).index_copy_(0, where, k)
                to[1].flatten(0, 1).index_copy_(0, where, v)
                return attend(q, k, v, bounds, max(lengths), to[2].window, q.shape[-1] ** -0.5)

            x = layer.infer(x, cos, sin, look)

    def advance(self, slots: Sequence[int], steps: int) -> None:
        """Give the rows in these slots up to `steps` more tokens; those that have ended stay as they are."""
        size = self.spare
        while size // 2 >= max(len(slots), FEWEST_ROWS):
            size //= 2
        filled = [*slots, *[self.spare] * (size - len(slots))]
        self.chosen[:size] = torch.tensor(filled, device=self.chosen.device)
        step = self._graph(size) if self.chosen.is_cuda else lambda: self._step(self.chosen[:size])
        for _ in range(steps):
            step()

    def _graph(self, size: int) -> Callable[[], None]:
        """The step of so many rows as a CUDA graph; run before only on the spare slot, to compile."""
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
        """One token for each of `slots`, (rows,)."""
        positions, written, active = self.positions[slots], self.written[slots], self.active[slots]
        x = self.fused.embed(self.newest[slots])
        cos, sin = self.fused.angles(x, positions)
        for layer, keys, values in zip(self.fused.layers, self.keys, self.values, strict=True):

            def look(q: Tensor, k: Tensor, v: Tensor, to: Any = (keys, values, layer)) -> Tensor:
                to[0].index_put_((slots, positions), k)
                to[1].index_put_((slots, positions), v)
                layer, scale = to[2], q.shape[-1] ** -0.5
                return layer.run.attend_to_cache(  # type: ignore[no-any-return]
                    q, to[0], to[1], slots, positions, layer.window, scale
                )

            x = layer.infer(x, cos, sin, look)
        new = self.pick(self.fused.logits(self.fused.body.norm(x)))
        self.answers[slots, written] = new
        ended = (new[:, None] == self.ends).any(dim=1) | (written + 1 >= self.limit)
        self.newest[slots] = new
        self.positions[slots] = positions + active
        self.written[slots] = written + active
        self.active[slots] = active & ~ended

    def ended(self, slots: Sequence[int] | dict[int, int]) -> list[tuple[int, list[int]]]:
        """Which of these slots have ended, and their answers' tokens, the end token included."""
        active, written = self.active.tolist(), self.written.tolist()
        done = [slot for slot in slots if not active[slot]]
        answers = self.answers[torch.tensor(done, dtype=torch.long)].tolist() if done else []
        return [(slot, new[: written[slot]]) for slot, new in zip(done, answers, strict=True)]
