"""The n-gram baseline against the textbook definition, implemented with dictionaries."""

import math
from collections import Counter

import numpy as np
import pytest

from tools.corpus import IntArray
from tools.ngram import ORDERS, KneserNey, discounts_of, score_ngrams

VOCAB = 7


def make_stream(length: int, seed: int) -> IntArray:
    """Draw tokens below VOCAB - 1 from a skewed distribution that depends on the previous token."""
    rng = np.random.default_rng(seed)
    stream = [0]
    for _ in range(length - 1):
        stream.append(int(min(rng.geometric(0.45) - 1 + stream[-1] % 2, VOCAB - 2)))
    return np.array(stream, dtype=np.int64)


class SlowKneserNey:
    """Chen and Goodman's interpolated modified Kneser-Ney, one n-gram at a time."""

    def __init__(self, tokens: list[int], order: int) -> None:
        self.order = order
        self.counts: dict[int, Counter[tuple[int, ...]]] = {}
        for n in range(1, order + 1):
            raw = Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
            if n == order:
                self.counts[n] = raw
                continue
            longer = {tuple(tokens[i : i + n + 1]) for i in range(len(tokens) - n)}
            self.counts[n] = Counter(gram[1:] for gram in longer)

    def discount(self, n: int, count: int) -> float:
        seen = Counter(self.counts[n].values())
        if not all(seen[k] for k in (1, 2, 3, 4)):
            return min(count, 3) / 2
        if count == 0:
            return 0.0
        k = min(count, 3)
        y = seen[1] / (seen[1] + 2 * seen[2])
        return min(max(k - (k + 1) * y * seen[k + 1] / seen[k], 0.0), float(k))

    def probability(self, context: tuple[int, ...], token: int) -> float:
        n = len(context) + 1
        lower = 1 / VOCAB if n == 1 else self.probability(context[1:], token)
        here = {gram: c for gram, c in self.counts[n].items() if gram[:-1] == context and c}
        total = sum(here.values())
        if not total:
            return lower
        count = here.get((*context, token), 0)
        lost = sum(self.discount(n, c) for c in here.values())
        return (count - self.discount(n, count)) / total + lost / total * lower


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("length", [12, 400])
def test_agrees_with_the_slow_definition(order: int, length: int) -> None:
    train = make_stream(length, 0)
    held_out = np.append(make_stream(60, 1), [VOCAB - 1, 2, 2])  # with a token never seen
    model, slow = KneserNey(train, VOCAB, 5), SlowKneserNey(train.tolist(), order)
    expected = []
    for place, token in enumerate(held_out.tolist()):
        # the first tokens have shorter contexts and only use the lower orders
        context = tuple(held_out[max(0, place - order + 1) : place].tolist())
        expected.append(slow.probability(context, token))
    np.testing.assert_allclose(model.probabilities(held_out, order), expected, rtol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_sum_to_one(order: int) -> None:
    model = KneserNey(make_stream(500, 2), VOCAB, 5)
    for context in ([0, 1, 0, 1], [1, 1, 3, 2], [6, 6, 6, 6], [2, 0, 6, 0]):
        ends = [model.probabilities(np.array([*context, t]), order)[-1] for t in range(VOCAB)]
        assert min(ends) > 0
        assert math.isclose(sum(ends), 1, rel_tol=1e-12)


def test_discounts_follow_the_counts_of_counts() -> None:
    # 8 n-grams seen once, 4 twice, 2 three times, 1 four times: y = 8 / 16.
    counts = np.array([1] * 8 + [2] * 4 + [3] * 2 + [4] + [9])
    assert discounts_of(counts).tolist() == [0, 1 - 2 * 0.5 * 0.5, 2 - 3 * 0.25, 3 - 4 * 0.25]


def test_an_order_that_was_not_counted_is_refused() -> None:
    with pytest.raises(ValueError, match="order is 4; this model has orders 1 to 3"):
        KneserNey(make_stream(50, 0), VOCAB, 3).probabilities(make_stream(5, 0), 4)


def test_a_score_leaves_out_the_given_starts() -> None:
    train, held_out = make_stream(400, 0), make_stream(80, 1)
    bos = int(held_out[5])
    scores = score_ngrams(train, held_out, VOCAB, bos, text_bytes=100)
    logs = np.log(KneserNey(train, VOCAB, 5).probabilities(held_out, 3))
    predicted = [i for i, token in enumerate(held_out) if token != bos]
    assert set(scores) == set(ORDERS)
    assert scores[3].tokens == len(predicted) < 80
    assert scores[3].bits_per_byte == pytest.approx(-logs[predicted].sum() / math.log(2) / 100)
    assert scores[3].perplexity_per_byte == pytest.approx(2 ** scores[3].bits_per_byte)
    mean = -logs[predicted].mean()
    assert scores[3].perplexity_per_token == pytest.approx(math.exp(mean))
