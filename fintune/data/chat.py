"""The base's own chat template as the layout of prompts and answers: `format.template: base`.

Special tokens within a text are marked, by transformers' own means, and encoded as text; those that the
template writes are tokens. transformers renders templates in a sandbox.
"""

import json
import re
from functools import lru_cache
from typing import Any, NamedTuple

from fintune.data.unpacking import Row
from fintune.errors import UserError, brief

# what a template that asks for the date is told; else equal data would differ from day to day
DAY = "26 Jul 2024"
SAME_DAY = f"{{% macro strftime_now(form) %}}{DAY}{{% endmacro %}}\n"
WAY_OUT = "set format.template: seed"
NO_THINKING = "{% set enable_thinking = false %}\n"  # the switch of templates that can think aloud

Tokenizer = Any
Message = dict[str, str]


class Refused(Exception):
    """A row that a template refuses or changes; the only argument says why."""


class Traits(NamedTuple):
    """Traits of a template: the token after an answer, a role for system messages, a date."""

    end: str
    system: bool
    dated: bool


def use_own_template(tokenizer: Tokenizer, model: str) -> None:
    """Check that a tokenizer's chat template can lay out the rows, and switch its thinking aloud off.

    Raises:
        UserError: there is none, or prompts are no beginnings of what it makes of them with an answer.
    """
    place = f"format.template: base: {model}"
    templates = tokenizer.chat_template
    own = templates.get("default") if isinstance(templates, dict) else templates
    if not own:
        raise UserError(f"{place} has no chat template; {WAY_OUT}")
    faults = []
    for template in (own, NO_THINKING + own):
        tokenizer.chat_template = template
        try:
            traits(tokenizer)
            return
        except Refused as refused:
            faults.append(str(refused))
    raise UserError(f"{place}: its chat template {faults[0]}; {WAY_OUT}")


def traits(tokenizer: Tokenizer) -> Traits:
    """Return what a tokenizer's chat template does, tried out on a short conversation.

    Raises:
        Refused: an answer cannot be told from its prompt, or no special token ends it.
    """
    return _traits(tokenizer, tokenizer.chat_template)


@lru_cache(maxsize=8)
def _traits(tokenizer: Tokenizer, template: str) -> Traits:
    user, system = _message("user", "question"), _message("system", "order")
    said = _said(tokenizer, [user], "answer")
    ends = _special(tokenizer).search(said)
    if not ends or said[: ends.start()].strip() != "answer":
        raise Refused(f"writes {brief(said)!r} for an answer, which no special token ends")
    try:
        knows_system = "order" in _render(tokenizer, [system, user], True)
        if knows_system:
            _said(tokenizer, [system, user], "answer")
    except Refused:
        knows_system = False
    return Traits(ends.group(), knows_system, "strftime_now" in template)


def lay_out(tokenizer: Tokenizer, row: Row, answer: str) -> tuple[str, str]:
    """Return a record's prompt, with special tokens of its texts marked, and the answer after it.

    Raises:
        Refused: the template refuses the conversation, or writes another answer.
    """
    said = _said(tokenizer, _messages(tokenizer, row), mark(tokenizer, answer))
    text = plain(said.rpartition(traits(tokenizer).end)[0])
    if text.strip() != answer.strip():
        raise Refused(f"writes {brief(text)!r} for the answer {brief(answer)!r}")
    return prompt_of(tokenizer, row), text


def prompt_of(tokenizer: Tokenizer, row: Row) -> str:
    """Return a record's prompt, with special tokens of its texts marked.

    Raises:
        Refused: the template refuses the conversation.
    """
    return _render(tokenizer, _messages(tokenizer, row), True)


def mark(tokenizer: Tokenizer, text: str) -> str:
    """Mark the special tokens within a text, which `encode_marked` then reads as text."""
    from transformers.utils.chat_template_utils import mark_control_tokens

    return str(mark_control_tokens(text, _special(tokenizer)))


def plain(text: str) -> str:
    """Return a text without the marks."""
    from transformers.utils import chat_template_utils

    marks = chat_template_utils._CONTROL_TOKEN_START + chat_template_utils._CONTROL_TOKEN_END
    return text.translate(dict.fromkeys(map(ord, marks)))


def encode_marked(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode a text in which special tokens are tokens, unless they are marked.

    Raises:
        Refused: the tokenizer makes a special token of its text.
    """
    from transformers.utils.chat_template_utils import encode_marked_chat

    try:
        return list(encode_marked_chat(tokenizer, text))
    except ValueError as error:
        raise Refused(brief(error)) from None


def _messages(tokenizer: Tokenizer, row: Row) -> list[Message]:
    """Return a record's messages; the instruction is the system's, or goes before the first user message."""
    turns = json.loads(row["turns"]) if row.get("turns") else [["user", row["input"]]]
    messages = [_message(role, mark(tokenizer, text)) for role, text in turns]
    instruction = mark(tokenizer, row["instruction"])
    if not instruction.strip():
        return messages
    if traits(tokenizer).system:
        return [_message("system", instruction), *messages]
    first = next(i for i, message in enumerate(messages) if message["role"] == "user")
    messages[first] = _message("user", f"{instruction}\n\n{messages[first]['content']}")
    return messages


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _said(tokenizer: Tokenizer, messages: list[Message], answer: str) -> str:
    """Return what a template writes after the prompt where there is an answer."""
    prompt = _render(tokenizer, messages, True)
    whole = _render(tokenizer, [*messages, _message("assistant", answer)], False)
    if not whole.startswith(prompt):
        raise Refused(
            f"writes no answer after its own prompt: {brief(prompt)!r} is no beginning of {brief(whole)!r}"
        )
    return whole[len(prompt) :]


def _render(tokenizer: Tokenizer, messages: list[Message], is_open: bool) -> str:
    from jinja2 import TemplateError

    own = tokenizer.chat_template
    template = SAME_DAY + own if "strftime_now" in own else own
    try:
        rendered: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=is_open, chat_template=template
        )
    except (TemplateError, TypeError, ValueError, LookupError) as error:
        raise Refused(f"refuses the conversation: {brief(error)}") from None
    return rendered


def _special(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Return a pattern of the special tokens, and of the other added ones that the template names."""
    names = _names(tokenizer, tokenizer.chat_template)
    return re.compile("|".join(map(re.escape, names)) or "(?!)")


@lru_cache(maxsize=8)
def _names(tokenizer: Tokenizer, template: str) -> list[str]:
    tokens = tokenizer.added_tokens_decoder.values()
    names = {
        t.content for t in tokens if t.special or (t.content.strip() and t.content in template)
    }
    return sorted(names, key=len, reverse=True)
