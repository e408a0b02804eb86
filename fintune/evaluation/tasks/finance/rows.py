"""Reduce the finance tasks' data sets to what their prompts and metrics use.

lm-evaluation-harness loads this file by its path. Each function takes one split as a `datasets.Dataset` and
drops all columns but the new ones, so that no prompt can show a label. An unexpected row is a ValueError.
"""

from collections.abc import Callable
from typing import Any

HEADLINES = {  # the data set's names of its nine questions, with their spelling
    "Price or Not": "Is the headline about the price of gold?",
    "Direction Up": "Does the headline tell of a rising price of gold?",
    "Direction Down": "Does the headline tell of a falling price of gold?",
    "Direction Constant": "Does the headline tell of a price of gold that stays as it is?",
    "PastPrice": "Does the headline tell what the price of gold was?",
    "FuturePrice": "Does the headline tell what the price of gold will be?",
    "PastNews": "Does the headline tell of a past event other than a price?",
    "FutureNews": "Does the headline tell of a coming event other than a price?",
    "Asset Comparision": "Does the headline compare gold with another asset?",
}


def fpb(rows: Any) -> Any:
    """Reduce Financial PhraseBank to `text` and `gold`: 0 negative, 1 neutral, 2 positive."""
    return _reduce(
        rows,
        ("sentence", "label"),
        lambda row: {"text": row["sentence"], "gold": _index(row["label"], (0, 1, 2))},
    )


def fiqa(rows: Any) -> Any:
    """Reduce FiQA to `text`, `target` and `gold`: 0 negative, 1 neutral, 2 positive.

    Scores from -0.1 up to, but without, 0.1 are neutral, as in FinGPT's benchmark.
    """
    return _reduce(
        rows,
        ("sentence", "target", "score"),
        lambda row: {
            "text": row["sentence"],
            "target": row["target"],
            "gold": 0 if row["score"] < -0.1 else 1 if row["score"] < 0.1 else 2,
        },
    )


def tfns(rows: Any) -> Any:
    """Reduce the tweets to `text` and `gold`: 0 negative, 1 neutral, 2 positive."""
    return _reduce(
        rows,
        ("text", "label"),  # 0 bearish, 1 bullish, 2 neutral
        lambda row: {"text": row["text"], "gold": _index(row["label"], (0, 2, 1))},
    )


def headlines(rows: Any) -> Any:
    """Reduce the headlines to `text`, `question`, `kind` and `gold`: 0 no, 1 yes.

    They are shuffled, the same way each time, so that `limit` takes of all questions.
    """
    reduced = _reduce(
        rows,
        ("query", "answer", "label_type"),
        lambda row: {
            "text": _between(row["query"], "Text:", "Answer:"),
            "question": HEADLINES[_one_of(row["label_type"], HEADLINES)],
            "kind": row["label_type"],
            "gold": _index(row["answer"], ("No", "Yes")),
        },
    )
    return reduced.shuffle(seed=0)


def cfa(rows: Any) -> Any:
    """Reduce the exam's questions to `text`, with the choices, and `gold`: 0 A, 1 B, 2 C."""
    return _reduce(
        rows,
        ("query", "answer"),
        lambda row: {
            "text": _between(row["query"], "Q:", "Answer:").replace(",CHOICES:", "\nChoices:"),
            "gold": _index(row["answer"], ("A", "B", "C")),
        },
    )


def finqa(rows: Any) -> Any:
    """Reduce FinQA to `context`, `question` and `answer`, a number as text, or yes or no."""
    return _reduce(
        rows,
        ("query", "text", "answer"),
        lambda row: {
            "context": _between(row["query"], "Context:", "Question:"),
            "question": row["text"],
            "answer": row["answer"],
        },
    )


def _reduce(
    rows: Any, columns: tuple[str, ...], convert: Callable[[dict[str, Any]], dict[str, Any]]
) -> Any:
    """Convert each row to the new columns alone."""
    there = rows.column_names
    if missing := set(columns) - set(there):
        raise ValueError(
            f"the data set has no column {', '.join(sorted(missing))}, only {', '.join(there)}"
        )

    def checked(row: dict[str, Any], number: int) -> dict[str, Any]:
        try:
            if empty := [name for name in columns if row[name] is None or row[name] == ""]:
                raise ValueError(f"{', '.join(empty)} is empty")
            return convert(row)
        except ValueError as error:
            raise ValueError(f"row {number} of the data set: {error}") from None

    return rows.map(checked, with_indices=True, remove_columns=there, keep_in_memory=True)


def _one_of(value: Any, known: Any) -> Any:
    if value not in known:
        raise ValueError(f"{value!r} is none of {', '.join(map(str, known))}")
    return value


def _index(value: Any, known: tuple[Any, ...]) -> int:
    return known.index(_one_of(value.strip() if isinstance(value, str) else value, known))


def _between(text: str, before: str, after: str) -> str:
    """Return the text between the first `before` and the last `after`."""
    start, end = text.find(before), text.rfind(after)
    if not -1 < start < end:
        raise ValueError(f"{text[:80]!r} has no text between {before} and {after}")
    return text[start + len(before) : end].strip()
