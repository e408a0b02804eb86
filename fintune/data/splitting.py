"""Split rows by question: equal and nearly equal questions stay in one split.

A row's split depends only on its question and the seed, not on the order of rows or on rows added
later. The one exception: a new near-duplicate joins the group of similar questions, and the group's
split follows from its member with the smallest hash.

Rows that the source assigns to validation or test stay there. A group of similar questions that it
assigns to several splits goes to the one held out most, without its rows of the others.
"""

import hashlib
import re
from collections import Counter, defaultdict
from typing import Any

from fintune.data.questions import normalize_question
from fintune.data.tables import COLUMNS, SPLITS
from fintune.errors import UserError
from fintune.params import Split

PERMUTATIONS = 128
SHINGLE = 5
Row = dict[str, Any]


def split_rows(rows: list[Row], params: Split) -> tuple[dict[str, list[Row]], dict[str, int]]:
    """Assign every row to train, validation or test.

    Args:
        rows: records with `instruction`, `input` and `output`; the question is `input`. `split` is
            where the source puts a row; the fractions are drawn from rows that it puts nowhere or in train.

    Returns:
        The rows of each split in hash order, and the number of rows left out, by reason:
        `held_out_question` (the source puts the same or a similar question in a split held out more) and
        `duplicate` (all three texts equal another row's).

    Raises:
        UserError: a split would be empty.
    """
    given: dict[str, str] = {}  # of each question the split held out most
    for row in rows:
        question = normalize_question(row["input"])
        given[question] = max(given.get(question, "train"), _given(row), key=SPLITS.index)
    groups = group_questions(sorted(given), params.near_duplicate_similarity)
    side = {}
    for group in groups:
        held_out = max((given[question] for question in group), key=SPLITS.index)
        leader = min(group, key=lambda question: _digest("leader", question))
        place = int.from_bytes(_digest(f"side {params.seed}", leader)[:8]) / 2**64
        drawn = _side(place, params) if held_out == "train" else held_out
        for question in group:
            given[question], side[question] = held_out, drawn
    kept = [row for row in rows if _given(row) == given[normalize_question(row["input"])]]
    # sorted, so that the order of the rows does not decide which of two duplicates' results is kept
    unique = {tuple(row[key] for key in COLUMNS): row for row in sorted(kept, key=str)}
    splits: dict[str, list[Row]] = {name: [] for name in SPLITS}
    for _, row in sorted(unique.items(), key=lambda item: _order(item[0], params.seed)):
        splits[side[normalize_question(row["input"])]].append(row)
    empty = [name for name, part in splits.items() if not part]
    for name in empty:
        if name != "train" and getattr(params, f"{name}_fraction") is None:
            raise UserError(
                f"split: {name} would be empty: the source's split column puts no question there; "
                f"set split.{name}_fraction"
            )
    if empty:
        raise UserError(
            f"split: {' and '.join(empty)} would be empty: {len(side)} different questions in "
            f"{len(groups)} groups are too few for these fractions; raise them, or bring more questions"
        )
    left_out = {"duplicate": len(kept) - len(unique), "held_out_question": len(rows) - len(kept)}
    return splits, left_out


def _given(row: Row) -> str:
    """Return the split that the source assigns to a row."""
    return str(row.get("split") or "train")


def _side(place: float, params: Split) -> str:
    test = params.test_fraction or 0
    if place < test:
        return "test"
    if place < test + (params.validation_fraction or 0):
        return "validation"
    return "train"


def _order(texts: tuple[str, ...], seed: int) -> tuple[bytes, bytes]:
    """Return a sort key: questions in hash order, and each question's answers in hash order."""
    return _digest(f"order {seed}", normalize_question(texts[1])), _digest("row", *texts)


def _digest(salt: str, *texts: str) -> bytes:
    return hashlib.sha256("\x00".join((salt, *texts)).encode("utf-8", "surrogatepass")).digest()


def group_questions(questions: list[str], similarity: float | None) -> list[list[str]]:
    """Group normalized questions that are similar, directly or transitively.

    Two questions are similar when the Jaccard similarity of their five-character shingles is at least
    `similarity` and they contain the same numbers: "a loan of $5,000" and "a loan of $9,000" have
    different answers. MinHash and locality-sensitive hashing propose the pairs (Broder 1997), and each
    pair is then checked exactly.

    Args:
        questions: distinct, normalized, sorted.
        similarity: 0.5 to 1, or None to keep every question on its own.
    """
    if similarity is None:
        return [[question] for question in questions]
    from datasketch import MinHash, MinHashLSH

    shingles = [_shingles(question) for question in questions]
    numbers = [Counter(re.findall(r"\d[\d.]*", question)) for question in questions]
    sketches = MinHash.bulk(
        [[shingle.encode() for shingle in sorted(each)] for each in shingles],
        num_perm=PERMUTATIONS,
        seed=1,
    )
    # Below `similarity`: a missed pair would leak, while surplus pairs are rejected below.
    index = MinHashLSH(threshold=max(0.3, similarity - 0.15), num_perm=PERMUTATIONS)
    parent = list(range(len(questions)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, sketch in enumerate(sketches):
        for j in index.query(sketch):
            if numbers[i] == numbers[j] and _jaccard(shingles[i], shingles[j]) >= similarity:
                parent[root(i)] = root(j)
        index.insert(i, sketch)
    members = defaultdict(list)
    for i, question in enumerate(questions):
        members[root(i)].append(question)
    return list(members.values())


def _shingles(question: str) -> set[str]:
    padded = f" {question} "
    return {padded[i : i + SHINGLE] for i in range(max(1, len(padded) - SHINGLE + 1))}


def _jaccard(a: set[str], b: set[str]) -> float:
    return len(a & b) / len(a | b)


def describe_splits(splits: dict[str, list[Row]]) -> dict[str, Any]:
    """Count the rows and questions of each split, and the questions in more than one split."""
    questions = {
        name: {normalize_question(row["input"]) for row in rows} for name, rows in splits.items()
    }
    seen = Counter(question for part in questions.values() for question in part)
    return {
        **{
            name: {"rows": len(rows), "questions": len(questions[name])}
            for name, rows in splits.items()
        },
        "overlapping_questions": sum(count > 1 for count in seen.values()),
    }
