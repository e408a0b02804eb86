"""Collected questions are found in the formatted rows."""

from pathlib import Path

import pyarrow as pa
import pytest

from fintune import paths
from fintune.data.tables import SPLITS, write_rows
from fintune.evaluation.collected import collected_rows


def test_rows_of_collected_questions_are_found_in_the_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another answer to a collected question is none of them."""
    monkeypatch.chdir(tmp_path)
    assert collected_rows().count == 0

    def row(question: str, answer: str) -> dict[str, str]:
        return {"instruction": "Answer.", "input": question, "output": answer}

    kept = {"train": [row("a", "1"), row("a", "2"), row("x", "9")], "test": [row("b", "3")]}
    formatted = {"prompt": "p", "completion": "c"}
    for split in SPLITS:
        rows = [each | formatted for each in kept.get(split, [row("y", "9")])]
        columns = dict.fromkeys(rows[0], pa.string())
        write_rows(paths.rows(paths.FORMATTED, split), rows, columns)
    asked = [row("a", "1"), row("b", "3"), row("c", "4")]
    columns = dict.fromkeys((*asked[0], "answered"), pa.string())
    write_rows(paths.RAW_COLLECTED, [each | {"answered": "0"} for each in asked], columns)
    found = collected_rows()
    assert found.count == 3
    assert [(each["input"], each["output"], each["split"]) for each in found.rows] == [
        ("a", "1", "train"),
        ("b", "3", "test"),
    ]
    assert all(each["answered"] == "0" and each["prompt"] == "p" for each in found.rows)
