"""Similar questions among millions: MinHash proposes pairs, and each is checked exactly.

Two questions are similar when the Jaccard similarity of their five-character shingles is at least the one
asked for and they contain the same numbers: "a loan of $5,000" and "a loan of $9,000" have different answers.
A question has 72 minima of its hashed shingles (Broder 1997); a band joins two groups of two or three of them
(groups are reused, as in Andoni and Indyk 2006), and questions that are equal in a band are compared. The
arithmetic is of integers, so that the pairs are the same on every machine.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tqdm.auto import tqdm

from fintune.data.stream import in_threads

SHINGLE = 5
HASHES, BANDS = 72, 60
ROWS_AT_ONCE = 512  # of the minima; what fits a core's cache
PAIRS_AT_ONCE = 2**15  # all of their shingles take 140 MB
SMALL = 64  # questions of one band; more are compared as blocks of a matrix
CELLS = 2**21  # of such a block
NUMBER = re.compile(r"\d[\d.]*")
SOURCE = np.random.Philox(key=1)  # a counter with a published definition, unlike the default's
ODD: NDArray[np.uint64] = SOURCE.random_raw(SHINGLE + 2 + HASHES) | np.uint64(1)

Numbers = NDArray[Any]


class Forest:
    """Disjoint sets of questions."""

    def __init__(self, size: int) -> None:
        self.parent = np.arange(size, dtype=np.int32)

    def roots(self, places: Numbers) -> Numbers:
        """Return the set of each of many questions."""
        found = self.parent[places]
        while (higher := self.parent[found]).shape and (higher != found).any():
            found = higher
        self.parent[places] = found
        return found

    def join(self, one: Numbers, other: Numbers) -> None:
        """Join the sets of pairs of questions; a set's root is its first question."""
        while len(one):
            low, high = (
                each(self.roots(one), self.roots(other)) for each in (np.minimum, np.maximum)
            )
            apart = low != high
            low, high, one, other = low[apart], high[apart], one[apart], other[apart]
            np.minimum.at(self.parent, high, low)


def group_similar(
    texts: Iterable[pa.Array], count: int, similarity: float, forest: Forest, scratch: Path
) -> None:
    """Join the questions that are similar.

    Args:
        texts: the different questions, in batches.
        count: their number.
        scratch: a folder for the keys of the bands, which are read band by band.
    """
    kept: list[pa.Array] = []

    def each() -> Iterator[pa.Array]:
        for some in texts:
            kept.append(some)
            yield some

    begin, path = 0, scratch / "bands"
    with path.open("wb") as file:
        for keys in in_threads(partial(bands, similarity=similarity), each()):
            for band, part in enumerate(keys):
                file.seek(4 * (band * count + begin))
                part.tofile(file)
            begin += keys.shape[1]
    begins = np.cumsum([0, *map(len, kept)])

    def texts_at(places: Numbers) -> list[str]:
        cuts = np.searchsorted(places, begins)
        return [
            text
            for k, (low, high) in enumerate(pairwise(cuts))
            if low < high
            for text in kept[k].take(pa.array(places[low:high] - begins[k])).to_pylist()
        ]

    found = in_threads(partial(_collisions_in, path, count), range(BANDS))
    bar = tqdm(found, desc="split: compare", total=BANDS, unit="band", leave=False)
    join_similar(bar, texts_at, similarity, forest)
    path.unlink()


def _collisions_in(path: Path, count: int, band: int) -> tuple[Numbers, Numbers]:
    return collisions(np.fromfile(path, np.uint32, count, offset=4 * band * count))


