"""Reading tables in four formats and dropping unusable rows, by reason."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

from fintune.data.records import read_passages, select_records
from fintune.data.tables import read_rows, read_source, write_rows
from fintune.errors import RecordError

ROWS = [
    {"instruction": "Answer.", "input": "What is a bond?", "output": "A loan, in short."},
    {
        "instruction": "Answer.",
        "input": 'A "quoted", split\tone?',
        "output": "Né à Zürich — 5 €, nan.",
    },
]
COLUMNS = {"instruction": "instruction", "input": "input", "output": "output"}


def select(rows: list[dict[str, Any]], invalid_rows: str = "drop", **columns: str | None) -> Any:
    default = "Help." if "instruction" in columns and columns["instruction"] is None else None
    return select_records(rows, COLUMNS | columns, default, invalid_rows, "the source")  # type: ignore[arg-type]


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    frame = pd.DataFrame(rows)
    match path.suffix:
        case ".parquet":
            frame.to_parquet(path)
        case ".csv":
            frame.to_csv(path, index=False)
        case ".json":
            path.write_text(json.dumps(rows))
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", ["parquet", "csv", "json", "jsonl"])
def test_formats_give_the_same_rows(tmp_path: Path, suffix: str) -> None:
    assert read_source(str(written(tmp_path / f"qa.{suffix}", ROWS))) == ROWS


def test_a_url_is_opened_by_fsspec() -> None:
    import fsspec

    with fsspec.open("memory://bucket/qa.jsonl", "w") as file:
        file.write(json.dumps(ROWS[0]))
    assert read_source("memory://bucket/qa.jsonl") == ROWS[:1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("qa.jsonl", '{"a": 1}\n{"a": \n', "line 2: not JSON"),
        ("qa.jsonl", '{"a": 1}\n\n[3]\n', "line 3: not a JSON object"),
        ("qa.json", '{"a": 1}', "list of objects"),
        ("qa.json", "[1", "not a readable json table"),
        ("qa.csv", "a,b\n1\n", "line 2: not as many values"),
        ("qa.csv", "a,b\n1,2,3\n", "line 2: not as many values"),
        ("qa.parquet", "not parquet", "not a readable parquet table"),
        ("qa.xlsx", "", "unknown format '.xlsx'"),
    ],
)
def test_broken_files_are_named_with_the_line(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(RecordError, match=message) as caught:
        read_source(str(path))
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"absent\.csv: cannot be read"):
        read_source(str(tmp_path / "absent.csv"))


def test_unusable_rows_are_dropped_and_counted_by_reason() -> None:
    bad: list[tuple[str, Any]] = [
        ("output", "nan"),
        ("output", " None "),
        ("input", "NULL"),
        ("output", "  \t"),
        ("input", None),
        ("output", float("nan")),
        ("output", 3),
    ]
    rows = [*ROWS, *({**ROWS[0], column: value} for column, value in bad), {"input": "no output?"}]
    records, dropped = select(rows)
    assert records == ROWS
    assert dropped == {"empty": 1, "literal_nan": 3, "missing": 3, "not_text": 1}
    assert len(rows) == len(records) + sum(dropped.values())


def test_a_text_that_only_begins_with_nan_stays() -> None:
    row = {**ROWS[0], "output": "nan bread is not finance"}
    assert select([row]) == ([row], {})


def test_refusing_names_row_column_and_way_out() -> None:
    rows = [ROWS[0], {**ROWS[0], "output": "nan"}]
    with pytest.raises(RecordError, match=r"row 2: output is literal nan.*invalid_rows: drop"):
        select(rows, invalid_rows="refuse")
    assert select(ROWS, invalid_rows="refuse") == (ROWS, {})


def test_columns_are_mapped_and_a_default_instruction_fills_in() -> None:
    rows = [{"question": "Why?", "answer": "Because."}]
    records, _ = select(rows, instruction=None, input="question", output="answer")
    assert records == [{"instruction": "Help.", "input": "Why?", "output": "Because."}]


MORE = {"result": "answer_key", "kind": "topic", "split": "part"}


def test_optional_columns_are_carried_and_may_be_null(tmp_path: Path) -> None:
    """A result or a kind that is null, absent or empty makes no row unusable."""
    given: list[dict[str, Any]] = [
        {"answer_key": "42", "topic": "sums", "part": "train"},
        {"answer_key": None, "topic": float("nan"), "part": "test"},
        {"part": "validation"},
        {"answer_key": " ", "topic": "", "part": "train"},
        {"answer_key": "none", "topic": "nan", "part": "train"},
    ]
    records, dropped = select([{**ROWS[0], **more} for more in given], "refuse", **MORE)
    assert dropped == {}
    nothing = (None, None)
    expected = [("42", "sums"), nothing, nothing, nothing, ("none", "nan")]
    assert [(record["result"], record["kind"]) for record in records] == expected
    assert all({**ROWS[0], **record} == record for record in records)
    write_rows(tmp_path / "qa.parquet", records)
    assert read_rows(tmp_path / "qa.parquet") == records


def test_columns_that_are_not_named_are_not_carried(tmp_path: Path) -> None:
    more = {"result": "42", "kind": "sums", "split": "train"}
    unnamed = dict.fromkeys(more)
    assert select([{**row, **more} for row in ROWS], **unnamed) == select(ROWS)
    records, _ = select([{**row, **more} for row in ROWS], kind="kind")
    assert records == [{**row, "kind": "sums"} for row in ROWS]
    write_rows(tmp_path / "qa.parquet", ROWS)
    assert pq.read_schema(tmp_path / "qa.parquet").names == ["instruction", "input", "output"]


@pytest.mark.parametrize(
    ("names", "split"),
    [
        (["train", "Train", " TRAIN "], "train"),
        (["validation", "valid", "val", "dev", "eval", "VAL", "Dev"], "validation"),
        (["test", "Test"], "test"),
    ],
)
def test_usual_names_of_splits(names: list[str], split: str) -> None:
    records, _ = select([{**ROWS[0], "part": name} for name in names], split="part")
    assert [record["split"] for record in records] == [split] * len(names)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("result", 42, r"row 2: answer_key is not text: 42"),
        ("kind", ["a"], r"row 2: topic is not text: \['a'\]"),
        ("split", 1, r"row 2: part is not text: 1"),
        (
            "split",
            "holdout",
            r"row 2: part is 'holdout', not one of train, validation, test, .*null",
        ),
        ("split", None, r"row 2: part is None, not one of train"),
    ],
)
def test_a_wrong_value_of_an_optional_column_names_the_row(
    column: str, value: Any, message: str
) -> None:
    good = {**ROWS[0], "answer_key": "a", "topic": "b", "part": "train"}
    with pytest.raises(RecordError, match=message):
        select([good, {**good, MORE[column]: value}], **MORE)


def test_an_optional_column_that_does_not_exist_is_refused() -> None:
    with pytest.raises(RecordError, match=r"fetch\.columns\.split: no column 'part'"):
        select(ROWS, split="part")


def test_a_column_that_does_not_exist_is_refused_with_a_near_match() -> None:
    with pytest.raises(RecordError, match=r"fetch\.columns\.output: no column 'outputs'.*output"):
        select(ROWS, output="outputs")


def test_nothing_usable_is_refused() -> None:
    with pytest.raises(RecordError, match="none of its 1 rows"):
        select([{**ROWS[0], "output": "nan"}])
    with pytest.raises(RecordError, match="no rows"):
        select([])


def test_equal_rows_give_equal_bytes_and_come_back(tmp_path: Path) -> None:
    one, two = tmp_path / "one.parquet", tmp_path / "two.parquet"
    write_rows(one, ROWS)
    write_rows(two, [dict(row) for row in ROWS])
    assert one.read_bytes() == two.read_bytes()
    assert read_rows(one) == ROWS
    assert sorted(tmp_path.iterdir()) == [one, two]


def test_a_failed_write_leaves_the_former_file(tmp_path: Path) -> None:
    path = tmp_path / "qa.parquet"
    write_rows(path, ROWS)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_rows(path, [{"instruction": 1, "input": object(), "output": None}])
    assert path.read_bytes() == before


def test_reading_a_table_without_a_column(tmp_path: Path) -> None:
    write_rows(tmp_path / "qa.parquet", ROWS)
    with pytest.raises(RecordError, match="no column prompt"):
        read_rows(tmp_path / "qa.parquet", ["prompt"])
    with pytest.raises(RecordError, match="dvc repro"):
        read_rows(tmp_path / "absent.parquet")


def test_passages_are_the_texts_of_a_table_and_the_shipped_ones_are_sixty(tmp_path: Path) -> None:
    shipped = read_passages(str(Path(__file__).parents[2] / "assets/general-text.jsonl"))
    assert len(shipped) == len(set(shipped)) == 60
    assert all(20 < len(text.split()) < 80 for text in shipped)
    path = tmp_path / "own.jsonl"
    path.write_text('{"text": "some words"}\n{"text": "one"}\n')
    with pytest.raises(RecordError, match="row 2: text is 'one'"):
        read_passages(str(path))
    path.write_text('{"text": "some words"}\n{"body": "no text"}\n')
    with pytest.raises(RecordError, match="row 2: text is None"):
        read_passages(str(path))
