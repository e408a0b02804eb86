"""The only definition of the prompt: its text, its two special tokens and its encoding."""

import json
import os
from typing import Any, Literal

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
        tokenizer.chat_template = _template(beginning, instruction, end_token(tokenizer))
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


def _template(begin: str, instruction: str, end: str) -> str:
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
        f"{{%- elif message.role == 'assistant' %}}{{{{- text(message.content) }}}}{end}",
        "{%- else %}{{ raise_exception('no messages of role ' ~ message.role ~ ' are known') }}",
        "{%- endif %}",
        "{%- endfor %}",
    )
    return "\n".join(lines) + "\n"


def load_tokenizer(base: Base, end_token: Literal["new", "base"]) -> Tokenizer:
    """Load the base's fast tokenizer, with a pad token.

    A loss that masks padding would also mask an end token used as padding. The pad token is the
    tokenizer's own, else the unknown token, else the end-of-text token, else the token that opens an answer.

    Args:
        end_token: `new` adds the two special tokens of the prompt; `base` adds none: `<response>` is plain
            text, and the tokenizer's own end-of-text token ends an answer.

    Raises:
        UserError: the tokenizer cannot be loaded, has no fast version, or no end token where it is needed.
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
    if end_token == "new":
        tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    elif tokenizer.eos_token is None:
        raise UserError(f"train.end_token: base: {base.model} has no end token of its own; set new")
    known = (tokenizer.pad_token, tokenizer.unk_token, tokenizer.eos_token)
    tokenizer.pad_token = next((token for token in known if token), RESPONSE)
    return tokenizer


def prompt_token_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the ids of the prompt's special tokens; empty where the base's own end token ends an answer."""
    ids = [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS]
    return [] if {None, tokenizer.unk_token_id} & set(ids) else ids


def end_token(tokenizer: Tokenizer) -> str:
    """Return the token that ends an answer: the prompt's own, or else the base's."""
    return RESPONSE_END if prompt_token_ids(tokenizer) else str(tokenizer.eos_token)


def with_end_token(tokenizer: Tokenizer, completion: str) -> str:
    """Return a rendered completion with the end token that this tokenizer has."""
    if not completion.endswith(RESPONSE_END):
        return completion
    return completion.removesuffix(RESPONSE_END) + end_token(tokenizer)


def end_token_id(tokenizer: Tokenizer) -> int:
    """Return the id of the token that ends an answer."""
    return int(tokenizer.convert_tokens_to_ids(end_token(tokenizer)))


def end_tokens(tokenizer: Tokenizer, end_id: int) -> list[int]:
    """Return the tokens that end an answer: the trained end token, then the base's own, if it has one."""
    own = tokenizer.eos_token_id
    return [end_id] + [own] * (own not in (None, end_id))


def encode(tokenizer: Tokenizer, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """Encode a row: the prompt, with the tokenizer's own beginning, and the completion with its end token.

    They are encoded separately, so that a prompt has the same tokens in training and in use. The loss is
    on the completion alone. Of special tokens only those that close prompt and completion act as such: `</s>`
    within a text is text.
    """
    opening = prompt_token_ids(tokenizer)[:1] * prompt.endswith(RESPONSE)
    body = prompt.removesuffix(RESPONSE) if opening else prompt
    encoded = tokenizer(body, split_special_tokens=True, return_special_tokens_mask=True)
    prompt_ids, added = encoded["input_ids"], encoded["special_tokens_mask"]
    while added and added.pop():
        prompt_ids.pop()  # some tokenizers append an end-of-text token
    answer = completion.removesuffix(RESPONSE_END)
    ids = encode_text(tokenizer, answer)
    return prompt_ids + opening, ids + [end_token_id(tokenizer)] * (answer != completion)


def has_special_token(tokenizer: Tokenizer, text: str) -> bool:
    """Return whether a text holds one of the tokenizer's special tokens, beside those of the prompt."""
    known = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return any(token in text for token in known.difference(SPECIAL_TOKENS))


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode a text in which no special token acts as one."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)[
        "input_ids"
    ]
    return ids
