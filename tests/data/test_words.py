"""Words and sentence ends of any script."""

import pytest

from fintune.data.words import bare_words, sentence_ends, split_words, word_ends


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It isn't 5 %, is it?", ["It", "isn't", "5", "%,", "is", "it?"]),  # as at white space
        ("बिल क्या है", ["बिल", "क्या", "है"]),
        ("我不知道。 OK.", ["我", "不知道", "OK."]),
        ("ออมเงิน🙂ดี", ["ออม", "เงิน", "ดี"]),
        ("教えてください。", ["教え", "て", "くだ", "さい"]),
        ("금리는 오른다", ["금리는", "오른다"]),
    ],
)
def test_words_of_every_script(text: str, words: list[str]) -> None:
    assert split_words(text) == words


def test_bare_words_lose_their_marks_and_keep_their_vowels() -> None:
    assert bare_words("Zürich’s bill, «है»: 5%") == ["Zürich", "s", "bill", "है", "5"]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("It is 3.14, e.g. Yes! “No.” Or", ["It is 3.14, e.g.", " Yes!", " “No.”"]),
        ("(He said “no.”) Or", ["(He said “no.”)"]),
        ("存钱。「好吗？」然后", ["存钱。", "「好吗？」"]),
        ("πόσο。３．１４．次", ["πόσο。", "３．１４．"]),
        ("बिल है। वह", ["बिल है।"]),
        ("نعم؟ لا", ["نعم؟"]),
    ],
)
def test_sentences_of_every_script(text: str, sentences: list[str]) -> None:
    ends = sentence_ends(text)
    assert [text[a:b] for a, b in zip([0, *ends], ends, strict=False)] == sentences


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a bond (short) pays", ["a", " bond", " (short)"]),
        ("不知道（怎么）存钱。🙂好", ["不知道", "（怎么）", "存钱。", "🙂", "好"]),
        ("ไม่แน่ใจ ว่า", ["ไม่", "แน่ใจ", " ว่า"]),
    ],
)
def test_a_word_is_cut_from_neither_its_marks_nor_its_vowels(text: str, parts: list[str]) -> None:
    ends = [*word_ends(text, len(text)), *([len(text)] if parts[-1][-1] == text[-1] else [])]
    assert [text[a:b] for a, b in zip([0, *ends], ends, strict=False)] == parts
    assert word_ends(text, 3) == [end for end in ends if end < 3 or (end == 3 and text[3:])]
