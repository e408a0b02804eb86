"""The scripts and manifests that run the pipeline on machines of others."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
RECIPE = "recipes/smollm2.yaml"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Copy what a job starts from, with programs that only note how they are called."""
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy")
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    shutil.copy(ROOT / "params.yaml", tmp_path)
    programs = tmp_path / ".venv/bin"
    programs.mkdir(parents=True)
    for name in ("dvc", "make", "srun", "git"):
        (programs / name).write_text(f'#!/bin/sh\necho {name} "$@" >> "$CALLS"\n')
        (programs / name).chmod(0o755)
    return tmp_path


def run(
    project: Path, *command: str, **environment: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run a script in the project; return how it ended and the programs that it called."""
    calls = project / "calls"
    calls.write_text("")
    path = f"{project / '.venv/bin'}:{os.environ['PATH']}"
    given = {"PATH": path, "CALLS": str(calls), **environment}
    ended = subprocess.run(command, cwd=project, env=given, capture_output=True, text=True)
    return ended, calls.read_text().splitlines()


def test_a_job_takes_the_recipe_and_sends_the_results_to_the_remote(project: Path) -> None:
    ended, calls = run(project, "deploy/job.sh", RECIPE, "v3", DVC_REMOTE_URL="s3://store/qa")
    assert ended.returncode == 0, ended.stderr
    assert calls == [
        "git checkout --quiet --detach v3",
        "make --silent .venv/bin/ready",
        "dvc remote add --local --force --default job s3://store/qa",
        "dvc fetch --run-cache",
        "dvc repro",
        "dvc push --run-cache",
    ]
    assert (project / "params.yaml").read_text() == (ROOT / RECIPE).read_text()


def test_without_a_remote_nothing_is_sent(project: Path) -> None:
    assert run(project, "deploy/job.sh", RECIPE)[1] == [
        "make --silent .venv/bin/ready",
        "dvc repro",
    ]


def test_a_failed_run_sends_nothing_and_fails_the_job(project: Path) -> None:
    with (project / ".venv/bin/dvc").open("a") as file:
        file.write('[ "$1" != repro ]\n')
    ended, calls = run(project, "deploy/job.sh", RECIPE, DVC_REMOTE_URL="s3://store/qa")
    assert ended.returncode == 1
    assert calls[-1] == "dvc repro"


def test_a_job_without_a_recipe_says_how_it_is_used(project: Path) -> None:
    ended, calls = run(project, "deploy/job.sh")
    assert ended.returncode and "usage: deploy/job.sh RECIPE" in ended.stderr and not calls


def test_slurm_starts_the_job_in_the_folder_that_it_was_submitted_from(project: Path) -> None:
    environment = {"SLURM_SUBMIT_DIR": str(project), "RECIPE": RECIPE}
    ended, calls = run(project, "deploy/slurm.sh", **environment)
    assert ended.returncode == 0, ended.stderr
    assert calls[-1] == "dvc repro"
    assert run(project, "deploy/slurm.sh", RECIPE=RECIPE)[0].returncode


def test_on_several_nodes_each_starts_a_process_for_each_of_its_gpus(project: Path) -> None:
    environment = {"SLURM_SUBMIT_DIR": str(project), "RECIPE": RECIPE, "SLURM_NNODES": "2"}
    job = {"SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "7"}
    _, calls = run(project, "deploy/slurm.sh", **environment, **job)
    first, start, commit, then = calls[1:]
    assert (first, commit, then) == ("dvc repro format", "dvc commit --force train", "dvc repro")
    assert "--nnodes 2 --nproc-per-node 8 --rdzv-id 7" in start
    assert start.endswith("-m stages.train")


def manifest(name: str) -> Any:
    return YAML(typ="safe").load((ROOT / "deploy" / name).read_text())


def test_the_kubernetes_job_is_one_by_kubernetes_schema() -> None:
    job = manifest("kubernetes.yaml")
    kubernetes_validate.validate(job, "1.32", strict=True)
    wrong = job | {"spec": job["spec"] | {"backoffLimit": "two"}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.32", strict=True)


def test_the_manifests_name_a_recipe_that_is_there() -> None:
    [container] = manifest("kubernetes.yaml")["spec"]["template"]["spec"]["containers"]
    values = {each["name"]: each["value"] for each in container["env"]}
    assert (ROOT / values["RECIPE"]).is_file()
    assert (ROOT / manifest("skypilot.yaml")["envs"]["RECIPE"]).is_file()


def test_the_skypilot_task_is_one_by_its_own_parser() -> None:
    sky = pytest.importorskip("sky")
    task = sky.Task.from_yaml(str(ROOT / "deploy/skypilot.yaml"))
    assert {r.accelerators["H100"] for r in task.resources} == {1}
