"""`fintune check` reports everything that it can, for the recipe and the machine that it is given."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.project import Project

CHECK = ("python", "-m", "fintune", "check")


@pytest.fixture(scope="module")
def project(make_project: Callable[..., Project]) -> Project:
    made = make_project()
    made.commit_all()
    return made


def said(project: Project, *arguments: str, **extra: str) -> tuple[int, dict[str, Any]]:
    done = project.run(*CHECK, "--json", *arguments, check=False, **extra)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout)


def of(report: dict[str, Any], status: str) -> dict[str, str]:
    return {f["what"]: f["said"] for f in report["findings"] if f["status"] == status}


def test_a_run_that_works_is_forecast(project: Project) -> None:
    before = {path for path in project.folder.rglob("*") if ".git/" not in str(path)}
    status, report = said(project, "--gpu", "h100", "--price-per-hour", "3.6")
    good = of(report, "ok")
    assert status == 0 and not of(report, "problem"), report
    assert {"parameters", "base", "data", "tracking", "repository", "disk", "device"} <= set(good)
    assert "columns instruction, input, output" in good["data"] and "needed" in good["disk"]
    seconds = report["seconds"]
    stages = {"fetch", "split", "format", "train", "evaluate", "merge_export"}
    assert set(seconds) == stages | {"in all"}
    assert sum(seconds[stage] for stage in stages) == pytest.approx(seconds["in all"], rel=0.01)
    assert report["price"] == pytest.approx(seconds["in all"] / 1000)
    assert report["peak_memory_gib"] > 0 and "varlen" in report["plan"]
    made = {path for path in project.folder.rglob("*") if ".git/" not in str(path)} - before
    assert not [path for path in made if "__pycache__" not in str(path)]
    assert "left out" not in good


def test_what_a_recipe_leaves_out_is_shown(project: Project, tmp_path: Path) -> None:
    recipe = tmp_path / "short.yaml"
    text = (project / "params.yaml").read_text()
    for line in ("  share: 1.0", "  weight_decay: 0.0", "  more: []"):
        assert line in text
        text = re.sub(rf"^{re.escape(line)}.*\n", "", text, flags=re.M)
    recipe.write_text(text)
    _, report = said(project, str(recipe))
    told = of(report, "ok")["left out"]
    assert told == "and taken as usual: fetch: share 1.0; train: weight_decay 0.0"


def test_everything_is_reported_not_the_first_failure_alone(
    project: Project, tmp_path: Path
) -> None:
    text = (project / "params.yaml").read_text()
    recipe = tmp_path / "mine.yaml"
    for old, new in (
        ("weight_decay: 0.0", "weight_decay: none\n  epoch: 2"),
        ("model: base", "model: nowhere/base"),
        ("source: assets/demo-questions.jsonl", "source: data/source/none.csv"),
        ("general_text: assets/general-text.jsonl", "general_text: none.jsonl"),
    ):
        assert old in text
        text = text.replace(old, new)
    recipe.write_text(text)
    status, report = said(project, str(recipe), MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    wrong = of(report, "problem")
    assert status == 1
    assert f"{recipe}: 3 problems" in wrong["parameters"] and "train.epoch" in wrong["parameters"]
    assert "No such file" in wrong["data"] and "none.jsonl" in wrong["evaluation"]
    assert "no MLflow server responds" in wrong["tracking"]
    assert "repository" in of(report, "ok")


def test_the_given_recipe_is_checked(project: Project, tmp_path: Path) -> None:
    recipe = tmp_path / "other.yaml"
    recipe.write_text((project / "params.yaml").read_text().replace("r: 4", "r: 0"))
    status, report = said(project, "--only", "base", str(recipe))
    assert status == 1 and "train.lora.r" in of(report, "problem")["parameters"]


def test_what_does_not_fit_a_gpu_is_a_problem(project: Project) -> None:
    status, report = said(project, "--gpu", "l4", "--gpu-memory", "0.01")
    assert status == 1 and "GiB" in of(report, "problem")["plan"]
    assert "scaled from an H100's" in of(report, "ok")["device"]


def test_data_that_git_does_not_know_is_told(project: Project, tmp_path: Path) -> None:
    shutil.copy(project / "assets/demo-questions.jsonl", project / "data/source/new.jsonl")
    recipe = tmp_path / "new.yaml"
    text = (project / "params.yaml").read_text()
    recipe.write_text(text.replace("assets/demo-questions.jsonl", "data/source/new.jsonl"))
    _, report = said(project, str(recipe), "--gpu", "h100")
    warned = of(report, "warning")["data"]
    assert "data/source/new.jsonl: neither git nor DVC" in warned and "--queue" in warned
    (project / "data/source/new.jsonl").unlink()


def test_the_table_fits_a_terminal(project: Project) -> None:
    done = project.run(*CHECK, "--gpu", "h100")
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert {line.split()[0] for line in done.stdout.splitlines() if line[0] != " "} == {"ok"}
