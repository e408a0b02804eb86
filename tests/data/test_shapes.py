"""Shapes of sources: what is recognised, and what a conversation teaches."""

import json
from typing import Any

import pytest

from fintune.data.shapes import recognise
from fintune.errors import RecordError
from fintune.params import Columns, Fetch
from support.rows import select_records

NAMED = {"instruction": "instruction", "input": "input", "output": "output"}
OPENAI = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "What is a bond?"}]},
    {"role": "assistant", "content": "A loan."},
    {"role": "user", "content": "And a share?"},
    {"role": "assistant", "content": "A part."},
]
SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}
SHAREGPT = [
    {
        "from": SPEAKERS[str(m["role"])],
        "value": m["content"] if isinstance(m["content"], str) else "What is a bond?",
    }
    for m in OPENAI
]
TRANSCRIPT = "User: What is a bond?\nAssistant: A loan.\nUser: And a share?"


def fetch(shape: str = "auto", turns: str = "last", **columns: str | None) -> Fetch:
    named = Columns.model_validate(columns or NAMED)
    default = None if named.instruction or named.messages else "Help."
    return Fetch(
        source="x.jsonl",
        revision=None,
        config=None,
        split="train",
        share=1.0,
        more=[],
        shape=shape,  # type: ignore[arg-type]
        turns=turns,  # type: ignore[arg-type]
        columns=named,
        default_instruction=default,
        invalid_rows="drop",
    )


def records(rows: list[dict[str, Any]], params: Fetch) -> Any:
    columns = recognise(dict.fromkeys(name for row in rows for name in row), params)
    given = params.default_instruction, params.invalid_rows, "the source", params.turns
    return select_records(rows, columns, *given)


@pytest.mark.parametrize("column", ["messages", "conversations", "Conversation"])
@pytest.mark.parametrize("messages", [OPENAI, SHAREGPT, json.dumps(OPENAI), json.dumps(SHAREGPT)])
def test_the_last_answer_is_learned_after_what_was_said(column: str, messages: Any) -> None:
    made, dropped = records([{column: messages, "id": 1}], fetch())
    turns = json.loads(made[0].pop("turns"))
    assert made == [{"instruction": "Be brief.", "input": TRANSCRIPT, "output": "A part."}]
    user, assistant = "user", "assistant"
    said = [[user, "What is a bond?"], [assistant, "A loan."], [user, "And a share?"]]
    assert turns == said
    assert dropped == {}


def test_all_answers_are_learned_as_rows_of_one_group() -> None:
    single = [m for m in OPENAI if m["role"] != "system"][:2]
    made, _ = records([{"messages": OPENAI}, {"messages": single}], fetch(turns="all"))
    texts = [[row["instruction"], row["input"], row["output"]] for row in made]
    assert texts == [
        ["Be brief.", "What is a bond?", "A loan."],
        ["Be brief.", TRANSCRIPT, "A part."],
        ["", "What is a bond?", "A loan."],
    ]
    assert made[0]["group"] == made[1]["group"] != made[2]["group"]


def test_an_answer_of_weight_zero_is_only_said() -> None:
    muted = [{**m, "weight": 0} if m["content"] == "A loan." else m for m in OPENAI]
    made, _ = records([{"messages": muted}], fetch(turns="all"))
    assert [(row["input"], row["output"]) for row in made] == [(TRANSCRIPT, "A part.")]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (OPENAI[:2], "no_answer"),
        ([OPENAI[2]], "no_answer"),  # to no question
        (None, "missing"),
        ([], "missing"),
        ("hello", "not_messages"),
        ("[{", "not_messages"),
        ([*OPENAI, {"role": "tool", "content": "42"}], "unknown_role"),
        ([OPENAI[1], {"role": "assistant", "content": None}], "missing"),
        ([OPENAI[1], {"role": "assistant", "content": [{"type": "image"}]}], "not_text"),
        ([OPENAI[1], {"role": "assistant", "content": " "}], "empty"),
    ],
)
def test_unusable_conversations_are_counted_by_reason(messages: Any, reason: str) -> None:
    made, dropped = records([{"messages": OPENAI}, {"messages": messages}], fetch())
    assert len(made) == 1 and dropped == {reason: 1}


@pytest.mark.parametrize(
    ("row", "asked", "answered"),
    [
        ({"question": "Why?", "context": "It rains.", "answer": "So."}, "It rains.\n\nWhy?", "So."),
        ({"question": "Why?", "context": "", "answer": "So."}, "Why?", "So."),
        ({"Prompt": "Why?", "Completion": "So."}, "Why?", "So."),
        ({"instruction": "Why?", "context": "Rain.", "response": "So."}, "Rain.\n\nWhy?", "So."),
    ],
)
def test_usual_columns_are_recognised(row: dict[str, str], asked: str, answered: str) -> None:
    made, _ = records([row], fetch(instruction=None, input="a", output="b"))
    assert made == [{"instruction": "Help.", "input": asked, "output": answered}]


def test_named_columns_go_before_recognised_ones() -> None:
    row = {"messages": OPENAI, "question": "no", "answer": "no", "q": "Why?", "a": "So."}
    made, _ = records([row], fetch(instruction=None, input="q", output="a"))
    assert [made[0]["input"], made[0]["output"]] == ["Why?", "So."]
    made, _ = records([row], fetch(shape="messages", instruction=None, input="q", output="a"))
    assert made[0]["output"] == "A part."
    made, _ = records([{**row, "chat": SHAREGPT}], fetch(messages="chat"))
    assert made[0]["output"] == "A part."


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            fetch(instruction="instruction", input="input", output="outputs"),
            "output: no column 'outputs'; did you mean output",
        ),
        (fetch(**NAMED, split="part"), "split: no column 'part'"),
        (fetch(shape="columns", instruction=None, input="a", output="b"), "input: no column 'a'"),
        (fetch(shape="messages"), "no column is called messages or"),
        (fetch(messages="chat"), "messages: no column 'chat'"),
    ],
)
def test_a_column_that_does_not_exist_is_refused(params: Fetch, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        recognise(["instruction", "input", "output"], params)
