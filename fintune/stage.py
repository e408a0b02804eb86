"""Run a stage or command, and write its files atomically."""

import atexit
import ctypes
import inspect
import json
import logging
import math
import os
import select
import shutil
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from fintune import paths
from fintune.errors import UserError, explain, redacted
from fintune.progress import write_lines

log = logging.getLogger("fintune")


def prepare() -> None:
    """Enter the project's environment if need be, and configure libraries; call before they are imported.

    Where the package kernels is installed, bitsandbytes and transformers fetch compiled code from the hub
    and run it; here they do not find that package. MLflow and the hub's client tell their makers nothing.

    bitsandbytes and torch each bring an OpenMP pool. Threads that spin for long while waiting take the
    cores from the other pool: with two jobs on two cores, 4-bit training is then ten times slower. A short
    spin costs nothing on an idle machine; never spinning costs a fifth. Both are read when torch is loaded.
    """
    if find_spec("ruamel") is None or find_spec("pydantic") is None:
        _enter_environment()
    # a stage's imports follow; within them, an exception could be swallowed
    if sys.argv[0] == "-m":
        signal.signal(signal.SIGINT, _leave)
    # it recommends an optional kernel package on every import
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    sys.modules["kernels"] = None  # type: ignore[assignment]
    os.environ["USE_HUB_KERNELS"] = "NO"
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if is_worker():
        _take_place()


LAUNCHER = "FINTUNE_LAUNCHER"  # pid of the stage that has started this process
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # where torchrun wants to find what a process failed of
GRACE_SECONDS = 10  # for a process that is told to end, and may wait for another one


def is_worker() -> bool:
    """Return whether a launcher, such as torchrun, has started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _take_place() -> None:
    """See one GPU, be silent but for the first process, and end with the stage that has started this one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else []
    place = int(os.environ.get("LOCAL_RANK", 0))
    if visible is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(place)
    elif len(gpus) > place:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[place]
    if os.environ["RANK"] != "0":
        os.environ["TQDM_DISABLE"] = "1"
        log.disabled = True
    if LAUNCHER in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != int(os.environ[LAUNCHER]):  # it died before
            os._exit(1)


def _end_in_time() -> None:
    """End this process soon after it is told to, also where it waits for another one outside Python."""
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)

    def wait() -> None:
        while os.read(told, 1)[0] not in (signal.SIGINT, signal.SIGTERM):
            pass
        time.sleep(GRACE_SECONDS)
        os._exit(1)

    threading.Thread(target=wait, name="end in time", daemon=True).start()


GOES_ON = "interrupted; `dvc repro` runs this stage again, a training from its last checkpoint"


def _leave(*_: Any) -> NoReturn:
    """End a stage that has not begun."""
    os.write(2, f"{GOES_ON}\n".encode())
    os._exit(1)


def _enter_environment() -> None:
    """Start again with the `python` of the nearest .venv, or exit and say how to get one.

    DVC runs stages with the first `python` on the PATH, also where `.venv/bin/python -m dvc` was typed.
    """
    folder = Path.cwd()
    found = (each / ".venv/bin/python" for each in (folder, *folder.parents))
    python = next((path for path in found if path.exists()), None)
    lacking = f"{sys.executable} lacks this project's packages"
    if python and python != Path(sys.executable):
        print(f"note: {lacking}; going on with {python}", file=sys.stderr)
        os.execv(python, [str(python), *sys.orig_argv[1:]])
    sys.exit(
        f"error: {lacking}; set up the environment with `make .venv/bin/ready` and activate it with "
        "`source .venv/bin/activate`"
    )


def run(main: Callable[[], None], interrupted: str = GOES_ON) -> None:
    """Run a stage or command; a `UserError` ends it with its message and exit status 1.

    SIGTERM ends it as Ctrl-C does: clusters send it before they take a machine back.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    printed = logging.StreamHandler(sys.stderr)
    printed.setFormatter(_Redacted("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[printed])
    log.setLevel(logging.INFO)
    if not sys.stderr.isatty():
        write_lines()
    warnings.filterwarnings("ignore", category=FutureWarning)  # meant for library developers
    is_stage = interrupted == GOES_ON
    worker = is_stage and is_worker()
    if worker:
        _end_in_time()
    elif is_stage:  # a command can run beside one
        _sweep()
    try:
        _run(main, is_stage, worker)
    except KeyboardInterrupt:  # also while an error is put into words
        if worker:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            leave(1)
        sys.exit(interrupted)
    if is_stage:
        leave(0)


def _run(main: Callable[[], None], is_stage: bool, worker: bool) -> None:
    try:
        if is_stage:
            from fintune.integrity import check_inputs  # it needs packages, unlike `prepare`

            check_inputs(Path(inspect.getfile(main)).stem)
        main()
    except UserError as error:
        _fail(str(error), worker)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and not is_stage and _has_no_reader():
            raise
        message = explain(error) or (traceback.format_exc() if worker else None)
        if message is None:
            raise
        _fail(message, worker)


def _has_no_reader() -> bool:
    """Return whether the program that read the output has ended."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return bool(poll.poll(0))


def _fail(message: str, worker: bool) -> NoReturn:
    """End with a message; the stage that has started this process says it instead, once for all of them."""
    message = redacted(message)
    if not (worker and LAUNCHER in os.environ):
        sys.exit(f"error: {message}")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends all when one fails
    write_text(Path(os.environ[ERROR_FILE]), json.dumps({"message": message, "timestamp": 0}))
    leave(1)


class _Redacted(logging.Formatter):
    """Messages without secrets; some quote a server's answer."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


def leave(status: int) -> NoReturn:
    """End the process after its exit handlers, without taking the interpreter apart.

    A library's threads that still run at that point abort now and then what is done and written.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _sweep() -> None:
    """Remove what writers left that were killed, in the folders of the outputs."""
    for folder in (paths.DATA, paths.ADAPTER.parent, paths.REPORTS):
        for left in [*folder.glob(".*.partial*"), *folder.glob("*/.*.partial*")]:
            _, _, pid = left.name.rpartition("-")
            if not (pid.isdecimal() and int(pid) != os.getpid() and _is_alive(int(pid))):
                shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """Read a record that a stage wrote.

    Raises:
        UserError: it is missing or damaged, or lacks one of the keys.
    """
    way_out = "`dvc checkout` brings it back, `dvc repro` makes it"
    if not path.is_file():
        raise UserError(f"{path}: not found; {way_out}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: empty or damaged ({error}); {way_out}") from None
    if not isinstance(content, dict) or not set(keys) <= set(content):
        raise UserError(f"{path}: has no {' or no '.join(keys) or 'keys'}; {way_out}")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a metrics or manifest file atomically.

    Raises:
        ValueError: a number is not finite; DVC and MLflow would read it differently.
    """
    text = json.dumps(_rounded(content), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder to fill; it replaces `path` only if the block ends without an error."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        _follow_umask(partial)
        shutil.rmtree(path, ignore_errors=True)
        partial.replace(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _follow_umask(folder: Path) -> None:
    """Give files the mode of any new file: safetensors writes its own with 0600."""
    umask = os.umask(0o077)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)


def _rounded(value: Any) -> Any:
    """Round floats to six significant digits, which drops the noise in the last bits."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.6g}")
    return value
