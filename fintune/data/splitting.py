"""Split rows by question: equal and nearly equal questions stay in one split.

A row's split depends only on its question and the seed, not on the order of rows or on rows added
later. The one exception: a new near-duplicate joins the group of similar questions, and the group's
split follows from its member with the smallest hash.

Rows that the source assigns to validation or test stay there. A group of similar questions that it
assigns to several splits goes to the one held out most, without its rows of the others.

In memory are some hashes at a time; the others, and the texts, are in files.
"""

import logging
import os
import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fintune.data.keys import Keys, read_keys
from fintune.data.ordering import inputs_of, without_duplicates, write_in_order
from fintune.data.questions import normalize_question, normalized
from fintune.data.records import hashes_of, warn_of_dropped
from fintune.data.similar import Forest, group_similar
from fintune.data.stream import batches, in_threads, open_rows
from fintune.data.tables import COLUMNS, LISTED, SPLITS, list_dropped
from fintune.errors import UserError, brief
from fintune.params import Split
from fintune.paths import rows as rows_of

log = logging.getLogger("fintune")

LARGE = 0.1  # of the rows; a group with more is told
Numbers = NDArray[Any]


def split_rows(
    source: Path, folder: Path, params: Split, kept_in: Path | None = None
) -> tuple[dict[str, int], dict[str, int]]:
    """Assign every row of a table to train, validation or test, and write these.

    Args:
        source: records with `instruction`, `input` and `output`; the question is `input`. `split` is
            where the source puts a row; the fractions are drawn from rows that it puts nowhere or in train.
        folder: where the rows of each split are written, in hash order.
        kept_in: a folder where hashes and groups that are found are kept, and read if they are there.

    Returns:
        The number of rows left out, by reason: `held_out_question` (the source puts the same or a similar
        question in a split held out more) and `duplicate` (all three texts equal another row's); and the
        number of `groups` of similar questions, and the rows of the largest.

    Raises:
        UserError: a split would be empty.
    """
    file = open_rows(source, COLUMNS)
    if not file.metadata.num_rows:
        raise UserError(f"split: {source} has no rows")
    scratch = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        keys = read_keys(file, params.seed, kept_in or scratch, kept_in is not None)
        kept, order, unique, counts, groups = _assign(file, keys, params, scratch, kept_in)
        write_in_order(file, unique, counts, [rows_of(folder, each) for each in SPLITS], scratch)
        list_dropped(folder, ("row", "reason", "text"), _lost(file, kept, order, unique))
        left_out = {
            "duplicate": len(order) - len(unique),
            "held_out_question": len(kept) - len(order),
        }
        return left_out, groups
    finally:
        shutil.rmtree(scratch)


def _assign(
    file: pq.ParquetFile, keys: Keys, params: Split, scratch: Path, kept_in: Path | None
) -> tuple[Numbers, Numbers, Numbers, Numbers, dict[str, int]]:
    """Return which rows are not held out, these in the order of the splits, the different ones of them, their
    number in each split, and what is told of the groups."""
    question, group = _group(keys, params.near_duplicate_similarity, scratch, kept_in)
    side, held_out, leader = _draw(keys, group[question], params)
    kept = keys["given"] == held_out
    warn_of_dropped(
        "split",
        len(kept) - int(kept.sum()),
        (f"{brief(text, 60)!r} is held out" for text in inputs_of(file, np.flatnonzero(~kept)[:3])),
        len(kept),
    )
    order = np.flatnonzero(kept)
    order = order[np.lexsort((keys["row"][order], keys["order"][order], side[order]))]
    unique = without_duplicates(file, keys, order)
    counts = np.bincount(side[unique], minlength=len(SPLITS))
    _check_counts(counts, params, len(group), len(np.unique(group)))
    sizes = np.bincount(group[question[unique]], minlength=len(group))
    leaders = leader[np.isin(group[question], np.flatnonzero(sizes == sizes.max()))]
    (example,) = inputs_of(file, leaders[[keys["leader"][leaders].argmin()]])
    groups = {"groups": int((sizes > 0).sum()), "largest_group_rows": int(sizes.max())}
    _warn_of_shares(
        counts, params, groups, normalize_question(example), bool(keys["assigned"].any())
    )
    return kept, order, unique, counts, groups


def _lost(
    file: pq.ParquetFile, kept: Numbers, order: Numbers, unique: Numbers
) -> Iterator[tuple[int, str, str]]:
    """Yield the first rows of each reason for leaving one out: number, reason and beginning."""
    equal = np.zeros(len(kept), bool)
    equal[order] = True
    equal[unique] = False
    reasons = {"held_out_question": np.flatnonzero(~kept), "duplicate": np.flatnonzero(equal)}
    for reason, found in reasons.items():
        for row, text in zip(found, inputs_of(file, found[:LISTED]), strict=False):
            yield int(row) + 1, reason, brief(text, 100)


