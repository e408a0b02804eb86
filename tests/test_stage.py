"""Starting a stage or command, and writing its files."""

import os
import re
import shutil
import signal
import subprocess
import sys
import termios
import venv
from contextlib import suppress
from pathlib import Path

import pytest

from fintune import stage
from fintune.__main__ import COMMANDS
from fintune.stage import run, whole_folder
from support.project import ROOT


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an interpreter without any package."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True)
    return folder / "bin/python"


def start(
    python: Path, folder: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(python), *arguments],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("arguments", [("-m", "stages.split"), ("-m", "fintune", "results")])
def test_another_interpreter_is_named_with_the_way_out(
    bare_python: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    done = start(bare_python, tmp_path, *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {bare_python} lacks")
    assert ".venv/bin/activate" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(("-m", "stages.split"), "params.yaml: not found"), (("-m", "fintune"), "usage:")],
)
def test_another_interpreter_goes_on_in_the_environment(
    bare_python: Path, tmp_path: Path, arguments: tuple[str, ...], expected: str
) -> None:
    """From the folder with .venv and from below it, where DVC runs queued experiments."""
    below = tmp_path / ".dvc/tmp/exps/standalone"
    below.mkdir(parents=True)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    for folder in (tmp_path, below):
        done = start(bare_python, folder, *arguments)
        assert f"going on with {python}" in done.stderr
        assert expected in done.stdout + done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", sorted(path.stem for path in ROOT.glob("stages/[!_]*.py")))
def test_a_stage_that_is_asked_or_misspelled_explains_itself_and_starts_nothing(
    name: str, tmp_path: Path
) -> None:
    """In a folder without params.yaml, where a stage that starts fails."""
    asked = start(Path(sys.executable), tmp_path, "-m", f"stages.{name}", "--help")
    assert asked.returncode == 0 and not asked.stderr
    assert asked.stdout.startswith(f"usage: python -m stages.{name}") and len(asked.stdout) > 130
    wrong = start(Path(sys.executable), tmp_path, "-m", f"stages.{name}", "--epochs", "3")
    assert wrong.returncode == 2 and "error: --epochs: a stage takes no arguments" in wrong.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_is_asked_or_misspelled_starts_nothing(name: str, tmp_path: Path) -> None:
    asked = start(Path(sys.executable), tmp_path, "-m", "fintune", name, "--help")
    assert asked.returncode == 0 and asked.stdout.startswith(f"usage: python -m fintune {name}")
    wrong = start(Path(sys.executable), tmp_path, "-m", "fintune", name, "--no-such-thing")
    said = wrong.stderr.splitlines()[-1]  # argparse names an argument that is missing first
    assert wrong.returncode == 2 and ("--no-such-thing" in said or "are required" in said)
    assert list(tmp_path.iterdir()) == []


def test_make_alone_lists_its_targets_and_starts_nothing(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    outside = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    done = subprocess.run(
        ["make"], cwd=tmp_path, env=outside, capture_output=True, text=True, check=True
    )
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    lines = done.stdout.splitlines()
    assert [line.split()[1] for line in lines] == [
        each for each in targets if each not in ("help", "repository")
    ]
    assert max(map(len, lines)) <= 80 and [path.name for path in tmp_path.iterdir()] == ["Makefile"]


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_of_a_folder_follow_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with whole_folder(tmp_path / "model") as folder:
            (folder / "private").touch(mode=0o600)
            (folder / "below").mkdir()
            (folder / "below/plain").touch()
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}
    assert len(files) == 2


def test_a_folder_that_fails_leaves_the_former_one(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/former").touch()
    with pytest.raises(ValueError, match="no"), whole_folder(tmp_path / "model") as folder:
        (folder / "new").touch()
        raise ValueError("no")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "former"]


def test_a_stage_sweeps_what_killed_processes_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not what a process that lives is writing."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    alive = f"models/.adapter.partial-{os.getppid()}"
    left = {
        f"models/.adapter.partial-{dead.pid}/weights",
        f"models/.merged.partial-{os.getpid()}/deep/model",
        "reports/.evaluation.html.partial",
        f"reports/.train.json.partial-{dead.pid}",
        "data/raw/.qa.parquet.partial",
    }
    kept = {f"{alive}/weights", "models/adapter/weights", "reports/.gitignore", "data/raw/partial"}
    for name in left | kept:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fintune.stage.leave", lambda status: None)
    run(lambda: None)
    there = {
        path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()
    }
    assert there == kept
    assert not list((tmp_path / "models").glob(f"*.partial-{dead.pid}"))


ABORTS = """
import atexit, os, sys, types
from fintune.stage import run

class Threads:
    def __del__(self):
        os.abort()

def main():
    sys.modules["library"] = Threads()
    atexit.register(print, "closed")
    print("written")

run(main)
"""


def test_a_library_that_aborts_at_exit_does_not_fail_a_stage(tmp_path: Path) -> None:
    """The exit handlers are called, and what was printed is seen."""
    done = start(Path(sys.executable), tmp_path, "-c", ABORTS)
    assert (done.returncode, done.stdout) == (0, "written\nclosed\n"), done.stderr


STOPPED = """
import os, signal, time
from fintune.stage import run

class Failed(Exception):
    def __str__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        return "failed"

def main():
    raise Failed

run(main)
"""


