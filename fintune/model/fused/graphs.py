"""CUDA graphs of a small model's passes: one launch instead of thousands, which a CPU issues too slowly."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fintune.model.attention import PackedSequences
from fintune.model.batch import MicroBatch
from fintune.model.fused.model import FusedModel

TOKENS = 512  # a pass is filled up to a multiple of it, so that few graphs serve all


@dataclass(frozen=True)
class _Pass:
    """The graphs of a pass of one size, and what they read and write."""

    place: MicroBatch
    forward: torch.cuda.CUDAGraph
    states: Tensor  # those that predict answers, (tokens, hidden); only the first ones count
    gradient: Tensor  # of the states
    backward: torch.cuda.CUDAGraph


class Graphs:
    """Gradients of a fused model by captured passes; each size of a pass is captured once.

    A pass is filled up by a document of its own. The head is not captured: its work depends on the number
    of answers, and its kernels are few and large. The graphs run one after the other, so they share one
    pool of memory.

    Args:
        parameters: those that are trained.
        documents: the most of a pass.
        longest: tokens of the longest document.
    """

    def __init__(
        self, fused: FusedModel, parameters: Iterable[Tensor], documents: int, longest: int
    ) -> None:
        self.fused = fused
        self.parameters = [p for p in parameters if p.requires_grad]
        self.sums: list[Tensor] = []
        self.longest = max(longest, TOKENS)
        self.device = fused.indices.device
        self.cu_seqlens = torch.zeros(documents + 2, dtype=torch.int32, device=self.device)
        self.seed = torch.zeros((), dtype=torch.long, device=self.device)
        self.pool: Any = torch.cuda.graph_pool_handle()
        # one for the first pass and all captures: what autograd keeps of a parameter belongs to a stream
        self.stream = torch.cuda.Stream()
        self.captured: dict[int, _Pass] = {}
        self.copying: torch.cuda.CUDAGraph | None = None

    def sync_parameters(self) -> None:
        """Do what the fused model's method does."""
        if self.copying is None and self.captured:
            self.copying, _ = self._capture(self.fused.sync_parameters)
        if self.copying:
            self.copying.replay()
        else:
            self.fused.sync_parameters()

    def begin(self) -> None:
        """Set the parameters' gradients to zero, where the graphs add to them."""
        if not self.sums:  # not earlier: the trainer changes the parameters' type at last
            self.sums = [torch.zeros_like(p) for p in self.parameters]
        torch._foreach_zero_(self.sums)
        for parameter, total in zip(self.parameters, self.sums, strict=True):
            parameter.grad = total

    def loss(self, part: MicroBatch, factor: float) -> Tensor:
        """Add the gradients of the summed loss times `factor` to the parameters'; return that loss."""
        assert part.packed is not None
        tokens, answers = part.ids.numel(), part.targets.numel()
        size = -(-tokens // TOKENS) * TOKENS
        found = self.captured.get(size)
        place = found.place if found else self._place(size)
        place.ids[:, :tokens] = part.ids
        place.positions[:, :tokens] = part.positions
        starts = part.packed.cu_seqlens
        self.cu_seqlens.fill_(size)
        self.cu_seqlens[: len(starts)] = starts
        place.predicting[:answers] = part.predicting
        if self.fused.drops:
            self.seed.copy_(self.fused.draw_seed(), non_blocking=True)
        if found is None:
            found = self.captured[size] = self._captured_pass(place)
        found.forward.replay()
        states = found.states[:answers]
        loss, d_states, d_rows = self.fused.loss_and_gradients(states, part.targets)
        found.gradient.zero_()
        torch.mul(d_states, factor, out=found.gradient[:answers])
        for parameter, total in zip(self.parameters, self.sums, strict=True):
            if parameter is self.fused.head_rows:
                total.add_(d_rows, alpha=factor)
        found.backward.replay()
        return loss * factor

    def _place(self, tokens: int) -> MicroBatch:
        """Make the tensors that a graph of this size reads."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.long, device=self.device)

        packed = PackedSequences(self.cu_seqlens, self.longest)
        ids, positions = zeros(1, tokens), zeros(1, tokens)
        return MicroBatch(ids, positions, None, packed, zeros(tokens), zeros(0))

    def _captured_pass(self, place: MicroBatch) -> _Pass:
        """Capture a pass; before the first one, run it, for a captured one must not compile kernels."""
        if not self.captured:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                states = self.fused.answer_states(place, self.seed)
                self._gradients(states, torch.zeros_like(states))
                del states
            torch.cuda.current_stream().wait_stream(self.stream)
        forward, states = self._capture(lambda: self.fused.answer_states(place, self.seed))
        gradient = torch.zeros_like(states)
        backward, _ = self._capture(lambda: self._add_gradients(states, gradient))
        return _Pass(place, forward, states.detach(), gradient, backward)

    def _capture(self, compute: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            found = compute()
        return graph, found

    def _gradients(self, states: Tensor, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(states, self.parameters, gradient, allow_unused=True)

    def _add_gradients(self, states: Tensor, gradient: Tensor) -> None:
        found = self._gradients(states, gradient)
        pairs = [
            (total, each)
            for total, each in zip(self.sums, found, strict=True)
            if each is not None  # a head's own rows
        ]
        torch._foreach_add_(*map(list, zip(*pairs, strict=True)))
