"""Two people with one S3 remote and one MLflow server on PostgreSQL and S3, with users.

Also MLflow's pages in a real browser: what they show of the runs without any setup.
"""

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pyarrow.parquet as pq
import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from ruamel.yaml import YAML
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from support.browser import chromium, names_of_role, wait_for_texts
from support.project import ROOT, Project
from support.servers import PASSWORD, S3, mlflow_server, postgres, postgres_binaries, s3_server

pytestmark = pytest.mark.end_to_end


@dataclass(frozen=True)
class Team:
    """Ann's trained and pushed project, and Bob's pulled clone, in which he ran an experiment."""

    ann: Project
    bob: Project
    address: str
    outputs: str
    pulled_repro: str
    same_files: bool
    server_log: Path


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, Path]]:
    """Run S3 and MLflow; yield their addresses and MLflow's log."""
    binaries = postgres_binaries()
    if binaries is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    log = tmp_path_factory.mktemp("server") / "server.log"
    with ExitStack() as stack:
        s3 = stack.enter_context(s3_server("mlflow", "dvc"))
        database = stack.enter_context(postgres(binaries))
        yield s3, stack.enter_context(mlflow_server(database, s3, log)), log


@pytest.fixture(scope="module")
def team(
    servers: tuple[str, str, Path],
    make_project: Callable[..., Project],
    tmp_path_factory: pytest.TempPathFactory,
) -> Team:
    s3, address, log = servers
    ann = make_project(train__max_steps=2, train__validate_every_steps=2, evaluate__max_rows=4)
    login = {
        "MLFLOW_TRACKING_URI": address,
        "MLFLOW_TRACKING_USERNAME": "admin",
        "MLFLOW_TRACKING_PASSWORD": PASSWORD,
    }
    ann.environment |= S3 | login
    ann.commit_all()
    said = [ann.run("dvc", "remote", "add", "--default", "storage", "s3://dvc/project")]
    said.append(ann.run("dvc", "remote", "modify", "storage", "endpointurl", s3))
    said.append(ann.run("dvc", "repro"))
    said.append(ann.run("dvc", "push"))
    ann.run("git", "add", "--all")
    ann.run("git", "commit", "--quiet", "--message", "results")
    bob = clone(ann, tmp_path_factory.mktemp("bob") / "project")
    said.append(bob.run("dvc", "pull"))
    repro = bob.run("dvc", "repro").stdout
    same = all(tree(ann, name) == tree(bob, name) != {} for name in ("data", "models"))
    said.append(bob.run("dvc", "exp", "run", "-S", "train.learning_rate=1e-4", "train"))
    text = repro + "".join(each.stdout + each.stderr for each in said)
    return Team(ann, bob, address, text, repro, same, log)


def clone(project: Project, folder: Path) -> Project:
    subprocess.run(["git", "clone", "--quiet", str(project.folder), str(folder)], check=True)
    copy = Project(folder)
    copy.environment = dict(project.environment)
    copy.run("git", "config", "user.name", "B")
    copy.run("git", "config", "user.email", "b@example.org")
    return copy


def tree(project: Project, name: str) -> dict[str, bytes]:
    folder = project / name
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in (".parquet", ".safetensors", ".json")
    }


@pytest.fixture
def client(team: Team, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    return MlflowClient(team.address, team.address)


def runs(client: MlflowClient) -> list[Run]:
    experiment = client.get_experiment_by_name("financial-qa")
    assert experiment
    return list(client.search_runs([experiment.experiment_id], order_by=["start_time ASC"]))


def test_a_clone_pulls_everything_and_runs_nothing(team: Team) -> None:
    assert "Running stage" not in team.pulled_repro
    assert team.same_files


def test_both_runs_are_on_the_server_and_differ_in_what_bob_changed(
    team: Team, client: MlflowClient
) -> None:
    first, second = runs(client)
    changed = {
        key: (value, second.data.params[key])
        for key, value in first.data.params.items()
        if second.data.params[key] != value
    }
    assert changed == {"train.learning_rate": ("0.003", "0.0001")}
    losses = [run.data.metrics["validation_loss"] for run in (first, second)]
    assert losses[0] != losses[1]
    assert {"tuned/loss", "merged_loss"} <= set(first.data.metrics)
    assert {run.info.status for run in (first, second)} == {"FINISHED"}
    (version,) = client.search_model_versions("name = 'financial-qa'")
    assert (int(version.version), version.run_id) == (1, first.info.run_id)


def test_artifacts_come_from_s3_through_the_server(
    team: Team, client: MlflowClient, tmp_path: Path
) -> None:
    (model,) = client.get_run(runs(client)[0].info.run_id).outputs.model_outputs
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(team.address)
    try:
        uri = f"models:/{model.model_id}"
        got = mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path))
    finally:
        mlflow.set_tracking_uri(before)
    name = "adapter_model.safetensors"
    assert (Path(got) / name).read_bytes() == (team.ann / "models/adapter" / name).read_bytes()


