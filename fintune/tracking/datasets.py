"""A run's data sets: name, digest, columns and path, not their rows."""

import warnings
from pathlib import Path
from typing import Any

import mlflow
import pyarrow as pa
from mlflow.entities import Dataset, DatasetInput, InputTag
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

COLUMNS = ["instruction", "input", "output"]


def describe_table(
    rows: pa.Table | list[dict[str, Any]], name: str, source: Path
) -> dict[str, str]:
    """Describe a table as MLflow does; `log_data_set` logs the description, also without the rows.

    Args:
        name: train, validation or test; it is the context, too.
    """
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows)
    frame = table.select(COLUMNS).to_pandas()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow has two readers for a local file
        described = mlflow.data.from_pandas(frame, source=str(source), name=name)
    return {key: str(value) for key, value in described.to_dict().items() if value is not None}


def log_data_set(client: MlflowClient, run_id: str, described: dict[str, str]) -> None:
    """Log a data set as an input of a run, once."""
    context = [InputTag(MLFLOW_DATASET_CONTEXT, described["name"])]
    client.log_inputs(run_id, [DatasetInput(Dataset(**described), context)])
