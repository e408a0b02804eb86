"""Rows of corrected and approved answers: what becomes one, and what is left out and told."""

import datetime
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from fintune.data.questions import normalize_question
from fintune.data.tables import write_rows
from fintune.errors import UserError
from fintune.usage.collection import COLUMNS, Collected, collect, compare, kept_rows, read_date
from fintune.usage.exchanges import Exchange
from fintune.usage.privacy import finder

TEST = ["Who audits the accounts of Selaco Motors in March 2020, and for which fee?"]


def asked(question: str, trace: str, **values: object) -> Exchange:
    given: dict[str, object] = {"answer": "No.", "ended": True, "trace": trace, "at": 1.75e9}
    return Exchange(question, "financial-qa/3", {}, **(given | values))  # type: ignore[arg-type]


def collected(*given: Exchange, look: Callable[[str], list[str]] | None = None) -> Collected:
    return collect(given, "Answer.", list(map(normalize_question, TEST)), 0.7, look)


def test_corrected_and_approved_answers_become_rows_with_their_origin() -> None:
    found = collected(
        asked("Is it so?", "tr-1", correction="Yes.", approved=False, passage="It is."),
        asked("And that?", "tr-2", approved=True, instruction="Be brief."),
        asked("And this?", "tr-3", approved=False),
        asked("Or those?", "tr-4"),
        asked("Or these?", "tr-5", approved=True, ended=False),
        asked("Or them?", "tr-6", error="out of memory"),
    )
    first, second = found.rows
    assert first == {
        "instruction": "Answer.",
        "input": "It is.\n\nIs it so?",
        "output": "Yes.",
        "origin": "tr-1",
        "reason": "corrected",
        "model": "financial-qa/3",
        "answered": "No.",
        "asked": "2025-06-15T15:06:40+00:00",
    }
    assert (second["instruction"], second["output"], second["reason"]) == (
        "Be brief.",
        "No.",
        "approved",
    )
    assert {reason: count for reason, count in found.left.items() if count} == {
        "disapproved without a correction": 1,
        "not judged": 1,
        "approved, but cut off": 1,
        "failed": 1,
    }


def test_questions_near_those_of_the_test_are_refused() -> None:
    questions = (
        "who audits the accounts of SELACO Motors in March 2020 and for which fee",
        "Who audits the account of Selaco Motors in March 2020, and for what fee?",
        "Who audits the accounts of Selaco Motors in March 2021, and for which fee?",
    )
    given = [asked(each, f"tr-{n}", correction="A") for n, each in enumerate(questions, start=1)]
    found = collected(*given)
    assert [row["origin"] for row in found.rows] == ["tr-3"]
    assert found.left["near a test question"] == 2
    assert [said.split(":")[0] for said in found.told] == ["tr-1", "tr-2"]


def test_conflicting_corrections_are_told_and_none_is_taken() -> None:
    found = collected(
        asked("Is it so?", "tr-1", correction="Yes."),
        asked("is it so", "tr-2", correction="No."),
        asked("And that?", "tr-3", correction="Yes."),
        asked("And that?", "tr-4", correction="Yes. "),
        asked("And this?", "tr-5", correction="Yes."),
        asked("And this?", "tr-6", approved=True),
    )
    assert [row["origin"] for row in found.rows] == ["tr-4"]
    assert found.left["conflicting"] == 4 and found.left["said before"] == 1
    assert found.told[0] == "tr-1: conflicting: another answer than tr-2 to one question"


def test_secrets_and_personal_data_are_left_out_and_their_kind_is_told() -> None:
    found = collected(
        asked("Who wrote it?", "tr-1", correction="Ann, ann.lee@example.com."),
        asked("What is the key?", "tr-2", correction="The key is AKIAIOSFODNN7EXAMPLE."),
        asked("Which card?", "tr-3", correction="4111 1111 1111 1111"),
        asked("Which account?", "tr-4", correction="DE89370400440532013000"),
        asked("What was the profit of 2024?", "tr-5", correction="It was $5,200,000, up 12.5 %."),
        asked("What is a secret reserve?", "tr-6", correction="Assets that are not shown."),
        look=finder(),
    )
    assert [row["origin"] for row in found.rows] == ["tr-5", "tr-6"]
    assert found.told == [
        "tr-1: secret or personal data: email address",
        "tr-2: secret or personal data: AWS Access Key",
        "tr-3: secret or personal data: credit card",
        "tr-4: secret or personal data: iban code",
    ]
    assert not [said for said in found.told if "ann.lee" in said or "AKIA" in said]


def test_without_the_extra_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install detect-secrets presidio-analyzer"):
        finder()


def test_a_later_date_keeps_the_file_s_earlier_rows(tmp_path: Path) -> None:
    path = tmp_path / "collected.parquet"
    (old,) = collected(asked("Is it so?", "tr-1", correction="Yes.")).rows
    (again,) = collected(asked("Is that so?", "tr-2", correction="No.", at=1.76e9)).rows
    write_rows(path, [old, again], dict.fromkeys(COLUMNS, pa.string()))
    since = datetime.datetime.fromtimestamp(1.755e9, datetime.UTC)
    (new,) = collected(asked("Is this so?", "tr-3", correction="No.", at=1.77e9)).rows
    kept = kept_rows(path, since, [new])
    assert [row["origin"] for row in kept] == ["tr-1", "tr-3"]  # tr-2's feedback was taken back
    assert kept_rows(path, None, [new]) == [new]


def test_a_date_that_is_none_is_named() -> None:
    assert read_date("2026-11-01").tzinfo is not None
    with pytest.raises(UserError, match="--since yesterday: no date"):
        read_date("yesterday")


def test_answers_before_and_after_are_held_against_what_was_collected() -> None:
    """By the result, where the output states one; else by the words."""
    figure = asked(
        "What was the profit?", "tr-1", correction="It was $5 million.", answer="$4 million"
    )
    words = asked(
        "Which desk?", "tr-2", correction="The desk in Basel.", answer="the desk  in basel."
    )
    rows = collected(figure, words).rows
    new = {"tr-1": "The profit was $5 million in that year.", "tr-2": "The desk in Bern."}
    assert compare(rows, lambda row: new[row["origin"]]) == ([False, True], [True, False])
