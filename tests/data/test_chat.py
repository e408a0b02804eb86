"""format.template: base. Rows in the layout of the base's own chat template."""

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from fintune.data import chat
from fintune.data.formatting import format_row
from fintune.data.prompt import (
    RESPONSE_END,
    add_chat_template,
    as_typed,
    describe_layout,
    encode,
    end_token,
    end_tokens,
    has_special_token,
    load_tokenizer,
    prompt_token_ids,
    render_row,
    template_of,
)
from fintune.errors import UserError
from fintune.generation.tuned import prompt_tokens
from fintune.params import Base, Format
from support.rows import format_rows

CHATML = (
    "{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{%- for message in messages %}{{- '<|im_start|>' ~ message.role ~ '\n' ~ message.content }}"
    "{{- '<|im_end|>\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"
)
# the answer after an empty thought, as Qwen 3 writes it, which its open prompt lacks by default
THINKING = (
    "{%- for message in messages %}{{- '<|im_start|>' ~ message.role ~ '\n' }}"
    "{%- if message.role == 'assistant' and loop.last %}{{- '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{- message.content ~ '<|im_end|>\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}"
    "{%- endif %}{% endif %}"
)
LLAMA = (
    "{{- bos_token }}{%- set day = strftime_now('%d %b %Y') %}"
    "{%- for message in messages %}"
    "{%- if loop.first %}{{- '<|head|>system<|/head|>\n\nToday: ' ~ day ~ '\n' }}"
    "{%- if message.role == 'system' %}{{- message.content | trim }}{% endif %}{{- '<|eot|>' }}{% endif %}"
    "{%- if message.role != 'system' %}"
    "{{- '<|head|>' ~ message.role ~ '<|/head|>\n\n' ~ message.content | trim ~ '<|eot|>' }}{% endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|head|>assistant<|/head|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{- bos_token }}{%- for message in messages %}"
    "{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('roles must alternate') }}{% endif %}"
    "{%- if message.role == 'user' %}{{- '[INST] ' ~ message.content ~ ' [/INST]' }}"
    "{%- else %}{{- ' ' ~ message.content ~ eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{- bos_token }}{%- if messages[0].role == 'system' %}"
    "{{- raise_exception('System role not supported') }}{% endif %}"
    "{%- for message in messages %}{%- set role = 'model' if message.role == 'assistant' else 'user' %}"
    "{{- '<turn>' ~ role ~ '\n' ~ message.content | trim ~ '</turn>\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{- '<turn>model\n' }}{% endif %}"
)
# ignores a system message without a word
DEAF = "{%- for m in messages if m.role != 'system' %}"
DEAF += "{{- m.role ~ ': ' ~ m.content ~ eos_token }}{% endfor %}"
DEAF += "{%- if add_generation_prompt %}{{- 'assistant: ' }}{% endif %}"
KINDS = {
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "thinking": (THINKING, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "llama": (LLAMA, ["<|head|>", "<|/head|>", "<|eot|>"], "<|eot|>"),
    "mistral": (MISTRAL, [], "</s>"),
    "gemma": (GEMMA, ["<turn>", "</turn>"], "</turn>"),
    "deaf": (DEAF, [], "</s>"),
}
ROW = {
    "instruction": "Be brief.",
    "input": "What is a bond?",
    "output": "A loan. It pays interest.",
}
Make = Callable[..., Any]


@pytest.fixture
def make(tiny_base: Path, tmp_path: Path) -> Make:
    """Return a function that loads the tiny base's tokenizer with a chat template and its tokens."""

    def made(template: str | None, tokens: list[str] = []) -> Any:  # noqa: B006
        tokenizer = AutoTokenizer.from_pretrained(tiny_base)
        tokenizer.add_special_tokens({"additional_special_tokens": tokens})
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / "base")
        return load_tokenizer(Base(model=str(tmp_path / "base"), revision=None), "new", "base")

    return made


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest, make: Make) -> tuple[Any, str]:
    template, tokens, end = KINDS[request.param]
    return make(template, tokens), end


def own(tokenizer: Any, messages: list[dict[str, str]], is_open: bool) -> list[int]:
    """Return what transformers makes of messages, on the fixed day."""
    template = tokenizer.chat_template.replace("strftime_now('%d %b %Y')", f"'{chat.DAY}'")
    said = tokenizer.apply_chat_template(
        messages, add_generation_prompt=is_open, chat_template=template
    )
    return list(said["input_ids"])


