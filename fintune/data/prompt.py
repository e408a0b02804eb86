"""The only definition of the prompt: its text, its two special tokens, its tokens and what is learned."""

import json
import os
from typing import Any

from fintune.errors import UserError
from fintune.params import Base

RESPONSE = "<response>"
RESPONSE_END = "<response|end>"
SPECIAL_TOKENS = (RESPONSE, RESPONSE_END)

# a loader process that is forked after the tokenizer was used would only warn about it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

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
            from fintune.hub.client import explain_model_error

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
