"""The prompt, the completion, and the handling of rows that are too long."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tokenizers.processors import TemplateProcessing

from fintune.data import formatting
from fintune.data.formatting import describe_tokens, format_row, schema_of
from fintune.data.prompt import (
    encode,
    end_token_id,
    has_special_token,
    render_completion,
    render_prompt,
)
from fintune.data.stream import writer
from fintune.data.tables import read_rows

ROW = {
    "instruction": "Answer briefly.",
    "input": "Should I refinance?",
    "output": "It depends on the rate. Compare the costs first! Then decide whether it pays off.",
}


def test_the_prompt_is_the_recipes() -> None:
    assert render_prompt("Do this.", "Why?") == "Instruction: Do this.\nInput: Why?\n<response>"
    assert render_completion("Because.") == "Because.<response|end>"


def test_each_special_token_is_one_token(tokenizer: Any) -> None:
    prompt, completion = encode(tokenizer, render_prompt("a", "b"), render_completion("c"))
    assert tokenizer.convert_ids_to_tokens(prompt[-1]) == "<response>"
    assert tokenizer.convert_ids_to_tokens(completion[-1]) == "<response|end>"
    assert completion[-1] == end_token_id(tokenizer)
    assert tokenizer.bos_token_id not in completion


def test_what_is_learned_decodes_to_the_answer_and_the_end_token(tokenizer: Any) -> None:
    for text in (ROW["output"], "5 %", "  spaced  ", "línea\nnueva 🙂", "</s>?"):
        _, completion = encode(tokenizer, "p<response>", render_completion(text))
        assert tokenizer.decode(completion) == text + "<response|end>"


def test_a_special_token_within_a_text_is_text(tokenizer: Any) -> None:
    """Only those of the prompt's frame act as tokens, wherever the base's own are written."""
    for text in ("</s>", "a <s>b</s> c", f"{tokenizer.pad_token}{tokenizer.unk_token}"):
        prompt, completion = encode(tokenizer, render_prompt(text, text), render_completion(text))
        special = set(tokenizer.all_special_ids) & {*prompt, *completion}
        framed = {tokenizer.bos_token_id, prompt[-1], completion[-1]}
        assert special == framed and [prompt[0], len(framed)] == [tokenizer.bos_token_id, 3]
        assert tokenizer.decode(prompt[1:]) == render_prompt(text, text)
        assert has_special_token(tokenizer, text)
    assert not has_special_token(tokenizer, render_prompt("a", "b"))


def test_a_tokenizer_s_own_end_of_text_is_left_out(tokenizer: Any) -> None:
    expected = encode(tokenizer, render_prompt("a", "b"), "")
    appending = copy.deepcopy(tokenizer)
    appending.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)],
    )
    assert appending("a")["input_ids"][-1] == tokenizer.eos_token_id
    assert encode(appending, render_prompt("a", "b"), "") == expected


def test_the_pad_token_ends_nothing(tokenizer: Any) -> None:
    assert tokenizer.pad_token_id not in (end_token_id(tokenizer), tokenizer.eos_token_id)


def test_a_row_that_fits_is_kept_whole(tokenizer: Any) -> None:
    formatted, happened = format_row(tokenizer, ROW, 200, "truncate")
    assert happened is None
    assert formatted is not None
    assert formatted["completion"] == ROW["output"] + "<response|end>"
    prompt, completion = encode(tokenizer, formatted["prompt"], formatted["completion"])
    assert formatted["tokens"] == len(prompt) + len(completion)
    assert {key: formatted[key] for key in ROW} == ROW


def full(tokenizer: Any) -> int:
    formatted, _ = format_row(tokenizer, ROW, 200, "truncate")
    assert formatted is not None
    return int(formatted["tokens"])


def test_every_length_keeps_the_end_token_and_fits(tokenizer: Any) -> None:
    """At each limit, a row is whole, cut to fit with its end token kept, or dropped."""
    seen = set()
    prompt, _ = encode(tokenizer, render_prompt(ROW["instruction"], ROW["input"]), "")
    for limit in range(2, full(tokenizer) + 1):
        formatted, happened = format_row(tokenizer, ROW, limit, "truncate")
        seen.add(happened)
        if formatted is None:
            assert happened == "prompt_too_long"
            assert limit <= len(prompt) + 5
            continue
        assert formatted["tokens"] <= limit
        _, completion = encode(tokenizer, formatted["prompt"], formatted["completion"])
        assert completion[-1] == end_token_id(tokenizer)
        answer = formatted["completion"].removesuffix("<response|end>")
        assert answer
        assert ROW["output"].startswith(answer)
        assert not answer[-1].isspace()
        assert ROW["output"][len(answer) :][:1] in ("", " ")  # never within a word
    assert seen == {None, "truncated", "prompt_too_long"}


def test_an_answer_is_cut_after_a_whole_sentence(tokenizer: Any) -> None:
    formatted, happened = format_row(tokenizer, ROW, full(tokenizer) - 2, "truncate")
    assert happened == "truncated"
    assert formatted is not None
    assert formatted["completion"] == (
        "It depends on the rate. Compare the costs first!<response|end>"
    )


@pytest.mark.parametrize(
    ("sentence", "word_ends"),
    [
        ("我不知道应该怎么存钱，也不知道为什么。", ("道", "该", "么", "钱，", "也", "我")),
        ("貯金の仕方がわかりません。", ("貯金", "の", "仕方", "が", "わか", "り", "ま")),
        ("ควรออมเงินอย่างไรดี", ("ควร", "ออม", "เงิน", "ไร", "ดี")),
        ("पैसे कैसे बचाएँ।", ("पैसे", "कैसे", "बचाएँ।")),
    ],
)
def test_long_answers_of_every_script_are_cut_and_kept(
    tokenizer: Any, sentence: str, word_ends: tuple[str, ...]
) -> None:
    row = {**ROW, "output": sentence * 9}
    prompt, _ = encode(tokenizer, render_prompt(row["instruction"], row["input"]), "")
    for limit in range(len(prompt) + 30, len(prompt) + 150, 7):
        formatted, happened = format_row(tokenizer, row, limit, "truncate")
        assert happened == "truncated" and formatted is not None
        answer = formatted["completion"].removesuffix("<response|end>")
        assert row["output"].startswith(answer) and formatted["tokens"] <= limit
        whole = answer.endswith("。") or answer.endswith("।")
        assert whole or answer.endswith(word_ends), answer


def test_each_cause_has_its_own_reason(tokenizer: Any) -> None:
    long = {**ROW, "output": "0123456789abcdef" * 50}
    assert format_row(tokenizer, long, 200, "truncate") == (None, "no_word_end")
    assert format_row(tokenizer, {**ROW, "input": "why " * 300}, 200, "truncate") == (
        None,
        "prompt_too_long",
    )


def test_dropping_instead_of_cutting(tokenizer: Any) -> None:
    assert format_row(tokenizer, ROW, full(tokenizer) - 1, "drop") == (None, "too_long")
    assert format_row(tokenizer, ROW, full(tokenizer), "drop")[1] is None


@pytest.mark.parametrize("column", ["instruction", "input", "output"])
def test_a_text_that_holds_a_special_token_is_dropped(tokenizer: Any, column: str) -> None:
    row = {**ROW, column: "ignore this <response|end> and say"}
    assert format_row(tokenizer, row, 200, "truncate") == (None, "special_token")


def test_the_optional_columns_are_no_texts_of_the_prompt(tokenizer: Any, tmp_path: Path) -> None:
    """Special tokens do no harm there, and null is no text; the source's split is not kept."""
    optional = {"result": "<response>", "kind": None, "split": "test"}
    formatted, happened = format_row(tokenizer, {**ROW, **optional}, 200, "truncate")
    assert formatted is not None and happened is None
    plain, _ = format_row(tokenizer, ROW, 200, "truncate")
    assert plain is not None
    for row, names in ((formatted, ["result", "kind"]), (plain, [])):
        given = pa.schema([(name, pa.string()) for name in row])
        with writer(tmp_path / "rows.parquet", schema_of(given)) as write:
            write(pa.Table.from_pylist([row], schema=schema_of(given)))
        (stored,) = read_rows(tmp_path / "rows.parquet")
        assert list(stored) == [*ROW, *names, "prompt", "completion", "tokens"]
        assert stored == {key: row[key] for key in stored}


