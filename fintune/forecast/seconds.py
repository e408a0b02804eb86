"""Seconds of each stage, from the measured speeds.

docs/performance.md has the measurements. Per token, training on a GPU takes the matrix products at a share
of a large product's speed, and a time for all that moves memory, in proportion to width and layers; both are
fitted to 7B, 1B and 135M on one H100. On a CPU it is a share of a large product's speed.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fintune.forecast.machine import Machine
from fintune.forecast.workload import Workload
from fintune.model.sizes import ModelSize
from fintune.params import Evaluate, Generation, MergeExport, Train
from fintune.training.plan import DEQUANTIZATIONS, DEQUANTIZE_TOKENS, TIME, Plan
from fintune.training.rates import plan_rounds

PRODUCTS = 0.91  # of a large product's speed, by those of a model
FP8_TIME = 0.57  # of the base's products in bfloat16; a quarter of the steps has its forward pass in 16 bits
FP8_SHARE = 0.9  # of the steps' products that are in FP8, then
MOVED = 1.28e-10  # seconds a token, layer and unit of width, on an H100
DROPPED = 6.5e-11  # more with dropout
PLAIN = 1.6  # times as long with plain layers
STEP = 0.012  # seconds of a step on the host
LAUNCH = 0.0052  # seconds a layer and pass to launch its kernels, where no graph is captured
CPU_TRAIN, CPU_ANSWER = 0.6, 0.1  # of a large product's speed
FORWARD = 0.45  # of the time of training, where only the likelihood is computed
ANSWERED = 3.4e14  # weights times tokens a second that an H100 generates: 24,600 tokens/s of a 7B
MOST_ANSWERED = 60_000  # tokens a second, of small bases
# with a GPU, on a machine of 16 cores, and without, on one of two
BYTES = {True: 3e9, False: 0.5e9}  # of a base read and quantized in a second
MERGED = {True: 1e9, False: 0.5e9}  # bytes merged and written in a second
HASHED = {True: 2e9, False: 0.4e9}  # bytes hashed in a second, by SHA-256 and by DVC's md5
IMPORT = {True: 13.0, False: 7.0}  # seconds to start a stage with torch
DVC = 0.5  # seconds of its own for each stage
ROWS = {"fetch": 19e-6, "split": 75e-6, "format": 136e-6}  # seconds a row, on two cores
STARTS = {"fetch": 0.8, "split": 0.5, "format": 1.6}
CHOICE = 1.3  # answers of validation rows to choose a decoding, for each of a test row
FINISH = 4.0  # seconds of MLflow, cards and intervals in evaluate and merge_export
ROW_TEXTS = 0.005  # seconds of an answer's metrics


@dataclass(frozen=True)
class Run:
    """A run, as far as its time depends on it."""

    size: ModelSize
    plan: Plan
    machine: Machine
    base_bytes: int

    @property
    def weights(self) -> int:
        """Return the weights that a token goes through."""
        return self.size.linear_weights + self.size.vocabulary * self.size.hidden


def steps_of(train: Train, rows: float) -> int:
    """Return the number of steps."""
    steps = math.ceil(math.ceil(rows / train.rows_per_step) * train.epochs)
    return max(1, min(steps, train.max_steps or steps))


def token_seconds(run: Run, train: Train, answer_share: float) -> float:
    """Return the seconds of a token in training on one device, without what a step or pass adds.

    Args:
        answer_share: of the tokens that are answers, which go through the head.
    """
    flops, machine = run.size.flops(1, 0), run.machine
    head = run.size.flops(0, 1) * answer_share
    if not machine.on_gpu:
        return (flops + head) / (CPU_TRAIN * machine.flops) * TIME[run.plan.checkpointing]
    if run.plan.fp8:
        flops *= 1 - FP8_SHARE * (1 - FP8_TIME)
    moved = MOVED + (DROPPED if train.lora.dropout else 0)
    moved *= run.size.hidden * run.size.layers / machine.bandwidth
    plain = PLAIN if run.plan.kernels == "plain" else 1.0
    again = TIME[run.plan.checkpointing] * plain
    return ((flops + head) / (PRODUCTS * machine.flops) + moved) * again


def step_seconds(run: Run, train: Train, tokens: float, answer_share: float) -> float:
    """Return the seconds of a training step of so many tokens."""
    plan = run.plan
    each = token_seconds(run, train, answer_share)
    computed = tokens / plan.processes * each
    if not run.machine.on_gpu:
        return computed
    if not plan.graphs:
        computed = max(computed, plan.passes * run.size.layers * LAUNCH)
    if plan.dequantize == "always" and train.quantization == "nf4":
        times = plan.passes * DEQUANTIZATIONS[plan.checkpointing]
        computed += times * DEQUANTIZE_TOKENS * each
    return computed + STEP


def training_seconds(run: Run, train: Train, work: Workload) -> float:
    """Return the seconds of the training's steps, with the validations between them.

    A search for the learning rate comes first.

    Raises:
        UserError: there are too few steps for it.
    """
    steps = steps_of(train, work.train)
    share = work.answer_tokens / work.tokens
    step = step_seconds(run, train, work.tokens * min(train.rows_per_step, work.train), share)
    searched = plan_rounds(steps) if train.learning_rate == "auto" else []
    validations = steps // train.validate_every_steps + 1
    each = work.validation * work.tokens * token_seconds(run, train, share) * FORWARD
    steps += sum(each.steps for each in searched)
    return steps * step + validations * each / run.plan.processes


def answer_seconds(run: Run, tokens: float) -> float:
    """Return the seconds to generate so many tokens in batches."""
    if run.machine.on_gpu:
        rate = min(MOST_ANSWERED, ANSWERED / run.weights) * run.machine.bandwidth
    else:
        rate = CPU_ANSWER * run.machine.flops / (2 * run.weights)
    return tokens / rate


def stage_seconds(
    run: Run,
    train: Train,
    work: Workload,
    evaluate: Evaluate,
    generation: Generation,
    export: MergeExport,
) -> Mapping[str, float]:
    """Return the seconds of each stage, without downloads."""
    rows = work.train + work.validation + work.test
    found = {name: STARTS[name] + rows * each + DVC for name, each in ROWS.items()}
    on_gpu = run.machine.on_gpu
    begin = IMPORT[on_gpu] + DVC
    load = run.base_bytes / BYTES[on_gpu] + 0.3
    loads = 2 if train.quantization == "nf4" else 1  # in 16 bits as well, to know what 4 cost
    found["train"] = begin + loads * load + training_seconds(run, train, work)

    share = work.answer_tokens / work.tokens
    token = token_seconds(run, train, share) * FORWARD
    asked = min(work.test, evaluate.max_rows or work.test)
    length = min(work.answer_tokens, generation.max_new_tokens)
    samples = evaluate.samples_per_prompt
    if generation.decoding == "auto":
        answers = asked * (length + generation.max_new_tokens)  # the base rarely ends
        answers += CHOICE * asked * samples * 1.5 * length
        answered = asked * (2 + CHOICE * samples)
    else:
        samples = samples + 1 if generation.decoding.temperature else 1  # and a greedy one
        answers = asked * samples * (length + generation.max_new_tokens)
        answered = 2 * asked * samples
    found["evaluate"] = (
        begin
        + load
        + 2 * asked * work.tokens * token
        + answer_seconds(run, answers)
        + answered * ROW_TEXTS
        + FINISH
    )
    merged = run.base_bytes * (2 if export.dtype == "float32" else 1)
    checked = 4 * export.check_rows * work.tokens * token
    found["merge_export"] = begin + 4 * load + checked + FINISH
    found["merge_export"] += merged / MERGED[on_gpu] + merged / HASHED[on_gpu]
    return found


def as_time(seconds: float) -> str:
    """Write seconds in the unit that a person would use."""
    for unit, size, least in (("weeks", 604800, 1), ("days", 86400, 2), ("h", 3600, 2)):
        if seconds >= least * size:
            return f"{seconds / size:.1f} {unit}"
    if seconds >= 600:
        return f"{seconds / 60:.0f} min"
    return (
        f"{seconds // 60:.0f} min {seconds % 60:02.0f} s" if seconds >= 60 else f"{seconds:.0f} s"
    )
