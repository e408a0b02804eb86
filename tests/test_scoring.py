"""Likelihood, generation and intervals, each against a plain way to get the same figure."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fintune.modeling import load_base
from fintune.params import Base
from fintune.prompts import encode, end_token_id, load_tokenizer
from fintune.scoring import (
    batches_by_length,
    bootstrap_interval,
    generate,
    likelihood,
    rouge_l,
)


@pytest.fixture(scope="module")
def setting(tiny_base: Path) -> tuple[Any, Any, list[tuple[list[int], list[int]]]]:
    base = Base(model=str(tiny_base), revision=None)
    tokenizer = load_tokenizer(base)
    model = load_base(base, tokenizer, "none", torch.float32)
    rows = [
        encode(
            tokenizer,
            f"Input: {'why ' * (k % 5)}\n<response>",
            "so " * (k % 4 + 1) + "<response|end>",
        )
        for k in range(10)
    ]
    return model, tokenizer, rows


def test_likelihood_by_hand(setting: Any) -> None:
    """Ten rows one at a time, through the whole model and without batches, masks or padding."""
    model, _, rows = setting
    measured = likelihood(model, rows, "")
    for i, (prompt, completion) in enumerate(rows):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].double()
        predicted = logits[len(prompt) - 1 : -1].log_softmax(dim=-1)
        nll = -sum(float(predicted[k, token]) for k, token in enumerate(completion))
        hits = sum(int(predicted[k].argmax()) == token for k, token in enumerate(completion))
        assert measured.nll[i] == pytest.approx(nll, rel=1e-5)
        assert measured.correct[i] == hits
        assert measured.tokens[i] == len(completion)
    assert measured.loss == pytest.approx(measured.nll.sum() / sum(len(c) for _, c in rows))


def test_order_does_not_change_the_likelihood(setting: Any) -> None:
    model, _, rows = setting
    there, back = likelihood(model, rows, ""), likelihood(model, rows[::-1], "")
    assert back.nll[::-1] == pytest.approx(there.nll, rel=1e-6)
    assert back.loss == pytest.approx(there.loss, rel=1e-6)


def greedy(model: Any, prompt: list[int], tokens: int) -> list[int]:
    """The most likely next token, again and again, without a cache."""
    ids = list(prompt)
    for _ in range(tokens):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("rows_per_batch", [1, 3, 10])
def test_batches_and_padding_do_not_change_greedy_answers(
    setting: Any, rows_per_batch: int
) -> None:
    model, tokenizer, rows = setting
    prompts = [prompt for prompt, _ in rows]
    answers = generate(model, tokenizer, prompts, end_token_id(tokenizer), 5, rows_per_batch, "")
    for prompt, answer in zip(prompts, answers, strict=True):
        text = tokenizer.decode(greedy(model, prompt, 5), skip_special_tokens=True).strip()
        assert answer.text == text
        assert answer.tokens == 5
        assert not answer.stopped


def test_an_answer_that_ends_is_cut_there_and_counted_as_stopped(setting: Any) -> None:
    """Any token may be named the end: take the last one that greedy decoding gives."""
    model, tokenizer, rows = setting
    prompt = rows[0][0]
    ids = greedy(model, prompt, 6)
    answer = generate(model, tokenizer, [prompt], ids[-1], 6, 1, "")[0]
    assert answer.stopped
    assert answer.tokens == ids.index(ids[-1])
    expected = tokenizer.decode(ids[: answer.tokens], skip_special_tokens=True).strip()
    assert answer.text == expected


def test_sampling_is_repeatable_and_follows_its_seed(setting: Any) -> None:
    model, tokenizer, rows = setting
    prompts = [prompt for prompt, _ in rows]

    def draw(seed: int) -> list[str]:
        answers = generate(
            model, tokenizer, prompts, end_token_id(tokenizer), 5, 4, "",
            {"temperature": 1.0, "top_p": 0.95}, seed,
        )  # fmt: skip
        return [answer.text for answer in answers]

    assert draw(1) == draw(1) != draw(2)


def test_batches_hold_every_row_once_within_both_limits() -> None:
    lengths = [5, 1, 9, 3, 3, 7, 2]
    batches = list(batches_by_length(lengths, tokens=14, rows=3))
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    for batch in batches:
        assert len(batch) <= 3
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 14


def test_rouge_l_by_hand() -> None:
    """Longest common subsequence of 'the rate falls' and 'the interest rate falls now': three words."""
    scores = rouge_l(
        ["the rate falls", "", "Rates fall."], ["the interest rate falls now", "a", "rate falls"]
    )
    precision, recall = 3 / 3, 3 / 5
    assert scores[0] == pytest.approx(2 * precision * recall / (precision + recall))
    assert scores[1] == 0
    assert scores[2] == 1  # stems are compared


def test_the_interval_covers_the_mean_and_narrows_with_more_questions() -> None:
    values = np.random.default_rng(0).normal(1.0, 1.0, 4000)
    mean = lambda rows: float(values[rows].mean())  # noqa: E731

    def width(count: int) -> tuple[float, float]:
        return bootstrap_interval(mean, [str(i) for i in range(count)], 500, seed=0)

    for count in (100, 400):
        low, high = width(count)
        assert low < values[:count].mean() < high
        assert high - low == pytest.approx(2 * 1.96 / math.sqrt(count), rel=0.25)


def test_rows_of_one_question_are_drawn_together() -> None:
    """Forty rows of one question each say no more than one row: the interval is that of ten."""
    values = np.repeat(np.random.default_rng(0).normal(0, 1, 10), 40)
    mean = lambda rows: float(values[rows].mean())  # noqa: E731
    together = bootstrap_interval(mean, [str(i // 40) for i in range(400)], 500, 0)
    apart = bootstrap_interval(mean, [str(i) for i in range(400)], 500, 0)
    assert together[1] - together[0] > 4 * (apart[1] - apart[0])


def test_the_interval_does_not_depend_on_the_order_of_rows() -> None:
    values = np.random.default_rng(0).normal(0, 1, 50)
    there = bootstrap_interval(
        lambda r: float(values[r].mean()), [str(i) for i in range(50)], 200, 3
    )
    flipped = values[::-1]
    back = bootstrap_interval(
        lambda r: float(flipped[r].mean()), [str(i) for i in range(50)][::-1], 200, 3
    )
    assert back == pytest.approx(there, rel=1e-12)