def numbers_key(question: str) -> int:
    """Return 64 bits that are the same for questions with the same numbers; 0 without any."""
    numbers = NUMBER.findall(question)
    if not numbers:
        return 0
    text = " ".join(sorted(numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())


def shingles(questions: list[str]) -> tuple[Numbers, Numbers]:
    """Return the hashed shingles of all questions, one after another, and where each question's begin."""
    padded = [f" {question} " for question in questions]
    lengths = np.fromiter(map(len, padded), np.int64, len(padded))
    text = "".join(padded) + "\0" * SHINGLE
    characters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    hashed = np.zeros(len(text) - SHINGLE, np.uint64)
    for k in range(SHINGLE):
        hashed += characters[k : len(hashed) + k] * ODD[k]
    for odd in ODD[SHINGLE : SHINGLE + 2]:
        hashed ^= hashed >> np.uint64(32)
        hashed *= odd
    hashed ^= hashed >> np.uint64(32)
    counts = np.maximum(1, lengths - SHINGLE + 1)
    begins = np.cumsum(lengths) - lengths
    for i in np.flatnonzero(lengths < SHINGLE):  # shorter than a shingle: the text itself
        digest = hashlib.blake2b(padded[i].encode(), digest_size=8).digest()
        hashed[begins[i]] = int.from_bytes(digest)
    starts = np.concatenate(([0], np.cumsum(counts)))
    places = np.arange(starts[-1]) + np.repeat(begins - starts[:-1], counts)
    return hashed[places], starts


def bands(texts: pa.Array, similarity: float) -> Numbers:
    """Return the keys of each band, bands x questions, as 32 bits; equal ones may be similar."""
    questions = texts.to_pylist()
    if not questions:
        return np.empty((BANDS, 0), np.uint32)
    hashed, starts = shingles(questions)
    small = (hashed >> np.uint64(32)).astype(np.uint32)
    multipliers = (ODD[SHINGLE + 2 :] >> np.uint64(32)).astype(np.uint32) | np.uint32(1)
    counts = np.diff(starts)
    minima = np.empty((HASHES, len(questions)), np.uint32)
    by_length = np.argsort(counts, kind="stable")
    for begin in range(0, len(questions), ROWS_AT_ONCE):
        rows = by_length[begin : begin + ROWS_AT_ONCE]
        # a question's shingles are a column; the last one is repeated, which leaves the minimum as it is
        below = np.arange(counts[rows[-1]])[:, None]
        columns = small[starts[rows] + np.minimum(below, counts[rows] - 1)]
        product = np.empty_like(columns)
        for k in range(HASHES):
            np.multiply(columns, multipliers[k], out=product)
            minima[k, rows] = product.min(axis=0)
    size = 2 if similarity < 0.65 else 3
    groups = np.zeros((HASHES // size, len(questions)), np.uint64)
    for k, minimum in enumerate(minima):
        groups[k // size] = (groups[k // size] + minimum) * ODD[k % SHINGLE]
        groups[k // size] ^= groups[k // size] >> np.uint64(29)
    numbers = np.fromiter(map(numbers_key, questions), np.uint64, len(questions))
    keys = np.empty((BANDS, len(questions)), np.uint32)
    around = [(k, (k + step) % len(groups)) for step in (1, 5, 7) for k in range(len(groups))]
    for band, (one, other) in enumerate(around[:BANDS]):
        mixed = (groups[one] * ODD[0] + groups[other] + numbers) * ODD[1]
        keys[band] = (mixed ^ (mixed >> np.uint64(31))) * ODD[2] >> np.uint64(32)
    return keys


def collisions(keys: Numbers) -> tuple[Numbers, Numbers]:
    """Return the questions whose key in a band another one has, key by key, and where each key's begin."""
    packed = keys.astype(np.uint64) << np.uint64(32) | np.arange(len(keys), dtype=np.uint64)
    packed.sort()  # several times as fast as a stable argsort
    order, in_order = packed.astype(np.uint32).astype(np.int32), packed >> np.uint64(32)
    new = np.concatenate(([True], in_order[1:] != in_order[:-1], [True]))
    alone = new[1:] & new[:-1]
    return order[~alone], np.concatenate((np.flatnonzero(new[:-1][~alone]), [(~alone).sum()]))


def join_similar(
    bands_found: Iterable[tuple[Numbers, Numbers]],
    texts: Callable[[Numbers], list[str]],
    similarity: float,
    forest: Forest,
) -> None:
    """Join the questions that are similar.

    Args:
        bands_found: what `collisions` returns of each band.
        texts: returns questions by their places.
    """
    compared: list[Numbers] = []  # large sets of questions: many bands hold the same
    for members, starts in bands_found:
        sizes = np.diff(starts)
        for k in np.flatnonzero(sizes > SMALL):
            together = np.sort(members[starts[k] : starts[k + 1]])
            if not any(np.isin(together, known).all() for known in compared):
                _join_many(together, texts, similarity, forest)
                compared = sorted([*compared, together], key=len)[-16:]
        key = np.repeat(np.arange(len(sizes)), sizes)
        few = np.repeat(sizes <= SMALL, sizes)
        members, key = members[few], key[few]
        for apart in range(1, min(SMALL, sizes.max(initial=0))):
            first = np.flatnonzero(key[apart:] == key[:-apart])
            for begin in range(0, len(first), PAIRS_AT_ONCE):
                some = first[begin : begin + PAIRS_AT_ONCE]
                one, other = members[some], members[some + apart]
                new = forest.roots(one) != forest.roots(other)
                if new.any():
                    _join_pairs(one[new], other[new], texts, similarity, forest)


def _matrix(questions: list[str]) -> Any:
    """Return which question has which shingle, as a sparse matrix."""
    from scipy.sparse import csr_array

    hashed, starts = shingles(questions)
    _, columns = np.unique(hashed, return_inverse=True)
    shape = (len(questions), int(columns.max()) + 1)
    found = csr_array((np.ones(len(columns), np.int32), columns, starts), shape=shape)
    found.sum_duplicates()
    found.data[:] = 1
    return found


def _join_pairs(
    one: Numbers,
    other: Numbers,
    texts: Callable[[Numbers], list[str]],
    similarity: float,
    forest: Forest,
) -> None:
    rows, places = np.unique(np.concatenate((one, other)), return_inverse=True)
    questions = texts(rows)
    left, right = places[: len(one)], places[len(one) :]
    shared = _matrix(questions)
    sizes = np.diff(shared.indptr)
    both = shared[left].multiply(shared[right]).sum(axis=1)
    numbers = np.array([numbers_key(question) for question in questions], np.uint64)
    alike = both >= similarity * (sizes[left] + sizes[right] - both)
    alike &= numbers[left] == numbers[right]
    forest.join(one[alike], other[alike])


def _join_many(
    members: Numbers, texts: Callable[[Numbers], list[str]], similarity: float, forest: Forest
) -> None:
    """Join those of many questions that are similar; pairs that are joined already are not compared.

    What all have in common, as the words of a template, is counted once.
    """
    questions = texts(members)
    found = _matrix(questions)
    sizes = np.diff(found.indptr)
    common = np.bincount(found.indices, minlength=found.shape[1]) == len(members)
    rest = found[:, ~common]
    numbers = np.array([numbers_key(question) for question in questions], np.uint64)
    left, begun = np.arange(len(members)), False
    while len(left):
        roots = forest.roots(members[left])
        _, classes, counts = np.unique(roots, return_inverse=True, return_counts=True)
        if len(counts) == 1:
            break
        left = left[np.lexsort((left, classes, counts[classes]))]  # the largest set comes last
        rows = left[: max(1, CELLS // len(left) if begun else 16)]
        begun = True
        both = (rest[rows] @ rest[left].T).toarray() + common.sum()
        alike = both >= similarity * (sizes[rows][:, None] + sizes[left] - both)
        alike &= numbers[rows][:, None] == numbers[left]
        one, other = np.nonzero(alike)
        forest.join(members[rows[one]], members[left[other]])
        left = left[len(rows) :]
