"""Shapes of sources: columns of question and answer, as named or recognised, or conversations.

A conversation is a list of messages, as OpenAI (`role`, `content`) or ShareGPT (`from`, `value`) write them,
or that list as JSON text. Its system message is the instruction, and what was said before an answer is the
input: the user's message alone, or a transcript, and then `turns` are its messages as JSON.
"""

import difflib
import hashlib
import json
from collections.abc import Iterable
from typing import Any, Literal

from fintune.data.tables import COLUMNS, OPTIONAL
from fintune.data.unpacking import Row
from fintune.errors import RecordError
from fintune.params import Source

CONVERSATIONS = ("messages", "conversations", "conversation")
QUESTIONS = ("question", "query", "prompt", "instruction", "input")
ANSWERS = ("answer", "response", "completion", "output")
CONTEXTS = ("context", "passage")
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "User"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "Assistant"),
}

Columns = dict[str, str | None]  # the source's name of each role


class Unusable(Exception):
    """A row that no record can be made of; its only argument is the reason."""


def recognise(names: Iterable[str], params: Source) -> Columns:
    """Return which columns of a source hold what.

    The named ones, if the source has them. With `shape: auto` and neither the named input nor the named
    output there, the usual names of conversations, then of questions and answers are looked for.

    Raises:
        RecordError: a named column is not there, and no usual one either.
    """
    present = list(names)
    if not present:
        raise RecordError(": no rows")
    columns: Columns = params.columns.model_dump()
    wanted = params.shape
    if wanted == "auto" and columns["messages"]:
        wanted = "messages"
    unnamed = columns["input"] not in present and columns["output"] not in present
    if wanted == "messages" or (wanted == "auto" and unnamed):
        columns = _usual(present, columns, wanted) or columns
    if columns["messages"] is None and params.shape == "messages":
        raise RecordError(
            f": fetch.shape: messages, and no column is called {' or '.join(CONVERSATIONS)}; name it "
            f"in fetch.columns.messages; the source has {_list(present)}"
        )
    for column, name in columns.items():
        if name is not None and name not in present:
            near = difflib.get_close_matches(name, present, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {_list(present)}"
            raise RecordError(f": fetch.columns.{column}: no column {name!r}; {hint}")
    return columns


def _usual(present: list[str], columns: Columns, shape: str) -> Columns | None:
    """Return the columns by their usual names in any case, or None; the optional ones stay as named."""
    spelled = {name.strip().lower(): name for name in reversed(present)}

    def first(usual: Iterable[str]) -> str | None:
        return next((spelled[name] for name in usual if name in spelled), None)

    found: Columns = dict.fromkeys(columns) | {
        name: columns[name] for name in OPTIONAL if name in columns
    }
    found["messages"] = columns["messages"] or first(CONVERSATIONS)
    if found["messages"] or shape == "messages":
        return found
    answer, context = first(ANSWERS), first(CONTEXTS)
    if answer and {"instruction", "input"} <= set(spelled):
        return found | {
            "instruction": spelled["instruction"],
            "input": spelled["input"],
            "output": answer,
        }
    question = first(QUESTIONS)
    return (
        found | {"input": question, "context": context, "output": answer}
        if question and answer
        else None
    )


def _list(names: list[str]) -> str:
    shown = ", ".join(sorted(names)[:20])
    return f"{shown}, and {len(names) - 20} more" if len(names) > 20 else shown or "none"


def hint(names: Iterable[str], columns: Columns) -> str:
    """Say which columns of a source are not used that usually hold what its rows lack."""
    usual = {
        "instruction": ("instruction", "system"),
        "input": QUESTIONS,
        "output": ANSWERS,
        "messages": CONVERSATIONS,
    }
    unused = [name for name in names if name not in columns.values()]
    told = []
    for role, known in usual.items():
        there = [name for name in unused if name.strip().lower() in known]
        unused = [name for name in unused if name not in there[:1]]
        if there and role == "instruction":
            told.append(f"columns.instruction: {there[0]} with default_instruction: null")
        elif there:
            told.append(f"columns.{role}: {there[0]}")
    other = ", or ".join(f"fetch.{each}" for each in told)
    return f"; these are unset, and the source has such columns: set {other}" if told else ""


def describe(columns: Columns) -> str:
    """Say which columns of a source hold what."""
    named = ((role, name) for role, name in columns.items() if name is not None)
    return ", ".join(name if name == role else f"{name} as {role}" for role, name in named)


def rows_of(row: Row, columns: Columns, turns: Literal["last", "all"]) -> list[Row]:
    """Return a source's row by role, one for each answer that is learned.

    With `all`, each turn of the assistant makes a row, and `group` is the same for those of a conversation.

    Raises:
        Unusable: it holds no conversation, or one without an answer to a question.
    """
    optional = {role: row.get(str(columns[role])) for role in OPTIONAL if columns.get(role)}
    if columns.get("messages") is None:
        texts = {role: row.get(str(columns[role])) for role in COLUMNS if columns.get(role)}
        context = row.get(str(columns.get("context")))
        if isinstance(context, str) and context.strip() and isinstance(texts.get("input"), str):
            texts["input"] = f"{context}\n\n{texts['input']}"
        return [texts | optional]
    messages = _messages(row.get(str(columns["messages"])))
    answers = list(_answers(messages))
    if not answers:
        raise Unusable("no_answer")
    if turns == "last":
        return [answers[-1] | optional]
    digest = hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:16]
    return [{"group": digest} | answer | optional for answer in answers]


def _messages(value: Any) -> list[tuple[str, str]]:
    """Return the role and text of each message."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            raise Unusable("not_messages") from None
    if value is None or value == []:
        raise Unusable("missing")
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise Unusable("not_messages")
    return [(_role(message), _content(message)) for message in value]


def _role(message: Row) -> str:
    role = str(message.get("role") or message.get("from")).strip().lower()
    if role not in ROLES:
        raise Unusable("unknown_role")
    silent = str(message.get("weight")) in ("0", "0.0")  # OpenAI's mark of an answer not to learn
    return "Silent" if silent and ROLES[role] == "Assistant" else ROLES[role]


def _content(message: Row) -> str:
    content = message.get("content", message.get("value"))
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise Unusable("not_text")
        content = "".join(str(part.get("text") or "") for part in content)
    if content is None:
        raise Unusable("missing")
    if not isinstance(content, str):
        raise Unusable("not_text")
    return content


def _answers(messages: list[tuple[str, str]]) -> Iterable[Row]:
    """Yield instruction, input and output of each answer to a user's message."""
    system = ""
    said: list[tuple[str, str]] = []
    for role, text in messages:
        if role == "system":
            system = f"{system}\n{text}" if system else text
            continue
        if role == "Assistant" and any(speaker == "User" for speaker, _ in said):
            lines = [f"{speaker}: {line}" for speaker, line in said]
            question = said[0][1] if len(said) == 1 else "\n".join(lines)
            answer: Row = {"instruction": system or None, "input": question, "output": text}
            if len(said) > 1:
                turns = [(speaker.lower(), line) for speaker, line in said]
                answer["turns"] = json.dumps(turns)
            yield answer
        said.append(("Assistant" if role == "Silent" else role, text))
