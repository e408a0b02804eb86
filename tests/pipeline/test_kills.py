"""A pipeline that is killed ten times ends as one that was not; `python -m tools.kills` does more of them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from support.project import Project
from tools.kills import Moment, faults, go_on, kill_at, results

pytestmark = pytest.mark.end_to_end

MOMENTS = (
    Moment("fetch", "SIGINT", share=0.0),
    Moment("split", "SIGTERM", share=0.0),
    Moment("format", "SIGKILL", appears="data/formatted/train.parquet"),
    Moment("train", "SIGKILL", appears=".mlflow.db.partial"),
    Moment("train", "SIGINT", appears=".checkpoints/*/checkpoint-*/trainer_state.json"),
    Moment("train", "SIGKILL", appears="models/adapter/training.json"),
    Moment("train", "SIGKILL", appears=".checkpoints/*/finished"),  # before dvc.lock has it
    Moment("evaluate", "SIGTERM", appears="reports/evaluation.json"),
    Moment("merge_export", "SIGKILL", appears="models/.merged.partial-*/*.safetensors"),
    Moment("merge_export", "SIGINT", appears="models/merged/config.json"),
)


def test_a_pipeline_that_is_killed_ten_times_ends_as_one_that_was_not(
    make_project: Callable[..., Project], tmp_path: Path
) -> None:
    """With a constant schedule, a step too many would change the adapter.

    The killed pipeline runs in interpreters of its own.
    """
    project = make_project(
        train__schedule="constant",
        train__max_steps=5,
        train__validate_every_steps=2,
        train__checkpoint_every_steps=3,
    )
    project.commit_all()
    project.run("dvc", "config", "core.analytics", "false")
    killed = tmp_path / "killed"
    shutil.copytree(project.folder, killed, symlinks=True)
    (killed / "mlflow.db").unlink()
    project.run("dvc", "repro")
    for moment in MOMENTS:
        came = kill_at(killed, moment, dict.fromkeys([moment.stage], 0.0))
        assert came, (moment, killed.with_name("killed.log").read_text()[-2000:])
    assert go_on(killed)[1] == ""
    assert faults(killed, results(project.folder)) == []
