"""A sweep of eight experiments by two DVC workers, as seen afterwards in DVC and MLflow."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from support.project import Project

pytestmark = pytest.mark.end_to_end

RATES = (1e-3, 3e-3)
RANKS = (2, 4)


@pytest.fixture(scope="module")
def swept(make_project: Callable[..., Project]) -> Project:
    """Make a project with the data stages run once and a queued sweep finished."""
    project = make_project(train__max_steps=2, train__validate_every_steps=2, evaluate__max_rows=4)
    project.commit_all()
    project.run("dvc", "repro", "format")
    project.run("git", "add", "--all")
    project.run("git", "commit", "--quiet", "--message", "data")
    rates = ",".join(map(str, RATES))
    ranks = ",".join(map(str, RANKS))
    project.run(
        "dvc",
        "exp",
        "run",
        "--queue",
        "train",
        "-S",
        f"train.learning_rate={rates}",
        "-S",
        f"train.lora.r={ranks}",
    )
    project.run("dvc", "queue", "start", "--jobs", "2")
    deadline = time.monotonic() + 900
    while True:
        status = project.run("dvc", "queue", "status").stdout
        if "Queued" not in status and "Running" not in status:
            return project
        assert time.monotonic() < deadline, status
        time.sleep(2)


def shown(project: Project) -> list[dict[str, Any]]:
    """Return the experiments in `dvc exp show`, without workspace and commit."""
    table = json.loads(project.run("dvc", "exp", "show", "--json").stdout)
    return [
        revision
        for baseline in table
        for group in baseline.get("experiments") or []
        for revision in group["revs"]
    ]


def logged(project: Project) -> list[Run]:
    """Return all runs in MLflow, including the parent."""
    client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    experiments = client.search_experiments(filter_string="name = 'financial-qa'")
    return list(client.search_runs([each.experiment_id for each in experiments]))


def test_all_of_them_are_in_both_with_the_same_parameters(swept: Project) -> None:
    wanted = sorted((rate, rank) for rate in RATES for rank in RANKS)
    trained = [each["data"]["params"]["params.yaml"]["data"]["train"] for each in shown(swept)]
    of_dvc = sorted((train["learning_rate"], train["lora"]["r"]) for train in trained)
    runs = [run for run in logged(swept) if "experiments_on_commit" not in run.data.tags]
    keys = ("train.learning_rate", "train.lora.r")
    of_mlflow = sorted(tuple(json.loads(run.data.params[key]) for key in keys) for run in runs)
    assert of_dvc == wanted
    assert of_mlflow == wanted
    assert {type(rate) for rate, _ in of_dvc + of_mlflow} == {float}
    assert all(run.info.status == "FINISHED" for run in runs)
    experiments = {run.data.tags["dvc_experiment"]: run.info.run_name for run in runs}
    assert set(experiments) == {each["name"] for each in shown(swept)}
    plain = [name for name, title in experiments.items() if title == name]
    assert len(plain) == 1  # it has the recipe's values
    told = {title for name, title in experiments.items() if title.endswith(f" ({name})")}
    assert len(told) == len(runs) - 1 and {"lora.r=2, learning_rate=0.001"} <= {
        title.partition(" (")[0] for title in told
    }
    assert len(set(experiments.values())) == len(runs)


def test_they_lie_under_one_run_that_names_the_commit(swept: Project) -> None:
    runs = logged(swept)
    parents = [run for run in runs if "experiments_on_commit" in run.data.tags]
    commit = swept.run("git", "rev-parse", "HEAD").stdout.strip()
    assert [run.data.tags["experiments_on_commit"] for run in parents] == [commit]
    children = [run for run in runs if run not in parents]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parents[0].info.run_id}


def test_versions_registered_at_once_are_all_there(tmp_path: Path) -> None:
    """Four stages end at the same moment, on a store and a model that do not exist yet."""
    code = """
import sys
from pathlib import Path
from fintune.registry.versions import register
from fintune.tracking.client import connect
client = connect(Path(sys.argv[1]))
experiment = client.get_experiment_by_name("financial-qa").experiment_id
run = client.create_run(experiment).info.run_id
print(*register(client, run, "qa", {"gate": "passed"}, True))
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    root = Path(__file__).parents[2]
    processes = [
        subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    told = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert sorted(line.split()[0] for line in told) == ["1", "2", "3", "4"]
