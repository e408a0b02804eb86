"""Exchanges in files and in MLflow: kept while the server is away, sent once, the user's last word."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from fintune.tracking.client import connect
from fintune.usage.exchanges import Exchange, Log, exchanges, read
from support.project import ROOT

DECODING = {"temperature": 0.7, "top_p": 0.95, "max_new_tokens": 64.0}


def exchange(**values: object) -> Exchange:
    given = {"question": "What is a bond?", "model": "financial-qa/3", "decoding": DECODING}
    return Exchange(**(given | {"answer": "A loan.", "ended": True} | values))  # type: ignore[arg-type]


@pytest.fixture
def project(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(ROOT / "recipes/demo.yaml", tmp_path / "params.yaml")
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return tmp_path


@pytest.fixture
def client(project: Path) -> MlflowClient:
    return connect(project)


def test_what_is_sent_comes_back(project: Path, client: MlflowClient) -> None:
    log = Log(project)
    sent = exchange(
        passage="A bond is a loan.",
        instruction="Be brief.",
        logged_model="m-0123",
        tokens=5,
        seconds=1.5,
        approved=False,
        correction="A loan that can be traded.",
        at=1795765000.5,
    )
    failed = exchange(answer="", ended=False, error="out of memory", at=sent.at + 1)
    log.keep(sent)
    log.keep(failed)
    assert log.send(client) == 2
    assert list(exchanges(client)) == [sent, failed]
    assert list(exchanges(client, since=sent.at + 0.5)) == [failed]
    assert sent.is_sent and sent.trace is not None
    assert client.get_trace(sent.trace).info.trace_metadata["mlflow.modelId"] == "m-0123"
    assert [path.name for path in log.folder.iterdir()] == ["lock"]


def test_the_last_word_counts(project: Path, client: MlflowClient) -> None:
    """A thumb that is turned, taken back, and a correction that is written anew."""
    log, said = Log(project), exchange(approved=True)
    for approved, correction in ((True, None), (False, "One."), (None, "Two."), (True, None)):
        said.approved, said.correction = approved, correction
        log.keep(said)
        log.send(client)
        (found,) = exchanges(client)
        assert (found.approved, found.correction) == (approved, correction)
    assert len(client.get_trace(str(said.trace)).info.assessments) == 1


def test_while_mlflow_is_away_exchanges_wait_in_files(
    project: Path, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    log = Log(project)
    log.start()
    said = exchange(approved=False, correction="A loan that can be traded.")
    log.keep(said)
    while not log.fault:
        log.wake.wait(0.1)
    assert "no MLflow server responds at http://127.0.0.1:9" in log.fault
    (path,) = log.folder.glob("*.json")
    assert read(path) == said and not said.is_sent
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    later = Log(project)  # another process, another day
    assert later.send(connect(project)) == 1
    (found,) = exchanges(client)
    assert found.correction == "A loan that can be traded." and found.at == pytest.approx(
        said.at, abs=0.001
    )


@pytest.mark.parametrize("at", ["after the trace", "after the feedback"])
def test_a_kill_while_it_is_sent_makes_no_second_trace(
    project: Path, client: MlflowClient, at: str
) -> None:
    """A process dies between the trace and its file; the next one finds the trace by the exchange's id."""
    Log(project).keep(exchange(approved=True, id="0123456789abcdef"))
    code = f"""
import os
from pathlib import Path
from fintune.tracking.client import connect
from fintune.usage import exchanges
if {at!r} == "after the trace":
    exchanges.Log._write = lambda *_: os._exit(9)
else:
    exchanges.mlflow.log_feedback = lambda log=exchanges.mlflow.log_feedback, **k: (log(**k), os._exit(9))
exchanges.Log(Path({str(project)!r})).send(connect(Path({str(project)!r})))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=project, env=environment, check=False)
    assert done.returncode == 9
    assert Log(project).send(client) == 1
    (found,) = exchanges(client)
    assert found.approved is True
    assert len(client.get_trace(str(found.trace)).info.assessments) == 1


def test_a_file_that_is_no_exchange_is_named_and_stops_nothing(
    project: Path, client: MlflowClient, caplog: pytest.LogCaptureFixture
) -> None:
    log = Log(project)
    log.keep(exchange())
    (log.folder / "torn.json").write_text('{"question": ')
    assert log.send(client) == 1
    assert "torn.json: no exchange" in caplog.text
    assert (log.folder / "torn.json").is_file()


def test_a_reviewer_s_word_in_mlflow_counts(project: Path, client: MlflowClient) -> None:
    """Corrections can be written in MLflow's UI as well; what a program says does not count."""
    import mlflow
    from mlflow.entities import AssessmentSource

    log, said = Log(project), exchange()
    log.keep(said)
    log.send(client)
    assert said.trace is not None
    machine, human = AssessmentSource("LLM_JUDGE", "judge"), AssessmentSource("HUMAN", "reviewer")
    mlflow.log_feedback(trace_id=said.trace, name="approved", value=True, source=machine)
    (found,) = exchanges(client)
    assert found.approved is None
    mlflow.log_expectation(
        trace_id=said.trace, name="expected_response", value="A loan, traded.", source=human
    )
    (found,) = exchanges(client)
    assert found.correction == "A loan, traded."
