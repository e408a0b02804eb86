"""Several sources: each by its own shape, weighed by share, and told apart in the manifest."""

import csv
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from fintune.data import selection, sources
from fintune.errors import RecordError, UserError
from fintune.params import Fetch
from support.rows import fetch_records

FIRST = {
    "revision": None,
    "config": None,
    "split": "train",
    "share": 1.0,
    "shape": "auto",
    "turns": "last",
    "columns": {"input": "q", "output": "a"},
    "default_instruction": "Help.",
}


def fetch(folder: Path, shares: list[float]) -> tuple[Any, Any]:
    """Write a table and a file of conversations with an unusable one, and fetch from both."""
    table, chats = folder / "qa.csv", folder / "chats.jsonl"
    table.write_text("".join(["q,a\n", *(f"What is {i}?,{i}\n" for i in range(200))]))
    talk = [
        [{"role": "user", "content": f"Hi {i}"}, {"role": "assistant", "content": "Ho"}]
        for i in range(200)
    ]
    lines = [json.dumps({"messages": messages}) for messages in (*talk, [])]
    chats.write_text("\n".join(lines))
    first, second = ({**FIRST, "share": share} for share in shares)
    more = [{**second, "source": str(chats), "default_instruction": None}]
    more[0]["columns"] = {"messages": "messages"}
    given = {**first, "source": str(table), "more": more, "invalid_rows": "drop"}
    return fetch_records(Fetch.model_validate(given))


def test_rows_of_all_sources_add_up(tmp_path: Path) -> None:
    records, about = fetch(tmp_path, [1.0, 0.25])
    first, second = about["sources"]
    assert (first["rows"], first["dropped"]) == (200, {})
    assert second["rows"] == pytest.approx(50, abs=15)
    assert second["dropped"] == {"missing": 1, "beyond_share": 200 - second["rows"]}
    assert about["rows"] == len(records) == 200 + second["rows"]
    assert about["rows_read"] == 401 == about["rows"] + sum(about["dropped"].values())
    assert [record["instruction"] for record in records[199:201]] == ["Help.", ""]


def test_a_smaller_share_is_part_of_a_larger(tmp_path: Path) -> None:
    few, some = (
        {record["input"] for record in fetch(tmp_path, [share, share])[0]} for share in (0.2, 0.5)
    )
    assert few < some


def test_what_dvc_does_not_watch_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import fsspec

    with fsspec.open("memory://bucket/qa.csv", "w") as file:
        file.write("q,a\nWhy?,So.\n")
    given = {**FIRST, "source": "memory://bucket/qa.csv", "more": [], "invalid_rows": "drop"}
    fetch_records(Fetch.model_validate(given))
    assert "DVC does not notice when memory://bucket/qa.csv changes" in caplog.text
    caplog.clear()
    fetch(tmp_path, [1.0, 1.0])
    assert f"DVC does not watch {tmp_path / 'chats.jsonl'}" in caplog.text


@pytest.mark.parametrize(
    ("row", "columns", "said"),
    [
        (
            {"instruction": "Why?", "input": "", "output": "So."},
            {"input": "input", "output": "output"},
            "input is empty in 20; .* set fetch.columns.instruction: instruction with "
            "default_instruction: null$",
        ),
        (
            {"question": "Why?", "q": None, "a": "So."},
            {"input": "q", "output": "a"},
            "q is missing in 20; .* set fetch.columns.input: question$",
        ),
        (
            {"q": "Why?", "a": " ", "Answer": "So.", "messages": []},
            {"input": "q", "output": "a"},
            "a is empty in 20; .* set fetch.columns.output: Answer, or fetch.columns.messages: messages$",
        ),
        ({"q": "Why?", "a": ""}, {"input": "q", "output": "a"}, "a is empty in 20$"),
    ],
)
def test_a_source_without_a_usable_row_is_told_what_to_name(
    tmp_path: Path, row: dict[str, Any], columns: dict[str, str], said: str
) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([row] * 20))
    given = {**FIRST, "source": str(file), "columns": columns, "more": [], "invalid_rows": "drop"}
    with pytest.raises(RecordError, match=f"none of its 20 rows can be used: {said}"):
        fetch_records(Fetch.model_validate(given))


def test_rows_that_are_dropped_are_listed_with_their_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each source the first ones, by the number of the row, whatever the batches."""
    monkeypatch.setattr(selection, "LISTED", 3)
    bad = {2: "", 9000: "nan", 9001: "", 9002: ""}
    (tmp_path / "a.csv").write_text(
        "q,a\n" + "".join(f"What is {n}?,{bad.get(n, n)}\n" for n in range(1, 9005))
    )
    (tmp_path / "b.jsonl").write_text(
        json.dumps({"q": "Why?", "a": None}) + '\n{"q": "Q", "a": "A"}'
    )
    part = {**FIRST, "source": str(tmp_path / "a.csv")}
    more = [{**FIRST, "source": str(tmp_path / "b.jsonl")}]
    params = Fetch.model_validate({**part, "more": more, "invalid_rows": "drop"})
    about = sources.fetch_records(params, tmp_path / "raw/qa.parquet")
    with (tmp_path / "raw/dropped.csv").open() as file:
        listed = list(csv.DictReader(file))
    told = [(Path(row["source"]).name, row["row"], row["reason"], row["text"]) for row in listed]
    assert told == [
        ("a.csv", "2", "a: empty", "What is 2?"),
        ("a.csv", "9000", "a: literal_nan", "What is 9000?"),
        ("a.csv", "9001", "a: empty", "What is 9001?"),
        ("b.jsonl", "1", "a: missing", "Why?"),
    ]
    assert sum(about["dropped"].values()) == 5


def test_a_queued_experiment_says_why_it_lacks_a_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DVC runs it in a copy of what git knows."""
    (tmp_path / "data/source").mkdir(parents=True)
    (tmp_path / "data/source/a.csv").write_text("q,a\nWhy?,So.\n")
    copy = tmp_path / ".dvc/tmp/exps/tmpab"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    given = {**FIRST, "source": "data/source/a.csv", "more": [], "invalid_rows": "drop"}
    with pytest.raises(UserError, match=r"queued and temporary experiments.*`git add` it"):
        fetch_records(Fetch.model_validate(given))
    monkeypatch.chdir(tmp_path)
    assert len(fetch_records(Fetch.model_validate(given))[0]) == 1


@pytest.mark.parametrize(("mark", "name"), [(";", "semicolons"), ("\t", "tabs"), ("|", "bars")])
def test_another_separator_is_read_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mark: str, name: str
) -> None:
    (tmp_path / "a.csv").write_text(f"q{mark}a\nWhat is 3,5?{mark}A number, with a comma.\n")
    given = {**FIRST, "source": str(tmp_path / "a.csv"), "more": [], "invalid_rows": "drop"}
    with caplog.at_level(logging.INFO, "fintune"):
        (record,), _ = fetch_records(Fetch.model_validate(given))
    assert (record["input"], record["output"]) == ("What is 3,5?", "A number, with a comma.")
    assert f"separated by {name}, not by commas" in caplog.text
    assert "1 rows, 1 kept; dropped: none" in caplog.text