def test_answers_are_traces_on_the_server(team: Team, client: MlflowClient) -> None:
    """They went to it with their assessments; Bob has only trained."""
    first, second = (run.info for run in runs(client))
    where = {"locations": [first.experiment_id], "max_results": 100}
    found = client.search_traces(**where, run_id=first.run_id)
    table = pq.read_table(team.ann / "reports/predictions.parquet").to_pylist()
    said = {trace.data.spans[0].outputs["tuned"] for trace in found}
    assert len(found) == len(table) and said == {row["tuned"] for row in table}
    names = {each.name for each in found[0].info.assessments}
    assert {"loss_tuned", "stopped_base", "expected_response"} <= names
    assert not client.search_traces(**where, run_id=second.run_id)


def test_bob_finds_where_ann_s_version_comes_from(team: Team) -> None:
    told = team.bob.run("python", "-m", "fintune", "lineage", "financial-qa/1").stdout
    assert "dvc repro --pull" in told
    assert re.search(r"git checkout [0-9a-f]{40}", told)


def test_repro_with_pull_of_a_commit_gives_the_same_data(team: Team, tmp_path: Path) -> None:
    commit = team.ann.run("git", "rev-parse", "HEAD").stdout.strip()
    other = clone(team.ann, tmp_path / "project")
    other.run("git", "checkout", "--quiet", commit)
    done = other.run("dvc", "repro", "--pull", "format")
    assert "Running stage" not in done.stdout
    locked = [YAML(typ="safe").load((p / "dvc.lock").read_text()) for p in (team.ann, other)]
    for stage in ("fetch", "split", "format"):
        assert locked[0]["stages"][stage]["outs"] == locked[1]["stages"][stage]["outs"]
    assert tree(other, "data/formatted") == tree(team.ann, "data/formatted")


@pytest.mark.parametrize(
    ("program", "password"),
    [("stages.train", "wrong-password-of-bob"), ("fintune restore", "")],
)
def test_a_wrong_password_names_the_variables(team: Team, program: str, password: str) -> None:
    command = ("python", "-m", *program.split())
    done = team.bob.run(*command, check=False, MLFLOW_TRACKING_PASSWORD=password)
    assert done.returncode != 0
    assert "MLFLOW_TRACKING_USERNAME" in done.stderr
    assert "MLFLOW_TRACKING_PASSWORD" in done.stderr
    assert "Traceback" not in done.stderr
    assert not password or password not in done.stdout + done.stderr


def test_no_password_is_shown_where_it_stands_in_the_address(team: Team) -> None:
    address = team.address.replace("//", "//admin:wrong-password-of-bob@")
    extra = {
        "MLFLOW_TRACKING_URI": address,
        "MLFLOW_TRACKING_USERNAME": "",
        "MLFLOW_TRACKING_PASSWORD": "",
    }
    done = team.bob.run("python", "-m", "fintune", "restore", check=False, **extra)
    assert done.returncode != 0 and done.stderr.startswith("error: MLflow at http://127.0.0.1")
    assert "wrong-password" not in done.stdout + done.stderr


def test_no_credential_is_printed_logged_or_stored(team: Team, client: MlflowClient) -> None:
    secrets = (PASSWORD, S3["AWS_SECRET_ACCESS_KEY"])
    logged = [json.dumps(run.to_dictionary(), default=str) for run in runs(client)]
    files = [
        path.read_bytes().decode("utf-8", "ignore")
        for project in (team.ann, team.bob)
        for path in project.folder.rglob("*")
        if path.is_file() and "base" not in path.parts
    ]
    for text in (team.outputs, team.server_log.read_text(), *logged, *files):
        assert not any(secret in text for secret in secrets)


