"""The only definition of the prompt: its text, its two special tokens and its encoding."""

import json
import os
from typing import Any

from fintune.errors import UserError
from fintune.params import Base

RESPONSE = "<response>"
RESPONSE_END = "<response|end>"
SPECIAL_TOKENS = (RESPONSE, RESPONSE_END)

# else processes forked after the tokenizer was used print a warning
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

Tokenizer = Any  # a transformers fast tokenizer; naming its class here would import transformers


def render_prompt(instruction: str, input: str) -> str:
    """Render the prompt, up to and including the token that opens the answer."""
    return f"Instruction: {instruction}\nInput: {input}\n{RESPONSE}"


def render_completion(output: str) -> str:
    """Render the completion: the answer and the token that ends it."""
    return f"{output}{RESPONSE_END}"


def add_chat_template(tokenizer: Tokenizer, instruction: str) -> None:
    """Set the prompt as the tokenizer's chat template, for programs that send messages.

    A system or developer message replaces `instruction`; a user message is the input. Earlier turns come
    first, each formatted as in training. Content is a text or a list of parts of text; other parts and other
    roles are errors.

    Raises:
        UserError: no template reproduces the tokens that this tokenizer puts at the beginning of texts.
    """
    begin = tokenizer.bos_token or ""
    expected = encode(tokenizer, render_prompt(instruction, "a"), "")[0]
    for beginning in ("", begin, begin + " "):  # some put a space only before the first word
        tokenizer.chat_template = _template(beginning, instruction)
        message = {"role": "user", "content": "a"}
        rendered = tokenizer.apply_chat_template([message], add_generation_prompt=True)
        if rendered["input_ids"] == expected:
            return
    raise UserError(
        "base.model: its tokenizer begins texts in a way that no chat template can express"
    )


def pad_left(tokenizer: Tokenizer) -> None:
    """Make a saved tokenizer pad on the left, as generating a batch needs."""
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"


def _template(begin: str, instruction: str) -> str:
    user = render_prompt("{{ ns.instruction }}", "{{ text(message.content) }}")
    lines = (
        "{%- macro text(content) %}{% if content is string %}{{ content }}"
        "{% else %}{% for part in content or [] %}{% if part.type == 'text' %}{{ part.text }}"
        "{% else %}{{ raise_exception('only text can be read, not a part of type ' ~ part.type) }}"
        "{% endif %}{% endfor %}{% endif %}{% endmacro %}",
        f"{{%- set ns = namespace(instruction={json.dumps(instruction, ensure_ascii=False)}) %}}",
        f"{{{{- {json.dumps(begin)} }}}}",
        "{%- for message in messages %}",
        "{%- if message.role in ('system', 'developer') %}"
        "{% set ns.instruction = text(message.content) %}",
        f"{{%- elif message.role == 'user' %}}{{{{- '' }}}}{user}",
        f"{{%- elif message.role == 'assistant' %}}{{{{- text(message.content) }}}}{RESPONSE_END}",
        "{%- else %}{{ raise_exception('no messages of role ' ~ message.role ~ ' are known') }}",
        "{%- endif %}",
        "{%- endfor %}",
    )
    return "\n".join(lines) + "\n"


def load_tokenizer(base: Base) -> Tokenizer:
    """Load the base's fast tokenizer, and add the two special tokens and a pad token that ends nothing.

    A loss that masks padding would also mask an end token used as padding. The pad token is the
    tokenizer's own, else the unknown token, else the end-of-text token, which ends no answer here, else
    the token that opens an answer.

    Raises:
        UserError: the tokenizer cannot be loaded, or has no fast version.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            base.model, revision=base.revision, trust_remote_code=False
        )
    except Exception as error:  # the hub client also raises its transport's errors
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
    known = (tokenizer.pad_token, tokenizer.unk_token, tokenizer.eos_token)
    tokenizer.pad_token = next((token for token in known if token), RESPONSE)
    return tokenizer


def end_token_id(tokenizer: Tokenizer) -> int:
    """Return the id of the token that ends an answer."""
    return int(tokenizer.convert_tokens_to_ids(RESPONSE_END))


def end_tokens(tokenizer: Tokenizer, end_id: int) -> list[int]:
    """Return the tokens that end an answer: the trained end token, then the base's own, if it has one."""
    own = tokenizer.eos_token_id
    return [end_id] + [own] * (own not in (None, end_id))


def encode(tokenizer: Tokenizer, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """Encode a row: the prompt, with the tokenizer's own beginning, and the completion.

    They are encoded separately, so that a prompt has the same tokens in training and in use. The loss is
    on the completion alone.
    """
    prompt_ids: list[int] = tokenizer(prompt)["input_ids"]
    if prompt_ids[-1] != tokenizer.convert_tokens_to_ids(RESPONSE):
        prompt_ids = prompt_ids[:-1]  # some tokenizers append an end-of-text token
    completion_ids: list[int] = tokenizer(completion, add_special_tokens=False)["input_ids"]
    return prompt_ids, completion_ids
