"""The adapter as a logged model: whole or not there, linked once, with the metrics that the run has."""

import json
import subprocess
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.tracking import MlflowClient

from fintune import paths
from fintune.tracking.datasets import describe_table, log_data_set
from fintune.tracking.models import begin_model, finish_model, linked_points, model_of_run
from fintune.tracking.runs import log_training, name_of_run

METRICS = {"train_loss": 1.5, "validation_loss": 1.0, "best_step": 20.0, "steps": 30.0}
METRICS |= {"seconds": 3.0, "tokens_per_second": 9.0}
ROWS = [{"instruction": "Answer.", "input": "a?", "output": "b"}]


@pytest.fixture
def record(client: MlflowClient) -> dict[str, Any]:
    """Write an adapter, and describe a run that has just begun."""
    paths.ADAPTER.mkdir(parents=True)
    (paths.ADAPTER / "adapter_model.safetensors").write_bytes(b"weights")
    (paths.ADAPTER / "adapter_model.safetensors").chmod(0o444)  # as DVC's links are
    run = client.create_run("1", run_name="base r16 lr0.003")
    data = [describe_table(ROWS, name, Path("data")) for name in ("train", "validation")]
    params = {"train.lora.r": "16", "fetch.source": "x" * 3000}
    return {"run_id": run.info.run_id, "params": params, "tags": {}, "datasets": data}


def test_a_training_makes_a_model_that_is_the_adapter(
    client: MlflowClient, record: dict[str, Any], tmp_path: Path
) -> None:
    """It is logged twice, as after a kill."""
    run_id = record["run_id"]
    for _ in range(2):
        log_training(client, record, METRICS, [])
    (model,) = client.search_logged_models(["1"])
    assert model.name == "base r16 lr0·003" and model.status == "READY"
    assert model.params == record["params"]
    assert {each.key: each.value for each in model.metrics} == METRICS
    assert len(model.metrics) == len(METRICS)
    assert all(len(client.get_metric_history(run_id, key)) == 1 for key in METRICS)
    run = client.get_run(run_id)
    (output,) = run.outputs.model_outputs
    assert (output.model_id, output.step) == (model.model_id, 20)
    got = mlflow.artifacts.download_artifacts(f"models:/{model.model_id}", dst_path=str(tmp_path))
    assert (Path(got) / "adapter_model.safetensors").read_bytes() == b"weights"
    assert not any(each.path == "adapter" for each in client.list_artifacts(run_id))
    contexts = {
        each.dataset.name: [tag.value for tag in each.tags] for each in run.inputs.dataset_inputs
    }
    assert contexts == {"train": ["train"], "validation": ["validation"]}


def test_a_model_that_was_not_uploaded_to_its_end_is_none(
    client: MlflowClient, record: dict[str, Any]
) -> None:
    run_id = record["run_id"]
    model = begin_model(client, record)
    assert model_of_run(client, run_id) is None
    assert begin_model(client, record).model_id == model.model_id
    finish_model(client, run_id, model, 20)
    found = model_of_run(client, run_id)
    assert found and found.model_id == model.model_id


def test_metrics_of_a_model_are_those_of_its_run(
    client: MlflowClient, record: dict[str, Any]
) -> None:
    """A kill may have left some to one of them, and a second evaluation measures others."""
    run_id, model = record["run_id"], begin_model(client, record)
    client.log_metric(run_id, "tuned/loss", 2.0)
    for value in (2.0, 2.0, 1.0, 2.0):
        points = linked_points(client, run_id, model, {"tuned/loss": value}, ("test", "abc"))
        client.log_batch(run_id, metrics=points)
    history = [point.value for point in client.get_metric_history(run_id, "tuned/loss")]
    assert history == [2.0, 1.0, 2.0]
    linked = client.get_logged_model(model.model_id).metrics
    assert sorted(each.value for each in linked) == [1.0, 2.0, 2.0]
    assert {(each.dataset_name, each.dataset_digest) for each in linked} == {("test", "abc")}
    assert linked_points(client, run_id, model, {"tuned/loss": 2.0}) == []


def test_a_data_set_is_logged_from_its_description(
    client: MlflowClient, record: dict[str, Any]
) -> None:
    """The description is that of MLflow, and comes back from models/run.json without the rows."""
    described = json.loads(json.dumps(describe_table(ROWS, "test", Path("data/test.parquet"))))
    for _ in range(2):
        log_data_set(client, record["run_id"], described)
    (logged,) = client.get_run(record["run_id"]).inputs.dataset_inputs
    assert logged.dataset.to_dictionary() == described
    assert json.loads(described["profile"])["num_rows"] == 1


BEFORE = "train:\n  learning_rate: 0.003\n  lora:\n    r: 16\nsplit:\n  seed: 0\n"


@pytest.mark.parametrize(
    ("now", "name"),
    [
        (BEFORE, "loopy-fox"),
        (BEFORE.replace("0.003", "3e-05"), "learning_rate=3e-05 (loopy-fox)"),
        (
            BEFORE.replace("16", "8").replace("seed: 0", "seed: 1"),
            "lora.r=8, split.seed=1 (loopy-fox)",
        ),
        (BEFORE + "fetch: {a: 1, b: 2, c: 3, d: x, e: 5}\n", 'fetch.a=1, fetch.b=2, fetch.c=3, '
         'fetch.d="x", 1 more (loopy-fox)'),
    ],
)  # fmt: skip
def test_an_experiment_is_named_after_what_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, now: str, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(BEFORE)
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    for command in (("init", "-q"), ("add", "."), (*who, "commit", "-qm", "x")):
        subprocess.run(["git", *command], check=True)
    Path("params.yaml").write_text(now)
    assert name_of_run("base r16") == "base r16"
    monkeypatch.setenv("DVC_EXP_NAME", "loopy-fox")
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", "HEAD")
    assert name_of_run("base r16") == name
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", "0" * 40)  # a shallow clone lacks it
    assert name_of_run("base r16") == "loopy-fox"