def test_the_compose_file_starts_what_the_tests_start() -> None:
    """Without Docker: the services, databases and settings are those used in these tests."""
    compose = YAML(typ="safe").load((ROOT / "deploy/compose.yaml").read_text())
    server = compose["services"]["mlflow"]
    assert all(port.startswith("127.0.0.1:") for port in server["ports"])
    for name in ("PGPASSWORD", "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"):
        assert server["environment"][name].startswith("${") and ":?" in server["environment"][name]
    # the image creates this database; for one in databases.sql, CREATE DATABASE would then fail
    assert compose["services"]["database"]["environment"]["POSTGRES_DB"] == "postgres"
    docker = (ROOT / "deploy/Dockerfile").read_text()
    for part in ("basic-auth", "postgresql+psycopg2:///mlflow", "s3://mlflow"):
        assert part in docker
    lock = (ROOT / "requirements.lock").read_text().splitlines()
    assert set(re.findall(r"\S+==\S+", docker)) <= set(lock)
    for database in ("mlflow", "mlflow_users"):
        assert f"CREATE DATABASE {database};" in (ROOT / "deploy/databases.sql").read_text()


@dataclass(frozen=True)
class Site:
    """A logged-in browser, and two runs: Ann's, with all results, and Bob's training."""

    page: webdriver.Chrome
    address: str
    ann: Run
    bob: Run

    def open(self, path: str) -> None:
        self.page.get(f"{self.address}/#/{path}")

    def open_run(self, path: str = "") -> None:
        self.open(f"experiments/{self.ann.info.experiment_id}/runs/{self.ann.info.run_id}{path}")


@pytest.fixture(scope="module")
def site(team: Team, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with chromium(tmp_path_factory.mktemp("profile")) as page, pytest.MonkeyPatch.context() as env:
        env.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        env.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
        ann, bob = runs(MlflowClient(team.address, team.address))
        page.get(team.address.replace("//", f"//admin:{PASSWORD}@"))
        yield Site(page, team.address, ann, bob)


def test_the_list_shows_runs_by_what_was_tried(site: Site) -> None:
    site.open(f"experiments/{site.ann.info.experiment_id}/runs")
    bob = site.bob.info.run_name
    wait_for_texts(site.page, "Training runs", "base r4 lr0.003", bob, "train (")
    assert {"base r4 lr0.003", bob} <= names_of_role(site.page, "link")
    assert "Training runs" in names_of_role(site.page, "heading")


def test_two_runs_compared_show_what_differs(site: Site) -> None:
    ids = f'["{site.ann.info.run_id}","{site.bob.info.run_id}"]'
    site.open(f'compare-runs?runs={ids}&experiments=["{site.ann.info.experiment_id}"]')
    wait_for_texts(site.page, "Comparing 2 Runs from 1 Experiment", "train.learning_rate")
    wait_for_texts(site.page, "base r4 lr0.003", site.bob.info.run_name, "0.003", "0.0001")


def test_the_loss_curve_is_drawn(site: Site) -> None:
    site.open_run("/model-metrics")
    wait_for_texts(site.page, "at_a_glance", "curve", "improvement/", "tuned")
    shown = site.page.execute_script("return document.body.innerText")
    sections = re.findall(r"^(at_a_glance|base|curve|tuned)\s*\(\d+\)", shown, re.MULTILINE)
    assert sections == ["at_a_glance", "base", "curve", "tuned"]
    assert "Model metrics" in names_of_role(site.page, "tab")
    site.page.find_element(By.CSS_SELECTOR, "input[placeholder*='Search metric']").send_keys(
        "curve/loss"
    )
    WebDriverWait(site.page, 60).until(
        lambda page: page.find_elements(By.CSS_SELECTOR, ".js-plotly-plot .scatterlayer path")
    )


def test_the_run_s_page_says_how_it_went(site: Site) -> None:
    site.open_run()
    wait_for_texts(site.page, "Validation loss", "after 2 steps", "train.learning_rate")
    wait_for_texts(site.page, "git_commit", "md5.data/formatted")


def test_samples_are_read_in_the_browser(site: Site) -> None:
    site.open_run("/artifacts/predictions.json")
    wait_for_texts(
        site.page, "predictions.json", "evaluation.html", "question", "reference", "tuned"
    )


def test_the_registered_version_shows_alias_and_lineage(site: Site) -> None:
    site.open("models/financial-qa/versions/1")
    wait_for_texts(site.page, "Version 1", "candidate", "gate", "git_commit", "base r4 lr0.003")
    assert "base r4 lr0.003" in names_of_role(site.page, "link")  # the source run
