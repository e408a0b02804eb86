"""The connection to MLflow: a database that is whole, at home after a move, and addresses in words."""

import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import mlflow
import pytest
import sqlalchemy
from mlflow.store.db import utils
from mlflow.store.tracking.dbmodels.initial_models import Base as InitialBase

from fintune.errors import UserError
from fintune.tracking.client import connect, experiment_name
from support.project import ROOT


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        if name.endswith(("_URI", "_NAME")):
            monkeypatch.delenv(name)


@pytest.fixture
def used(tmp_path: Path, empty_store: Path) -> Path:
    """Make a project's folder with a run, an artifact, a model, a trace and registered versions."""
    folder = tmp_path / "project"
    folder.mkdir()
    shutil.copy(empty_store, folder / "mlflow.db")
    with closing(sqlite3.connect(folder / "mlflow.db")) as database, database:
        location = f"{(folder / 'mlartifacts').as_uri()}/0"
        database.execute("update experiments set artifact_location = ?", (location,))
    client = connect(folder)
    (folder / "MLmodel").write_text("weights")
    with mlflow.start_run(log_system_metrics=False) as run:
        client.log_artifact(run.info.run_id, str(folder / "MLmodel"), "adapter")
    client.create_registered_model("model")
    client.create_model_version("model", f"runs:/{run.info.run_id}/adapter", run.info.run_id)
    model = client.create_logged_model(run.info.experiment_id, "adapter", run.info.run_id)
    client.log_model_artifact(model.model_id, str(folder / "MLmodel"))
    client.finalize_logged_model(model.model_id, "READY")
    client.create_registered_model("logged")
    client.create_model_version("logged", f"models:/{model.model_id}", run.info.run_id)
    with mlflow.start_span("row") as span:
        span.set_inputs("question")
    mlflow.flush_trace_async_logging()
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


CONNECT = """
from pathlib import Path
from fintune.errors import UserError
from fintune.tracking.client import connect, experiment_name
try:
    connect(Path.cwd()).log_text(__import__("mlflow").start_run().info.run_id, "text", "file")
except UserError as error:
    print(error)
"""


