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

PATIENCE = 20  # seconds that the server has to end by itself
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux's prctl


@contextmanager
def running(
    command: Sequence[str], environment: dict[str, str], written: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A program whose output goes to a file; all of its processes end with the block, or with ours."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def end_with_us() -> None:
        if libc:  # elsewhere it outlives a stage that is killed outright
            libc.prctl(DIE_WITH_PARENT, signal.SIGTERM)

    with written.open("wb") as file:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own; Ctrl-C reaches us alone
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
            psutil.wait_procs(left, PATIENCE)  # the next server is to find their memory free


def _group(leader: int) -> list[psutil.Process]:
    """The processes of a group, whether or not the one that leads it is still alive."""
    found = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, PermissionError):
            if os.getpgid(process.pid) == leader:
                found.append(process)
    return found
