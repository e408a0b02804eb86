"""The processes of a stage, one for each GPU: started by torchrun, and what they tell each other.

Every process runs the whole stage on the same rows in the same order and takes its share of the work;
the first one alone writes, logs and registers. Libraries see one process with one GPU.
"""

import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fintune.errors import UserError
from fintune.stage import GRACE_SECONDS, LAUNCHER, is_worker

log = logging.getLogger("fintune")
T = TypeVar("T")

PATIENCE = timedelta(days=1)  # for each other: whether all are alive is the launcher's business
OF_LAUNCHERS = (  # by which libraries take this process for one of several
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "PMI_SIZE"),
    *("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_SIZE"),
)


def rank() -> int:
    """Return this process's number; 0 is the first, which writes and logs."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def start(stage: str, wanted: int | str, key: str = "train.processes") -> bool:
    """Start a stage's processes on this machine, or join those that torchrun has started.

    Args:
        wanted: their number; `auto` for one on each visible GPU, one without a GPU, or as many as torchrun
            has started.
        key: the parameter that says so, for messages.

    Returns:
        Whether the processes have been started and have done the stage's work; else this one does.

    Raises:
        UserError: there are fewer GPUs, another number was started, or a process failed.
        KeyboardInterrupt: the stage was told to end.
    """
    if is_worker():
        _join(wanted, key)
        return False
    number, gpus = number_here(wanted), torch.cuda.device_count()
    if gpus and number > gpus:
        raise UserError(
            f"{key}: {number} processes are asked for, and {gpus} GPU{'s are' if gpus > 1 else ' is'} "
            "visible; set auto, or start the stage by torchrun on several machines (docs/scale.md)"
        )
    if number > 1:
        _launch(stage, number)
    return number > 1


def number_here(wanted: int | str) -> int:
    """Return the number of processes that a stage starts on this machine."""
    return max(1, torch.cuda.device_count()) if wanted == "auto" else int(wanted)


def _launch(stage: str, number: int) -> None:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    log.info(
        "%d processes, one for each %s", number, "GPU" if torch.cuda.is_available() else "share"
    )
    logging.getLogger("torch.distributed.elastic").setLevel(
        logging.CRITICAL
    )  # told below, in words
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(2 * GRACE_SECONDS)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // number)))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    os.environ[LAUNCHER] = str(os.getpid())
    with tempfile.TemporaryDirectory() as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=number,
            run_id=f"{stage}-{os.getpid()}",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(folder),
        )
        try:
            elastic_launch(config, sys.executable)("-m", f"stages.{stage}")
        except SignalException:
            raise KeyboardInterrupt from None
        except ChildFailedError as failed:
            sys.stderr.write("\n")  # a bar may have been left on the line
            raise UserError(_cause(failed.failures, number)) from None


def _cause(failures: dict[int, Any], number: int) -> str:
    """Return in words why processes failed: one that was killed is the cause of what others report."""
    told = {each.local_rank: each for each in failures.values()}
    for place, each in sorted(told.items()):
        if each.exitcode < 0:
            return (
                f"process {place} of {number} was ended by {each.signal_name()}; the others were stopped; "
                "the system kills a process where memory runs out; `dvc repro` goes on from "
                "the last checkpoint"
            )
    messages = [str(told[place].message) for place in sorted(told)]
    return min(messages, key=lambda text: "Traceback" in text)


def _join(wanted: int | str, key: str) -> None:
    """Join the processes that torchrun has started.

    Raises:
        UserError: their number is not the one that is wanted.
    """
    number = int(os.environ["WORLD_SIZE"])
    if wanted not in ("auto", number):
        raise UserError(
            f"{key}: {wanted} process{'es are' if wanted != 1 else ' is'} asked for, and {number} "
            f"{'were' if number > 1 else 'was'} started (WORLD_SIZE); set auto or {number}, or start {wanted}"
        )
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    for name in OF_LAUNCHERS:
        os.environ.pop(name, None)
    logging.getLogger("transformers.training_args").setLevel(logging.ERROR)


def of_first(value: T) -> T:
    """Return the first process's value in all of them."""
    if count() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def of_all(value: T) -> list[T]:
    """Return the values of all processes, by rank."""
    values: list[Any] = [value] * count()
    if count() > 1:
        dist.all_gather_object(values, value)
    return values


def check_same(values: dict[str, Any]) -> None:
    """Check that all processes have the same values.

    Raises:
        UserError: one has not; it names the value.
    """
    for place, other in enumerate(of_all(values)):
        for name, value in values.items():
            if other[name] != value:
                raise UserError(
                    f"processes {rank()} and {place} differ in {name}: {value} and {other[name]}; they need "
                    "the same project, parameters and data, on a file system that all machines share"
                )


def add_up(tensors: Sequence[torch.Tensor]) -> None:
    """Replace tensors of one type by their sums over all processes, in one call."""
    if count() == 1:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(
        list(tensors), [part.view_as(t) for part, t in zip(parts, tensors, strict=True)]
    )
