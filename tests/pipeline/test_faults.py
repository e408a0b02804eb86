"""Faults while stages run: no server, a kill, a lost run, wrong values, a bad merge."""

import contextlib
import csv
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from fintune.reports import whole
from support.project import SAMPLED, Project
from support.servers import failing_proxy

pytestmark = pytest.mark.end_to_end

LIMIT = 300  # seconds until a process counts as hung
POLL = 0.02  # seconds between polls


@pytest.fixture(scope="module")
def formatted(make_project: Callable[..., Project]) -> Project:
    """Make a project with formatted data; dropout makes training depend on the random state."""
    project = make_project(train__max_steps=12, train__lora__dropout=0.1)
    for stage in ("fetch", "split", "format"):
        project.stage(stage)
    return project


@pytest.fixture(scope="module")
def trained(formatted: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Copy the project and train it without interruption."""
    project = copy(formatted, tmp_path_factory.mktemp("trained"))
    project.stage("train")
    return project


def copy(project: Project, folder: Path) -> Project:
    shutil.copytree(project.folder, folder / "project")
    return Project(folder / "project")


def client_of(project: Project) -> MlflowClient:
    uri = f"sqlite:///{project / 'mlflow.db'}"
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def all_runs(client: MlflowClient) -> list[Run]:
    return list(client.search_runs([each.experiment_id for each in client.search_experiments()]))


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def curve_of(project: Project, name: str) -> dict[int, float]:
    with (project / "reports/train_curve.csv").open() as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row[name]}


def logged_curve(client: MlflowClient, run_id: str, name: str) -> dict[int, float]:
    return {point.step: point.value for point in client.get_metric_history(run_id, f"curve/{name}")}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(holds: Callable[[], bool], process: subprocess.Popen[bytes], what: str) -> None:
    """Poll until something holds; fail if the process ends or `LIMIT` passes first."""
    end = time.monotonic() + LIMIT
    while not holds():
        assert process.poll() is None, f"ended with {process.returncode} before: {what}"
        assert time.monotonic() < end, f"still not after {LIMIT} s: {what}"
        time.sleep(POLL)


def test_training_without_its_server_stops_before_anything_is_loaded(formatted: Project) -> None:
    address = f"127.0.0.1:{free_port()}"
    begun = time.monotonic()
    done = formatted.stage(
        "train", check=False, MLFLOW_TRACKING_URI=f"http://user:secret@{address}"
    )
    assert time.monotonic() - begun < 60  # mostly imports; the client would retry for minutes
    assert done.returncode == 1
    assert f"error: no MLflow server responds at http://{address}" in done.stderr
    assert "user" not in done.stderr.replace("unset", "") and "secret" not in done.stderr
    assert "Traceback" not in done.stderr
    assert "device:" not in done.stderr and "Loading" not in done.stderr
    assert not (formatted / "models").exists()


def whole_checkpoints(project: Project) -> list[int]:
    """Return the steps of the complete checkpoints; their state is the last file of a save."""
    steps = []
    for state in project.folder.glob(".checkpoints/*/checkpoint-*/trainer_state.json"):
        with contextlib.suppress(OSError, ValueError):
            steps.append(int(read_json(state)["global_step"]))
    return sorted(steps)


def test_a_killed_training_goes_on_to_the_same_result(
    formatted: Project, trained: Project, tmp_path: Path
) -> None:
    project = copy(formatted, tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "stages.train"],
        cwd=project.folder,
        env=project.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: bool(whole_checkpoints(project)), process, "the first checkpoint")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (project / "models/adapter").exists(), "the kill came too late"
    (record,) = project.folder.glob(".checkpoints/*/run_id")
    run_id = record.read_text()
    reached = whole_checkpoints(project)[-1]

    again = project.stage("train")

    assert f"checkpoint-{reached}" in again.stderr.split("going on from ")[1].splitlines()[0]
    resumed, unbroken = (
        whole(read_json(each / "reports/train.json")) for each in (project, trained)
    )
    for key in ("train_loss", "validation_loss", "steps", "best_step", "trainable_parameters"):
        assert resumed[key] == pytest.approx(unbroken[key], rel=1e-5), key
    for name in ("loss", "validation_loss", "learning_rate"):
        expected = curve_of(trained, name)
        assert curve_of(project, name) == pytest.approx(expected, rel=1e-5)
        assert logged_curve(client_of(project), run_id, name) == pytest.approx(expected, rel=1e-5)
    assert read_json(project / "models/run.json")["run_id"] == run_id
    (run,) = all_runs(client_of(project))
    assert (run.info.run_id, run.info.status) == (run_id, "FINISHED")
    assert len(list(project.folder.glob(".checkpoints/*/finished"))) == 1  # until dvc.lock has it


def test_a_run_that_mlflow_lost_is_logged_again_once(trained: Project, tmp_path: Path) -> None:
    project = copy(trained, tmp_path)
    (project / "mlflow.db").unlink()
    shutil.rmtree(project / "mlartifacts")
    project.stage("evaluate")
    client = client_of(project)
    (run,) = all_runs(client)
    record = read_json(project / "models/run.json")
    assert run.info.run_id != record["run_id"] == run.data.tags["first_run_id"]
    assert run.info.status == "FINISHED"
    assert run.data.params == record["params"] != {}
    assert set(run.data.tags) >= set(record["tags"])
    for name in ("loss", "validation_loss", "learning_rate"):
        expected = curve_of(project, name)
        assert logged_curve(client, run.info.run_id, name) == pytest.approx(expected)
    finals = whole(read_json(project / "reports/train.json"))
    assert {k: v for k, v in run.data.metrics.items() if k in finals} == pytest.approx(finals)
    (model,) = client.get_run(run.info.run_id).outputs.model_outputs
    stored = client.get_logged_model(model.model_id).artifact_location.removeprefix("file://")
    name = "adapter_model.safetensors"
    assert (Path(stored) / name).read_bytes() == (project / "models/adapter" / name).read_bytes()

    project.stage("evaluate")

    (still,) = all_runs(client)
    assert still.info.run_id == run.info.run_id
    assert still.data.metrics["tuned/loss"] == pytest.approx(run.data.metrics["tuned/loss"])


def test_a_strict_gate_fails_the_stage_after_all_is_written(
    trained: Project, tmp_path: Path
) -> None:
    project = copy(trained, tmp_path)
    project.set(evaluate__gate__strict=True)
    done = project.stage("evaluate", check=False)
    assert done.returncode == 1
    assert "error: evaluate.gate: failed: " in done.stderr and "Traceback" not in done.stderr
    report = whole(read_json(project / "reports/evaluation.json"))
    assert report["gate"]["passed"] is False
    for name in ("evaluation.html", "predictions.parquet", "row_loss.csv"):
        assert (project / "reports" / name).stat().st_size > 0
    (run,) = all_runs(client_of(project))
    assert run.data.metrics["tuned/loss"] == pytest.approx(report["tuned"]["loss"])
    logged = {file.path for file in client_of(project).list_artifacts(run.info.run_id)}
    assert {"evaluation.html", "evaluation.json", "predictions.json"} <= logged


def test_the_champion_stays_until_something_is_no_worse(trained: Project, tmp_path: Path) -> None:
    """A first champion, the same adapter again, a worse adapter, and one whose champion is lost."""
    project = copy(trained, tmp_path)
    rules = {
        "min_perplexity_reduction": None,
        "min_stop_rate": None,
        "max_loop_rate": None,
        "min_accuracy_gain": None,
        "max_loss_above_champion": 0.0,
    }
    project.set_all({f"evaluate.gate.{rule}": limit for rule, limit in rules.items()})

    def evaluate() -> dict[str, Any]:
        project.stage("evaluate")
        return whole(read_json(project / "reports/evaluation.json"))

    assert "no champion yet" in evaluate()["champion"]["reason"]
    project.stage("merge_export")
    first = client_of(project).get_model_version_by_alias("financial-qa", "champion")
    assert evaluate()["champion"]["reason"] == "version 1 is this very adapter"
    best = whole(read_json(project / "reports/evaluation.json"))["tuned"]

    project.set(train__max_steps=1)
    project.stage("train")
    report = evaluate()
    assert report["champion"]["compared"] and report["champion"]["run"] == first.run_id
    assert report["champion"]["metrics"] == pytest.approx(best, rel=1e-3)
    assert report["champion"]["improvement"]["loss"]["value"] < 0
    broken = [rule["rule"] for rule in report["gate"]["rules"] if not rule["passed"]]
    assert broken == ["max_loss_above_champion"]
    project.stage("merge_export")
    aliases = client_of(project).get_registered_model("financial-qa").aliases
    assert {alias: str(v) for alias, v in aliases.items()} == {"champion": "1", "candidate": "2"}

    with contextlib.closing(sqlite3.connect(project / "mlflow.db")) as database, database:
        lost = ("file:///nowhere", first.run_id)
        model = "update logged_models set artifact_location = ? where source_run_id = ?"
        assert database.execute(model, lost).rowcount == 1
    done = project.stage("evaluate")
    assert "the champion of financial-qa could not be fetched" in done.stderr
    report = whole(read_json(project / "reports/evaluation.json"))
    assert report["champion"]["broken"] and not report["gate"]["passed"]


@pytest.fixture(scope="module")
def server(
    empty_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path]]:
    """Run a tracking server on loopback; yield its address and its artifact folder."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(empty_store, folder / "server.db")
    address, artifacts = f"http://127.0.0.1:{(port := free_port())}", folder / "artifacts"
    options = {
        "host": "127.0.0.1",
        "port": str(port),
        "workers": "1",
        "backend-store-uri": f"sqlite:///{folder / 'server.db'}",
        "artifacts-destination": str(artifacts),
    }
    arguments = [text for key, value in options.items() for text in (f"--{key}", value)]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *arguments],
            cwd=folder,
            stdout=log,
            stderr=log,
            start_new_session=True,  # its workers must end with it
        )
    try:
        wait_until(lambda: responds(f"{address}/health"), process, "the server")
        yield address, artifacts
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def responds(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def test_a_server_gets_the_run_and_the_version(
    trained: Project, server: tuple[str, Path], tmp_path: Path
) -> None:
    project = copy(trained, tmp_path)
    address, artifacts = server
    for stage in ("evaluate", "merge_export"):
        project.stage(stage, MLFLOW_TRACKING_URI=address)
    client = MlflowClient(tracking_uri=address, registry_uri=address)
    (run,) = all_runs(client)
    record = read_json(project / "models/run.json")
    assert run.data.tags["first_run_id"] == record["run_id"]
    assert run.data.params == record["params"]
    assert {"train_loss", "tuned/loss", "merged_loss"} <= set(run.data.metrics)
    assert logged_curve(client, run.info.run_id, "loss") == pytest.approx(curve_of(project, "loss"))
    (stored,) = artifacts.rglob("adapter_model.safetensors")
    assert (
        stored.read_bytes() == (project / "models/adapter/adapter_model.safetensors").read_bytes()
    )
    version = client.get_model_version_by_alias("financial-qa", "candidate")
    assert (str(version.version), version.run_id) == ("1", run.info.run_id)
    assert (project / "models/merged/model.safetensors").is_file()
    (local,) = all_runs(client_of(project))
    assert "tuned/loss" not in local.data.metrics


def test_every_wrong_parameter_is_named_at_once(formatted: Project, tmp_path: Path) -> None:
    project = copy(formatted, tmp_path)
    project.set_all({"train.lerning_rate": 1e-3, "split.seed": "thirteen", "format.max_tokens": 3})
    done = project.stage("fetch", check=False)
    assert done.returncode == 1
    first, *problems = done.stderr.strip().splitlines()
    assert first == "error: params.yaml: 3 problems"
    assert len(problems) == 3
    assert "  train.lerning_rate: unknown key; did you mean learning_rate?" in problems
    assert any(p.startswith("  split.seed: ") and "thirteen" in p for p in problems)
    assert any(p.startswith("  format.max_tokens: ") and p.endswith("not 3") for p in problems)


@pytest.mark.parametrize(
    ("config", "gguf", "message"),
    [
        ({"max_position_embeddings": 40}, [], "longer than the 40 that the base can read"),
        ({"model_type": "t5"}, [], "a base of type t5 is not supported: it is no causal language"),
        ({"model_type": "bert"}, [], "type bert is not supported: its tokens see those after them"),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}},
            [],
            "is computed by code of its own (auto_map in its config.json), which is never run",
        ),
        ({"model_type": "nosuch"}, [], "nosuch"),
        (
            {"model_type": "olmo_hybrid", "architectures": ["OlmoHybridForCausalLM"]},
            ["f16"],
            "a base of type olmo_hybrid with its tokenizer cannot be written as GGUF",
        ),
    ],
)
def test_a_base_that_cannot_be_used_is_refused_by_format_and_check(
    formatted: Project,
    tiny_base: Path,
    tmp_path: Path,
    config: dict[str, Any],
    gguf: list[str],
    message: str,
) -> None:
    project = copy(formatted, tmp_path)
    shutil.copytree(tiny_base, project / "another")
    file = project / "another/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    project.set(base__model="another", merge_export__gguf=gguf)
    command = ("python", "-m", "fintune", "check", "--only", "base", "--json")
    told = [project.run(*command, check=False)]
    if config.get("model_type") not in ("bert", "nosuch"):  # format asks check, as for t5
        told.append(project.stage("format", check=False))
    for done in told:
        assert done.returncode == 1 and "Traceback" not in done.stderr
        said = [f["said"] for f in json.loads(done.stdout)["findings"]] if done.stdout else []
        assert message in "\n".join([*said, done.stderr.rpartition("error: ")[2]])
        assert "trust_remote_code" not in done.stdout + done.stderr and "[y/N]" not in done.stdout


