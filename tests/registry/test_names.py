"""Registered models with signs in their names."""

import pytest
from mlflow.tracking import MlflowClient

from fintune.registry.versions import find_version, register, version_of_run


@pytest.mark.parametrize("name", ["Ann's QA", 'the "best"', 'Ann\'s "QA"', "100 % `ours`", "ü"])
def test_a_model_of_any_name_is_registered_once_a_run(client: MlflowClient, name: str) -> None:
    runs = []
    for _ in range(2):
        runs.append(client.create_run("1").info.run_id)
        client.log_text(runs[-1], "x", "adapter/MLmodel")
    for _ in range(2):
        assert register(client, runs[0], name, {"gate": "it's"}, passed=True)[0] == "1"
    assert register(client, runs[1], name, {}, passed=False) == ("2", ["candidate"])
    assert register(client, runs[1], "another", {}, passed=False)[0] == "1"
    assert version_of_run(client, name, runs[0]) == "1"
    assert version_of_run(client, name, "none") is None
    assert find_version(client, f"{name}@champion").run_id == runs[0]
    assert find_version(client, f"{name}/2").run_id == runs[1]
