"""A frozen base of which each process holds a part, by torch's FSDP2.

Only the base's large weights are sharded, a group for each decoder layer; norms, embedding, head and adapter
are whole in each process. Nothing of the base is trained, so that sharding is gathering: the adapter's
gradients are added up as without it (training/trainer.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from fintune.hardware import GIB, device, free_memory
from fintune.model.adapter import base_of
from fintune.processes import count


def is_sharded(model: Any) -> bool:
    """Return whether the base's weights are shared out among the processes."""
    return any(isinstance(layer, FSDPModule) for layer in _layers(model))


def sharded_gib(model: Any) -> float:
    """Return the size in GiB of the weights that `shard` shares out."""
    large = [weight for layer in _layers(model) for _, _, weight in _large(layer)]
    return sum(weight.numel() * weight.element_size() for weight in large) / GIB


def shard(model: Any) -> None:
    """Move a model to this process's device, with a part of each large weight of its decoder layers.

    The model may lie on the CPU: one layer at a time comes to the device as a whole.
    """
    mesh = init_device_mesh(device().type, (count(),))
    for layer in _layers(model):
        layer.to(device())
        for module, name, weight in _large(layer):
            if hasattr(weight, "quant_state"):
                module.quant_state = weight.quant_state  # stays whole: a byte for 64 weights
                plain = weight.data.as_subclass(Tensor)
                setattr(module, name, torch.nn.Parameter(plain, requires_grad=False))
        sharded = {weight for _, _, weight in _large(layer)}
        whole = {weight for weight in layer.parameters() if weight not in sharded}
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    model.to(device())
    if hasattr(base_of(model), "hf_device_map"):
        base_of(model).hf_device_map = {"": device()}  # accelerate trusts it
    free_memory()


def _layers(model: Any) -> list[Any]:
    decoder = base_of(model).get_decoder()
    return list(getattr(decoder, "layers", None) or getattr(decoder, "h", []))


def _large(layer: Any) -> list[tuple[Any, str, Tensor]]:
    """Return a layer's frozen matrices, each with its module and name."""
    return [
        (module, name, weight)
        for module in layer.modules()
        for name, weight in module.named_parameters(recurse=False)
        if weight.ndim > 1 and not weight.requires_grad
    ]


class Shards:
    """The layers of a sharded base for code that does not call them, each gathered one ahead of its use."""

    def __init__(self, layers: Any) -> None:
        self.layers: list[Any] = list(layers)
        self._asked: dict[int, Any] = {}

    def enter(self, x: Tensor, number: int) -> Tensor:
        """Have a layer's weights at hand; x is its input. Its backward pass ends here."""
        out: Tensor = _Enter.apply(x, self, number)
        return out

    def leave(self, x: Tensor, number: int) -> Tensor:
        """Leave a layer's weights; x is its output. Its backward pass begins here."""
        out: Tensor = _Leave.apply(x, self, number)
        return out

    def gather(self, number: int, following: int) -> None:
        """Wait for a layer's weights, and ask for those of the following one."""
        for each in (number, following):
            if each not in self._asked and 0 <= each < len(self.layers):
                self._asked[each] = self.layers[each].unshard(async_op=True)
        self._asked.pop(number).wait()

    def release(self, number: int) -> None:
        self.layers[number].reshard()


class _Enter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: Shards, number: int) -> Tensor:
        shards.gather(number, number + 1)
        ctx.shards, ctx.number = shards, number
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.shards.release(ctx.number)
        return gradients[0], None, None


class _Leave(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: Shards, number: int) -> Tensor:
        shards.release(number)
        ctx.shards, ctx.number = shards, number
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.shards.gather(ctx.number, ctx.number - 1)
        return gradients[0], None, None