def test_a_server_that_fails_at_registration_is_named(
    trained: Project, server: tuple[str, Path], tmp_path: Path
) -> None:
    """A proxy passes all requests on, and answers those that register with 503."""
    project = copy(trained, tmp_path)
    with failing_proxy(server[0], "registered-models") as address:
        project.stage("evaluate", MLFLOW_TRACKING_URI=address)
        done = project.stage("merge_export", check=False, MLFLOW_TRACKING_URI=address)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"error: MLflow at {address} failed" in done.stderr


def test_a_record_that_was_cut_is_named(trained: Project, tmp_path: Path) -> None:
    project = copy(trained, tmp_path)
    (project / "models/run.json").write_text("")
    done = project.stage("evaluate", check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: models/run.json: empty or damaged" in done.stderr


def test_a_loss_that_is_not_a_number_leaves_the_adapter(trained: Project, tmp_path: Path) -> None:
    project = copy(trained, tmp_path)
    weights = project / "models/adapter/adapter_model.safetensors"
    before = weights.read_bytes()
    project.set(train__learning_rate=1e30)
    done = project.stage("train", check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: train: the loss is nan at step 3; lower train.learning_rate" in done.stderr
    assert weights.read_bytes() == before
    assert {run.info.status for run in all_runs(client_of(project))} == {"FINISHED", "FAILED"}


def test_a_merge_that_is_another_model_changes_nothing(trained: Project, tmp_path: Path) -> None:
    project = copy(trained, tmp_path)
    project.set(merge_export__max_loss_difference=1e-9, merge_export__weights="original")
    decoding = SAMPLED | {"max_new_tokens": 8}
    (project / "reports/evaluation.json").write_text(json.dumps({"decoding": decoding}))
    (project / "models/merged").mkdir()
    (project / "models/merged/config.json").write_text("former")
    before = sorted(path.name for path in (project / "models").iterdir())
    done = project.stage("merge_export", check=False)
    assert done.returncode == 1
    assert "merge_export.max_loss_difference: 1e-09" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in (project / "models/merged").iterdir()] == ["config.json"]
    assert (project / "models/merged/config.json").read_text() == "former"
    assert sorted(path.name for path in (project / "models").iterdir()) == before
    assert not (project / "reports/export.json").exists()
    assert client_of(project).search_registered_models() == []


def test_a_searched_learning_rate_is_recorded(formatted: Project, tmp_path: Path) -> None:
    """The parameter stays `auto`, as dvc.lock has it; the adapter, the reports and MLflow have the number."""
    project = copy(formatted, tmp_path)
    project.set(train__learning_rate="auto")
    done = project.stage("train", check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: train.learning_rate: auto: a search may take 15% of the steps" in done.stderr
    assert "12 that is too few" in done.stderr
    project.set(train__max_steps=120, train__epochs=99.0, train__validate_every_steps=60)
    done = project.stage("train")
    finals = whole(read_json(project / "reports/train.json"))
    rate = finals["learning_rate"]
    assert f"learning rate: {rate:g}, by " in done.stderr
    assert " for 5 steps; found in 18 steps (15 % of the training's)" in done.stderr
    assert finals["search_steps"] == 18 and finals["steps"] == 120
    record = read_json(project / "models/run.json")
    assert record["params"]["train.learning_rate"] == "auto"
    assert record["tags"]["learning_rate"] == f"{rate:g}"
    search = record["learning_rate_search"]
    assert search["rate"] == rate and len(search["losses"]) == 8
    assert read_json(project / "models/adapter/training.json")["train"]["learning_rate"] == rate
    client = client_of(project)
    run = client.get_run(record["run_id"])
    assert run.data.params["train.learning_rate"] == "auto"
    assert run.data.metrics["learning_rate"] == pytest.approx(rate)
    assert run.data.metrics["search_steps"] == 18
    kept = client.download_artifacts(run.info.run_id, "learning_rate_search.json", str(tmp_path))
    rows = zip(read_json(Path(kept))["losses"], search["losses"], strict=True)
    assert all(logged == pytest.approx(row, rel=1e-5) for logged, row in rows)
    assert (
        f"Learning rate {rate:g}, found in 18 further steps" in run.data.tags["mlflow.note.content"]
    )
