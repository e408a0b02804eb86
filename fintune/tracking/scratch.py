"""The scratch folder of a training: its checkpoints and its run's id, kept until its adapter is safe."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from fintune import paths
from fintune.errors import UserError
from fintune.lineage import folder_md5, locked_stages, output_hashes
from fintune.stage import write_text

RUN_ID, LOCK, FINISHED = "run_id", "lock", "finished"  # files in it


@contextmanager
def own_scratch(client: MlflowClient, scratch: Path) -> Iterator[None]:
    """Hold a training's folder, and sweep those beside it.

    Raises:
        UserError: another process holds it.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(scratch / LOCK).acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{scratch}: another process trains with these parameters, data and code; wait for it"
        ) from None
    with lock:
        for id_file in scratch.parent.glob(f"*/{RUN_ID}"):
            if id_file.parent != scratch:
                _sweep(client, id_file)
        yield


def _sweep(client: MlflowClient, id_file: Path) -> None:
    """End the run of a training whose process died, and remove its folder if it had finished."""
    scratch = id_file.parent
    with suppress(Timeout), FileLock(scratch / LOCK).acquire(timeout=0):
        run_id = existing_run(client, id_file.read_text().strip())
        if run_id and client.get_run(run_id).info.status == "RUNNING":
            client.set_terminated(run_id, "KILLED")
        if (scratch / FINISHED).is_file():
            shutil.rmtree(scratch)


def keep_until_locked(scratch: Path) -> None:
    """Mark a training's folder as finished: it stays until dvc.lock has the adapter.

    A kill before that makes DVC start the training again, and it ends at once with the same adapter and run.
    """
    write_text(scratch / FINISHED, folder_md5(paths.ADAPTER))


def forget_locked(root: Path) -> None:
    """Remove the folder of a training whose adapter dvc.lock has."""
    locked = output_hashes([locked_stages().get("train", {})]).get(f"md5.{paths.ADAPTER}")
    for file in (root / paths.SCRATCH).glob(f"*/{FINISHED}"):
        if file.read_text() == locked:
            shutil.rmtree(file.parent)


def existing_run(client: MlflowClient, run_id: str) -> str | None:
    """Return the id if the store has this run and it is not deleted, else None."""
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return run_id if run.info.lifecycle_stage == "active" else None