@pytest.mark.parametrize(
    ("worker", "said"), [({}, f"{stage.GOES_ON}\n"), ({"RANK": "0", "WORLD_SIZE": "2"}, "")]
)
def test_a_stage_that_is_told_to_end_while_it_words_an_error_prints_no_traceback(
    worker: dict[str, str], said: str, tmp_path: Path
) -> None:
    done = start(Path(sys.executable), tmp_path, "-c", STOPPED, **worker)
    assert (done.returncode, done.stderr) == (1, said)


KERNELS = """
import os, pathlib
pathlib.Path(os.environ["CALLED"]).touch()
def __getattr__(name):
    raise RuntimeError(f"kernels.{name} was asked for")
"""


def test_no_compiled_code_is_fetched_from_the_hub(tmp_path: Path) -> None:
    """A stand-in for the package kernels is not imported; bitsandbytes and transformers look for it."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text(KERNELS)
    (tmp_path / "kernels-0.14.0.dist-info").mkdir()
    (tmp_path / "kernels-0.14.0.dist-info/METADATA").write_text("Name: kernels\nVersion: 0.14.0\n")
    load = "import bitsandbytes.backends.cpu.ops, transformers.integrations.hub_kernels"
    for first, called in (
        ("import kernels", True),
        ("import fintune.stage as s; s.prepare()", False),
    ):
        file = tmp_path / f"called-{called}"
        done = subprocess.run(
            [sys.executable, "-c", f"{first}\n{load}"],
            env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "CALLED": str(file)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert file.exists() == called, done.stderr
        assert called or done.returncode == 0, done.stderr


def test_no_library_tells_its_makers_of_the_use() -> None:
    ask = """
from mlflow.telemetry.utils import is_telemetry_disabled
from huggingface_hub.constants import HF_HUB_DISABLE_TELEMETRY
print(is_telemetry_disabled(), HF_HUB_DISABLE_TELEMETRY)
"""
    quiet = ("CI", "GITHUB_ACTIONS", "PYTEST_CURRENT_TEST", "DO_NOT_TRACK")
    quiet += ("MLFLOW_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY")
    environment = {key: value for key, value in os.environ.items() if key not in quiet}
    for first, expected in (
        ("", "False False"),
        ("import fintune.stage as s; s.prepare()", "True True"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", first + ask],
            env=environment | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == expected


@pytest.mark.parametrize(
    ("visible", "place", "expected"),
    [(None, "1", "1"), ("4,6", "1", "6"), ("GPU-a,GPU-b", "0", "GPU-a"), ("3", "1", "3")],
)
def test_one_of_several_processes_sees_its_gpu_alone(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, place: str, expected: str
) -> None:
    """Where a launcher has hidden the others already, as Slurm can, the one that is left."""
    monkeypatch.setattr(os, "environ", {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": place})
    if visible:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    stage._take_place()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == expected


BARS = """
import time, sys
now = [0.0]
time.time = time.monotonic = lambda: now[0]
from fintune.stage import prepare, run
prepare()
run(lambda: None, interrupted="of a command")
from datasets.utils import tqdm as of_datasets
from huggingface_hub.utils import tqdm as of_hub
from tqdm.auto import tqdm
from transformers.utils.logging import tqdm as of_transformers
for make in (tqdm, of_datasets, of_hub, of_transformers):
    with make(total=100, desc="long", unit="row", leave=False) as bar:
        for step in range(100):
            now[0] += 1
            bar.set_postfix(loss=step)
            bar.update()
    for _ in make(range(9), desc="short"):
        now[0] += 1
"""


def test_bars_are_lines_where_output_is_no_terminal(tmp_path: Path) -> None:
    """At most one each ten seconds, of bars of all libraries; none of what is over by then."""
    done = start(Path(sys.executable), tmp_path, "-c", BARS)
    lines = done.stderr.splitlines()
    assert "\r" not in done.stderr and "\x1b" not in done.stderr and "short" not in done.stderr
    assert len(lines) == 4 * 10 and all(line.startswith("long: ") for line in lines)
    assert lines[0] == "long: 9 of 100 after 00:10, 01:31 left,  1.00row/s, loss=9"


def test_a_terminal_keeps_its_bars(tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    code = BARS.replace(
        "for make in (tqdm, of_datasets, of_hub, of_transformers)", "for make in (tqdm,)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=theirs,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
    )
    os.close(theirs)
    drawn = b""
    with suppress(OSError):  # the terminal's other end is closed
        while part := os.read(ours, 65536):
            drawn += part
    os.close(ours)
    assert process.wait() == 0
    assert b"\rlong:   0%|" in drawn


@pytest.mark.parametrize("command", [["--help"], ["verify", "--help"], ["lineage", "."]])
def test_a_command_whose_reader_leaves_ends_without_a_word(command: list[str]) -> None:
    """As in `python -m fintune results | head -1`."""
    code = (
        "import runpy, sys\n"
        "import fintune.commands.lineage as lineage\n"
        "lineage.main = lambda given: print('a line\\n' * 100_000)\n"
        "runpy.run_module('fintune', run_name='__main__')\n"
    )
    read, written = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", code, *command],
        cwd=ROOT,
        stdout=written,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(written)
    assert done.stderr == b"" and done.returncode in (0, 128 + signal.SIGPIPE)
