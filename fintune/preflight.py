"""Checks before minutes are spent: is the base there, is there room for it, what will compute it.

`python -m fintune.preflight` runs all of them on params.yaml and changes nothing.
"""

import functools
import itertools
import json
import logging
import math
import os
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fintune.params import Base, Lora, Train, UserError, read_params

if TYPE_CHECKING:
    import torch

log = logging.getLogger("fintune")
GIB = 2**30
NF4_BYTES = (
    0.516  # per weight: 4 bits, and a doubly quantised scale for every 64 (Dettmers et al. 2023)
)
ACTIVATION_BYTES = 44  # of plain kernels: a token, layer and hidden unit in 16 bits, measured
CHUNK = 1024  # answer tokens whose logits are held at once
SAFE_SHARE = 0.92  # of the free memory; the rest is for fragments
# measured on an H100 and an H200, in the time of one token: of a token, of dequantising all weights once, and
# the least that a pass takes, since the host needs as long to launch it
TIME = {"none": 1.0, "selective": 1.2, "full": 1.31}
DEQUANTIZE_TOKENS, LEAST_TOKENS = 160, 2600
DEQUANTIZATIONS = {"none": 2, "selective": 3, "full": 3}  # in a pass: forward, again, backward


def check_base(base: Base) -> int:
    """Make sure that the base can be loaded.

    Returns:
        The size of its weights in bytes.

    Raises:
        UserError: a folder without config, tokenizer or safetensors weights; a hub model that is
            gated, missing or unreachable.
    """
    if not base.is_folder:
        from fintune.hub import check_model

        return check_model(base.model, base.revision or "")
    folder = Path(base.model)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"base.model: {folder} has no config.json; it is no Hugging Face model folder"
        )
    weights = list(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(
            f"base.model: {folder} has no safetensors weights; other formats can run code and are not loaded"
        )
    return sum(file.stat().st_size for file in weights)


def hardware() -> str:
    """What will compute: the GPU and its memory, or the CPU's cores; needs torch."""
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return f"{properties.name}, {properties.total_memory / GIB:.0f} GiB"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} CPU cores"


def describe_device() -> str:
    """The hardware, and what happens without a GPU or without bfloat16; needs torch."""
    import torch

    if not torch.cuda.is_available():
        return f"no GPU: {hardware()}, float32; right for the demo, hours or days for a 7B model"
    if torch.cuda.is_bf16_supported():
        return f"{hardware()}, bfloat16"
    return f"{hardware()}, float16 with loss scaling (no bfloat16 here)"


@dataclass(frozen=True)
class Shape:
    """The sizes of a base and its adapter that time and memory depend on."""

    hidden: int
    middle: int
    layers: int
    wide: int  # outputs of q
    narrow: int  # outputs of k, and of v
    heads: int
    vocabulary: int
    rank: int
    tuned: tuple[str, ...]

    @classmethod
    def of(cls, config: Any, lora: Lora) -> "Shape":
        """Read from a transformers config and the parameters."""
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(
            hidden=config.hidden_size,
            middle=config.intermediate_size,
            layers=config.num_hidden_layers,
            wide=heads * size,
            narrow=config.num_key_value_heads * size,
            heads=heads,
            vocabulary=config.vocab_size,
            rank=lora.r,
            tuned=tuple(lora.target_modules),
        )

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's linear layers."""
        return {
            "q_proj": (self.hidden, self.wide),
            "k_proj": (self.hidden, self.narrow),
            "v_proj": (self.hidden, self.narrow),
            "o_proj": (self.wide, self.hidden),
            "gate_proj": (self.hidden, self.middle),
            "up_proj": (self.hidden, self.middle),
            "down_proj": (self.middle, self.hidden),
        }

    @property
    def linear_weights(self) -> int:
        return self.layers * sum(a * b for a, b in self.linears.values())

    @property
    def adapter_weights(self) -> int:
        tuned = [self.linears[name] for name in self.tuned if name in self.linears]
        return self.layers * self.rank * sum(a + b for a, b in tuned)

    def flops(self, tokens: int, answer_tokens: int) -> float:
        """Of one training step, without what is computed twice to save memory.

        A frozen weight takes part in the product forward and in the gradient of the input, 4
        operations a token; a trained one in its own gradient as well, 6. The head sees answer tokens
        alone. Attention's scores are left out: rows of some hundred tokens make them a hundredth.
        """
        body = 4 * self.linear_weights + 6 * self.adapter_weights
        return float(tokens) * body + 4.0 * answer_tokens * self.vocabulary * self.hidden


