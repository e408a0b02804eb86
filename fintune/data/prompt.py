"""The only definition of the prompt: its text, its special tokens and its encoding.

Rows are laid out in the seed's format, with two tokens of its own, or by the base's own chat template
(`fintune.data.chat`). In either a completion ends with `<response|end>`, which stands for the token that ends
an answer.
"""

import json
import os
from typing import Any, Literal

from fintune.data import chat
from fintune.data.unpacking import Row
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


def render_row(tokenizer: Tokenizer, row: Row, answer: str) -> tuple[str, str]:
    """Render a record's prompt, and the completion with this answer, as the tokenizer's layout has them.

    Raises:
        Refused: the base's chat template refuses the conversation, or changes the answer.
    """
    if not has_own_template(tokenizer):
        return render_prompt(row["instruction"], row["input"]), render_completion(answer)
    prompt, said = chat.lay_out(tokenizer, row, answer)
    return prompt, render_completion(said)


def has_own_template(tokenizer: Tokenizer) -> bool:
    """Return whether the base's own chat template lays out the rows."""
    return RESPONSE not in (tokenizer.chat_template or RESPONSE)


def describe_layout(tokenizer: Tokenizer) -> str:
    """Say by which template rows are laid out, and what ends an answer."""
    if not has_own_template(tokenizer):
        return "format.template: seed: Instruction, Input, <response>"
    known = chat.traits(tokenizer)
    said = f"format.template: base: the base's own chat template; an answer ends with {known.end}"
    if not known.system:
        said += "; it has no system messages: instructions are put before the first user message"
    if tokenizer.chat_template.startswith(chat.NO_THINKING):
        said += "; its thinking aloud is off"
    if known.dated:
        said += f"; it writes the date, which is {chat.DAY} in training, evaluation and ask"
    return said


def template_of(rows: list[Row]) -> Literal["seed", "base"]:
    """Return the `format.template` by which formatted rows were laid out."""
    return "seed" if all(row["prompt"].endswith(RESPONSE) for row in rows[:1]) else "base"


def add_chat_template(tokenizer: Tokenizer, instruction: str) -> None:
    """Set the prompt as the tokenizer's chat template, for programs that send messages.

    The base's own template stays as it is, and the tokenizer's settings say which `instruction` is usual.

    A system or developer message replaces `instruction`; a user message is the input. Earlier turns come
    first, each formatted as in training. Content is a text or a list of parts of text; other parts and other
    roles are errors.

    Raises:
        UserError: no template reproduces the tokens that this tokenizer puts at the beginning of texts.
    """
    if has_own_template(tokenizer):
        tokenizer.init_kwargs["usual_instruction"] = instruction
        return
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


def load_tokenizer(
    base: Base, end_token: Literal["new", "base"], template: Literal["seed", "base"] = "seed"
) -> Tokenizer:
    """Load the base's fast tokenizer, with a pad token.

    A loss that masks padding would also mask an end token used as padding. The pad token is the
    tokenizer's own, else the unknown token, else the end-of-text token, else one of the prompt's.

    Args:
        end_token: `new` adds the two special tokens of the prompt; `base` adds none: `<response>` is plain
            text, and the tokenizer's own end-of-text token ends an answer.
        template: `base` adds no tokens in any case: what the base's chat template writes ends an answer.

    Raises:
        UserError: the tokenizer cannot be loaded, has no fast version, no end token or no chat template where
            it is needed, or a chat template that cannot lay out rows.
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
    if template == "seed":
        tokenizer.chat_template = None  # else it would lay out the rows
    elif RESPONSE in str(tokenizer.chat_template):
        raise UserError(
            f"format.template: base: {base.model} was trained in the seed's format, which its chat "
            f"template writes; {chat.WAY_OUT}"
        )
    else:
        chat.use_own_template(tokenizer, base.model)
    if template == "seed" and end_token == "new":
        tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    elif template == "seed" and tokenizer.eos_token is None:
        raise UserError(f"train.end_token: base: {base.model} has no end token of its own; set new")
    last = RESPONSE if template == "seed" else chat.traits(tokenizer).end
    known = (tokenizer.pad_token, tokenizer.unk_token, tokenizer.eos_token, last)
    tokenizer.pad_token = next(token for token in known if token)
    return tokenizer


def prompt_token_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the ids of the prompt's special tokens; empty where a token of the base's ends an answer."""
    if has_own_template(tokenizer):
        return []
    ids = [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS]
    return [] if {None, tokenizer.unk_token_id} & set(ids) else ids


def end_token(tokenizer: Tokenizer) -> str:
    """Return the token that ends an answer: the prompt's own, or else the base's."""
    if has_own_template(tokenizer):
        return chat.traits(tokenizer).end
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

    In the layout of the base's own template, its tokens are tokens as well, and prompt and completion are
    encoded together if the prompt's tokens stay the same.

    Raises:
        Refused: the base's tokenizer makes a special token of a text.
    """
    if has_own_template(tokenizer):
        return _encode_own(tokenizer, prompt, completion)
    opening = prompt_token_ids(tokenizer)[:1] * prompt.endswith(RESPONSE)
    body = prompt.removesuffix(RESPONSE) if opening else prompt
    encoded = tokenizer(body, split_special_tokens=True, return_special_tokens_mask=True)
    prompt_ids, added = encoded["input_ids"], encoded["special_tokens_mask"]
    while added and added.pop():
        prompt_ids.pop()  # some tokenizers append an end-of-text token
    answer = completion.removesuffix(RESPONSE_END)
    ids = encode_text(tokenizer, answer)
    return prompt_ids + opening, ids + [end_token_id(tokenizer)] * (answer != completion)


def _encode_own(tokenizer: Tokenizer, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    answer = completion.removesuffix(RESPONSE_END)
    begun = chat.encode_marked(tokenizer, prompt)
    whole = chat.encode_marked(tokenizer, prompt + chat.mark(tokenizer, answer))
    ids = whole[len(begun) :]
    if whole[: len(begun)] != begun:  # as where a line's end and an answer's first are one token
        ids = encode_text(tokenizer, answer)
    return begun, ids + [end_token_id(tokenizer)] * (answer != completion)


def as_typed(tokenizer: Tokenizer, prompt: str, completion: str = "") -> str:
    """Return a row's text for programs that put the tokenizer's own beginning before it."""
    text = prompt + with_end_token(tokenizer, completion)
    begin = tokenizer.bos_token or ""
    if has_own_template(tokenizer) and tokenizer.bos_token_id in tokenizer("")["input_ids"]:
        return text.removeprefix(begin)
    return text


def has_special_token(tokenizer: Tokenizer, prompt: str, completion: str = "") -> bool:
    """Return whether other programs read a row's text as other tokens, since one of its words is a token."""
    if has_own_template(tokenizer):
        prompt_ids, ids = encode(tokenizer, prompt, completion)
        text = prompt + with_end_token(tokenizer, completion)
        return bool(tokenizer(text, add_special_tokens=False)["input_ids"] != prompt_ids + ids)
    text = prompt + completion
    known = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return any(token in text for token in known.difference(SPECIAL_TOKENS))


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode a text in which no special token acts as one."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)[
        "input_ids"
    ]
    return ids
