"""Use of a version as its traces tell it: numbers, and questions unlike the training data."""

import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from mlflow.tracking import MlflowClient

from fintune import paths
from fintune.data.minhash import shingles
from fintune.data.tables import write_rows
from fintune.tracking.client import connect
from fintune.usage.drift import new_shares, use_of
from fintune.usage.exchanges import Exchange, Log

NEWS = ["Selaco Motors raised its outlook.", "Norock Motors lost a client.", "Daragan pays a fine."]


@pytest.fixture
def client(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "params.yaml").touch()
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / "mlflow.db").write_bytes(empty_store.read_bytes())
    for name, some in (("train", NEWS * 2), ("test", ["Norock Motors raised its outlook again."])):
        rows = [{"instruction": "", "input": text, "output": "x"} for text in some]
        write_rows(paths.rows(paths.SPLIT, name), rows)
    return connect(tmp_path)


def version(number: int, registered: float) -> SimpleNamespace:
    at = int(registered * 1000)
    return SimpleNamespace(name="financial-qa", version=number, creation_timestamp=at)


def test_use_is_counted_since_the_registration(client: MlflowClient, tmp_path: Path) -> None:
    now, log = time.time(), Log(tmp_path)
    given = [
        ("financial-qa/3", now, {"approved": True}),
        ("financial-qa/3", now, {"approved": False, "correction": "Yes."}),
        ("financial-qa/3", now, {"ended": False}),
        ("financial-qa/3", now, {"error": "out of memory", "ended": False}),
        ("financial-qa/3", now, {"question": "Quel est le prix du beurre à Paris?"}),
        ("financial-qa/3", now - 900, {"approved": True}),  # of a registry that was restored
        ("financial-qa/2", now, {"approved": True}),
    ]
    for model, at, values in given:
        said = {"question": NEWS[0], "model": model, "decoding": {}, "at": at, "ended": True}
        log.keep(Exchange(**(said | values)))  # type: ignore[arg-type]
    log.send(client)
    told = use_of(client, version(3, now - 60))
    assert told is not None
    lines = [line.split() for line in told.splitlines()]
    assert lines[1:5] == [
        ["answers", *["4", "of", "5;", "1", "failed"]],
        ["approved", *["1", "of", "2", "judged"]],
        ["corrected", *["1", "of", "5"]],
        [*["did", "not", "end"], *["1", "of", "4"]],
    ]
    assert lines[5] == [
        "unlike",
        "1",
        "of",
        "2",
        "questions",
        "are",
        "unlike",
        "the",
        "training",
        "data",
    ]
    assert lines[6][2:6] == ["quel", "est", "le", "prix"]
    assert len(lines) == 7
    assert use_of(client, version(7, now)) is None


def test_a_share_is_of_what_no_training_question_has() -> None:
    known = np.unique(shingles(["profit fell", "revenue rose"])[0])
    assert new_shares(["profit fell", "profit rose", "xyzzy"], known) == [0, 3 / 9, 1]
    assert new_shares([], known) == []
