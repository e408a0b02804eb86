"""Use of a version since it was registered, as its traces tell."""

import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.tracking import MlflowClient

from fintune import paths
from fintune.data.minhash import Numbers, shingles
from fintune.data.questions import normalize_question
from fintune.data.stream import batches, open_rows
from fintune.usage.exchanges import Exchange, exchanges

USUAL = 0.95  # of the test questions are no more unlike the training's than this share says
EXAMPLES = 3


def use_of(client: MlflowClient, version: Any) -> str | None:
    """Say how a registered version is used: answers, what users say of them, and unlike questions.

    Without a trace since its registration, None.
    """
    name = f"{version.name}/{version.version}"
    since = version.creation_timestamp / 1000
    found = [each for each in exchanges(client, since) if each.model == name]
    if not found:
        return None
    day = datetime.fromtimestamp(since, UTC).strftime("%Y-%m-%d")
    lines = [f"Use of {name} since it was registered on {day}", *summary(found), *unlike(found)]
    return "\n".join(lines)


def summary(found: Sequence[Exchange]) -> list[str]:
    """Count answers, and those that were approved, corrected, cut off or failed."""
    answered = [each for each in found if not each.error]
    judged = [each for each in answered if each.approved is not None]
    counts = (
        ("answers", len(answered), len(found), f"; {len(found) - len(answered)} failed"),
        ("approved", sum(each.approved is True for each in judged), len(judged), " judged"),
        ("corrected", sum(each.correction is not None for each in found), len(found), ""),
        ("did not end", sum(not each.ended for each in answered), len(answered), ""),
    )
    return [f"  {title:<15}{count} of {total}{more}" for title, count, total, more in counts]


def unlike(found: Sequence[Exchange]) -> list[str]:
    """Count the questions that are less like the training's than 95 % of the test questions are.

    Measured is the share of a question's five-character shingles that no training question has.
    """
    train, test = (paths.rows(paths.SPLIT, name) for name in ("train", "test"))
    if not (train.is_file() and test.is_file()):
        return [f"  {'unlike':<15}not measured: {train} and {test} are not here"]
    known = np.array([], np.uint64)
    for questions in _questions(train):
        known = np.union1d(known, shingles(questions)[0])
    held = [share for questions in _questions(test) for share in new_shares(questions, known)]
    limit = sorted(held)[math.ceil(USUAL * len(held)) - 1]
    asked = list(dict.fromkeys(normalize_question(each.input) for each in found))
    shares = dict(zip(asked, new_shares(asked, known), strict=True))
    far = sorted((q for q in asked if shares[q] > limit), key=lambda q: -shares[q])
    line = f"  {'unlike':<15}{len(far)} of {len(asked)} questions are unlike the training data"
    return [line, *(f"  {'':<15}{shares[q]:.0%} new: {q[:70]}" for q in far[:EXAMPLES])]


def new_shares(questions: list[str], known: Numbers) -> list[float]:
    """Return of each question the share of its shingles that are not among the known ones."""
    if not questions:
        return []
    hashed, starts = shingles(questions)
    new = ~np.isin(hashed, known)
    return [float(new[begin:end].mean()) for begin, end in pairwise(starts)]


def _questions(path: Path) -> Iterable[list[str]]:
    """Yield the normalised questions of a table, batch by batch."""
    for batch in batches(open_rows(path, ["input"]), ["input"], "questions"):
        yield [normalize_question(text) for text in batch["input"].to_pylist()]
