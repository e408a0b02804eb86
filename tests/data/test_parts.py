"""Parts of format's work outlast a kill, and nothing else does."""

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fintune import paths
from fintune.data import formatting, parts
from fintune.data.formatting import format_rows
from fintune.data.parts import kept_parts
from fintune.params import Format

PARAMS = Format(template="seed", max_tokens=60, overlong="truncate")
ROWS = 600  # in row groups of 50, each of 5 batches


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(parts, "KEPT_FROM", ROWS)
    monkeypatch.setattr(formatting, "AT_ONCE", 10)
    rows = [
        {"instruction": "Answer.", "input": f"Why {i}?", "output": "So it is. " * (i % 9 * 3)}
        for i in range(ROWS)
    ]
    rows[7]["input"] = rows[430]["input"] = "<response>"
    pq.write_table(pa.Table.from_pylist(rows), "rows.parquet", row_group_size=50)
    return tmp_path / "rows.parquet"


class Batches:
    """Counts the batches that are formatted, and kills the process at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.killed_at = 0, -1
        plain = formatting.format_batch

        def work(*args: Any, **given: Any) -> Any:
            self.count += 1
            if self.count == self.killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*args, **given)

        monkeypatch.setattr(formatting, "format_batch", work)


def formatted(tokenizer: Any, source: Path, setting: str = "") -> tuple[Any, bytes]:
    target = source.with_name("formatted.parquet")
    with kept_parts("format", [source], [setting]) as kept:
        told = format_rows(tokenizer, source, target, PARAMS, "train", kept)
    return told, target.read_bytes()


def killed(tokenizer: Any, source: Path, batches: Batches, at: int) -> list[Path]:
    """Format until a batch kills the process; return the parts that are finished."""
    batches.killed_at = at
    process = multiprocessing.get_context("fork").Process(
        target=formatted, args=(tokenizer, source)
    )
    process.start()
    process.join()
    batches.killed_at = -1
    assert process.exitcode == -signal.SIGKILL
    assert not source.with_name("formatted.parquet").exists()
    return list(paths.SCRATCH.glob("format-*/*.arrow"))


def test_a_killed_format_goes_on_with_the_parts_that_it_finished(
    source: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(parts, "KEPT_FROM", ROWS + 1)
    expected = formatted(tokenizer, source)
    assert expected[0][0]["rows_truncated"] and len(expected[0][1]) == 2
    assert not list(paths.SCRATCH.glob("format-*"))  # of few rows nothing is kept
    source.with_name("formatted.parquet").unlink()

    monkeypatch.setattr(parts, "KEPT_FROM", ROWS)
    batches = Batches(monkeypatch)
    finished = killed(tokenizer, source, batches, at=28)
    assert 0 < len(finished) < 12
    caplog.set_level("INFO", "fintune")
    assert formatted(tokenizer, source) == expected
    assert batches.count == 5 * (12 - len(finished))
    assert f"format goes on: {len(finished)} parts were finished before" in caplog.text
    assert not list(paths.SCRATCH.glob("format-*"))


def test_parts_of_other_tables_or_settings_are_swept(
    source: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = Batches(monkeypatch)
    (folder,) = {part.parent for part in killed(tokenizer, source, batches, at=28)}
    with kept_parts("format", [source], ["other"]) as kept:
        assert kept and kept != folder and not folder.exists()
    killed(tokenizer, source, batches, at=28)
    pq.write_table(pq.read_table(source).slice(1), source, row_group_size=50)
    monkeypatch.setattr(parts, "KEPT_FROM", 0)
    with kept_parts("format", [source], [""]) as kept:
        assert kept and kept != folder and not folder.exists()


def test_one_of_two_processes_keeps_parts(source: Path) -> None:
    with (
        kept_parts("format", [source], [""]) as one,
        kept_parts("format", [source], [""]) as same,
        kept_parts("format", [source], ["other"]),
    ):
        assert one and one.exists() and same is None
