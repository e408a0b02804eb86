"""Functions run in several processes, as torchrun's, without starting interpreters."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from fintune import processes


def in_processes(
    number: int, work: Callable[[], Any], folder: Path, wanted: int | str = "auto"
) -> list[Any]:
    """Run a function in forks that talk to each other; return its results by rank.

    Raises:
        AssertionError: one failed; the message holds its error.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    folder.mkdir(parents=True, exist_ok=True)
    forks = [
        context.Process(target=_run, args=(rank, number, port, work, folder, wanted))
        for rank in range(number)
    ]
    for fork in forks:
        fork.start()
    waiting = list(forks)
    while waiting:
        wait([fork.sentinel for fork in waiting])
        waiting = [fork for fork in waiting if fork.is_alive()]
        if any(fork.exitcode for fork in forks):  # the others may wait for it
            for fork in waiting:
                fork.terminate()
    failed = "\n".join(file.read_text() for file in folder.glob("error-*"))
    assert not any(fork.exitcode for fork in forks), failed
    return [torch.load(folder / f"result-{rank}", weights_only=False) for rank in range(number)]


def _run(
    rank: int, number: int, port: int, work: Callable[[], Any], folder: Path, wanted: int | str
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(number),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    status = 1
    # torch makes a fork's pool of threads anew at the first use, of which two threads at once fail
    torch.set_num_threads(torch.get_num_threads())
    try:
        assert not processes.start("train", wanted)
        torch.save(work(), folder / f"result-{rank}")
        status = 0
    except BaseException:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
    os._exit(status)
