"""Fast starts for the projects' Python processes: a zygote that has imported the heavy libraries, and forks.

A stage spends most of a test on importing torch, transformers and MLflow. `python` on the projects' PATH is
`python_shim`, which has the zygote fork a process for the module that it is to run. The fork has the
caller's folder, environment and standard streams, and its exit status is the caller's; it shares no state
with other stages. Tests of kills, of imports and one whole pipeline start real interpreters
(`Project.real`), and so does a project whose environment the libraries read when they are imported.
"""

import atexit
import gc
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

SOCKET = "FINTUNE_TEST_ZYGOTE"
LIBRARIES = (
    *("accelerate", "aiohttp", "alembic.command", "bitsandbytes.functional", "celery", "datasets"),
    *("dvc.cli", "dvc.commands.repro", "dvc.repo.experiments", "dvc_http", "dvc_s3"),
    *(
        "filelock",
        "git",
        "jinja2",
        "joblib",
        "matplotlib.figure",
        "nltk.stem.porter",
        "peft",
        "psutil",
    ),
    *("opentelemetry.sdk.trace", "pyarrow.parquet", "pydantic", "requests", "ruamel.yaml"),
    *("rouge_score.rouge_scorer", "sacrebleu.metrics.chrf", "torch._dynamo"),
    *("mlflow.pyfunc", "mlflow.system_metrics.system_metrics_monitor", "mlflow.tracking"),
    "mlflow.store.model_registry.sqlalchemy_store",
    "mlflow.store.tracking.sqlalchemy_store",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.mistral.modeling_mistral",
    "transformers.trainer",
    "trl.trainer.sft_trainer",
)


class Zygote:
    """The zygote of a test session, which all its workers share; it ends with the session."""

    def __init__(self) -> None:
        session = os.environ.get("PYTEST_XDIST_TESTRUNUID", f"alone-{os.getpid()}")
        folder = Path(tempfile.gettempdir()) / f"zygote-{session}"
        self.socket = folder / "socket"
        self.path = str(folder / "bin")
        try:
            folder.mkdir()
        except FileExistsError:
            return  # another worker has started it
        script = Path(__file__).with_name("python_shim.py").read_text()
        (folder / "bin").mkdir()
        for name in ("python", "dvc"):
            shim = folder / "bin" / name
            shim.write_text(f"#!{sys.executable} -SE\n{script}")
            shim.chmod(0o755)
        # the parent of a worker is the session; without workers, this process is
        session_pid = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
        command = [sys.executable, __file__, str(self.socket), str(session_pid)]
        subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

    @property
    def environment(self) -> dict[str, str]:
        """What a project's environment needs in order to use it; PATH apart."""
        return {SOCKET: str(self.socket), "FINTUNE_TEST_PYTHON": sys.executable}


def serve(address: str, session: int) -> dict[str, Any]:
    """Fork for each request until `session` ends; return the request, in the forked process only."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    children: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([listener], [], [], 0.01)
        while children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            with children.pop(pid) as caller, suppress(OSError):  # the caller has been killed
                caller.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        if not ready:
            if not is_alive(session):
                shutil.rmtree(Path(address).parent)
                os._exit(0)
            continue
        caller, _ = listener.accept()
        data, descriptors, _, _ = socket.recv_fds(caller, 4, 3)
        size = int.from_bytes(data, "big")
        request = b""
        while len(request) < size:
            request += caller.recv(size - len(request))
        pid = os.fork()
        if pid:
            for descriptor in descriptors:
                os.close(descriptor)
            caller.sendall(f"{pid}\n".encode())
            children[pid] = caller
            continue
        listener.close()
        caller.close()
        for other in children.values():
            other.close()
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        content: dict[str, Any] = json.loads(request)
        return content


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def become(request: dict[str, Any]) -> None:
    """Run the requested module as `python -m` would."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["folder"])
    os.umask(request["umask"])
    os.environ.clear()
    os.environ.update(request["environment"])
    module, *arguments = request["arguments"]
    sys.argv = [module, *arguments]
    sys.path[0] = request["folder"]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def leave(status: int) -> None:
    """End the fork as an interpreter does, without taking all of the zygote's modules apart."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    import importlib

    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # as stages and commands have it
    try:
        for library in LIBRARIES:
            importlib.import_module(library)
    except BaseException:  # nobody may wait for it
        shutil.rmtree(Path(sys.argv[1]).parent)
        raise
    gc.freeze()  # collections in the forks leave the zygote's objects alone
    request = serve(sys.argv[1], int(sys.argv[2]))
    shim = Path(sys.argv[1]).with_name("bin") / "python"
    sys.executable = str(shim)  # what a fork starts is forked, too
    try:
        become(request)
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        leave(ended.code if isinstance(ended.code, int) else int(ended.code is not None))
    except BaseException:
        traceback.print_exc()
        leave(1)
    leave(0)
