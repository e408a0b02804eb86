"""`dvc repro` with several processes, of which one is killed, and with another number afterwards."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from safetensors.numpy import load_file

from fintune.stage import GOES_ON
from support.project import Project
from tools.kills import POLL, Moment, go_on, kill_at, start

pytestmark = pytest.mark.end_to_end


def kill_worker(project: Path, place: int, appears: str) -> tuple[str, list[psutil.Process]]:
    """Kill one of a training's processes when a file appears; return what was printed, and all of them."""
    log = project.with_name(f"{project.name}.log")
    log.write_bytes(b"")
    dvc = start(project, log, "train")
    while not any(project.glob(appears)):
        assert dvc.poll() is None, log.read_text()
        time.sleep(POLL)
    below = psutil.Process(dvc.pid).children(recursive=True)
    workers = [each for each in below if each.environ().get("RANK")]
    assert sorted(each.environ()["RANK"] for each in workers) == ["0", "1"]
    os.kill(next(w.pid for w in workers if w.environ()["RANK"] == str(place)), signal.SIGKILL)
    assert dvc.wait() != 0
    return log.read_text(), workers


def is_over(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_a_training_goes_on_after_one_of_its_processes_was_killed_also_with_another_number(
    make_project: Callable[..., Project], tmp_path: Path
) -> None:
    values = {"train__max_steps": 8, "train__validate_every_steps": 2, "train__parallel": "ddp"}
    alone = make_project(**values)
    alone.commit_all()
    alone.run("dvc", "config", "core.analytics", "false")
    alone.run("dvc", "repro", "format")
    killed = Project(tmp_path / "killed", real=True)
    shutil.copytree(alone.folder, killed.folder, symlinks=True)
    killed.set(train__processes=2)
    alone.run("dvc", "repro", "train")

    printed, workers = kill_worker(
        killed.folder, 1, ".checkpoints/*/checkpoint-2/trainer_state.json"
    )
    assert "error: process 1 of 2 was ended by SIGKILL" in printed
    assert "Traceback" not in printed
    assert all(map(is_over, workers))
    for name, step in (("SIGKILL", 4), ("SIGTERM", 6)):  # of all that is in DVC's process group
        there = f".checkpoints/*/checkpoint-{step}/trainer_state.json"
        assert kill_at(killed.folder, Moment("train", name, appears=there), {}, "train")
        left = [p for p in psutil.process_iter() if str(killed.folder) in _folder_of(p)]
        assert psutil.wait_procs(left, timeout=60)[1] == []
    printed = killed.folder.with_name(f"{killed.folder.name}.log").read_text()
    assert GOES_ON in printed and "Traceback" not in printed

    killed.set(train__processes=1)
    assert go_on(killed.folder, "train")[1] == ""
    assert "going on from" in killed.folder.with_name(f"{killed.folder.name}.log").read_text()
    reports = [json.loads((p / "reports/train.json").read_text()) for p in (alone, killed)]
    for key in ("train_loss", "validation_loss", "steps", "best_step"):
        assert reports[1][key] == pytest.approx(reports[0][key], abs=1e-5), key
    adapters = [load_file(p / "models/adapter/adapter_model.safetensors") for p in (alone, killed)]
    assert set(adapters[0]) == set(adapters[1])
    for name, weight in adapters[0].items():
        assert adapters[1][name] == pytest.approx(weight, abs=1e-5), name


def _folder_of(process: psutil.Process) -> str:
    try:
        return process.cwd()
    except psutil.Error:
        return ""
