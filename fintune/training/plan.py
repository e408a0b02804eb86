"""Plan how a training step is computed, to fit the free memory."""

import functools
import itertools
import logging
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from fintune.errors import UserError
from fintune.model.sizes import CODES, ModelSize, lacks_for_fp8
from fintune.params import Train
from fintune.training.memory import estimate_memory_gib

log = logging.getLogger("fintune")

SAFE_SHARE = 0.92  # of the free memory; the rest allows for fragmentation
# measured on an H100 and an H200, in units of one token's time: a token, dequantizing all weights once, and
# the minimum of a micro-batch, which launching its kernels takes
TIME = {"none": 1.0, "selective": 1.2, "full": 1.31}
DEQUANTIZE_TOKENS, LEAST_TOKENS = 160, 2600
LEAST_HIDDEN = 2048  # of a base for which FP8 is chosen: a small one is no faster
MOST_WEIGHTS = 2e9  # of a base whose kernels a CPU launches more slowly than a GPU runs them
DEQUANTIZATIONS = {"none": 2, "selective": 3, "full": 3}  # forward, recompute, backward


@dataclass(frozen=True)
class Plan:
    """The execution of a training step; `memory` is the predicted peak in GiB, by part."""

    attention: str
    kernels: str
    checkpointing: str
    dequantize: str
    fp8: bool  # the base's products
    graphs: bool  # the passes are captured CUDA graphs
    tokens_per_pass: int
    passes: int  # for a step of the expected size
    memory: dict[str, float]  # of each process
    processes: int = 1
    sharded: bool = False

    @property
    def parallel(self) -> str:
        """Return how the processes share the work, as train.parallel names it."""
        return "none" if self.processes == 1 else "fsdp" if self.sharded else "ddp"

    @property
    def peak_gib(self) -> float:
        return sum(self.memory.values())

    def __str__(self) -> str:
        passes = f"{self.passes} pass{'es' * (self.passes > 1)}"
        if self.processes > 1:
            passes += f" in each of {self.processes} processes"
            passes += " that share the base," if self.sharded else ""
        parts = ", ".join(f"{name} {size:.1f}" for name, size in self.memory.items())
        return (
            f"{self.attention} attention, {self.kernels} kernels, checkpointing {self.checkpointing}, "
            f"dequantize {self.dequantize}, {'products in FP8, ' if self.fp8 else ''}"
            f"{'CUDA graphs, ' if self.graphs else ''}"
            f"{passes} of up to {self.tokens_per_pass:,} tokens a step; "
            f"memory about {self.peak_gib:.1f} GiB ({parts})"
        )


