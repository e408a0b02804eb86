"""The checks of a run in order, with its plan, its time and its price."""

import argparse
from pathlib import Path
from typing import Any

from fintune.errors import UserError
from fintune.forecast.checks import (
    Findings,
    base_weights,
    check_evaluation,
    check_layout,
    check_repository,
    check_room,
    check_sources,
)
from fintune.forecast.machine import MEASURED, Machine, known_machine, this_machine
from fintune.forecast.planned import plan_on
from fintune.forecast.seconds import Run, as_time, stage_seconds
from fintune.forecast.workload import Workload, workload
from fintune.hardware import describe_device
from fintune.model.base import read_config
from fintune.model.sizes import ModelSize
from fintune.tracking.client import check_store
from fintune.training.plan import SAFE_SHARE

NEEDED = ("train", "evaluate", "generation", "merge_export")


def check_run(
    found: Findings,
    about: dict[str, Any],
    sections: dict[str, Any],
    root: Path,
    given: argparse.Namespace,
) -> None:
    """Add to `found` what the checks say, and to `about` the figures, of the sections that are valid.

    Args:
        given: gpu, gpu_memory, gpus, price_per_hour and only.
    """
    base: Any = sections.get("base")
    train: Any = sections.get("train")
    known: dict[str, Any] = {}

    def look_at_base() -> str:
        known["bytes"], said = base_weights(base)
        return said

    def look_at_layout() -> str:
        tokenizer, said = check_layout(base, sections["format"], train, sections["merge_export"])
        known["tokenizer"] = tokenizer
        return said

    def look_at_sources() -> str:
        known["sample"], said = check_sources(sections["fetch"], root)
        return said

    if base:
        found.check("base", look_at_base)
    if "bytes" in known and train and {"format", "merge_export"} <= set(sections):
        found.check("layers", look_at_layout)
    if given.only:
        return
    if "fetch" in sections:
        found.check("data", look_at_sources)
    if "evaluate" in sections:
        found.check("evaluation", lambda: check_evaluation(sections["evaluate"]))
    found.check("tracking", lambda: check_store(root))
    found.check("repository", lambda: check_repository(root))
    if not train:
        return

    def look_at_device() -> str:
        known["machine"] = machine = _machine(given, train.precision)
        if not given.gpu:
            return describe_device()
        if given.gpu == MEASURED:
            return f"as if on {machine.name}"
        return f"as if on {machine.name}; its speed is scaled from an H100's, not measured"

    found.check("device", look_at_device)
    if "tokenizer" not in known or "machine" not in known:
        return
    size = ModelSize.of(read_config(base), train.lora)
    found.check("disk", lambda: check_room(base, known["bytes"], 4 * size.adapter_weights, root))
    if "sample" in known and "split" in sections:
        found.check("rows", lambda: _rows(known, about, sections))
    work, machine = known.get("work"), known["machine"]
    lengths = work.lengths if work else [sections["format"].max_tokens] * train.rows_per_step

    def look_at_plan() -> str:
        known["plan"] = plan = plan_on(machine, base, train, lengths)
        about.update(plan=str(plan), peak_memory_gib=plan.peak_gib)
        if plan.peak_gib > SAFE_SHARE * machine.free_gib and given.gpu:
            raise UserError(
                f"the training takes about {plan.peak_gib:.1f} GiB at least, and {machine.name} has "
                f"{machine.free_gib:.1f}; take a larger one, a smaller format.max_tokens, or a smaller base"
            )
        return f"{plan}; {machine.free_gib:.1f} GiB free"

    found.check("plan", look_at_plan)
    if work and "plan" in known and set(NEEDED) <= set(sections):
        run = Run(size, known["plan"], machine, known["bytes"])
        parts = [sections[name] for name in ("evaluate", "generation", "merge_export")]
        found.check("time", lambda: _time(run, about, stage_seconds(run, train, work, *parts)))
        if given.price_per_hour and "seconds" in about:
            price = about["seconds"]["in all"] / 3600 * given.price_per_hour
            about["price"] = price
            found.check("price", lambda: f"{price:.2f}, at {given.price_per_hour:g} an hour")


def _machine(given: argparse.Namespace, precision: str) -> Machine:
    if given.gpu:
        return known_machine(given.gpu.lower(), given.gpu_memory, given.gpus or 1, precision)
    if given.gpu_memory or given.gpus:
        raise UserError("--gpu-memory and --gpus: of which GPU? give --gpu as well")
    return this_machine(precision)


def _rows(known: dict[str, Any], about: dict[str, Any], sections: dict[str, Any]) -> str:
    most = sections["format"].max_tokens
    work: Workload = workload(known["sample"], sections["split"], known["tokenizer"], most)
    known["work"] = work
    counts = {"train": work.train, "validation": work.validation, "test": work.test}
    about["rows"] = {name: round(count) for name, count in counts.items()}
    listed = ", ".join(f"{count:,.0f} {name}" for name, count in counts.items())
    return f"about {listed}; {work.tokens:.0f} tokens each, {work.answer_tokens:.0f} of them the answer"


def _time(run: Run, about: dict[str, Any], seconds: Any) -> str:
    total = sum(seconds.values())
    about["seconds"] = {
        **{name: round(each, 1) for name, each in seconds.items()},
        "in all": round(total, 1),
    }
    listed = ", ".join(f"{name} {as_time(each)}" for name, each in seconds.items())
    said = f"about {as_time(total)} in all: {listed}"
    if not run.machine.on_gpu and total > 86400:
        said += "; a GPU is what this base needs (--gpu h100 says how long there)"
    return said
