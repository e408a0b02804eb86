"""Similar questions among millions: MinHash proposes pairs, and each is checked exactly.

Two questions are similar when the Jaccard similarity of their five-character shingles is at least the one
asked for and they contain the same numbers: "a loan of $5,000" and "a loan of $9,000" have different answers.
Questions that are equal in one of 60 bands are compared.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm

from fintune.data.minhash import (
    BANDS,
    Numbers,
    bands,
    collisions,
    data_of,
    numbers_keys,
    shingles_of,
    sums_of,
)
from fintune.data.parts import made_once
from fintune.data.stream import in_threads

SCHEMA = pa.schema([("parent", pa.int32())])
BANDS_KEPT = 20  # that are joined until what is joined is kept
PAIRS_AT_ONCE = 2**16  # whose texts are read
BYTES_AT_ONCE = 2**18  # of texts whose shingles are made, which take forty times as much
WINDOW = 2**26  # bytes of the texts that are in memory to read some of them
PAIRS_SORTED, CACHED = 256, 2**16  # pairs whose shingles are sorted at once, and these
SMALL = 64  # questions of one band; more are compared as blocks of a matrix
CELLS = 2**21  # of such a block


class Forest:
    """Disjoint sets of questions."""

    def __init__(self, size: int) -> None:
        self.parent = np.arange(size, dtype=np.int32)
        self.lock = RLock()

    def roots(self, places: Numbers) -> Numbers:
        """Return the set of each of many questions."""
        with self.lock:
            found = self.parent[places]
            while (higher := self.parent[found]).shape and (higher != found).any():
                found = higher
            self.parent[places] = found
            return found

    def join(self, one: Numbers, other: Numbers) -> None:
        """Join the sets of pairs of questions; a set's root is its first question."""
        with self.lock:
            while len(one):
                low, high = (
                    each(self.roots(one), self.roots(other)) for each in (np.minimum, np.maximum)
                )
                apart = low != high
                low, high, one, other = low[apart], high[apart], one[apart], other[apart]
                np.minimum.at(self.parent, high, low)


class _Texts:
    """Questions in a file, of which some are read at a time."""

    def __init__(self, path: Path, count: int) -> None:
        self.path = path
        self.begins = np.zeros(count + 1, np.int64)  # in the file

    def write(self, texts: Iterable[pa.Array]) -> Iterator[pa.Array]:
        """Write all questions, and yield them in parts of which the shingles are no burden."""
        done = 0
        with self.path.open("wb") as file:
            for some in texts:
                file.write(data_of(some))
                sizes = pc.binary_length(some).to_numpy()
                self.begins[done + 1 : done + 1 + len(some)] = self.begins[done] + np.cumsum(sizes)
                done += len(some)
                for part in _parts(sizes):
                    yield some[part]

    def sizes(self, places: Numbers) -> Numbers:
        """Return the bytes of questions."""
        return self.begins[places + 1] - self.begins[places]

    def at(self, places: Numbers) -> pa.Array:
        """Return questions, given their places in ascending order."""
        windows = self.begins[places] // WINDOW
        found = []
        for some in np.split(places, np.flatnonzero(np.diff(windows)) + 1):
            with pa.memory_map(str(self.path)) as file:  # anew: what was read is no longer there
                buffers = [None, pa.py_buffer(self.begins), file.read_buffer()]
                every = pa.Array.from_buffers(pa.large_string(), len(self.begins) - 1, buffers)
                found.append(every.take(pa.array(some)))
                del every, buffers
        return pa.concat_arrays(found)


def _parts(sizes: Numbers) -> Iterator[slice]:
    """Cut texts of these bytes into parts of no more bytes than are worked on at once."""
    ends, begin = np.cumsum(sizes), 0
    while begin < len(ends):
        most = BYTES_AT_ONCE + (ends[begin - 1] if begin else 0)
        end = max(begin + 1, int(np.searchsorted(ends, most, "right")))
        yield slice(begin, end)
        begin = end


def group_similar(
    texts: Iterable[pa.Array],
    count: int,
    similarity: float,
    forest: Forest,
    scratch: Path,
    kept_in: Path | None = None,
) -> None:
    """Join the questions that are similar.

    Args:
        texts: the different questions, in batches.
        count: their number.
        scratch: a folder for the texts, and for the keys of the bands, which are read band by band.
        kept_in: a folder where what is joined is kept after some bands, and read if it is there.
    """
    path, kept = scratch / "bands", _Texts(scratch / "questions", count)
    compared: list[Numbers] = []  # large sets of questions: many bands hold the same
    bar = tqdm(desc="split: compare", total=BANDS, unit="band", leave=False)

    def prepare() -> None:
        done = 0
        with path.open("wb") as file:
            for keys in in_threads(partial(bands, similarity=similarity), kept.write(texts)):
                for band, part in enumerate(keys):
                    file.seek(4 * (band * count + done))
                    part.tofile(file)
                done += keys.shape[1]

    def join(band: int) -> None:
        keys = np.fromfile(path, np.uint32, count, offset=4 * band * count)
        _join_band(*collisions(keys), kept, similarity, forest, compared)

    def joined(some: range) -> Iterator[tuple[pa.RecordBatch, dict[str, Any]]]:
        if not path.exists():
            prepare()
        for _ in in_threads(join, some):
            bar.update()
        yield pa.record_batch([forest.parent], SCHEMA), {}

    with bar:
        for begin in range(0, BANDS, BANDS_KEPT):
            some = range(begin, min(BANDS, begin + BANDS_KEPT))
            file = kept_in and kept_in / f"bands-{begin}.arrow"
            ((batch, _),) = made_once(file, SCHEMA, joined(some))
            forest.parent = batch.column("parent").to_numpy().copy()
    for file in (path, kept.path):
        file.unlink(missing_ok=True)