@dataclass(frozen=True)
class Plan:
    """How a training step is computed; `memory` is the predicted peak in GiB, by part."""

    attention: str
    kernels: str
    checkpointing: str
    dequantize: str
    tokens_per_pass: int
    passes: int  # for a step of the expected size
    memory: dict[str, float]

    @property
    def peak_gib(self) -> float:
        return sum(self.memory.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size:.1f}" for name, size in self.memory.items())
        return (
            f"{self.attention} attention, {self.kernels} kernels, checkpointing {self.checkpointing}, "
            f"dequantize {self.dequantize}, "
            f"{self.passes} pass{'es' * (self.passes > 1)} of up to {self.tokens_per_pass:,} tokens a step; "
            f"memory about {self.peak_gib:.1f} GiB ({parts})"
        )


def plan_execution(
    shape: Shape,
    params: Train,
    lengths: Sequence[int],
    bytes_per_value: int,
    free_gib: float,
    on_gpu: bool,
    unsupported: str | None = None,
) -> Plan:
    """Choose what `auto` stands for: the fastest way that the estimate fits into the free memory.

    Args:
        lengths: tokens of each training row.
        bytes_per_value: of an activation, 2 or 4.
        free_gib: what the training may take, the base's weights included.
        unsupported: why the fused kernels cannot compute this base, if so.

    Raises:
        UserError: fused kernels are asked for and cannot compute this base, varlen attention without
            a GPU, or the weights alone do not fit.
    """
    if params.kernels == "fused" and unsupported:
        raise UserError(
            f"train.kernels: fused: they cannot compute {unsupported}; set auto or plain"
        )
    if params.attention == "varlen" and not on_gpu:
        raise UserError("train.attention: varlen needs a GPU; set auto or sdpa")
    attention = params.attention
    if attention == "auto":
        attention = "varlen" if on_gpu else "sdpa"
    kernels = params.kernels
    if kernels == "auto":
        kernels = "plain" if unsupported or attention == "padded" else "fused"
    if kernels == "plain" and unsupported and params.kernels == "auto":
        log.info("plain kernels: the fused ones cannot compute %s", unsupported)
    modes = ["none", "selective", "full"] if kernels == "fused" else ["none", "full"]
    if params.checkpointing != "auto":
        modes = [params.checkpointing]
    keeps = kernels == "fused" and params.quantization == "nf4"
    dequantize = ["once", "always"] if keeps else ["always"]
    if params.dequantize != "auto":
        if params.dequantize not in dequantize:
            raise UserError(
                "train.dequantize: once: only fused kernels keep the 16-bit weights of a 4-bit base; set auto"
            )
        dequantize = [params.dequantize]
    step, longest = (
        _step_tokens(lengths, params.rows_per_step, padded=attention == "padded"),
        max(lengths),
    )
    if params.tokens_per_pass != "auto":
        limits = [params.tokens_per_pass]
    else:
        limits = sorted({max(math.ceil(step / 2**k), longest) for k in range(12)}, reverse=True)
    estimate = functools.partial(
        estimate_memory_gib, shape, params.quantization, bytes_per_value, kernels
    )
    plans = []
    for mode, how, limit in itertools.product(modes, dequantize, limits):
        tokens = max(min(limit, step), min(longest, step))
        passes = math.ceil(step / tokens)
        memory = estimate(mode, how == "once", tokens)
        plans.append(Plan(attention, kernels, mode, how, limit, passes, memory))
    smallest = min(plans, key=lambda plan: plan.peak_gib)
    if smallest.memory["weights"] > free_gib:
        raise UserError(
            f"the base's weights take {smallest.memory['weights']:.1f} GiB and {free_gib:.1f} GiB are free; "
            "use train.quantization: nf4, a smaller base, or other hardware"
        )
    fitting = [plan for plan in plans if plan.peak_gib <= SAFE_SHARE * free_gib]
    if not fitting:
        log.warning(
            "warning: the training takes about %.1f GiB at least and %.1f GiB are free",
            smallest.peak_gib,
            free_gib,
        )
        return smallest
    return min(fitting, key=lambda plan: _time(plan, step))


def _time(plan: Plan, tokens: int) -> float:
    """What a step of so many tokens takes, in the time of one token."""
    computed = tokens / plan.passes * TIME[plan.checkpointing]
    times = 1 if plan.dequantize == "once" else plan.passes * DEQUANTIZATIONS[plan.checkpointing]
    return plan.passes * max(LEAST_TOKENS, computed) + times * DEQUANTIZE_TOKENS


def _step_tokens(lengths: Sequence[int], rows: int, padded: bool) -> int:
    """Tokens of a large step: longer than 99 in 100, when rows are drawn by chance."""
    if padded:
        return max(lengths) * min(rows, len(lengths))
    if rows >= len(lengths):
        return sum(lengths)
    spread = statistics.pstdev(lengths) * math.sqrt(rows)
    return min(math.ceil(statistics.fmean(lengths) * rows + 2.3 * spread), sum(lengths))


