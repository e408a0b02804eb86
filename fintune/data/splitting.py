"""Split rows by question: equal and nearly equal questions stay in one split.

A row's split depends only on its question and the seed, not on the order of rows or on rows added
later. The one exception: a new near-duplicate joins the group of similar questions, and the group's
split follows from its member with the smallest hash.

Rows that the source assigns to validation or test stay there. A group of similar questions that it
assigns to several splits goes to the one held out most, without its rows of the others.
"""

import hashlib
import json
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from fintune.data.prompt import render_prompt
from fintune.data.questions import normalize_question
from fintune.data.records import warn_of_dropped
from fintune.data.tables import COLUMNS, SPLITS
from fintune.errors import UserError, brief
from fintune.params import Split

log = logging.getLogger("fintune")

PERMUTATIONS = 128
SHINGLE = 5
LARGE = 0.1  # of the rows; a group with more is told
Row = dict[str, Any]


def split_rows(
    rows: list[Row], params: Split
) -> tuple[dict[str, list[Row]], dict[str, int], dict[str, int]]:
    """Assign every row to train, validation or test.

    Args:
        rows: records with `instruction`, `input` and `output`; the question is `input`. `split` is
            where the source puts a row; the fractions are drawn from rows that it puts nowhere or in train.

    Returns:
        The rows of each split in hash order, and the number of rows left out, by reason:
        `held_out_question` (the source puts the same or a similar question in a split held out more) and
        `duplicate` (all three texts equal another row's); and the number of `groups` of similar questions,
        and the rows of the largest.

    Raises:
        UserError: a split would be empty.
    """
    given: dict[str, str] = {}  # of each question the split held out most
    for row in rows:
        question = normalize_question(row["input"])
        given[question] = max(given.get(question, "train"), _given(row), key=SPLITS.index)
    asked = _asked(rows)
    similarity = params.near_duplicate_similarity
    groups = group_questions(sorted(given), similarity, _linked(rows, asked), asked)
    side, leaders = {}, {}
    for group in groups:
        held_out = max((given[question] for question in group), key=SPLITS.index)
        leader = min(group, key=lambda question: _digest("leader", question))
        place = int.from_bytes(_digest(f"side {params.seed}", leader)[:8]) / 2**64
        drawn = _side(place, params) if held_out == "train" else held_out
        for question in group:
            given[question], side[question], leaders[question] = held_out, drawn, leader
    kept = [row for row in rows if _given(row) == given[normalize_question(row["input"])]]
    examples = [
        f"{brief(row['input'], 60)!r} is held out"
        for row in rows
        if _given(row) != given[normalize_question(row["input"])]
    ]
    warn_of_dropped("split", examples, len(rows))
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
    sizes = Counter(
        leaders[normalize_question(row["input"])] for part in splits.values() for row in part
    )
    leader, largest = max(sizes.items(), key=lambda item: (item[1], item[0]))
    _warn_of_shares(splits, params, len(sizes), largest, leader)
    return splits, left_out, {"groups": len(sizes), "largest_group_rows": largest}


def _warn_of_shares(
    splits: dict[str, list[Row]], params: Split, groups: int, largest: int, leader: str
) -> None:
    """Warn of a group with much of the data, and of splits that are far from what was asked."""
    total = sum(map(len, splits.values()))
    assigned = any(row.get("split") for part in splits.values() for row in part)
    asked = {"validation": params.validation_fraction, "test": params.test_fraction}
    told = []
    for name, share in asked.items():
        got = len(splits[name]) / total
        if share and not assigned and abs(got - share) > max(0.05, share / 2):
            told.append(f"{name} has {got:.0%} of the rows where {share:.0%} were asked")
    if largest > LARGE * total:
        told.append(
            f"one group of similar questions has {largest} of {total} rows, as {brief(leader, 80)!r}; raise "
            "split.near_duplicate_similarity, or set it to null to keep only equal questions together"
        )
    elif told:
        told.append(f"{groups} groups of similar questions are too few for even shares")
    if told:
        log.warning("warning: split: %s", "; ".join(told))