def _group(
    keys: Keys, similarity: float | None, scratch: Path, kept: Path | None
) -> tuple[Numbers, Numbers]:
    """Return the question of each row, and the group of each question, both as numbers from 0."""
    hashes, asked = keys["order"], keys["asked"]
    order = np.lexsort((asked, asked == 0, hashes))
    hashes = hashes[order]
    new = np.concatenate(([True], hashes[1:] != hashes[:-1]))
    del hashes
    first = order[new]  # a row of each question, of a conversation if there is one
    places = np.argsort(np.argsort(first)).astype(np.int32)
    question = np.empty(len(order), np.int32)
    question[order] = places[np.cumsum(new) - 1]
    del order, places
    first.sort()
    forest = Forest(len(first))
    asked_first = np.zeros_like(asked)
    asked_first[first] = asked[first]
    del asked
    for linking in (keys["prompt"], keys["group"], asked_first):
        rows = np.flatnonzero(linking)
        rows = rows[np.argsort(linking[rows], kind="stable")]
        same = linking[rows[1:]] == linking[rows[:-1]]
        forest.join(question[rows[1:][same]], question[rows[:-1][same]])
    del asked_first, linking
    if similarity is not None:
        group_similar(keys.texts(first), len(first), similarity, forest, scratch, kept)
    return question, forest.roots(np.arange(len(first)))


def _draw(keys: Keys, group: Numbers, params: Split) -> tuple[Numbers, Numbers, Numbers]:
    """Return of each row the split of its group, the split where the source holds it out most, and a row of
    the group's leader, its question with the smallest hash."""
    order = np.lexsort((keys["leader"], group))
    new = np.concatenate(([True], group[order][1:] != group[order][:-1]))
    number = np.empty(len(group), np.int32)  # of the group, from 0
    number[order] = np.cumsum(new) - 1
    leader = order[new]
    held_out = np.zeros(len(leader), np.int8)
    np.maximum.at(held_out, number, keys["given"])
    place = keys["side"][leader] / 2.0**64
    test, validation = params.test_fraction or 0, params.validation_fraction or 0
    drawn = np.select([place < test, place < test + validation], [2, 1], 0)
    side = np.where(held_out == 0, drawn, held_out).astype(np.int8)
    return side[number], held_out[number], leader[number]


def _check_counts(counts: Numbers, params: Split, questions: int, groups: int) -> None:
    empty = [name for name, count in zip(SPLITS, counts, strict=True) if not count]
    for name in empty:
        if name != "train" and getattr(params, f"{name}_fraction") is None:
            raise UserError(
                f"split: {name} would be empty: the source's split column puts no question there; "
                f"set split.{name}_fraction"
            )
    if empty:
        raise UserError(
            f"split: {' and '.join(empty)} would be empty: {questions} different questions in "
            f"{groups} groups are too few for these fractions; raise them, or bring more questions"
        )


def _warn_of_shares(
    counts: Numbers, params: Split, groups: dict[str, int], example: str, assigned: bool
) -> None:
    """Warn of a group with much of the data, and of splits that are far from what was asked."""
    total, largest = int(counts.sum()), groups["largest_group_rows"]
    asked = {"validation": params.validation_fraction, "test": params.test_fraction}
    told = []
    for name, share in asked.items():
        got = counts[SPLITS.index(name)] / total
        if share and not assigned and abs(got - share) > max(0.05, share / 2):
            told.append(f"{name} has {got:.0%} of the rows where {share:.0%} were asked")
    if largest > LARGE * total:
        told.append(
            f"one group of similar questions has {largest} of {total} rows, as {brief(example, 80)!r}; raise "
            "split.near_duplicate_similarity, or set it to null to keep only equal questions together"
        )
    elif told:
        told.append(f"{groups['groups']} groups of similar questions are too few for even shares")
    if told:
        log.warning("warning: split: %s", "; ".join(told))


def describe_splits(folder: Path) -> dict[str, Any]:
    """Count the rows and questions of each split as written, and the questions in more than one split."""
    files = {name: open_rows(rows_of(folder, name), COLUMNS) for name in SPLITS}
    rows = {name: file.metadata.num_rows for name, file in files.items()}
    every = chain.from_iterable(
        batches(files[name], ["input"], f"split: count {name}") for name in SPLITS
    )
    hashed = np.concatenate([*in_threads(_questions, every), np.empty(0, np.uint64)])
    parts = np.split(hashed, np.cumsum([rows[name] for name in SPLITS])[:-1])
    questions = {name: np.unique(part) for name, part in zip(SPLITS, parts, strict=True)}
    _, seen = np.unique(np.concatenate([*questions.values()]), return_counts=True)
    return {
        **{
            name: {
                "rows": rows[name],
                "questions": len(questions[name]),
                "share": rows[name] / max(1, sum(rows.values())),
            }
            for name in SPLITS
        },
        "overlapping_questions": int((seen > 1).sum()),
    }


def _questions(batch: pa.RecordBatch) -> Numbers:
    return hashes_of("question", normalized(batch.column("input")))[:, 0]
