"""Parts of the work of fetch, split and format outlast a kill, and nothing else does."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from threading import RLock
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tqdm.auto import tqdm

from data.test_stream import fetch_params, written
from fintune import paths
from fintune.data import (
    formatting,
    keys,
    parquet,
    parsing,
    parts,
    similar,
    sources,
    splitting,
    unpacking,
)
from fintune.data.formatting import format_rows
from fintune.data.parts import are_many, kept_parts
from fintune.data.sources import fetch_records, is_large
from fintune.data.splitting import split_rows
from fintune.data.stream import unspool
from fintune.data.tables import SPLITS
from fintune.params import Format, Split
from support.project import ROOT

SPLIT = Split(seed=13, validation_fraction=0.2, test_fraction=0.2, near_duplicate_similarity=0.7)
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


class Calls:
    """Counts the calls of a function, and kills the process at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
        self.count, self.killed_at = 0, -1
        plain = getattr(module, name)

        def work(*args: Any, **given: Any) -> Any:
            self.count += 1
            if self.count == self.killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*args, **given)

        monkeypatch.setattr(module, name, work)


def killed(calls: Calls, at: int, work: Callable[..., Any], *args: Any) -> list[str]:
    """Work in a process until a call kills it; return the names of the parts that are finished."""

    def alone() -> None:
        tqdm.set_lock(RLock())  # its own outlasts a process that is killed with it
        work(*args)

    calls.killed_at = at
    process = multiprocessing.get_context("fork").Process(target=alone)
    process.start()
    process.join()
    calls.killed_at = -1
    assert process.exitcode == -signal.SIGKILL
    return sorted(path.name for path in paths.SCRATCH.glob("*/*.arrow"))


def formatted(tokenizer: Any, source: Path, setting: str = "") -> tuple[Any, bytes]:
    target = source.with_name("formatted.parquet")
    with kept_parts("format", are_many([source]), [source], [setting]) as kept:
        told = format_rows(tokenizer, source, target, PARAMS, "train", kept)
    return told, target.read_bytes()


