"""Errors of the surroundings in words: every class that the libraries have, and moments that users meet."""

import errno
import inspect
import os
import shutil
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import botocore.exceptions
import mlflow.exceptions
import pytest
import requests.exceptions
import safetensors
import sqlalchemy.exc
import urllib3.exceptions

from fintune.errors import UserError, explain, explain_store
from fintune.stage import GOES_ON, read_json, run
from support.project import ROOT

LIBRARIES = (
    *(mlflow.exceptions, sqlalchemy.exc, requests.exceptions, urllib3.exceptions),
    botocore.exceptions,
)
CLASSES = sorted(
    {
        each
        for library in LIBRARIES
        for each in vars(library).values()
        if inspect.isclass(each) and issubclass(each, Exception) and not issubclass(each, Warning)
        if each.__module__.split(".")[0] == library.__name__.split(".")[0]
    },
    key=lambda each: f"{each.__module__}.{each.__qualname__}",
)


WAYS: tuple[Any, ...] = (
    ("it broke\nsecond line",),
    ("select", {}, Exception("it broke")),
    ({"error_code": "INTERNAL_ERROR", "message": "it broke"},),
    (None, "it broke"),
    (None, "it broke", None),
)


def instance(kind: type[Exception]) -> Exception:
    """Make an error in the first way that its class allows."""
    fields = [name for _, name, _, _ in string.Formatter().parse(getattr(kind, "fmt", "")) if name]
    for way in WAYS:
        try:
            error = kind(**dict.fromkeys(fields, "it broke")) if fields else kind(*way)
            str(error)
        except Exception:
            continue
        return error
    pytest.skip("made in a way of its own")


@pytest.mark.parametrize("kind", CLASSES, ids=lambda each: f"{each.__module__}.{each.__name__}")
def test_every_error_of_a_store_is_explained(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://ann:secret@mlflow.example.org")
    message = explain(instance(kind))
    assert message and "MLflow at https://mlflow.example.org" in message
    assert "secret" not in message and "\n" not in message


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/file")


def after(error: Exception) -> Exception:
    """Return an error that another one caused."""
    found = RuntimeError("writing failed")
    found.__cause__ = error
    return found


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FULL, "/data/file: the disk is full"),
        (after(FULL), "/data/file: the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full"),
        (safetensors.SafetensorError("I/O: No space left on device (os error 28)"), "disk is full"),
        (Exception("No space left on device (os error 28)"), "disk is full"),  # a tokenizer's
        (RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/3"), "full"),
        (PermissionError(errno.EACCES, "Permission denied", "reports/x"), "reports/x: Permission"),
        (OSError(errno.EROFS, "Read-only file system", "models"), "models: Read-only file system"),
        (MemoryError(), "not enough memory"),
        (ConnectionResetError("by peer"), "MLflow at"),
    ],
    ids=str,
)
def test_a_full_disk_and_others_are_explained_however_they_come(
    error: Exception, said: str
) -> None:
    message = explain(error)
    assert message and said in message and "\n" not in message


@pytest.mark.parametrize("error", [ValueError("no"), KeyError("x"), OSError(errno.ENOENT, "no")])
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    assert explain(error) is None

    def main() -> None:
        raise error

    with pytest.raises(type(error)):
        run(main)


def test_a_stage_ends_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise after(FULL)

    with pytest.raises(SystemExit, match="error: /data/file: the disk is full"):
        run(main)


@pytest.mark.parametrize(
    ("code", "said"),
    [("INTERNAL_ERROR", "look at it"), ("INVALID_PARAMETER_VALUE", ": no")],
)
def test_mlflow_tells_apart_what_the_server_and_what_the_user_did(code: str, said: str) -> None:
    error = mlflow.exceptions.MlflowException(
        "no", error_code=getattr(sys.modules["mlflow.protos.databricks_pb2"], code)
    )
    assert said in explain_store(error, "http://u:pw@host")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"run_id": "a"}'])
def test_a_record_that_is_damaged_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "run.json"
    file.write_text(content)
    with pytest.raises(UserError, match=r"run\.json: (empty or damaged|has no).*dvc checkout"):
        read_json(file, "run_id", "tags")
    with pytest.raises(UserError, match=r"other\.json: not found"):
        read_json(tmp_path / "other.json")


INTERRUPT = """
import os, signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name == "{module}":
            os.kill(os.getpid(), signal.{number})
sys.meta_path.insert(0, Finder())
sys.argv = ["-m"]
import runpy
runpy.run_module("stages.train", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("module", ["fintune.params", "torch", "numpy"])
def test_ctrl_c_while_a_stage_imports_is_no_traceback(module: str) -> None:
    code = INTERRUPT.format(module=module, number="SIGINT")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == f"{GOES_ON}\n"


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_a_stage_that_is_told_to_end_does_so(number: str) -> None:
    code = f"""
import os, signal, sys
from fintune.stage import run
run(lambda: os.kill(os.getpid(), signal.{number}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (
        1,
        f"{GOES_ON}\n",
    )


def test_room_that_is_missing_is_told_in_a_unit_that_shows_it(tmp_path: Path) -> None:
    """A base of a few MiB used to need 0.0 GiB."""
    from fintune.hardware import GIB, check_disk

    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(UserError, match=r"GiB needed; make room"):
        check_disk(free + GIB, tmp_path)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError) as caught:
        patch.setattr("shutil.disk_usage", lambda _: Usage())
        check_disk(5 * 2**20, tmp_path)
    assert "0.0 MiB free and about 5.0 MiB needed" in str(caught.value)


class Usage:
    """A disk that is full."""

    free = 0