def plan_execution(
    model: ModelSize,
    params: Train,
    lengths: Sequence[int],
    bytes_per_value: int,
    free_gib: float,
    on_gpu: bool,
    unsupported: str | None = None,
    packed_differs: str | None = None,
    base_gib: float = 0.0,
    has_fp8: bool = False,
    processes: int = 1,
    sharded: bool = False,
) -> Plan:
    """Resolve each `auto` to the fastest execution whose estimate fits into the free memory.

    Args:
        lengths: tokens of each training row.
        bytes_per_value: of an activation, 2 or 4.
        free_gib: memory available for training, including the base's weights, to each process.
        unsupported: why the fused kernels do not support this base, if so.
        packed_differs: how transformers' own layers differ on packed rows, if they do.
        base_gib: of the base's weights as loaded.
        has_fp8: this GPU has FP8 products, and activations are in bfloat16.
        processes: share the rows of each step.
        sharded: they share the base's weights, too.

    Raises:
        UserError: fused kernels are required but do not support this base, varlen attention without a GPU,
            `dequantize: once` or `products: fp8` where it is not possible, or weights that alone do not fit.
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
    if packed_differs and (unsupported or params.kernels == "plain"):
        if params.attention not in ("auto", "padded"):
            raise UserError(
                f"train.attention: {params.attention}: this base differs on packed rows "
                f"({packed_differs}); set auto or padded"
            )
        log.info("padded rows: on packed ones this base differs (%s)", packed_differs)
        attention = "padded"
    kernels = params.kernels
    if kernels == "auto":
        kernels = "plain" if unsupported or attention == "padded" else "fused"
    if kernels == "plain" and unsupported and params.kernels == "auto":
        log.info("plain kernels: the fused ones cannot compute %s", unsupported)
    modes = ["none", "selective", "full"] if kernels == "fused" else ["none", "full"]
    if params.checkpointing != "auto":
        modes = [params.checkpointing]
    can_cache = kernels == "fused" and params.quantization == "nf4" and not sharded
    dequantize = ["once", "always"] if can_cache else ["always"]
    if params.dequantize != "auto":
        if params.dequantize not in dequantize:
            raise UserError(
                "train.dequantize: once: only fused kernels keep the 16-bit weights of a 4-bit base, "
                "and not with fsdp; set auto"
            )
        dequantize = [params.dequantize]
    lacks = lacks_for_fp8(model, params.quantization, kernels, has_fp8)
    if params.dequantize == "always":
        lacks = lacks or CODES
    if sharded:
        lacks = "its codes are whole in each process, and fsdp shares the base out"
    if params.products == "fp8":
        if lacks:
            raise UserError(f"train.products: fp8: {lacks}; set auto")
        dequantize = ["once"]
    step = _step_tokens(lengths, params.rows_per_step, padded=attention == "padded")
    longest = max(lengths)
    if processes > 1:
        step = max(math.ceil(step / processes), longest)
    if params.tokens_per_pass != "auto":
        limits = [params.tokens_per_pass]
    else:
        limits = sorted({max(math.ceil(step / 2**k), longest) for k in range(12)}, reverse=True)
    estimate = functools.partial(
        estimate_memory_gib, model, params.quantization, bytes_per_value, kernels
    )
    small = on_gpu and bytes_per_value == 2 and model.linear_weights <= MOST_WEIGHTS
    plans = []
    for mode, how, limit in itertools.product(modes, dequantize, limits):
        tokens = max(min(limit, step), min(longest, step))
        passes = math.ceil(step / tokens)
        shards = processes if sharded else 1
        memory = estimate(mode, how == "once", tokens, base_gib, shards)
        wanted = params.products == "fp8" or (
            params.products == "auto" and model.hidden >= LEAST_HIDDEN
        )
        fp8 = wanted and not lacks and how == "once"
        graphs = small and kernels == "fused" and mode != "full" and not sharded
        made = (attention, kernels, mode, how, fp8, graphs, limit, passes, memory)
        plans.append(Plan(*made, processes, sharded))
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


def fits_whole(
    model: ModelSize, params: Train, longest: int, bytes_per_value: int, free_gib: float
) -> bool:
    """Return whether the smallest execution fits with the whole base, before it is loaded.

    Args:
        longest: tokens of the longest row.
    """
    kernels = "plain" if params.kernels == "plain" else "fused"
    smallest = "full" if params.checkpointing == "auto" else params.checkpointing
    how = (model, params.quantization, bytes_per_value, kernels, smallest)
    once = params.dequantize == "once" or params.products == "fp8"
    return sum(estimate_memory_gib(*how, once, longest).values()) <= SAFE_SHARE * free_gib


def _time(plan: Plan, tokens: int) -> float:
    """Estimate the time of a step of `tokens` tokens, in units of one token's time."""
    computed = tokens / plan.passes * TIME[plan.checkpointing]
    times = 1 if plan.dequantize == "once" else plan.passes * DEQUANTIZATIONS[plan.checkpointing]
    return plan.passes * max(LEAST_TOKENS, computed) + times * DEQUANTIZE_TOKENS


def _step_tokens(lengths: Sequence[int], rows: int, padded: bool) -> int:
    """Estimate the tokens of a large step, the 99th percentile for randomly drawn rows."""
    if padded:
        return max(lengths) * min(rows, len(lengths))
    if rows >= len(lengths):
        return sum(lengths)
    spread = statistics.pstdev(lengths) * math.sqrt(rows)
    return min(math.ceil(statistics.fmean(lengths) * rows + 2.3 * spread), sum(lengths))
