"""Paths of the files that pass between stages, and of the project's configuration and databases."""

from pathlib import Path

PIPELINE = Path("dvc.yaml")
LOCK = Path("dvc.lock")
DVC_CONFIG = (Path(".dvc/config"), Path(".dvc/config.local"))

DEMO_ASSETS = Path("assets")
GENERAL_TEXT = Path("assets/general-text.jsonl")

DATA = Path("data")
OWN_DATA = DATA / "source"
COLLECTED = OWN_DATA / "collected.parquet"
RAW = DATA / "raw"
RAW_ROWS = RAW / "qa.parquet"
RAW_COLLECTED = RAW / "collected.parquet"  # a copy, where it is a source
MANIFEST = RAW / "manifest.json"
DROPPED = Path("dropped.csv")  # in each of the three folders of rows
SPLIT = DATA / "split"
FORMATTED = DATA / "formatted"

ADAPTER = Path("models/adapter")
RUN = Path("models/run.json")
MERGED = Path("models/merged")

REPORTS = Path("reports")
SPLIT_METRICS = REPORTS / "split.json"
FORMAT_METRICS = REPORTS / "format.json"
TRAIN_METRICS = REPORTS / "train.json"
TRAIN_CURVE = REPORTS / "train_curve.csv"
VALIDATION_CURVE = REPORTS / "validation_curve.csv"  # separate: DVC plots an empty cell as 0
EVALUATION = REPORTS / "evaluation.json"
EVALUATION_PAGE = REPORTS / "evaluation.html"
PREDICTIONS = REPORTS / "predictions.parquet"
ROW_LOSS = REPORTS / "row_loss.csv"
EXPORT = REPORTS / "export.json"

SCRATCH = Path(".checkpoints")
MLFLOW_DATABASE = Path("mlflow.db")
MLFLOW_ARTIFACTS = Path("mlartifacts")
SEARCH_DATABASE = Path("search.db")
EXCHANGES = Path(".exchanges")  # those that MLflow does not have yet


def rows(folder: Path, split: str) -> Path:
    """Return the path of a split's rows in `folder`; a split is train, validation or test."""
    return folder / f"{split}.parquet"
