"""Run a program in a process group that ends with this process."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

PATIENCE = 20  # seconds that the server has to shut down
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux's prctl


@contextmanager
def running(
    command: Sequence[str], environment: dict[str, str], written: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program with its output in a file; end its process group with the block.

    On Linux the program also gets SIGTERM if this process dies.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def end_with_us() -> None:
        if libc:  # elsewhere it outlives a stage that is killed
            libc.prctl(DIE_WITH_PARENT, signal.SIGTERM)

    with written.open("wb") as file:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a separate group: Ctrl-C reaches only us
            preexec_fn=end_with_us,
        )
    try:
        yield process
    finally:
        try:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
        finally:
            left = _group(process.pid)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            psutil.wait_procs(left, PATIENCE)  # the next server needs their memory


def _group(leader: int) -> list[psutil.Process]:
    """Find the processes of a group, even if its leader is dead."""
    found = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, PermissionError):
            if os.getpgid(process.pid) == leader:
                found.append(process)
    return found
