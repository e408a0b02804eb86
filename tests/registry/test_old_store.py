"""Stores of earlier releases: a version is an artifact of its run, and has its figures as tags."""

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from fintune import paths
from fintune.registry.champion import fetch_champion
from fintune.registry.recovery import run_of_adapter
from fintune.registry.versions import (
    adapter_uri,
    download_version,
    find_version,
    register,
    registered_figures,
    version_of_run,
    where_registered,
)
from fintune.tracking.models import model_of_run

METRICS = {"validation_loss": 1.0, "steps": 30.0, "seconds": 3.0, "tokens_per_second": 9.0}
TAGS = {
    "gate": "passed: all",
    "md5.data/split": "s1",
    "tuned_loss": "0.938417",
    "tuned_accuracy": "0.5",
}
WEIGHTS = "adapter_model.safetensors"


def write_adapter(folder: Path, weights: bytes) -> None:
    folder.mkdir(parents=True)
    (folder / WEIGHTS).write_bytes(weights)
    said = {"base": {"model": "base", "revision": None}, "base_fingerprint": "x"}
    (folder / "training.json").write_text(json.dumps(said))
    (folder / "adapter_config.json").write_text('{"trainable_token_indices": null}')


@pytest.fixture
def run_id(client: MlflowClient) -> str:
    """Log and register an adapter by the calls that the last release without logged models made."""
    write_adapter(paths.ADAPTER, b"old weights")
    run_id = str(client.create_run("1", run_name="base r16").info.run_id)
    client.log_param(run_id, "train.lora.r", "16")
    for key, value in METRICS.items():
        client.log_metric(run_id, key, value)
    client.log_artifacts(run_id, str(paths.ADAPTER), "adapter")
    client.set_tag(run_id, "training_logged", "true")
    client.set_terminated(run_id, "FINISHED")
    client.log_text(run_id, "x", "adapter/MLmodel")
    client.create_registered_model("m")
    made = client.create_model_version("m", f"runs:/{run_id}/adapter", run_id, description="First.")
    for key, value in TAGS.items():
        client.set_model_version_tag("m", made.version, key, value)
    for alias in ("candidate", "champion"):
        client.set_registered_model_alias("m", alias, made.version)
    return run_id


@pytest.fixture
def record(run_id: str) -> dict[str, Any]:
    record = {"run_id": run_id, "name": "base r16", "experiment": "e", "tags": {}}
    record["params"] = {"train.lora.r": "16"}
    paths.RUN.write_text(json.dumps(record))
    paths.TRAIN_METRICS.parent.mkdir()
    paths.TRAIN_METRICS.write_text(json.dumps(METRICS))
    paths.TRAIN_CURVE.write_text("step,loss\n1,2.0\n")
    return record


def test_an_old_version_is_found_and_fetched(
    client: MlflowClient, run_id: str, tmp_path: Path
) -> None:
    got = download_version(client, "m@champion", tmp_path)
    assert (got / WEIGHTS).read_bytes() == b"old weights"
    assert where_registered(client, "m", run_id) == "m version 1 (candidate, champion)"
    version = find_version(client, "m/1")
    assert registered_figures(client, version) == {"loss": "0.938417", "accuracy": "0.5"}
    assert adapter_uri(version) == f"runs:/{run_id}/adapter"


def test_an_old_champion_is_compared_with(
    client: MlflowClient, record: dict[str, Any], tmp_path: Path
) -> None:
    write_adapter(tmp_path / "new", b"new weights")
    into = tmp_path / "into"
    into.mkdir()
    found = fetch_champion(client, "m", paths.RUN, tmp_path / "new", into)
    assert found.folder and (found.folder / WEIGHTS).read_bytes() == b"old weights"
    same = fetch_champion(client, "m", paths.RUN, paths.ADAPTER, into)
    assert same.reason == "version 1 is this very adapter"


def test_an_old_run_gets_the_model_that_it_lacks_once(
    client: MlflowClient, record: dict[str, Any]
) -> None:
    """Its parameters, metrics and version stay as they are."""
    run_id = record["run_id"]
    for _ in range(2):
        assert run_of_adapter(client) == run_id
    model = model_of_run(client, run_id)
    assert model and len(client.search_logged_models(["1"])) == 1
    assert model.params == {"train.lora.r": "16"}
    assert {each.key: each.value for each in model.metrics} == METRICS
    assert all(len(client.get_metric_history(run_id, key)) == 1 for key in METRICS)
    assert client.get_run(run_id).info.status == "FINISHED"


def test_an_old_version_stays_the_run_s_version(
    client: MlflowClient, record: dict[str, Any]
) -> None:
    """What people wrote into its description stays, too; the next adapter's version is a model."""
    run_of_adapter(client)
    figures = "\n\n**Evaluated** on 8 rows"
    client.update_model_version("m", "1", "First. Approved by Ann.")
    for figure in (figures, f"{figures} again"):
        said = register(client, record["run_id"], "m", {"gate": "passed"}, True, figure)
        assert said == ("1", ["candidate", "champion"])
    version = client.get_model_version("m", "1")
    assert version.description == f"First. Approved by Ann.{figures} again"
    assert version.source == f"runs:/{record['run_id']}/adapter"
    assert version.tags == TAGS | {"gate": "passed"}
    model = model_of_run(client, record["run_id"])
    assert model and "mlflow.modelVersions" not in model.tags

    new = client.create_run("1").info.run_id
    paths.RUN.write_text(json.dumps(record | {"run_id": new}))
    run_of_adapter(client)
    assert register(client, new, "m", {}, passed=False)[0] == "2"
    version, model = client.get_model_version("m", "2"), model_of_run(client, new)
    assert model and version.source == adapter_uri(version) == f"models:/{model.model_id}"
    assert '"version": "2"' in client.get_logged_model(model.model_id).tags["mlflow.modelVersions"]
    before = client.search_model_versions("name = 'm'")
    assert register(client, new, "m", {}, passed=False)[0] == "2"
    assert len(client.search_model_versions("name = 'm'")) == len(before)
    assert version_of_run(client, "m", new) == "2"
