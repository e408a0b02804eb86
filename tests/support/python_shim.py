"""`python` for a project in a test: runs stages and commands in forks of the zygote, all else for real."""

import json
import os
import signal
import socket
import sys

REAL = os.environ.get("FINTUNE_TEST_PYTHON", "")
ADDRESS = os.environ.get("FINTUNE_TEST_ZYGOTE", "")


def run_real():
    os.execv(REAL, [REAL, *sys.argv[1:]])


def run_in_fork():
    caller = socket.socket(socket.AF_UNIX)
    try:
        caller.connect(ADDRESS)
    except OSError:  # it is still importing, or gone
        run_real()
    request = {
        "folder": os.getcwd(),  # noqa: PTH109  # pathlib is slow to import
        "environment": dict(os.environ),
        "arguments": sys.argv[2:],
    }
    content = json.dumps(request).encode()
    socket.send_fds(caller, [len(content).to_bytes(4, "big")], [0, 1, 2])
    caller.sendall(content)
    lines = caller.makefile()
    pid = int(lines.readline())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: os.kill(pid, received))
    status = int(lines.readline() or 1)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


read_at_import = [name for name in os.environ if name.startswith(("HF_", "TRANSFORMERS_"))]
ours = sys.argv[1:2] == ["-m"] and (sys.argv[2] == "fintune" or sys.argv[2].startswith("stages."))
if ADDRESS and ours and not read_at_import:
    run_in_fork()
run_real()
