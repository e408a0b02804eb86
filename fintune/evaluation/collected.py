"""Collected questions, whose answers users corrected or approved: how many each model answers right."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from fintune import paths
from fintune.data.stream import batches, open_rows
from fintune.data.tables import COLUMNS, SPLITS, read_rows
from fintune.data.unpacking import Row
from fintune.evaluation.correctness import is_correct
from fintune.generation.generate import Answer


@dataclass(frozen=True)
class Collected:
    """The formatted rows of collected questions, with `answered` and `split`, and the number collected."""

    rows: list[Row]
    count: int


def collected_rows() -> Collected:
    """Return the rows of collected questions that the data has; none where fetch did not read any."""
    if not paths.RAW_COLLECTED.is_file():
        return Collected([], 0)
    given = read_rows(paths.RAW_COLLECTED, (*COLUMNS, "answered"))
    answered = {tuple(row[name] for name in COLUMNS): row["answered"] for row in given}
    questions = pa.array(sorted({row["input"] for row in given}), pa.string())
    names = [*COLUMNS, "prompt", "completion"]
    rows = []
    for split in SPLITS:
        for batch in batches(open_rows(paths.rows(paths.FORMATTED, split), names), names):
            for row in batch.filter(pc.is_in(batch.column("input"), questions)).to_pylist():
                key = tuple(row[name] for name in COLUMNS)
                if key in answered:
                    rows.append(row | {"answered": answered[key], "split": split})
    return Collected(rows, len(given))


def is_right(row: Mapping[str, Any], answer: str) -> bool:
    """Return whether an answer says what a collected row's output says.

    Where the output has no result that can be checked, the texts have to be equal but for case and spaces.
    """
    right = is_correct(row["output"], answer, row["input"])
    if right is None:
        said, wanted = (" ".join(text.casefold().split()) for text in (answer, row["output"]))
        return said == wanted
    return right


def describe_collected(
    collected: Collected, answers: Mapping[str, Sequence[Sequence[Answer]]]
) -> dict[str, Any]:
    """Count the collected questions that were right in use (`before`), and that each model answers right.

    Args:
        answers: of each model to each row, of which the first counts.
    """
    rows = collected.rows
    right = {"before": sum(is_right(row, row["answered"]) for row in rows)}
    for name, of_rows in answers.items():
        right[name] = sum(
            is_right(r, found[0].text) for r, found in zip(rows, of_rows, strict=True)
        )
    trained = sum(row["split"] == "train" for row in rows)
    return {"collected": collected.count, "asked": len(rows), "trained": trained, "right": right}
