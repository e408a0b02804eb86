"""Shingles of questions, and keys by MinHash: questions that are equal in one may be similar.

A question has 72 minima of its hashed five-character shingles (Broder 1997); a band joins two groups of two
or three of them (groups are reused, as in Andoni and Indyk 2006). The arithmetic is of integers, so that the
keys are the same on every machine.
"""

import hashlib
import re
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

SHINGLE = 5
HASHES, BANDS = 72, 60
ROWS_AT_ONCE = 512  # of the minima; what fits a core's cache
NUMBER = re.compile(r"\d[\d.]*")
SOURCE = np.random.Philox(key=1)  # a counter with a published definition, unlike the default's
ODD: NDArray[np.uint64] = SOURCE.random_raw(SHINGLE + 2 + HASHES) | np.uint64(1)

Numbers = NDArray[Any]


def numbers_keys(texts: pa.Array) -> Numbers:
    """Return 64 bits for each question that are the same for those with the same numbers; 0 without any."""
    found = np.zeros(len(texts), np.uint64)
    places = np.flatnonzero(pc.match_substring_regex(texts, r"\p{Nd}"))
    for place, text in zip(places, texts.take(pa.array(places)).to_pylist(), strict=True):
        numbers = " ".join(sorted(NUMBER.findall(text))).encode()
        found[place] = int.from_bytes(hashlib.blake2b(numbers, digest_size=8).digest())
    return found


def shingles(questions: list[str]) -> tuple[Numbers, Numbers]:
    """Return the hashed shingles of all questions, one after another, and where each question's begin."""
    padded = [f" {question} " for question in questions]
    return _shingles("".join(padded), np.fromiter(map(len, padded), np.int64, len(padded)))


def shingles_of(texts: pa.Array) -> tuple[Numbers, Numbers]:
    """Return what `shingles` does, for a column."""
    return _shingles(*_padded(texts))


def sums_of(texts: pa.Array) -> tuple[Numbers, Numbers, Numbers]:
    """Return sums that are equal where shingles are, where each text's begin, and how many it has.

    After the sums of one text, those of its end and the next one's beginning follow.
    """
    text, lengths = _padded(texts)
    sums, begins, counts = _sums(text, lengths)
    _set_short(sums, text, begins, lengths)
    return sums, begins, counts


def _padded(texts: pa.Array) -> tuple[str, Numbers]:
    """Return texts that follow one another, each between spaces, and their lengths."""
    space, nothing = (pa.scalar(text, texts.type) for text in (" ", ""))
    padded = pc.binary_join_element_wise(space, texts, space, nothing)
    return str(data_of(padded), "utf-8"), pc.utf8_length(padded).to_numpy().astype(np.int64)


def data_of(texts: pa.Array) -> pa.Buffer:
    """Return the bytes of a column's texts, one after another."""
    if not len(texts):
        return pa.py_buffer(b"")
    kind = np.int64 if pa.types.is_large_string(texts.type) else np.int32
    _, offsets, data = texts.buffers()
    begin, end = np.frombuffer(offsets, kind)[[texts.offset, texts.offset + len(texts)]]
    return data.slice(begin, end - begin)


def _sums(text: str, lengths: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """Return sums for the shingles of texts that follow one another, their beginnings and numbers."""
    coded = (text + "\0" * SHINGLE).encode("utf-32-le", "surrogatepass")
    characters = np.frombuffer(coded, np.uint32)
    sums = characters[: len(text)] * ODD[0]
    for k in range(1, SHINGLE):
        sums += characters[k : len(sums) + k] * ODD[k]
    begins = np.cumsum(lengths) - lengths
    return sums, begins, np.maximum(1, lengths - SHINGLE + 1)


def _set_short(hashed: Numbers, text: str, begins: Numbers, lengths: Numbers) -> None:
    """Let a text that is shorter than a shingle be its only one."""
    for i in np.flatnonzero(lengths < SHINGLE):
        short = text[begins[i] : begins[i] + lengths[i]].encode("utf-8", "surrogatepass")
        hashed[begins[i]] = int.from_bytes(hashlib.blake2b(short, digest_size=8).digest())


def _shingles(text: str, lengths: Numbers) -> tuple[Numbers, Numbers]:
    """Hash the shingles of texts that follow one another."""
    hashed, begins, counts = _sums(text, lengths)
    for odd in ODD[SHINGLE : SHINGLE + 2]:
        hashed ^= hashed >> np.uint64(32)
        hashed *= odd
    hashed ^= hashed >> np.uint64(32)
    _set_short(hashed, text, begins, lengths)
    starts = np.concatenate(([0], np.cumsum(counts)))
    places = np.arange(starts[-1]) + np.repeat(begins - starts[:-1], counts)
    return hashed[places], starts


def bands(texts: pa.Array, similarity: float) -> Numbers:
    """Return the keys of each band, bands x questions, as 32 bits; equal ones may be similar."""
    if not len(texts):
        return np.empty((BANDS, 0), np.uint32)
    hashed, starts = shingles_of(texts)
    small = (hashed >> np.uint64(32)).astype(np.uint32)
    multipliers = (ODD[SHINGLE + 2 :] >> np.uint64(32)).astype(np.uint32) | np.uint32(1)
    counts = np.diff(starts)
    minima = np.empty((HASHES, len(texts)), np.uint32)
    by_length = np.argsort(counts, kind="stable")
    for begin in range(0, len(texts), ROWS_AT_ONCE):
        rows = by_length[begin : begin + ROWS_AT_ONCE]
        # a question's shingles are a column; the last one is repeated, which leaves the minimum as it is
        below = np.arange(counts[rows[-1]])[:, None]
        columns = small[starts[rows] + np.minimum(below, counts[rows] - 1)]
        product = np.empty_like(columns)
        for k in range(HASHES):
            np.multiply(columns, multipliers[k], out=product)
            minima[k, rows] = product.min(axis=0)
    size = 2 if similarity < 0.65 else 3
    groups = np.zeros((HASHES // size, len(texts)), np.uint64)
    for k, minimum in enumerate(minima):
        groups[k // size] = (groups[k // size] + minimum) * ODD[k % SHINGLE]
        groups[k // size] ^= groups[k // size] >> np.uint64(29)
    numbers = numbers_keys(texts)
    keys = np.empty((BANDS, len(texts)), np.uint32)
    around = [(k, (k + step) % len(groups)) for step in (1, 5, 7) for k in range(len(groups))]
    for band, (one, other) in enumerate(around[:BANDS]):
        mixed = (groups[one] * ODD[0] + groups[other] + numbers) * ODD[1]
        keys[band] = (mixed ^ (mixed >> np.uint64(31))) * ODD[2] >> np.uint64(32)
    return keys


def collisions(keys: Numbers) -> tuple[Numbers, Numbers]:
    """Return the questions whose key in a band another one has, key by key, and where each key's begin."""
    packed = keys.astype(np.uint64)
    packed <<= np.uint64(32)
    packed |= np.arange(len(keys), dtype=np.uint64)
    packed.sort()  # several times as fast as a stable argsort
    new = np.ones(len(keys) + 1, bool)
    new[1:-1] = packed[1:] >> np.uint64(32) != packed[:-1] >> np.uint64(32)
    several = ~(new[1:] & new[:-1])
    begins = np.flatnonzero(new[:-1][several])
    return packed[several].astype(np.uint32).astype(np.int32), np.append(begins, several.sum())
