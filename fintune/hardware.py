"""Device, dtypes, memory, disk space and speed of this machine."""

import gc
import math
import os
import resource
import shutil
import sys
import time
from functools import cache
from pathlib import Path

import psutil
import torch

from fintune.errors import UserError

GIB = 2**30
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


def hardware() -> str:
    """Name the compute device: the GPU and its memory, or the number of CPU cores."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return f"{properties.name}, {properties.total_memory / GIB:.0f} GiB"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} CPU cores"


def describe_device() -> str:
    """Name the hardware and the dtype that `precision: auto` selects on it."""
    if not torch.cuda.is_available():
        return f"no GPU: {hardware()}, float32; right for the demo; a 7B model takes weeks"
    if torch.cuda.is_bf16_supported():
        return f"{hardware()}, bfloat16"
    return f"{hardware()}, float16 with loss scaling (no bfloat16 here)"


def has_fp8() -> bool:
    """Return whether the GPU multiplies 8-bit floating-point numbers: Ada, Hopper and later ones."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)


def free_memory_gib() -> float:
    """Return the memory available to this process in GiB, including what it has reserved on the GPU.

    A per-process GPU memory limit is respected. Without a GPU, it is the machine's memory.
    """
    if not torch.cuda.is_available():
        return psutil.virtual_memory().available / GIB
    free, total = torch.cuda.mem_get_info()
    reserved = torch.cuda.memory_reserved()
    share = torch.cuda.get_per_process_memory_fraction() * total - reserved
    return (min(free, share) + reserved) / GIB


def room_gib() -> float:
    """Return the memory that this process can still allocate, in GiB."""
    held = torch.cuda.memory_allocated() / GIB if torch.cuda.is_available() else 0.0
    return free_memory_gib() - held


@cache
def matmul_flops(dtype: torch.dtype) -> float:
    """Measure the FLOP/s of a large matrix product, the ceiling that MFU is relative to."""
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
    """Check that the file system of `folder` has `needed_bytes` free.

    Raises:
        UserError: it has not.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise UserError(
            f"{folder.resolve()}: {size_text(free)} free and about {size_text(needed_bytes)} needed; "
            "make room (dvc gc -w removes outputs of other experiments from the cache)"
        )


def size_text(count: int) -> str:
    """Write a number of bytes in a unit that a person would use."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"


def device() -> torch.device:
    """Return the first GPU, or the CPU if there is none."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def free_memory() -> None:
    """Release a deleted model's memory before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def compute_dtype(precision: str) -> torch.dtype:
    """Return the dtype of matrix products; `auto` picks bfloat16, float16 or float32 by hardware."""
    if precision != "auto":
        return DTYPES[precision]
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def peak_memory_gib() -> float:
    """Return the peak memory so far in GiB: of the GPU if there is one, else of this process."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated()) / GIB
    unit = GIB if sys.platform == "darwin" else 2**20  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
