"""What is made ready before a training."""

from pathlib import Path
from typing import Any

import pytest

from fintune.data import stream
from fintune.data.prompt import encode
from fintune.data.tables import usual_instruction, write_rows
from fintune.errors import RecordError
from fintune.model.batch import TokenRows, lengths_of
from fintune.training.prepare import encode_table

ROWS = [{"prompt": f"Input: {n}?\n<response>", "completion": "so " * (n % 7)} for n in range(50)]


def written(path: Path) -> Path:
    import pyarrow as pa

    write_rows(path, ROWS, dict.fromkeys(("prompt", "completion"), pa.string()))
    return path


@pytest.mark.parametrize("workers", ["1", "2"])
def test_token_rows_are_those_encoded_one_by_one(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, workers: str
) -> None:
    monkeypatch.setenv(stream.WORKERS, workers)
    monkeypatch.setattr(stream.batches, "__defaults__", (None, "", 8, None))  # several batches
    found = encode_table(tokenizer, written(tmp_path / "rows.parquet"), tmp_path / "train.arrow")
    expected = [encode(tokenizer, row["prompt"], row["completion"]) for row in ROWS]
    assert isinstance(found, TokenRows)
    assert list(found) == expected
    assert found[3:20:5] == expected[3:20:5] and found[-1] == expected[-1]
    assert lengths_of(found) == lengths_of(expected)
    with pytest.raises(IndexError):
        found[len(ROWS)]


def test_a_table_without_prompts_is_named(tmp_path: Path, tokenizer: Any) -> None:
    write_rows(tmp_path / "rows.parquet", [{"instruction": "a", "input": "b", "output": "c"}])
    with pytest.raises(RecordError, match=r"rows\.parquet: no column prompt, completion"):
        encode_table(tokenizer, tmp_path / "rows.parquet", tmp_path / "train.arrow")


def test_the_usual_instruction_is_the_most_frequent(tmp_path: Path) -> None:
    """Of equally frequent ones, the first in the alphabet."""
    rows = [{"instruction": text, "input": "", "output": ""} for text in "bbaacbca"]
    write_rows(tmp_path / "rows.parquet", rows)
    assert usual_instruction(tmp_path / "rows.parquet") == "a"
    write_rows(tmp_path / "rows.parquet", rows[:4])
    assert usual_instruction(tmp_path / "rows.parquet") == "a"
