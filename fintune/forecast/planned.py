"""The plan of a step on a machine, before anything is loaded."""

from collections.abc import Sequence

import torch

from fintune.forecast.machine import Machine
from fintune.model.base import read_config
from fintune.model.conformance import agreement_of
from fintune.model.sizes import ModelSize
from fintune.params import Base, Train
from fintune.training.plan import Plan, plan_execution
from fintune.training.prepare import chosen_parallel


def plan_on(machine: Machine, base: Base, params: Train, lengths: Sequence[int]) -> Plan:
    """Plan the steps on a machine.

    Args:
        lengths: tokens of some training rows.

    Raises:
        UserError: as `plan_execution` raises.
    """
    config = read_config(base)
    size, agreement = ModelSize.of(config, params.lora), agreement_of(config)
    wanted, width = params.wanted_processes, machine.dtype.itemsize
    processes = machine.count if wanted == "auto" else int(wanted)
    free = machine.free_gib / (1 if machine.on_gpu else processes)
    parallel = (
        chosen_parallel(size, params, max(lengths), machine.dtype, free)
        if processes > 1
        else "none"
    )
    return plan_execution(
        size,
        params,
        lengths,
        width,
        free,
        machine.on_gpu,
        None if agreement.fused else f"a base of type {config.model_type}",
        agreement.differences.get("packed rows"),
        has_fp8=machine.dtype == torch.bfloat16 and machine.has_fp8,
        processes=processes,
        sharded=parallel == "fsdp",
    )