def test_a_killed_format_goes_on_with_the_parts_that_it_finished(
    source: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(parts, "KEPT_FROM", ROWS + 1)
    expected = formatted(tokenizer, source)
    assert expected[0][0]["rows_truncated"] and len(expected[0][1]) == 2
    assert not list(paths.SCRATCH.glob("format-*"))  # of few rows nothing is kept
    source.with_name("formatted.parquet").unlink()

    monkeypatch.setattr(parts, "KEPT_FROM", ROWS)
    batches = Calls(monkeypatch, formatting, "format_batch")
    finished = killed(batches, 28, formatted, tokenizer, source)
    assert not source.with_name("formatted.parquet").exists()
    assert 0 < len(finished) < 12
    caplog.set_level("INFO", "fintune")
    assert formatted(tokenizer, source) == expected
    assert batches.count == 5 * (12 - len(finished))
    assert f"format goes on: {len(finished)} parts were finished before" in caplog.text
    assert not list(paths.SCRATCH.glob("format-*"))


def test_parts_of_other_tables_or_settings_are_swept(
    source: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = Calls(monkeypatch, formatting, "format_batch")
    assert killed(batches, 28, formatted, tokenizer, source)
    (folder,) = paths.SCRATCH.glob("format-*")
    with kept_parts("format", are_many([source]), [source], ["other"]) as kept:
        assert kept and kept != folder and not folder.exists()
    assert killed(batches, 28, formatted, tokenizer, source)
    pq.write_table(pq.read_table(source).slice(1), source, row_group_size=50)
    monkeypatch.setattr(parts, "KEPT_FROM", 0)
    with kept_parts("format", are_many([source]), [source], [""]) as kept:
        assert kept and kept != folder and not folder.exists()


def test_a_stage_that_fails_before_its_first_part_leaves_nothing(source: Path) -> None:
    with pytest.raises(KeyError), kept_parts("format", True, [source], []) as kept:
        assert kept and kept.exists()
        raise KeyError
    assert not list(paths.SCRATCH.iterdir())
    with pytest.raises(KeyError), kept_parts("format", True, [source], []) as kept:
        assert kept
        (kept / "train-0.arrow").touch()
        raise KeyError
    assert list(paths.SCRATCH.glob("format-*/train-0.arrow"))


def test_one_of_two_processes_keeps_parts(source: Path) -> None:
    with (
        kept_parts("format", are_many([source]), [source], [""]) as one,
        kept_parts("format", are_many([source]), [source], [""]) as same,
        kept_parts("format", are_many([source]), [source], ["other"]),
    ):
        assert one and one.exists() and same is None


def split(source: Path) -> tuple[Any, list[bytes]]:
    folder = source.with_name("split")
    with kept_parts("split", are_many([source]), [source], []) as kept:
        told = split_rows(source, folder, SPLIT, kept)
    return told, [paths.rows(folder, name).read_bytes() for name in SPLITS]


def test_a_killed_split_goes_on_with_the_hashes_and_the_bands_that_it_finished(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed as it hashes, and again as it compares."""
    monkeypatch.setattr(parts, "KEPT_FROM", ROWS + 1)
    expected = split(source)
    assert expected[0][1]["groups"] < ROWS and not list(paths.SCRATCH.glob("split-*"))
    monkeypatch.setattr(parts, "KEPT_FROM", ROWS)
    monkeypatch.setattr(keys, "GROUPS_KEPT", 2)
    hashed = Calls(monkeypatch, keys, "keys_of")
    bands = Calls(monkeypatch, similar, "_join_band")
    finished = killed(hashed, 8, split, source)
    assert 0 < len(finished) < 6
    assert killed(bands, 50, split, source)[:2] == ["bands-0.arrow", "bands-20.arrow"]
    assert hashed.count == bands.count == 0  # of this process
    assert split(source) == expected
    assert (hashed.count, bands.count) == (0, 20)
    assert not list(paths.SCRATCH.glob("split-*"))


def test_a_split_that_is_killed_as_it_writes_compares_nothing_again(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "KEPT_FROM", ROWS + 1)
    expected = split(source)
    monkeypatch.setattr(parts, "KEPT_FROM", ROWS)
    writes = Calls(monkeypatch, splitting, "write_in_order")
    assert "bands-40.arrow" in killed(writes, 1, split, source)
    monkeypatch.setattr(similar, "bands", None)
    monkeypatch.setattr(keys, "keys_of", None)
    assert split(source) == expected


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_a_killed_fetch_goes_on_with_the_records_that_it_selected(
    ending: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source is read twice, since an instruction comes with an input far down: killed in both passes."""
    monkeypatch.setenv("FINTUNE_WORKERS", "1")
    for module, name, size in ((unpacking, "AT_ONCE", 500), (parsing, "BATCH", 7)):
        monkeypatch.setattr(module, name, size)
    monkeypatch.setattr(parquet, "BATCH", 7)
    rows = [{"instruction": "Add.", "input": "", "output": str(i)} for i in range(120)]
    rows += [{"instruction": f"Why {i}?", "input": "", "output": "So."} for i in range(300)]
    rows += [{"instruction": "Add.", "input": "1 and 1", "output": "2"}]
    table = written(source.with_name(f"made.{ending}"), rows)
    with monkeypatch.context() as patch:
        patch.chdir(ROOT)  # where the recipe's base is
        params = fetch_params(table)

    def fetch() -> tuple[Any, bytes]:
        with kept_parts("fetch", is_large(params), [], [params.model_dump()]) as kept:
            told = fetch_records(params, source.with_name("qa.parquet"), kept)
        return told, source.with_name("qa.parquet").read_bytes()

    expected = fetch()
    assert expected[0]["dropped"] == {"empty": 120} and not list(paths.SCRATCH.glob("fetch-*"))
    monkeypatch.setattr(sources, "BYTES_FROM", 0)
    monkeypatch.setattr(sources, "PIECES_KEPT", 3)
    pieces = Calls(monkeypatch, sources, "_selected")
    assert fetch() == expected
    whole, pieces.count = pieces.count, 0
    first = killed(pieces, whole // 4, fetch)
    second = killed(pieces, whole // 2, fetch)
    assert 0 < len(first) < len(second)
    done = sum(len([*unspool(path)]) for path in paths.SCRATCH.glob("fetch-*/*.arrow"))
    assert fetch() == expected
    assert pieces.count == whole - done
    assert not list(paths.SCRATCH.glob("fetch-*"))
    pieces.count = 0
    assert killed(pieces, whole * 3 // 4, fetch)  # in the second pass
    written(table, [{**row, "output": "Other."} for row in rows])
    of_another_file = fetch()
    assert of_another_file == fetch() != expected