def estimate_memory_gib(
    shape: Shape,
    quantization: str,
    size: int,
    kernels: str,
    checkpointing: str,
    keeps: bool,
    tokens: int,
) -> dict[str, float]:
    """The peak of a training's memory, by part.

    Args:
        size: bytes of an activation and of an unquantised weight.
        keeps: whether a 4-bit base is held dequantised as well.
        tokens: that go through the model at once, padding included.
    """
    s = shape
    per_weight = NF4_BYTES if quantization == "nf4" else size
    table = s.vocabulary * s.hidden * size
    norms = (2 * s.layers + 1) * s.hidden * size
    qkv = s.wide + 2 * s.narrow
    copies = s.layers * s.rank * (7 * s.hidden + 3 * qkv + s.wide + 5 * s.middle)
    logits = CHUNK * s.vocabulary * (size + 8)
    if kernels == "fused":
        layer_full = s.hidden * size
        attention = (qkv + s.wide + s.hidden) * size + 4 * s.heads
        kept = {
            "none": layer_full + attention + 2 * s.middle * size,
            "selective": layer_full + attention,
            "full": layer_full,
        }[checkpointing] * s.layers
        # the feed-forward layer's backward pass: gradients of gate and up, values and gradients between
        working = (4 * s.middle + 4 * s.hidden) * size
        if checkpointing == "selective":
            working += 2 * s.middle * size
        if checkpointing == "full":
            working += attention + 2 * s.middle * size
        buffer = quantization == "nf4" and not keeps
        weights = max(2 * s.middle, qkv) * s.hidden * size if buffer else 0
        activations = tokens * (kept + working) + weights
        adapter = s.adapter_weights * 16 + copies * size
    else:
        kept = ACTIVATION_BYTES * s.hidden * (s.layers if checkpointing == "none" else 1)
        if checkpointing == "full":
            kept += 2 * s.layers * s.hidden
        activations = (
            tokens * kept * size // 2 + 3 * table
        )  # PEFT copies both tables to change two rows
        adapter = s.adapter_weights * 16
    dequantized = s.linear_weights * size if keeps else 0
    return {
        "weights": (s.linear_weights * per_weight + dequantized + 2 * table + norms) / GIB,
        "adapter and optimizer": adapter / GIB,  # weight, gradient and two moments in float32
        "activations": activations / GIB,
        "logits": logits / GIB,
    }


def free_memory_gib() -> float:
    """What this process can still take: of the GPU, within its share if it has one, or of the machine."""
    import psutil
    import torch

    if not torch.cuda.is_available():
        return psutil.virtual_memory().available / GIB
    free, total = torch.cuda.mem_get_info()
    reserved = torch.cuda.memory_reserved()
    share = torch.cuda.get_per_process_memory_fraction() * total - reserved
    return (min(free, share) + reserved) / GIB


def room_gib() -> float:
    """What is left of it beside all that this process holds already."""
    import torch

    held = torch.cuda.memory_allocated() / GIB if torch.cuda.is_available() else 0.0
    return free_memory_gib() - held


def matmul_flops(dtype: "torch.dtype") -> float:
    """Operations a second of a large matrix product here, the ceiling that MFU is measured against."""
    import torch

    on_gpu = torch.cuda.is_available()
    n, repeats = (8192, 10) if on_gpu else (1024, 3)
    where = torch.device("cuda" if on_gpu else "cpu")
    a, b = (torch.randn(n, n, device=where, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    best = math.inf
    for _ in range(3):
        if on_gpu:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(repeats):
            torch.mm(a, b, out=out)
        if on_gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begun)
    return repeats * 2.0 * n**3 / best


def check_disk(needed_bytes: int, folder: Path) -> None:
    """Make sure that what will be written fits.

    Raises:
        UserError: it does not.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise UserError(
            f"{folder.resolve()}: {free / GIB:.1f} GiB free and about {needed_bytes / GIB:.1f} GiB needed; "
            "make room (dvc gc -w removes outputs of other experiments from the cache)"
        )


def main() -> None:
    """Check parameters, base, device and disk, and say what was found."""
    params = read_params()
    size = check_base(params.base)
    # the hub's cache or nothing, then the merged model in the workspace and in DVC's cache
    check_disk(2 * size + (0 if params.base.is_folder else size), Path.cwd())
    summary = {
        "parameters": "valid",
        "base": f"{params.base.model}, {size / GIB:.2f} GiB",
        "device": describe_device(),
    }
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    from fintune.stage import run

    run(main)
