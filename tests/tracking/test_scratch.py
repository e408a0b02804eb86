"""The scratch folder of a training: resumed, swept, and kept until dvc.lock has the adapter."""

from pathlib import Path

import mlflow
import pytest
from filelock import FileLock
from mlflow.tracking import MlflowClient

from fintune.errors import UserError
from fintune.lineage import folder_md5
from fintune.tracking.client import connect
from fintune.tracking.runs import training_run
from fintune.tracking.scratch import forget_locked, keep_until_locked


@pytest.fixture
def client(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlflow.db").write_bytes(empty_store.read_bytes())
    return connect(tmp_path)


def train(scratch: Path, fault: BaseException | None = None) -> str:
    """Stand for a training; return its run."""
    with training_run(scratch, "name", None) as (run_id, live):
        live.add(1, {"loss": 1.0})
        if fault:
            raise fault
    return run_id


def die(scratch: Path) -> str:
    """Stand for a training that is killed: nothing ends its run."""
    run_id = str(mlflow.start_run(log_system_metrics=False).info.run_id)
    mlflow.tracking.fluent._active_run_stack.get().clear()
    scratch.mkdir(parents=True)
    (scratch / "run_id").write_text(run_id)
    return run_id


def status(client: MlflowClient, run_id: str) -> str:
    return str(client.get_run(run_id).info.status)


def test_the_run_of_a_killed_training_goes_on_or_is_ended(
    client: MlflowClient, tmp_path: Path
) -> None:
    same, other = (die(tmp_path / ".checkpoints" / name) for name in ("same", "other"))
    assert status(client, same) == status(client, other) == "RUNNING"
    assert train(tmp_path / ".checkpoints/same") == same
    assert (status(client, same), status(client, other)) == ("FINISHED", "KILLED")
    assert (tmp_path / ".checkpoints/other/run_id").is_file()  # its checkpoints are of use yet
    assert train(tmp_path / ".checkpoints/other") == other
    assert status(client, other) == "FINISHED"


@pytest.mark.parametrize(
    ("fault", "ended"), [(KeyboardInterrupt(), "KILLED"), (UserError("nan"), "FAILED")]
)
def test_a_run_ends_as_its_training_does(
    client: MlflowClient, tmp_path: Path, fault: BaseException, ended: str
) -> None:
    with pytest.raises(type(fault)):
        train(tmp_path / ".checkpoints/a", fault)
    assert status(client, (tmp_path / ".checkpoints/a/run_id").read_text()) == ended


def test_the_same_training_is_not_done_twice_at_once(client: MlflowClient, tmp_path: Path) -> None:
    alive = die(tmp_path / ".checkpoints/a")
    with FileLock(tmp_path / ".checkpoints/a/lock"):
        with pytest.raises(UserError, match="another process trains with these parameters"):
            train(tmp_path / ".checkpoints/a")
        train(tmp_path / ".checkpoints/b")
        assert status(client, alive) == "RUNNING"


def test_a_finished_training_is_kept_until_the_lock_has_its_adapter(
    client: MlflowClient, tmp_path: Path
) -> None:
    (tmp_path / "models/adapter").mkdir(parents=True)
    (tmp_path / "models/adapter/weights").write_text("of now")
    scratch = tmp_path / ".checkpoints/a"
    train(scratch)
    keep_until_locked(scratch)

    def lock(md5: str) -> None:
        out = f"{{path: models/adapter, md5: {md5}}}"
        (tmp_path / "dvc.lock").write_text(f"stages: {{train: {{outs: [{out}]}}}}")

    forget_locked(tmp_path)
    lock("of-before.dir")
    forget_locked(tmp_path)
    assert scratch.is_dir()
    lock(folder_md5(tmp_path / "models/adapter"))
    forget_locked(tmp_path)
    assert not scratch.exists()


def test_another_training_sweeps_a_finished_one(client: MlflowClient, tmp_path: Path) -> None:
    (tmp_path / "models/adapter").mkdir(parents=True)
    train(tmp_path / ".checkpoints/a")
    keep_until_locked(tmp_path / ".checkpoints/a")
    train(tmp_path / ".checkpoints/b")
    assert [path.name for path in (tmp_path / ".checkpoints").iterdir() if path.is_dir()] == ["b"]
