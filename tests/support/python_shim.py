"""`python` and `dvc` for a project in a test: forks of the zygote run stages and commands, `dvc` included."""

import json
import os
import signal
import socket
import sys
import time

REAL = os.environ.get("FINTUNE_TEST_PYTHON", "")
ADDRESS = os.environ.get("FINTUNE_TEST_ZYGOTE", "")


ARGUMENTS = ["-m", "dvc", *sys.argv[1:]] if sys.argv[0].endswith("/dvc") else sys.argv[1:]


def run_real():
    os.execv(REAL, [REAL, *ARGUMENTS])


def run_in_fork():
    caller = socket.socket(socket.AF_UNIX)
    end = time.monotonic() + 60
    while caller.connect_ex(ADDRESS):  # it is still importing what this would import beside it
        if time.monotonic() > end or not os.path.isdir(os.path.dirname(ADDRESS)):  # noqa: PTH112, PTH120
            run_real()
        time.sleep(0.05)
    umask = os.umask(0o077)
    os.umask(umask)
    request = {
        "umask": umask,
        "folder": os.getcwd(),  # noqa: PTH109  # pathlib is slow to import
        "environment": dict(os.environ),
        "arguments": ARGUMENTS[1:],
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


module = ARGUMENTS[1] if ARGUMENTS[:1] == ["-m"] else ""
# the zygote was imported with the second, and the third changes what is printed
read_later = ["HF_TOKEN", "HF_HUB_DISABLE_TELEMETRY", "TRANSFORMERS_NO_ADVISORY_WARNINGS"]
if module == "fintune.export.gguf.convert":  # its folders are no names of the hub
    read_later.append("HF_HUB_OFFLINE")
read_at_import = [
    name
    for name in os.environ
    if name.startswith(("HF_", "TRANSFORMERS_")) and name not in read_later
]
forked = ("dvc", "fintune", "fintune.export.gguf.convert")
if ADDRESS and not read_at_import and (module in forked or module.startswith("stages.")):
    run_in_fork()
run_real()