def run(folder: Path, code: str, *before: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new process, without what MLflow keeps for each address in this one."""
    return subprocess.run(
        [*before, sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": ""},
        capture_output=True,
        text=True,
        check=False,
    )


DIE = """
import os, signal
from mlflow.store.db import utils
utils._upgrade_db = lambda *_: os.kill(os.getpid(), signal.SIG%s)
"""


@pytest.mark.parametrize("number", ["KILL", "INT"])
def test_a_database_that_was_interrupted_is_made_again(tmp_path: Path, number: str) -> None:
    """The signal comes after the first tables and before the migrations."""
    assert run(tmp_path, (DIE % number) + CONNECT).returncode != 0
    assert ".mlflow.db.partial" in names(tmp_path) and "mlflow.db" not in names(tmp_path)
    assert run(tmp_path, CONNECT).stdout == ""
    assert names(tmp_path) == {"mlflow.db", ".checkpoints", "mlartifacts"}


@pytest.mark.parametrize("half", ["tables", "empty"])
def test_a_half_made_database_is_made_again(
    tmp_path: Path, half: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "mlflow.db"
    file.touch()
    if half == "tables":
        engine = sqlalchemy.create_engine(f"sqlite:///{file}")
        InitialBase.metadata.create_all(engine)
        engine.dispose()
    assert connect(tmp_path).get_experiment_by_name("financial-qa") is not None
    assert ("only half made" in caplog.text) == (half == "tables")


@pytest.mark.parametrize("fault", ["header", "cut", "page"])
def test_a_broken_database_is_named_with_the_way_out(used: Path, fault: str) -> None:
    file = used / "mlflow.db"
    content = bytearray(file.read_bytes())
    if fault == "header":
        content[:16] = b"no database, is "
    elif fault == "cut":
        del content[len(content) // 2 :]
    else:
        content[4096 * 3 : 4096 * 4] = os.urandom(4096)
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        connect(used)
    message = str(caught.value)
    assert message.startswith(f"{file}: ") and "fintune restore" in message
    assert file.read_bytes() == content


LAST_RIGHTS = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--"]


@pytest.mark.skipif(not shutil.which("setpriv"), reason="setpriv is not there")
@pytest.mark.parametrize("what", ["file", "folder", "new"])
def test_a_database_that_cannot_be_written_is_named(used: Path, what: str) -> None:
    """Also for root, whose right to write anywhere is taken from the process."""
    if what == "new":
        (used / "mlflow.db").unlink()
    (used / "mlflow.db" if what == "file" else used).chmod(0o555)
    done = run(used, CONNECT, *(LAST_RIGHTS if os.geteuid() == 0 else []))
    used.chmod(0o755)
    assert done.stdout.startswith(f"{used}/mlflow.db: "), done
    assert "make the file and its folder writable" in done.stdout


ADD = """
import mlflow
[version] = mlflow.MlflowClient().search_model_versions("name = 'model'")
print(mlflow.artifacts.load_text(f"{version.source}/MLmodel"))
mlflow.MlflowClient().log_text(version.run_id, "added", "added.txt")
print((mlflow.artifacts.download_artifacts("models:/model/1")))
print(mlflow.artifacts.load_text("models:/logged/1/MLmodel"))
"""


@pytest.mark.parametrize("how", [shutil.move, shutil.copytree])
def test_a_project_that_was_moved_or_copied_keeps_its_runs(
    used: Path, tmp_path: Path, how: Any
) -> None:
    before = {path: path.stat().st_mtime_ns for path in used.rglob("*")}
    here = tmp_path / "what %41 else/renamed"
    here.parent.mkdir()
    how(used, here)
    done = run(here, CONNECT + ADD)
    assert f"mlflow.db was in {used / 'mlartifacts'} before" in done.stderr
    told = done.stdout.splitlines()
    assert told[0] == told[-1] == "weights", done.stderr
    assert {path.name for path in (here / "mlartifacts").rglob("*.txt")} == {"added.txt"}
    assert len(list((here / "mlartifacts").rglob("file"))) == 1  # of a new run
    if how is shutil.copytree:
        assert {path: path.stat().st_mtime_ns for path in used.rglob("*")} == before
    else:
        assert not used.exists()
    assert "before" not in run(here, CONNECT).stderr
    with closing(sqlite3.connect(here / "mlflow.db")) as database:
        assert str(used) not in "\n".join(database.iterdump())


@pytest.mark.parametrize(
    ("kind", "after"),
    [
        (None, "custom_model_development"),
        ("genai_development_inferred", "custom_model_development"),
        ("genai_development", "genai_development"),  # a user's choice
    ],
)
def test_an_experiment_has_the_kind_that_fits_it(used: Path, kind: str | None, after: str) -> None:
    """Those of earlier releases have none, or what the UI guessed."""
    tag, client = "mlflow.experimentKind", connect(used)
    experiment = client.get_experiment_by_name(experiment_name())
    assert experiment.tags[tag] == "custom_model_development"
    if kind:
        client.set_experiment_tag(experiment.experiment_id, tag, kind)
    else:
        client.delete_experiment_tag(experiment.experiment_id, tag)
    client = connect(used)
    assert client.get_experiment(experiment.experiment_id).tags[tag] == after


@pytest.mark.parametrize("name", ["what?x=1", "100%41", "a#b", "a@b:c d", "Ann's"])
def test_a_folder_with_signs_in_its_name_holds_its_database(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name / "p"
    folder.mkdir(parents=True)
    done = run(folder, CONNECT)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {name}
    assert {path.name for path in folder.parent.iterdir()} == {"p"}
    assert names(folder) == {"mlflow.db", "mlartifacts", ".checkpoints"}
    assert len(list((folder / "mlartifacts").rglob("file"))) == 1


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("./mlruns", "./mlruns: no address of an MLflow server or database; set https://HOST"),
        ("mlflow.example.com:5000", "mlflow.example.com:5000: no address"),
        ("databricks", "databricks: no address"),
        ("ftp://u:secret@host/x", "ftp://host/x: no address"),
        ("file:///srv/mlruns", "file:///srv/mlruns: no address"),
        (
            "postgresql+psycopg://u:secret@127.0.0.1:1/db",
            "driver is not installed (No module named 'psycopg')",
        ),
        ("postgresql+nosuch://u:secret@127.0.0.1:1/db", "postgresql+nosuch://127.0.0.1:1/db"),
        ("sqlite:////nonexistent/x.db", "there is no folder /nonexistent; create it"),
        ("sqlite:///sub/x.db", "sub; create it, or unset"),
        ("http://u:secret@127.0.0.1:1", "no MLflow server responds at http://127.0.0.1:1"),
        ("postgresql+psycopg2://u:secret@127.0.0.1:1/db", "postgresql+psycopg2://127.0.0.1:1/db"),
    ],
)
def test_an_address_that_cannot_be_used_is_named_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str, said: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr(utils, "MAX_RETRY_COUNT", 1)
    with pytest.raises(UserError) as caught:
        connect(tmp_path)
    assert said in str(caught.value) and "MLFLOW_TRACKING_URI" in str(caught.value)
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)