def _asked(rows: list[Row]) -> dict[str, str]:
    """Return what the user said in each conversation.

    Conversations are compared by it: the answers of one assistant, and a transcript's labels, are alike.
    """
    found: dict[str, str] = {}
    for row in rows:
        if row.get("turns"):
            said = [text for role, text in json.loads(row["turns"]) if role == "user"]
            asked = normalize_question("\n".join(said))
            question = normalize_question(row["input"])
            found[question] = min(found.get(question, asked), asked)
    return found


def _linked(rows: list[Row], asked: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield pairs of questions that are asked in one group of the source, by one prompt or in equal words."""
    first: dict[tuple[str, str], str] = {}
    for row in rows:
        question = normalize_question(row["input"])
        keys = [("prompt", render_prompt(row["instruction"], row["input"]))]
        keys += [("group", row["group"])] if row.get("group") else []
        keys += [("asked", asked[question])] if question in asked else []
        for key in keys:
            if first.setdefault(key, question) != question:
                yield first[key], question


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


def group_questions(
    questions: list[str],
    similarity: float | None,
    linked: Iterable[tuple[str, str]] = (),
    asked: Mapping[str, str] = MappingProxyType({}),
) -> list[list[str]]:
    """Group normalized questions that are similar or linked, directly or transitively.

    Two questions are similar when the Jaccard similarity of their five-character shingles is at least
    `similarity` and they contain the same numbers: "a loan of $5,000" and "a loan of $9,000" have
    different answers. MinHash and locality-sensitive hashing propose the pairs among questions with the same
    numbers (Broder 1997), and each pair is then checked exactly.

    Args:
        questions: distinct, normalized, sorted.
        similarity: 0.5 to 1, or None to keep every question on its own.
        linked: pairs of questions that belong together for another reason.
        asked: by what a question is compared, if not by itself.
    """
    place = {question: i for i, question in enumerate(questions)}
    parent = list(range(len(questions)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for one, other in linked:
        parent[root(place[one])] = root(place[other])
    alike = defaultdict(list)
    compared = [asked.get(question, question) for question in questions]
    for i, question in enumerate(compared):
        numbers = Counter(re.findall(r"\d[\d.]*", question))
        alike[tuple(sorted(numbers.items()))].append(i)
    for places in alike.values():
        if similarity is not None and len(places) > 1:
            _join_similar([compared[i] for i in places], places, similarity, parent, root)
    members = defaultdict(list)
    for i, question in enumerate(questions):
        members[root(i)].append(question)
    return list(members.values())


def _join_similar(
    questions: list[str],
    places: list[int],
    similarity: float,
    parent: list[int],
    root: Callable[[int], int],
) -> None:
    """Join those of some questions that are similar, by their places among all."""
    from datasketch import MinHash, MinHashLSH

    shingles = [_shingles(question) for question in questions]
    sketches = MinHash.bulk(
        [[shingle.encode() for shingle in sorted(each)] for each in shingles],
        num_perm=PERMUTATIONS,
        seed=1,
    )
    # Below `similarity`: a missed pair would leak, while surplus pairs are rejected below.
    index = MinHashLSH(threshold=max(0.3, similarity - 0.15), num_perm=PERMUTATIONS)
    for i, sketch in enumerate(sketches):
        for j in index.query(sketch):
            one, other = root(places[i]), root(places[j])
            if one != other and _jaccard(shingles[i], shingles[j]) >= similarity:
                parent[one] = other
        index.insert(i, sketch)


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
            name: {
                "rows": len(rows),
                "questions": len(questions[name]),
                "share": len(rows) / max(1, sum(map(len, splits.values()))),
            }
            for name, rows in splits.items()
        },
        "overlapping_questions": sum(count > 1 for count in seen.values()),
    }
