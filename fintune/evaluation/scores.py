"""Score answers to validation questions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fintune.evaluation.correctness import is_correct
from fintune.evaluation.texts import text_scores
from fintune.generation.generate import Answer

SHOWN = ("loop_rate", "rouge_1", "rouge_l", "distinct_2", "words", "reference_words")
MIN_CHECKABLE = 30  # questions; with fewer, likeness decides


@dataclass(frozen=True)
class Question:
    """A validation prompt's tokens, all references to it, and the result of its own row."""

    prompt: list[int]
    references: list[str]
    result: str
    text: str


def result_of(row: Mapping[str, Any]) -> str:
    """Return the part of a row's reference that can be right or wrong: its result, or else all of it."""
    return str(row.get("result") or row["output"])


def measure_of(questions: Sequence[Question]) -> str:
    """Return the score that decides: `accuracy` if MIN_CHECKABLE results can be checked, else `likeness`."""
    checkable = sum(is_correct(q.result, "", q.text) is not None for q in questions)
    return "accuracy" if checkable >= MIN_CHECKABLE else "likeness"


def score(questions: Sequence[Question], answers: Sequence[Answer]) -> dict[str, np.ndarray]:
    """Score answers, each (questions,).

    Returns:
        `accuracy`, nan where nothing can be checked; `likeness`, the mean of ROUGE-1 and ROUGE-L; and the
        shares, lengths and likenesses that a report shows.
    """
    texts = text_scores([a.text for a in answers], [q.references for q in questions])
    right = [is_correct(q.result, a.text, q.text) for q, a in zip(questions, answers, strict=True)]
    return {
        "accuracy": np.array([np.nan if r is None else float(r) for r in right]),
        "likeness": (texts["rouge_1"] + texts["rouge_l"]) / 2,
        "stop_rate": np.array([float(a.stopped) for a in answers]),
        **{name: texts[name] for name in SHOWN},
        "tokens": np.array([float(a.tokens) for a in answers]),
    }