def test_token_counts() -> None:
    counts = describe_tokens(np.array([10, 20, 30, 40]))
    expected = {"rows": 4, "tokens": 100, "p50": 25, "p95": 38.5, "p99": 39.7, "max": 40}
    assert counts == pytest.approx(expected)
    assert describe_tokens([]) == {"rows": 0, "tokens": 0}


def test_of_a_huge_text_only_the_beginning_is_read(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It formats as its beginning does, is kept as the reference, and is not tokenized as a whole."""
    seen = []
    plain = formatting.count_tokens
    monkeypatch.setattr(
        formatting,
        "count_tokens",
        lambda to, rows: seen.append(len("".join(rows[0]))) or plain(to, rows),
    )
    sentence = "It pays 5 % a year. "
    huge, long = (ROW | {"output": sentence * count} for count in (500_000, 4_000))
    found, event = format_row(tokenizer, huge, 192, "truncate")
    expected, _ = format_row(tokenizer, long, 192, "truncate")
    assert found and expected and event == "truncated"
    assert found | {"output": ""} == expected | {"output": ""}
    assert found["output"] == huge["output"]
    assert max(seen) < 2 * formatting.READ
    asked = ROW | {"input": sentence * 500_000}
    assert format_row(tokenizer, asked, 192, "truncate") == (None, "prompt_too_long")
    for row in (huge, asked):
        assert format_row(tokenizer, row, 192, "drop") == (None, "too_long")
    assert max(seen) < 2 * formatting.READ
