"""The search: its proposals, its results in DVC and MLflow, and resumption after an interruption."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from mlflow.tracking import MlflowClient
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from ruamel.yaml import YAML

from fintune.commands.search import read_dimension
from fintune.errors import UserError
from support.project import Project

KNOWN = ["train.learning_rate", "train.lora.r", "train.schedule"]
SPACE = ("train.learning_rate=1e-4..1e-2:log", "train.lora.r=0,2")  # a rank of 0 is refused


@pytest.mark.parametrize(
    ("text", "space"),
    [
        ("train.learning_rate=1e-4..1e-2:log", FloatDistribution(1e-4, 1e-2, log=True)),
        ("train.learning_rate=0..1.5", FloatDistribution(0, 1.5)),
        ("train.lora.r=4..64", IntDistribution(4, 64)),
        ("train.lora.r=8,16", CategoricalDistribution([8, 16])),
        ("train.learning_rate=1e-4,3e-3", CategoricalDistribution([1e-4, 3e-3])),
        ("train.schedule=cosine,linear", CategoricalDistribution(["cosine", "linear"])),
    ],
)
def test_ranges_and_choices_keep_their_types(text: str, space: BaseDistribution) -> None:
    key, read = read_dimension(text, KNOWN)
    assert key == text.split("=")[0]
    assert repr(read) == repr(space)  # 8 and 8.0 are equal, but not as a rank


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("train.learning_rte=1,2", "did you mean train.learning_rate?"),
        ("train.lora.r=8", "at least two choices"),
        ("train.learning_rate=0..1e-2:log", "0"),
        ("train.learning_rate=2..1", "2"),
        ("train.learning_rate=a..b", "'a'"),
        ("train.learning_rate=1e-4..1e-2:lin", "'lin' is no scale"),
    ],
)
def test_a_wrong_space_is_refused(text: str, reason: str) -> None:
    with pytest.raises(UserError, match=re.escape(text)) as refused:
        read_dimension(text, KNOWN)
    assert reason in str(refused.value)


@dataclass(frozen=True)
class Searched:
    """A project after a search of three trials that was interrupted in its second good one."""

    project: Project
    interrupted: str
    output: str


@pytest.fixture(scope="module")
def searched(make_project: Callable[..., Project]) -> Searched:
    project = make_project(train__max_steps=2, train__validate_every_steps=2)
    project.commit_all()
    project.run("dvc", "repro", "format")
    project.run("git", "add", "--all")
    project.run("git", "commit", "--quiet", "--message", "data")
    command = ["-m", "fintune", "search", "--trials", "3", "--seed", "10", *SPACE]
    first = subprocess.Popen(
        [sys.executable, *command],  # an interrupt reaches all processes of real interpreters
        cwd=project.folder,
        env=project.environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        # a shell's background jobs ignore SIGINT, and their children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert first.stderr
    for line in first.stderr:
        if "validation_loss" in line:  # the first good trial is done
            first.send_signal(signal.SIGINT)
            break
    rest = first.stderr.read()
    assert first.wait() != 0
    return Searched(project, rest, project.run("python", *command).stdout)


def experiments(project: Project) -> list[str]:
    return project.run("dvc", "exp", "list", "--name-only").stdout.split()


@pytest.mark.end_to_end
def test_an_interrupted_search_goes_on(searched: Searched) -> None:
    assert "interrupted; the same command goes on" in searched.interrupted
    assert "Traceback" not in searched.interrupted
    done = re.search(r"3 trials, (\d) failed; the best is", searched.output)
    assert done and int(done[1]) == 1  # the last one: this seed draws ranks 2, 2, 0
    names = experiments(searched.project)
    assert len(names) == len(set(names)) == 3 - int(done[1])
    assert searched.project.run("git", "status", "--porcelain").stdout == ""


@pytest.mark.end_to_end
def test_every_trial_is_one_run_below_the_search_s(searched: Searched) -> None:
    client = MlflowClient(f"sqlite:///{searched.project / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'financial-qa'")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "search" in run.data.tags]
    trials = [run for run in runs if run is not parent]
    assert {run.data.tags["mlflow.parentRunId"] for run in trials} == {parent.info.run_id}
    named = {run.data.tags["dvc_experiment"]: run for run in trials}
    assert sorted(named) == sorted(experiments(searched.project))
    for name, run in named.items():
        params = {key: json.loads(run.data.params[key]) for key in KNOWN[:2]}
        told = [
            f"lora.r={params['train.lora.r']}",
            f"learning_rate={params['train.learning_rate']}",
        ]
        assert run.info.run_name == f"{', '.join(told)} ({name})"
    assert parent.info.run_name.startswith("search of learning_rate, lora.r (search-")
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert parent.data.params == dict(text.split("=", 1) for text in SPACE)
    lowest = min(run.data.metrics["validation_loss"] for run in trials)
    assert parent.data.metrics["best/validation_loss"] == pytest.approx(lowest, rel=1e-5)
    assert "dvc exp run -S" in parent.data.tags["mlflow.note.content"]


@pytest.mark.end_to_end
def test_the_printed_command_reproduces_the_best(searched: Searched) -> None:
    """DVC restores it from its cache; the parameters and the loss are the best trial's."""
    project = searched.project
    command = searched.output.strip().splitlines()[-1].split()
    assert command[:3] == ["dvc", "exp", "run"]
    said = re.search(r"validation_loss ([\d.]+) with", searched.output)
    assert said
    project.run(*command, "train")
    report = json.loads((project / "reports/train.json").read_text())
    assert report["validation_loss"] == pytest.approx(float(said[1]), rel=1e-5)
    params = YAML(typ="safe").load((project / "params.yaml").read_text())
    assert type(params["train"]["learning_rate"]) is float and params["train"]["lora"]["r"] == 2
