"""Lists of rows through the functions that take tables."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fintune import paths
from fintune.data import formatting, selection, sources, splitting
from fintune.data.parsing import Pieces, names_of
from fintune.data.similar import Forest, group_similar
from fintune.data.stream import unspool
from fintune.data.tables import COLUMNS, SPLITS, read_rows, write_rows
from fintune.data.unpacking import Piece
from fintune.params import Fetch, Format, Split

Row = dict[str, Any]


def select_records(
    rows: list[Row],
    columns: dict[str, str | None],
    default_instruction: str | None,
    invalid_rows: str,
    source: str,
    turns: str = "last",
    hint: str = "",
) -> tuple[list[Row], dict[str, int]]:
    """Select in two pieces, as `fetch_records` does."""
    given = columns, default_instruction, invalid_rows, source, turns
    with tempfile.TemporaryDirectory() as name:
        half = len(rows) // 2
        pieces = [piece for piece in (rows[:half], rows[half:]) if piece]
        table = Pieces(names_of(rows), True, lambda wanted: map(Piece, pieces))
        rules = selection.Rules(*given)  # type: ignore[arg-type]
        told, files = sources.select_all(table, rules, sources.Place(Path(name), "0", False))
        dropped = selection.check_selected(told, source, hint)
        names = [name for name in selection.SCHEMA.names if name in {*COLUMNS, *told.present}]
        found = [
            row
            for path in files
            for batch in unspool(path)
            for row in batch.select(names).to_pylist()
        ]
    return found, dropped


def fetch_records(params: Fetch) -> tuple[list[Row], dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        target = Path(name) / "raw/qa.parquet"
        about = sources.fetch_records(params, target)
        assert [path.name for path in target.parent.parent.iterdir()] == ["raw"]
        return read_rows(target), about


def split_rows(
    rows: list[Row], params: Split
) -> tuple[dict[str, list[Row]], dict[str, int], dict[str, int]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "split"
        write_rows(folder.parent / "rows.parquet", rows)
        dropped, groups = splitting.split_rows(folder.parent / "rows.parquet", folder, params)
        assert {path.name for path in folder.parent.iterdir()} == {"split", "rows.parquet"}
        return {each: read_rows(paths.rows(folder, each)) for each in SPLITS}, dropped, groups


def describe_splits(splits: dict[str, list[Row]]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        for each in SPLITS:
            write_rows(paths.rows(Path(name), each), splits.get(each, []))
        return splitting.describe_splits(Path(name))


def group_questions(questions: list[str], similarity: float) -> list[list[str]]:
    forest, half = Forest(len(questions)), len(questions) // 2
    texts = [pa.array(part, pa.string()) for part in (questions[:half], questions[half:])]
    with tempfile.TemporaryDirectory() as name:
        group_similar(texts, len(questions), similarity, forest, Path(name))
    found: dict[int, list[str]] = {}
    for question, root in zip(questions, forest.roots(np.arange(len(questions))), strict=True):
        found.setdefault(int(root), []).append(question)
    return list(found.values())


def format_rows(
    tokenizer: Any, rows: list[Row], params: Format, split: str
) -> tuple[list[Row], dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        source, target = Path(name) / "rows.parquet", Path(name) / "formatted.parquet"
        write_rows(source, rows)
        counts, _ = formatting.format_rows(tokenizer, source, target, params, split)
        return read_rows(target), counts