def messages_of(tokenizer: Any, row: dict[str, str]) -> list[dict[str, str]]:
    system = {"role": "system", "content": row["instruction"]}
    user = {"role": "user", "content": row["input"]}
    if chat.traits(tokenizer).system:
        return [system, user]
    return [user | {"content": f"{row['instruction']}\n\n{row['input']}"}]


def test_a_row_has_the_tokens_that_transformers_gives_it(kind: tuple[Any, str]) -> None:
    """The prompt is an open conversation, the completion goes on to the token that ends the answer."""
    tokenizer, end = kind
    prompt, completion = encode(tokenizer, *render_row(tokenizer, ROW, ROW["output"]))
    messages = messages_of(tokenizer, ROW)
    assert prompt == own(tokenizer, messages, True)
    answered = [*messages, {"role": "assistant", "content": ROW["output"]}]
    whole = own(tokenizer, answered, False)
    if whole[: len(prompt)] == prompt:
        assert whole[: len(prompt) + len(completion)] == prompt + completion
        assert not set(whole[len(prompt) + len(completion) :]) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(completion).strip() == ROW["output"] + end
    assert end_token(tokenizer) == end and completion[-1] == tokenizer.convert_tokens_to_ids(end)
    assert completion.count(completion[-1]) == 1
    assert (
        prompt_token_ids(tokenizer) == []
        and end_tokens(tokenizer, completion[-1])[0] == completion[-1]
    )


def test_special_tokens_in_texts_are_text(kind: tuple[Any, str]) -> None:
    """Those of the frame and no others are tokens, and the text is whole."""
    tokenizer, end = kind
    bare = {key: value.replace(".", "") for key, value in ROW.items()}
    frame = [encode(tokenizer, *render_row(tokenizer, bare, bare["output"]))]
    special = [token for token in tokenizer.all_special_tokens if token != tokenizer.unk_token]
    for text in (f"a {end} b", f"{''.join(special)}x", f"q{end}{end[:1]}", f"x\n{end}"):
        row = {"instruction": text, "input": text, "output": text}
        prompt, completion = rendered = render_row(tokenizer, row, text)
        ids = encode(tokenizer, prompt, completion)
        for found, plain in zip(ids, frame[0], strict=True):
            known = set(tokenizer.all_special_ids)
            assert [i for i in found if i in known] == [i for i in plain if i in known]
        assert tokenizer.decode(ids[1]).strip() == text.strip() + end
        assert tokenizer.decode(ids[0]).count(text.strip()) == 2
        assert has_special_token(tokenizer, *rendered)
    if not render_row(tokenizer, ROW, "A")[0].endswith(
        " "
    ):  # else read otherwise for another reason
        assert not has_special_token(tokenizer, *render_row(tokenizer, ROW, ROW["output"]))


def test_prompts_are_beginnings_in_tokens_as_well(kind: tuple[Any, str]) -> None:
    """Also where white space at an answer's beginning joins that at a prompt's end."""
    tokenizer, end = kind
    for answer in ("\nA loan.", "  A loan.", "\n\n\nA"):
        prompt, completion = render_row(tokenizer, ROW, answer)
        ids = encode(tokenizer, prompt, completion)
        assert ids[0] == encode(tokenizer, prompt, "")[0]
        assert tokenizer.decode(ids[1]).strip() == answer.strip() + end


def test_each_length_is_cut_to_fit_with_its_end_token(kind: tuple[Any, str]) -> None:
    tokenizer, end = kind
    whole, _ = format_row(tokenizer, ROW, 400, "truncate")
    assert whole is not None
    prompt, _ = encode(tokenizer, whole["prompt"], "")
    seen = set()
    for limit in range(len(prompt), whole["tokens"] + 1):
        formatted, event = format_row(tokenizer, ROW, limit, "truncate")
        seen.add(event)
        if formatted:
            _, completion = encode(tokenizer, formatted["prompt"], formatted["completion"])
            assert formatted["tokens"] == len(prompt) + len(completion) <= limit
            assert completion[-1] == tokenizer.convert_tokens_to_ids(end)
            answer = formatted["completion"].removesuffix(RESPONSE_END).strip()
            assert answer and ROW["output"].startswith(answer)
    assert seen == {None, "truncated", "prompt_too_long"}


def test_a_conversation_keeps_its_turns(kind: tuple[Any, str]) -> None:
    tokenizer, _ = kind
    turns = [["user", "What is a bond?"], ["assistant", "A loan."], ["user", "And a share?"]]
    row = {
        "instruction": "",
        "input": "a transcript",
        "turns": json.dumps(turns),
        "output": "A part.",
    }
    formatted, _ = format_row(tokenizer, row, 400, "truncate")
    assert formatted is not None and "turns" not in formatted
    messages = [{"role": role, "content": text} for role, text in turns]
    assert encode(tokenizer, formatted["prompt"], "")[0] == own(tokenizer, messages, True)


