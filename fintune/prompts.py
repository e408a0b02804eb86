"""The only definition of the prompt: its text, its two special tokens, its tokens and what is learned."""

import json
import re
from collections.abc import Sequence
from typing import Any, Literal

from fintune.params import Base, UserError

RESPONSE = "<response>"
RESPONSE_END = "<response|end>"
SPECIAL_TOKENS = (RESPONSE, RESPONSE_END)

Tokenizer = Any  # a transformers fast tokenizer; naming its class here would import transformers


def render_prompt(instruction: str, input: str) -> str:
    """The text that the model is given, up to and including the token that opens the answer."""
    return f"Instruction: {instruction}\nInput: {input}\n{RESPONSE}"


def render_completion(output: str) -> str:
    """The text that the model learns to give: the answer and the token that ends it."""
    return f"{output}{RESPONSE_END}"


def add_chat_template(tokenizer: Tokenizer, instruction: str) -> None:
    """Give the tokenizer the prompt as a template over messages, for what talks to models as to chats.

    A system message takes the place of `instruction`, a user's message is the input. Earlier questions
    and answers are put in front, end to end, each as it would stand in the training data.

    Raises:
        UserError: this tokenizer cannot make a prompt's tokens from text that begins with its own
            beginning token.
    """
    begin = tokenizer.bos_token or ""
    expected = encode(tokenizer, render_prompt(instruction, "a"), "")[0]
    for beginning in ("", begin, begin + " "):  # some put a space before the first word alone
        tokenizer.chat_template = _template(beginning, instruction)
        message = {"role": "user", "content": "a"}
        rendered = tokenizer.apply_chat_template([message], add_generation_prompt=True)
        if rendered["input_ids"] == expected:
            return
    raise UserError(
        "base.model: its tokenizer begins texts in a way that no chat template can express"
    )


def _template(begin: str, instruction: str) -> str:
    user = render_prompt("{{ ns.instruction }}", "{{ message.content }}")
    lines = (
        f"{{%- set ns = namespace(instruction={json.dumps(instruction, ensure_ascii=False)}) %}}",
        f"{{{{- {json.dumps(begin)} }}}}",
        "{%- for message in messages %}",
        "{%- if message.role == 'system' %}{% set ns.instruction = message.content %}",
        f"{{%- elif message.role == 'user' %}}{{{{- '' }}}}{user}",
        f"{{%- elif message.role == 'assistant' %}}{{{{- message.content }}}}{RESPONSE_END}",
        "{%- endif %}",
        "{%- endfor %}",
    )
    return "\n".join(lines) + "\n"


def load_tokenizer(base: Base) -> Tokenizer:
    """The base's fast tokenizer with the two special tokens added and a pad token that ends nothing.

    Padding with a token that can end a text hides that end from a loss that masks padding; an own
    pad token is taken, else the unknown token, else the end-of-text token, which ends no answer here.

    Raises:
        UserError: the tokenizer cannot be loaded, or has no fast version.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(base.model, revision=base.revision)
    except Exception as error:  # the hub's client raises its transport's own kinds
        reason = str(error)
        if not base.is_folder:
            from fintune.hub import explain_model_error

            reason = explain_model_error(error, base.model, base.revision)
        raise UserError(
            f"base.model: {base.model}: no tokenizer can be loaded: {reason}"
        ) from error
    if not tokenizer.is_fast:
        raise UserError(
            f"base.model: {base.model} has no fast tokenizer, which cutting answers needs"
        )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def end_token_id(tokenizer: Tokenizer) -> int:
    """The id of the token that ends an answer."""
    return int(tokenizer.convert_tokens_to_ids(RESPONSE_END))


def encode(tokenizer: Tokenizer, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """The tokens of a row: the prompt's, with the tokenizer's own beginning, and the completion's.

    The two are encoded apart, so that a prompt has the same tokens in training and in use. The loss
    is taken on the second list alone.
    """
    prompt_ids: list[int] = tokenizer(prompt)["input_ids"]
    if prompt_ids[-1] != tokenizer.convert_tokens_to_ids(RESPONSE):
        prompt_ids = prompt_ids[
            :-1
        ]  # a tokenizer that closes every text with its end-of-text token
    completion_ids: list[int] = tokenizer(completion, add_special_tokens=False)["input_ids"]
    return prompt_ids, completion_ids


def format_row(
    tokenizer: Tokenizer,
    row: dict[str, str],
    max_tokens: int,
    overlong: Literal["truncate", "drop"],
) -> tuple[dict[str, Any] | None, str | None]:
    """Render a record and make it fit.

    An answer that is too long is cut after its last whole sentence that fits, or after its last
    whole word where that would lose over half of the room, and keeps its end token: the model learns
    shorter answers, not answers that never stop.

    Returns:
        The record with `prompt`, `completion` and `tokens` (their number together) added, or None
        where the row is dropped; and what happened: None, `truncated`, `too_long` (with
        overlong=drop), `prompt_too_long`, or `special_token` (the text holds a token of the prompt).
    """
    if any(token in text for text in row.values() for token in SPECIAL_TOKENS):
        return None, "special_token"
    prompt = render_prompt(row["instruction"], row["input"])
    completion = render_completion(row["output"])
    prompt_ids, completion_ids = encode(tokenizer, prompt, completion)
    happened = None
    if len(prompt_ids) + len(completion_ids) > max_tokens:
        if overlong == "drop":
            return None, "too_long"
        room = max_tokens - len(prompt_ids) - 1  # one for the end token
        answer = _cut(tokenizer, row["output"], room)
        if not answer:
            return None, "prompt_too_long"
        happened = "truncated"
        completion = render_completion(answer)
        prompt_ids, completion_ids = encode(tokenizer, prompt, completion)
    formatted = {
        **row,
        "prompt": prompt,
        "completion": completion,
        "tokens": len(prompt_ids) + len(completion_ids),
    }
    return formatted, happened


def _cut(tokenizer: Tokenizer, text: str, room: int) -> str:
    """The longest run of whole sentences from the start that takes `room` tokens, or of whole words."""
    if room < 1:
        return ""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    head = text[: encoded["offset_mapping"][:room][-1][1]]
    sentences = [match.end() for match in re.finditer(r"[.!?][\"')\]]*(?=\s)", head)]
    sentences = [end for end in sentences if end > len(head) / 2]
    words = [match.start() for match in re.finditer(r"(?<=\S)\s", head)]
    for end in [*reversed(sentences), *reversed(words)]:
        # Encoding a prefix can take a token more than it took inside the whole.
        if len(tokenizer(head[:end], add_special_tokens=False)["input_ids"]) <= room:
            return head[:end]
    return ""


def describe_tokens(tokens: Sequence[int]) -> dict[str, float]:
    """Tokens in total and per row: p50, p95, p99 and max."""
    import numpy as np

    if not tokens:
        return {"rows": 0, "tokens": 0}
    p50, p95, p99 = (float(q) for q in np.percentile(tokens, [50, 95, 99]))
    return {
        "rows": len(tokens),
        "tokens": sum(tokens),
        "p50": p50,
        "p95": p95,
        "p99": p99,
        "max": max(tokens),
    }
