"""Machines that a run is forecast for: this one, or one with GPUs of a known kind.

An H100 is measured (docs/performance.md). Other GPUs are scaled from it: matrix products by the published
dense BF16 TFLOP/s, everything else by the memory's bandwidth.
"""

import os
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fintune.errors import UserError
from fintune.hardware import (
    DTYPES,
    compute_dtype,
    free_memory_gib,
    hardware,
    has_fp8,
    matmul_flops,
)


class Gpu(NamedTuple):
    """A GPU's published dense BF16 TFLOP/s, memory in GB and its bandwidth in GB/s."""

    tflops: float
    memory_gb: float
    bandwidth: float
    has_fp8: bool = True


GPUS = {
    "h100": Gpu(989, 80, 3350),
    "h100-pcie": Gpu(756, 80, 2000),
    "h200": Gpu(989, 141, 4800),
    "a100": Gpu(312, 80, 2039, False),
    "a10": Gpu(125, 24, 600, False),
    "l4": Gpu(121, 24, 300),
    "l40s": Gpu(362, 48, 864),
    "rtx3090": Gpu(71, 24, 936, False),
    "rtx4090": Gpu(165, 24, 1008),
}
MEASURED = "h100"
MEASURED_FLOPS = 780e12  # of a large matrix product in bfloat16 on that GPU
USABLE = 0.96  # of the memory on a GPU's label, in GiB


@dataclass(frozen=True)
class Machine:
    """Figures of a machine for a forecast; the memory is that of one GPU, or the machine's."""

    name: str
    flops: float  # of a large matrix product
    bandwidth: float  # of an H100's
    free_gib: float
    on_gpu: bool
    dtype: torch.dtype
    has_fp8: bool
    count: int  # of GPUs


def known_machine(gpu: str, memory_gb: float | None, count: int, precision: str) -> Machine:
    """Return a machine with GPUs of a known kind.

    Raises:
        UserError: the kind is not known.
    """
    if gpu not in GPUS:
        raise UserError(f"--gpu: {gpu}: not known; give one of {', '.join(GPUS)}")
    kind = GPUS[gpu]
    memory = memory_gb or kind.memory_gb
    return Machine(
        name=f"{f'{count} x ' if count > 1 else ''}{gpu}, {memory:g} GB",
        flops=MEASURED_FLOPS * kind.tflops / GPUS[MEASURED].tflops,
        bandwidth=kind.bandwidth / GPUS[MEASURED].bandwidth,
        free_gib=USABLE * memory,
        on_gpu=True,
        dtype=torch.bfloat16 if precision == "auto" else DTYPES[precision],
        has_fp8=kind.has_fp8,
        count=count,
    )


def this_machine(precision: str) -> Machine:
    """Return this machine, after a short measurement of a matrix product.

    On a CPU one thread is measured and multiplied by the cores: other programs disturb that least.
    """
    dtype, on_gpu = compute_dtype(precision), torch.cuda.is_available()
    if not on_gpu:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        best = max(matmul_flops.__wrapped__(dtype) for _ in range(4))
        flops = best * len(os.sched_getaffinity(0))
        torch.set_num_threads(threads)
        return Machine(hardware(), flops, 0, free_memory_gib(), False, dtype, False, 1)
    flops, name = matmul_flops(dtype), torch.cuda.get_device_name().lower().replace(" ", "")
    found = [kind for kind in GPUS if kind.replace("-", "") in name]
    rate = GPUS[max(found, key=len)].bandwidth / GPUS[MEASURED].bandwidth if found else None
    return Machine(
        name=hardware(),
        flops=flops,
        bandwidth=rate or flops / MEASURED_FLOPS,
        free_gib=free_memory_gib(),
        on_gpu=True,
        dtype=dtype,
        has_fp8=has_fp8(),
        count=torch.cuda.device_count(),
    )