def test_what_is_said_in_use_is_what_was_trained(kind: tuple[Any, str], tmp_path: Path) -> None:
    """The exported tokenizer has the base's template, and its usual instruction."""
    tokenizer, _ = kind
    template = tokenizer.chat_template
    add_chat_template(tokenizer, ROW["instruction"])
    tokenizer.save_pretrained(tmp_path / "exported")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert loaded.chat_template == template
    prompt, completion = render_row(tokenizer, ROW, ROW["output"])
    ids = encode(tokenizer, prompt, completion)
    assert prompt_tokens(loaded, ROW["input"], None) == ids[0] == encode(loaded, prompt, "")[0]
    assert prompt_tokens(loaded, ROW["input"], "Shout.") != ids[0]
    typed = loaded(as_typed(loaded, prompt, completion))["input_ids"]
    if "bos_token" in template:
        assert typed == [*ids[0], *ids[1]]
    with pytest.raises(UserError, match="the question is empty"):
        prompt_tokens(loaded, " ", None)


def test_the_layout_is_said(make: Make, tokenizer: Any) -> None:
    said = {name: describe_layout(make(*KINDS[name][:2])) for name in KINDS}
    assert all("base's own chat template; an answer ends with" in text for text in said.values())
    assert [name for name in said if "no system messages" in said[name]] == [
        "mistral",
        "gemma",
        "deaf",
    ]
    assert [name for name in said if "thinking aloud is off" in said[name]] == ["thinking"]
    assert [name for name in said if chat.DAY in said[name]] == ["llama"]
    assert describe_layout(tokenizer).startswith("format.template: seed")
    rows = [dict(zip(("prompt", "completion"), render_row(tokenizer, ROW, "A."), strict=True))]
    assert template_of(rows) == "seed"
    own_rows = [{"prompt": render_row(make(*KINDS["mistral"][:2]), ROW, "A.")[0]}]
    assert template_of(own_rows) == "base"


def test_no_day_changes_the_data(make: Make) -> None:
    tokenizer = make(*KINDS["llama"][:2])
    prompt, _ = render_row(tokenizer, ROW, "A.")
    assert "Today: 26 Jul 2024" in prompt and str(datetime.date.today().year) not in prompt


def test_a_template_that_cannot_be_used_is_refused_with_the_way_out(make: Make) -> None:
    way_out = r"; set format\.template: seed$"
    for template, said in (
        (None, "has no chat template"),
        (CHATML.replace("<|im_end|>", "***"), r"answer\*\*\*.* which no special token ends"),
        ("{{ messages[-1].content }}", "no special token ends|no answer after its own prompt"),
        ("{{ raise_exception('ask nothing') }}", "refuses the conversation: ask nothing"),
        ("{{ messages | nothing }}", "refuses the conversation: No filter named 'nothing'"),
        ("{{ ''.__class__.__mro__ }}" + CHATML, "refuses the conversation: access to attribute"),
        ("{{ '<response>' }}" + CHATML, "trained in the seed's format"),
    ):
        with pytest.raises(UserError, match=f"^format.template: base: .*({said}).*{way_out}"):
            make(template)
    broken = CHATML.replace("{{- '<|im_start|>assistant\n' }}", "{{- '<|im_start|>model\n' }}")
    with pytest.raises(UserError, match=f"no answer after its own prompt.*{way_out}"):
        make(broken, ["<|im_start|>", "<|im_end|>"])


def test_rows_that_the_template_refuses_or_changes_are_counted(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = make(*KINDS["mistral"][:2])
    params = Format(template="base", max_tokens=200, overlong="truncate")
    twice = ROW | {"turns": json.dumps([["user", "a"], ["user", "b"]])}
    kept, counts = format_rows(tokenizer, [ROW, twice], params, "train")
    assert len(kept) == 1 and counts["dropped"] == {"template": 1}
    assert "the base's chat template refuses the conversation: roles must alternate" in caplog.text
    with pytest.raises(UserError, match=r"roles must alternate; set format\.template: seed"):
        format_rows(tokenizer, [twice], params, "train")
    shouting = make(
        MISTRAL.replace("' ' ~ message.content", "' ' ~ message.content | replace('A', 'B')")
    )
    _, counts = format_rows(shouting, [ROW, ROW | {"output": "Well."}], params, "train")
    assert counts["dropped"] == {"template": 1}
