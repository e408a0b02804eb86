"""CUDA graphs of a small model's passes: one launch instead of thousands, which a CPU issues too slowly."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fintune.model.attention import PackedSequences
from fintune.model.batch import CHUNK, MicroBatch
from fintune.model.fused.model import FusedModel

TOKENS = 512  # a pass is filled up to a multiple of it, so that few graphs serve all


class Graphs:
    """Gradients of a fused model by captured passes; each size of a pass is captured once.

    A pass is filled up: its tokens by a document of their own, its answers by targets that do not count. The
    graphs run one after the other, so they share one pool of memory.

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
        self.factor = torch.ones((), dtype=torch.float32, device=self.device)
        self.pool: Any = torch.cuda.graph_pool_handle()
        # one for the first pass and all captures: what autograd keeps of a parameter belongs to a stream
        self.stream = torch.cuda.Stream()
        self.captured: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, MicroBatch, Tensor]] = {}
        self.copying: torch.cuda.CUDAGraph | None = None
        self.warm = False  # a first pass compiles kernels, which a captured one must not

    def sync_parameters(self) -> None:
        """Do what the fused model's method does."""
        if self.copying is None and self.warm:
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
        size = -(-tokens // TOKENS) * TOKENS, -(-answers // CHUNK) * CHUNK
        found = self.captured.get(size)
        place = found[1] if found else self._place(*size)
        place.ids[:, :tokens] = part.ids
        place.positions[:, :tokens] = part.positions
        starts = part.packed.cu_seqlens
        self.cu_seqlens.fill_(size[0])
        self.cu_seqlens[: len(starts)] = starts
        place.predicting[:answers] = part.predicting
        place.targets.fill_(-1)
        place.targets[:answers] = part.targets
        self.factor.fill_(factor)
        if self.fused.drops:
            self.seed.copy_(self.fused.draw_seed(), non_blocking=True)
        if not self.warm:
            self.warm = True
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                loss = self._add_gradients(place)
            torch.cuda.current_stream().wait_stream(self.stream)
            return loss
        if found is None:
            graph, loss = self._capture(lambda: self._add_gradients(place))
            found = self.captured[size] = graph, place, loss
        found[0].replay()
        return found[2]

    def _place(self, tokens: int, answers: int) -> MicroBatch:
        """Make the tensors that a graph of this size reads."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.long, device=self.device)

        packed = PackedSequences(self.cu_seqlens, self.longest)
        ids, positions = zeros(1, tokens), zeros(1, tokens)
        return MicroBatch(ids, positions, None, packed, zeros(answers), zeros(answers))

    def _capture(self, compute: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            found = compute()
        return graph, found

    def _add_gradients(self, place: MicroBatch) -> Tensor:
        states = self.fused.answer_states(place, self.seed)
        loss = self.fused.answer_loss(states, place.targets) * self.factor
        torch._foreach_add_(self.sums, torch.autograd.grad(loss, self.parameters))
        return loss.detach()
