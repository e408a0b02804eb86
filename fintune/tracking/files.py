"""Files on their way to MLflow."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlflow.tracking import MlflowClient


@contextmanager
def writable(path: Path) -> Iterator[Path]:
    """Yield a copy of a file or folder that can be overwritten.

    DVC's hard links are read-only. MLflow's store on disk would copy the mode, and fail to overwrite the
    file the next time.
    """
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / path.name
        if path.is_dir():
            shutil.copytree(path, copy, copy_function=shutil.copyfile)
        else:
            shutil.copyfile(path, copy)
        yield copy


def upload(client: MlflowClient, run_id: str, file: Path) -> None:
    """Log a file as an artifact of a run."""
    with writable(file) as copy:
        client.log_artifact(run_id, str(copy))