def _join_band(
    members: Numbers,
    starts: Numbers,
    texts: _Texts,
    similarity: float,
    forest: Forest,
    compared: list[Numbers],
) -> None:
    """Join the questions of a band that are similar.

    Args:
        members: with `starts` what `collisions` returns.
        compared: large sets of questions that other bands hold; those of this one are added.
    """
    sizes = np.diff(starts)
    for k in np.flatnonzero(sizes > SMALL):
        together = np.sort(members[starts[k] : starts[k + 1]])
        if not any(np.isin(together, known).all() for known in compared):
            _join_many(together, texts, similarity, forest)
            compared[:] = sorted([*compared, together], key=len)[-16:]
    key = np.repeat(np.arange(len(sizes)), sizes)
    few = np.repeat(sizes <= SMALL, sizes)
    members, key = members[few], key[few]
    for apart in range(1, min(SMALL, sizes.max(initial=0))):
        first = np.flatnonzero(key[apart:] == key[:-apart])
        for begin in range(0, len(first), PAIRS_AT_ONCE):
            some = first[begin : begin + PAIRS_AT_ONCE]
            one, other = members[some], members[some + apart]
            new = forest.roots(one) != forest.roots(other)
            one, other = one[new], other[new]
            if len(one):
                _join_pairs(one, other, texts, similarity, forest)


def _matrix(questions: pa.Array) -> Any:
    """Return which question has which shingle, as a sparse matrix."""
    from scipy.sparse import csr_array

    hashed, starts = shingles_of(questions)
    _, columns = np.unique(hashed, return_inverse=True)
    shape = (len(questions), int(columns.max()) + 1)
    found = csr_array((np.ones(len(columns), np.int32), columns, starts), shape=shape)
    found.sum_duplicates()
    found.data[:] = 1
    return found


def _join_pairs(
    one: Numbers,
    other: Numbers,
    texts: _Texts,
    similarity: float,
    forest: Forest,
) -> None:
    rows, places = np.unique(np.concatenate((one, other)), return_inverse=True)
    questions = texts.at(rows)
    left, right = places[: len(one)], places[len(one) :]
    sizes = pc.binary_length(questions).to_numpy()
    alike = np.concatenate(
        [
            _alike(questions, left[part], right[part], similarity)
            for part in _parts(sizes[left] + sizes[right])
        ]
    )
    left, right = left[alike], right[alike]
    rows, places = np.unique(np.concatenate((left, right)), return_inverse=True)
    numbers = numbers_keys(questions.take(pa.array(rows)))[places]
    same = numbers[: len(left)] == numbers[len(left) :]
    forest.join(one[alike][same], other[alike][same])


def _alike(texts: pa.Array, left: Numbers, right: Numbers, similarity: float) -> Numbers:
    """Return which pairs of texts are similar by their shingles.

    Those of both are sorted together, with the last bit for the side that they are of: one that both have
    is once followed by itself of the other side, however often it is there.
    """
    sums, begins, counts = sums_of(texts.take(pa.array(np.concatenate((left, right)))))
    sums &= ~np.uint64(1)
    found = np.zeros(len(left), bool)
    widths = counts[: len(left)] + counts[len(left) :]
    order, done = np.argsort(widths, kind="stable"), 0
    while done < len(order):
        # no more than so many shingles, all repeated to the width of the widest pair
        size = max(1, int(CACHED // widths[order[min(len(order), done + PAIRS_SORTED) - 1]]))
        some = order[done : done + min(size, PAIRS_SORTED)]
        sides = []
        for side, rows in enumerate((some, some + len(left))):
            below = np.arange(counts[rows].max())[None]
            places = begins[rows][:, None] + np.minimum(below, counts[rows][:, None] - 1)
            sides.append(sums[places])
            sides[side] |= np.uint64(side)
        together = np.concatenate(sides, axis=1)
        together.sort(axis=1)
        apart = together[:, 1:] ^ together[:, :-1]
        both = np.count_nonzero(apart == 1, axis=1)
        either = np.count_nonzero(apart > 1, axis=1) + 1
        found[some] = both >= similarity * either
        done += len(some)
    return found


def _join_many(members: Numbers, texts: _Texts, similarity: float, forest: Forest) -> None:
    """Join those of many questions that are similar; pairs that are joined already are not compared.

    What all have in common, as the words of a template, is counted once.
    """
    questions = texts.at(members)
    found = _matrix(questions)
    sizes = np.diff(found.indptr)
    common = np.bincount(found.indices, minlength=found.shape[1]) == len(members)
    rest = found[:, ~common]
    numbers = numbers_keys(questions)
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
