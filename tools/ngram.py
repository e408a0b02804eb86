"""Score interpolated modified Kneser-Ney n-grams over token ids: the baseline for the base model.

    python -m tools.ngram --text .cache/text/beige_book.parquet --tokenizer assets/demo-base

S. F. Chen and J. Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling"
(1998), equations 26 to 29. The lowest order is interpolated with the uniform distribution, so
every token has a probability above zero. The corpus is one stream; n-grams cross documents.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from tools.corpus import (
    BOS,
    InputError,
    IntArray,
    Score,
    byte_count,
    encode_stream,
    read_documents,
    split_documents,
    token_id,
)

FloatArray = NDArray[np.float64]
ORDERS = (3, 4, 5)


@dataclass(frozen=True)
class _Level:
    """The data to interpolate one order; contexts are indices of (n-1)-grams."""

    counts: IntArray  # [n-grams], raw at the highest order, else distinct left neighbours
    discounts: FloatArray  # [4], subtracted from counts of 0, 1, 2, 3 or more
    totals: IntArray  # [contexts], sum of counts
    backoff: FloatArray  # [contexts], the probability mass of the next lower order


class KneserNey:
    """Counts of all n-grams of up to ``max_order`` tokens of one stream.

    An n-gram is the number ``context * vocab_size + last token``, where ``context`` is the index
    of its first n-1 tokens among the sorted (n-1)-grams, so that any order fits into 64 bits.
    """

    def __init__(self, stream: IntArray, vocab_size: int, max_order: int) -> None:
        """Count ``stream`` ``[tokens]``, which must be longer than ``max_order``."""
        self.vocab_size = vocab_size
        self._keys: list[IntArray] = [np.arange(vocab_size, dtype=np.int64)]
        self._raw: list[IntArray] = [np.bincount(stream, minlength=vocab_size)]
        self._continuations: list[IntArray] = []
        ending_at = stream  # index of the n-gram ending at each position, from n-1 on
        for order in range(2, max_order + 1):
            packed = ending_at[:-1] * vocab_size + stream[order - 1 :]
            keys, first, index, counts = np.unique(
                packed, return_index=True, return_inverse=True, return_counts=True
            )
            # Each distinct n-gram adds a distinct left neighbour to its last n-1 tokens.
            suffixes = ending_at[1:][first]
            neighbours = np.bincount(suffixes, minlength=len(self._keys[-1]))
            self._continuations.append(neighbours)
            self._keys.append(keys)
            self._raw.append(counts)
            ending_at = index

    def probabilities(self, stream: IntArray, order: int) -> FloatArray:
        """Compute the probability ``[tokens]`` of each token given the ``order - 1`` tokens before it.

        The first tokens of the stream have shorter contexts. Unknown contexts back off.
        """
        if not 1 <= order <= len(self._keys):
            raise ValueError(f"order is {order}; this model has orders 1 to {len(self._keys)}")
        result = np.full(len(stream), 1 / self.vocab_size)
        context: IntArray = np.zeros(len(stream), dtype=np.int64)
        for below, keys in enumerate(self._keys[:order]):
            level = self._level(below, self._raw if below == order - 1 else self._continuations)
            packed = context * self.vocab_size + stream
            index = np.minimum(np.searchsorted(keys, packed), len(keys) - 1)
            found = (context >= 0) & (keys[index] == packed)
            counts = np.where(found, level.counts[index], 0)
            usable = (context >= 0) & (level.totals[context] > 0)
            kept = counts - level.discounts[np.minimum(counts, 3)]
            totals = np.where(usable, level.totals[context], 1)
            mixed = kept / totals + level.backoff[context] * result
            result = np.where(usable, mixed, result)
            context = np.concatenate([[-1], np.where(found, index, -1)[:-1]])
        return result

    def _level(self, below: int, source: list[IntArray]) -> _Level:
        counts = source[below]
        contexts = self._keys[below] // self.vocab_size
        size = len(self._keys[below - 1]) if below else 1
        discounts = discounts_of(counts)
        totals = np.bincount(contexts, weights=counts, minlength=size).astype(np.int64)
        lost = np.bincount(contexts, discounts[np.minimum(counts, 3)], minlength=size)
        return _Level(counts, discounts, totals, lost / np.maximum(totals, 1))


def discounts_of(counts: IntArray) -> FloatArray:
    """Compute Chen and Goodman's discounts ``[4]`` for counts of 0, 1, 2, 3 or more.

    They are clipped to [0, count], so that no probability is negative and each distribution sums to
    one. If one of the counts 1 to 4 does not occur, they are 0, 0.5, 1 and 1.5.
    """
    seen = np.bincount(np.minimum(counts, 5), minlength=6)[1:5]
    if (seen == 0).any():
        return np.array([0.0, 0.5, 1.0, 1.5])
    share = seen[0] / (seen[0] + 2 * seen[1])
    steps = np.arange(1, 4)
    discounts = steps - (steps + 1) * share * seen[1:] / seen[:-1]
    return np.concatenate([[0.0], np.clip(discounts, 0, steps)])


def score_ngrams(
    train: IntArray, held_out: IntArray, vocab_size: int, bos_id: int, text_bytes: int
) -> dict[int, Score]:
    """Score every order of ``ORDERS`` on the held-out stream; ``<s>`` is given, not predicted."""
    model = KneserNey(train, vocab_size, max(ORDERS))
    predicted = held_out != bos_id
    scores = {}
    for order in ORDERS:
        logs = np.log(model.probabilities(held_out, order)[predicted])
        scores[order] = Score(float(-logs.sum()), int(predicted.sum()), text_bytes)
    return scores


def main(argv: list[str] | None = None) -> None:
    """Print the baseline's figures for the test part of a text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--text", type=Path, required=True, help="as for tools.pretrain_base")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder that has one")
    args = parser.parse_args(argv)
    try:
        parts = split_documents(read_documents(args.text).texts)
        backend = AutoTokenizer.from_pretrained(args.tokenizer).backend_tokenizer
        train, test = (encode_stream(backend, parts[name]) for name in ("train", "test"))
        bos_id = token_id(backend, BOS)
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    started = time.perf_counter()
    vocab_size = backend.get_vocab_size()
    scores = score_ngrams(train, test, vocab_size, bos_id, byte_count(parts["test"]))
    seconds = time.perf_counter() - started
    print(f"{len(train):,} training tokens, {len(test):,} held-out tokens, {seconds:.1f} s")
    for order, score in scores.items():
        print(
            f"{order}-gram  {score.bits_per_byte:.4f} bits/byte  "
            f"perplexity {score.perplexity_per_byte:.3f} a byte, "
            f"{score.perplexity_per_token:.2f} a token"
        )


if __name__ == "__main__":
    main()
