"""Likelihood and generation against simple reference implementations."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fintune.data.prompt import encode, end_token_id, load_tokenizer
from fintune.generation.decoding import Decoding
from fintune.generation.generate import generate
from fintune.model.base import load_base
from fintune.model.batch import batches_by_length
from fintune.model.likelihood import BINS, calibration_sums, likelihood, token_figures
from fintune.params import Base


@pytest.fixture(scope="module")
def setting(tiny_base: Path) -> tuple[Any, Any, list[tuple[list[int], list[int]]]]:
    base = Base(model=str(tiny_base), revision=None)
    tokenizer = load_tokenizer(base, "new")
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
    """Against ten rows one at a time, through the whole model, without batches, masks or padding."""
    model, _, rows = setting
    measured = likelihood(model, rows, "")
    sure = []
    for i, (prompt, completion) in enumerate(rows):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].double()
        predicted = logits[len(prompt) - 1 : -1].log_softmax(dim=-1)
        nll = -sum(float(predicted[k, token]) for k, token in enumerate(completion))
        hits = sum(int(predicted[k].argmax()) == token for k, token in enumerate(completion))
        assert measured.nll[i] == pytest.approx(nll, rel=1e-5)
        assert measured.correct[i] == hits
        assert measured.tokens[i] == len(completion)
        sure += predicted.exp().max(dim=-1).values.tolist()
    assert measured.calibration[:, 0].sum() == len(sure)
    assert measured.calibration[:, 1].sum() == pytest.approx(sum(sure), rel=1e-5)
    assert measured.calibration[:, 2].sum() == measured.correct.sum()
    assert measured.loss == pytest.approx(measured.nll.sum() / sum(len(c) for _, c in rows))


def test_token_figures_by_hand() -> None:
    """The right tokens have probabilities 0.7 and 0.1; the top prediction is right, then wrong."""
    chances = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.1, 0.6, 0.2, 0.1]])
    losses, hits, confidence = token_figures(chances.log() + 3, torch.tensor([0, 3]))
    assert losses == pytest.approx([-np.log(0.7), -np.log(0.1)], rel=1e-5)
    assert hits.tolist() == [1, 0]
    assert confidence == pytest.approx([0.7, 0.6], rel=1e-5)


def test_calibration_puts_tokens_where_their_confidence_belongs() -> None:
    sums = calibration_sums(np.array([0.0, 0.05, 0.55, 0.58, 1.0]), np.array([0, 1, 1, 0, 1.0]))
    assert sums.shape == (BINS, 3)
    assert sums[0].tolist() == pytest.approx([2, 0.05, 1])
    assert sums[5].tolist() == pytest.approx([2, 1.13, 1])
    assert sums[9].tolist() == pytest.approx([1, 1, 1])
    assert sums.sum() == pytest.approx(5 + 2.18 + 3)


@pytest.mark.parametrize("tokens", [1, 40, 8192])
def test_batches_do_not_change_the_likelihood(
    setting: Any, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, rows = setting
    expected = likelihood(model, rows, "")
    monkeypatch.setattr("fintune.model.likelihood.TOKENS_PER_BATCH", tokens)
    measured = likelihood(model, rows, "")
    assert measured.nll == pytest.approx(expected.nll, rel=1e-5)
    assert (measured.correct == expected.correct).all()
    assert measured.calibration == pytest.approx(expected.calibration, rel=1e-5)


def test_order_does_not_change_the_likelihood(setting: Any) -> None:
    model, _, rows = setting
    there, back = likelihood(model, rows, ""), likelihood(model, rows[::-1], "")
    assert back.nll[::-1] == pytest.approx(there.nll, rel=1e-6)
    assert back.loss == pytest.approx(there.loss, rel=1e-6)


def greedy(model: Any, prompt: list[int], tokens: int) -> list[int]:
    """Take the most likely next token repeatedly, without a KV cache."""
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
    answers = generate(
        model, tokenizer, prompts, Decoding(end_token_id(tokenizer), 5), "", rows_per_batch
    )
    for prompt, answer in zip(prompts, answers, strict=True):
        text = tokenizer.decode(greedy(model, prompt, 5), skip_special_tokens=True).strip()
        assert answer.text == text
        assert answer.tokens == 5
        assert not answer.stopped


def test_an_answer_that_ends_is_cut_there_and_counted_as_stopped(setting: Any) -> None:
    """Uses the last token of the greedy answer as the end token."""
    model, tokenizer, rows = setting
    prompt = rows[0][0]
    ids = greedy(model, prompt, 6)
    answer = generate(model, tokenizer, [prompt], Decoding(ids[-1], 6), "", 1)[0]
    assert answer.stopped
    assert answer.tokens == ids.index(ids[-1])
    expected = tokenizer.decode(ids[: answer.tokens], skip_special_tokens=True).strip()
    assert answer.text == expected


def test_sampling_is_repeatable_and_follows_its_seed(setting: Any) -> None:
    model, tokenizer, rows = setting
    prompts = [prompt for prompt, _ in rows]

    def draw(seed: int) -> list[str]:
        decoding = Decoding(end_token_id(tokenizer), 5, temperature=1.0, top_p=0.95, seed=seed)
        answers = generate(model, tokenizer, prompts, decoding, "", 4)
        return [answer.text for answer in answers]

    assert draw(1) == draw(1) != draw(2)


def test_batches_hold_every_row_once_within_both_limits() -> None:
    lengths = [5, 1, 9, 3, 3, 7, 2]
    batches = list(batches_by_length(lengths, tokens=14, rows=3))
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    for batch in batches:
        assert len(batch) <= 3
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 14
