"""Text metrics, each against a plain computation."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fintune.errors import UserError
from fintune.evaluation import texts
from fintune.evaluation.texts import (
    distinct_2,
    ends_in_loop,
    longest_repeat,
    similarities,
    text_scores,
)
from fintune.params import Embedding


def test_rouge_by_hand() -> None:
    """'the rate falls' and 'the interest rate falls now' share three words and one bigram."""
    scores = text_scores(
        ["the rate falls", "", "Rates fall."],
        [["the interest rate falls now"], ["a"], ["rate falls"]],
    )

    def f1(found: float, of_answer: float, of_reference: float) -> float:
        return 2 * found / (of_answer + of_reference)

    assert scores["rouge_1"] == pytest.approx([f1(3, 3, 5), 0, 1])  # stems are compared
    assert scores["rouge_2"] == pytest.approx([f1(1, 2, 4), 0, 1])
    assert scores["rouge_l"] == pytest.approx([f1(3, 3, 5), 0, 1])


def test_rouge_is_the_library_s_own_with_stemming() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    plain = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    answers = ["Bonds' yields were rising, 5% fewer.", "", "one two three", *made_texts(20, 1)]
    references = ["The bond yielded 5 % and the rises ended", "none", "3 2 1", *made_texts(20, 2)]
    scores = text_scores(answers, [[each] for each in references])
    expected = [plain.score(*each) for each in zip(references, answers, strict=True)]
    for name, kind in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
        assert list(scores[name]) == [each[kind].fmeasure for each in expected]
    assert len(set(scores["rouge_l"])) > 15


def made_texts(count: int, seed: int) -> list[str]:
    """Make texts of 5 to 200 words, of which two have some in common."""
    numbers = random.Random(seed)
    words = (
        ["bond", "yields", "risen", "falling", "of", "the", "market", "12", "percent"],
        range(5, 201),
    )
    return [" ".join(numbers.choices(words[0], k=numbers.choice(words[1]))) for _ in range(count)]


@pytest.mark.parametrize(
    ("answer", "reference", "shared", "of_answer", "of_reference"),
    [
        ("बिल क्या है", "बैल क्या है", 2, 3, 3),  # the first words differ by a vowel sign
        ("我不知道。", "我不懂", 1, 2, 2),
        ("ออมเงิน ดี", "ออมเงิน", 2, 3, 2),
        ("Курс растёт", "курс падает", 1, 2, 2),
        ("Ｒａｔｅ falls", "rates fell", 1, 2, 2),  # English words keep their stems
    ],
)
def test_rouge_of_every_script(
    answer: str, reference: str, shared: int, of_answer: int, of_reference: int
) -> None:
    found = text_scores([answer], [[reference]])["rouge_1"][0]
    assert found == pytest.approx(2 * shared / (of_answer + of_reference))


def test_words_are_counted_where_a_script_has_no_spaces() -> None:
    scores = text_scores(["我不知道我不知道"], [["ออมเงินดี"]])
    assert (scores["words"][0], scores["reference_words"][0]) == (4, 3)
    assert scores["longest_repeat"][0] == 2 and scores["distinct_2"][0] == pytest.approx(2 / 3)


def test_chrf_by_hand() -> None:
    """'abc' and 'abd' share 2 of 3 letters, 1 of 2 pairs and 0 of 1 triple; there are no longer n-grams."""
    scores = text_scores(["abc", "abc"], [["abd"], ["abc"]])
    assert scores["chrf"] == pytest.approx([100 * (2 / 3 + 1 / 2 + 0) / 3, 100], rel=1e-6)


def test_the_best_of_several_references_counts() -> None:
    several = text_scores(["bonds fall"], [["a b c d", "bonds fall", "x"]])
    alone = text_scores(["bonds fall"], [["bonds fall"]])
    for name in ("rouge_1", "rouge_2", "rouge_l", "chrf"):
        assert several[name] == alone[name]
    assert several["reference_words"] == [2]
    worse = text_scores(["bonds fall"], [["a b c d", "x"]])
    assert worse["rouge_l"] == [0] and worse["reference_words"] == [1]


def test_distinct_2() -> None:
    assert distinct_2(["a", "b", "a", "b"]) == pytest.approx(2 / 3)
    assert distinct_2(["a", "a", "a", "a", "a"]) == pytest.approx(1 / 4)
    assert distinct_2(["a"]) == distinct_2([]) == 1


def test_longest_repeat_equals_the_search_of_all_stretches() -> None:
    def plain(words: list[str]) -> int:
        return max(
            (
                length
                for start in range(len(words))
                for length in range(1, len(words) - start + 1)
                if any(words[e : e + length] == words[start : start + length] for e in range(start))
            ),
            default=0,
        )

    draw = random.Random(0)
    for letters in ("ab", "abcdefgh"):
        for length in range(12):
            words = [draw.choice(letters) for _ in range(length)]
            assert longest_repeat(words) == plain([*words]), words
    assert longest_repeat(["to", "be", "or", "not", "to", "be"]) == 2
    assert longest_repeat(["no", "no", "no", "no"]) == 3


def test_many_cores_give_the_same_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [f"bond number {k % 5} falls by {k % 3}" for k in range(30)]
    references = [[f"the bond falls by {k % 3}"] for k in range(30)]
    serial = text_scores(given, references)
    monkeypatch.setattr(texts, "SERIAL_WORDS", 0)
    parallel = text_scores(given, references)
    for name in serial:
        assert (serial[name] == parallel[name]).all()


def test_equal_pairs_are_scored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scored = []
    plain = texts._score
    monkeypatch.setattr(texts, "_score", lambda job: scored.append(job) or plain(job))  # type: ignore[func-returns-value]
    scores = text_scores(["a", "b", "a", "a"], [["a"], ["a"], ["a"], ["b"]])
    assert len(scored) == 3
    assert scores["rouge_1"].tolist() == [1, 0, 1, 0]


def test_similarity_is_the_cosine_of_mean_states(tiny_base: Path, tokenizer: Any) -> None:
    from transformers import AutoModel, AutoTokenizer

    plain, model = AutoTokenizer.from_pretrained(tiny_base), AutoModel.from_pretrained(tiny_base)

    def vector(text: str) -> np.ndarray:
        with torch.no_grad():
            ids = plain(text, return_tensors="pt")["input_ids"]
            mean: np.ndarray = model(input_ids=ids).last_hidden_state[0].float().mean(dim=0).numpy()
        return mean / np.linalg.norm(mean)

    embedding = Embedding(model=str(tiny_base), revision=None)
    given = ["a bond", "a share that rises and rises", ""]
    references = [["a bond"], ["some stock", "a share"], ["x"]]
    found = similarities({"base": given}, references, embedding, torch.device("cpu"))["base"]
    nearest = max(float(vector(given[1]) @ vector(text)) for text in references[1])
    assert found == pytest.approx([1, nearest, 0], abs=1e-2)


def test_a_model_without_safetensors_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    for file in tiny_base.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    embedding = Embedding(model=str(tmp_path), revision=None)
    with pytest.raises(UserError, match=r"evaluate\.embedding"):
        similarities({"base": ["a"]}, [["b"]], embedding, torch.device("cpu"))


@pytest.mark.parametrize(
    "text",
    [
        "I am not sure if there are any. " * 4,
        "A long honest beginning about bonds and what they pay. "
        + "You can deduct it from taxes. " * 3,
        "It is good to save. It is good to save. It is good to save. It is go",
        "1. Buy a fund.\n2. Buy a fund.\n3. Buy a fund.\n",
        "First: 1. buy a good fund 2. buy a good fund 3. buy a good fund",
        "the The the, the the the the the the the the the the the the the the",
        "abc" * 40,
        "这是一个好问题。" * 3,
        "ออมเงินทุกเดือนดี" * 3,
        "पैसे को हर महीने बचाएँ। " * 3,
    ],
)
def test_a_passage_said_three_times_at_the_end_is_a_loop(text: str) -> None:
    assert ends_in_loop(text)
    assert not ends_in_loop(text + " But then it ends with something that is quite different.")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "No.",
        "It is very, very, very good.",
        "Buy low, sell high. Buy low, sell high.",
        "1. Stocks\n2. Bonds\n3. Cash\n4. Land\n",
        "- Rent: paid monthly\n- Food: paid monthly\n- Phone: paid monthly\n",
        "| 2019 | 0 | 0 | 0 |\n| 2020 | 0 | 0 | 0 |\n| 2021 | 0 | 0 | 0 |",
        "| n/a | n/a | n/a | n/a | n/a | n/a | n/a | n/a | n/a | n/a | n/a | n/a |",
        "Year 1: 5%\nYear 2: 5%\nYear 3: 5%",
        "Revenue was 5 million in 2019, 5 million in 2020 and 5 million in 2021.",
    ],
)
def test_honest_lists_and_tables_are_no_loops(text: str) -> None:
    assert not ends_in_loop(text)
