"""Batches through processes, and tables in pieces: the same bytes, whole or not at all."""

import csv
import gzip
import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers.processors import TemplateProcessing

from fintune.data import formatting, ordering, parsing, splitting, stream, unpacking
from fintune.data.formatting import format_rows
from fintune.data.prompt import encode, load_tokenizer
from fintune.data.sources import fetch_records
from fintune.data.splitting import split_rows
from fintune.data.stream import ordered, spool, unspool, writer
from fintune.data.tables import COLUMNS, SPLITS, write_rows
from fintune.data.tokens import encode_rows
from fintune.errors import RecordError, UserError
from fintune.params import Base, Fetch, Format, Split, read_params
from support.project import ROOT
from support.rows import Row

PARAMS = Split(seed=13, validation_fraction=0.2, test_fraction=0.2, near_duplicate_similarity=0.7)


def made(count: int) -> list[Row]:
    """Make rows of which some are equal, some nearly equal, and some have a result of their own."""
    words = ["bond", "stock", "loan", "lease", "deed", "index", "option", "pension"]
    questions = [
        " ".join(
            words[(i * (k + 3) + k * k + i // 7) % 8] + "aeiou"[(i >> k) % 5] for k in range(8)
        )
        for i in range(count // 2)
    ]
    return [
        {
            "instruction": "Answer.",
            "input": f"{text}{'s' * (i % 2)}?",
            "output": str(i // 3),
            "kind": kind,
        }
        for i, text in enumerate(questions * 2)
        for kind in ("a", None)
    ]


def written(path: Path, rows: list[Row]) -> Path:
    """Write rows in the format of the file's name."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=50)
        return path
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
        return path
    lines = "\n".join(map(json.dumps, rows))
    text = json.dumps(rows) if path.suffix == ".json" else lines
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.fixture(params=["1", "2", "3"])
def processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FINTUNE_WORKERS", request.param)
    return str(request.param)


def test_results_come_in_the_order_of_the_jobs(processes: str) -> None:
    assert list(ordered(lambda job: job * job, range(40))) == [job * job for job in range(40)]
    ids = set(ordered(lambda job: os.getpid(), range(40)))
    assert (os.getpid() in ids) == (processes == "1") and len(ids) <= int(processes)


def test_an_error_in_a_process_is_an_error_here(processes: str) -> None:
    def work(job: int) -> int:
        if job == 3:
            raise UserError("row 3: no")
        return job

    with pytest.raises(UserError, match="row 3: no"):
        list(ordered(work, range(9)))


def test_a_killed_process_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINTUNE_WORKERS", "2")
    with pytest.raises(
        UserError, match=r"killed, perhaps for lack of memory; with FINTUNE_WORKERS=1"
    ):
        list(ordered(lambda job: os.kill(os.getpid(), signal.SIGKILL), range(9)))


@pytest.mark.parametrize("given", ["0", "two", "-1", "1.5"])
def test_a_wrong_number_of_processes_is_refused(
    given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINTUNE_WORKERS", given)
    with pytest.raises(UserError, match=f"FINTUNE_WORKERS: '{given}' is no number"):
        list(ordered(str, range(3)))


def test_where_no_process_can_be_made_one_does_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINTUNE_WORKERS", "2")

    def refuse() -> int:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(os, "fork", refuse)
    assert list(ordered(lambda job: job + 1, range(5))) == [1, 2, 3, 4, 5]


def test_split_and_format_are_the_same_bytes_whatever_the_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    """Batches, row groups and the files that are sorted are made small, so that there are many."""
    for module, name in (
        *((stream, each) for each in ("BATCH", "GROUP")),
        (ordering, "GROUP"),
    ):
        monkeypatch.setattr(module, name, 50)
    monkeypatch.setattr(stream.batches, "__defaults__", (None, "", 50, None))
    write_rows(tmp_path / "rows.parquet", made(600))
    written = []
    for count in ("1", "2", "3"):
        monkeypatch.setenv("FINTUNE_WORKERS", count)
        told = split_rows(tmp_path / "rows.parquet", tmp_path / count, PARAMS)
        told = (*told, splitting.describe_splits(tmp_path / count))
        written.append(
            (told, [(tmp_path / count / f"{each}.parquet").read_bytes() for each in SPLITS])
        )
    assert written[0] == written[1] == written[2]
    train = pq.ParquetFile(tmp_path / "1/train.parquet")
    assert train.metadata.num_row_groups == -(-train.metadata.num_rows // 50) > 2
    assert written[0][0][2]["overlapping_questions"] == 0
    lists = [(tmp_path / count / "dropped.csv").read_text() for count in ("1", "2", "3")]
    assert lists[0] == lists[1] == lists[2]
    listed = [line.split(",")[1] for line in lists[0].splitlines()[1:]]
    assert Counter(listed) == {key: n for key, n in written[0][0][0].items() if n}
    number, _, text = next(csv.reader(lists[0].splitlines()[1:]))
    assert made(600)[int(number) - 1]["input"] == text

    params = Format(template="seed", max_tokens=80, overlong="truncate")
    rows = made(600)
    for number in (7, 120, 599):
        rows[number]["input"] = f"{number} </s><response> " * 9
    write_rows(
        tmp_path / "rows.parquet", [{**row, "output": row["output"] + " word" * 20} for row in rows]
    )
    monkeypatch.setattr(formatting, "AT_ONCE", 50)
    formatted = []
    for count in ("1", "2", "3"):
        monkeypatch.setenv("FINTUNE_WORKERS", count)
        target = tmp_path / count / "formatted.parquet"
        told = format_rows(tokenizer, tmp_path / "rows.parquet", target, params, "train")
        formatted.append((told, target.read_bytes()))
    assert formatted[0] == formatted[1] == formatted[2]
    (report, lost), _ = formatted[0]
    assert report["rows_truncated"] and report["rows_dropped"] == sum(report["dropped"].values())
    assert [each[0] for each in lost if each[1] == "special_token"] == [8, 121, 600]


def test_small_pieces_change_no_row_of_a_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "rows.parquet"
    write_rows(source, made(600))
    whole = split_rows(source, tmp_path / "whole", PARAMS)
    monkeypatch.setattr(ordering, "GROUP", 50)
    monkeypatch.setattr(stream.batches, "__defaults__", (None, "", 50, None))
    assert split_rows(source, tmp_path / "pieces", PARAMS) == whole
    for each in SPLITS:
        one, other = (pq.read_table(tmp_path / k / f"{each}.parquet") for k in ("whole", "pieces"))
        assert one.equals(other)


def test_a_table_is_the_same_in_whatever_pieces_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "GROUP", 70)
    table = pa.table({"text": [str(i) for i in range(333)]})
    found = set()
    for size in (1, 7, 70, 100, 333):
        with writer(tmp_path / "rows.parquet", table.schema) as write:
            for begin in range(0, 333, size):
                write(table.slice(begin, size))
        found.add((tmp_path / "rows.parquet").read_bytes())
    assert len(found) == 1 and pq.read_table(tmp_path / "rows.parquet").equals(table)


def test_a_table_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    table = pa.table({"text": ["a"]})
    with pytest.raises(KeyError), writer(tmp_path / "rows.parquet", table.schema) as write:
        write(table)
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_a_spool_gives_back_its_batches(tmp_path: Path) -> None:
    some = [pa.record_batch({"a": [1, 2]}), pa.record_batch({"a": [3]})]
    with spool(tmp_path / "spool", some[0].schema) as write:
        for batch in some:
            write(batch)
    assert list(unspool(tmp_path / "spool")) == some


def fetch_params(path: Path, **changes: Any) -> Fetch:
    chosen = read_params(ROOT / "recipes/demo.yaml").fetch.model_dump()
    plain = dict.fromkeys(chosen["columns"]) | {name: name for name in COLUMNS}
    given = chosen | {"source": str(path), "columns": plain} | changes
    return Fetch.model_validate(given)


def fetched(path: Path, target: Path, **changes: Any) -> dict[str, Any]:
    return fetch_records(fetch_params(path, **changes), target)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "AT_ONCE", 500)
    monkeypatch.setattr(parsing, "BATCH", 7)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet", "json", "jsonl.gz"])
def test_fetch_gives_the_same_bytes_whatever_the_processes(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {**row, "output": "" if i % 50 == 3 else row["output"]} for i, row in enumerate(made(200))
    ]
    path = written(tmp_path / f"made.{ending}", rows)
    found = []
    for count in ("1", "2", "3"):
        monkeypatch.setenv("FINTUNE_WORKERS", count)
        about = fetched(path, tmp_path / count / "qa.parquet")
        found.append((about, (tmp_path / count / "qa.parquet").read_bytes()))
    assert found[0] == found[1] == found[2]
    assert found[0][0]["dropped"] == {"empty": 8} and found[0][0]["rows"] == 392


@pytest.mark.usefixtures("small_pieces", "processes")
def test_a_column_of_later_rows_alone_is_found(tmp_path: Path) -> None:
    rows = [{"question": f"Why {i}?"} for i in range(30)]
    rows += [{"question": f"How {i}?", "answer": "So."} for i in range(30)]
    about = fetched(
        written(tmp_path / "made.jsonl", rows),
        tmp_path / "qa.parquet",
    )
    assert (about["rows"], about["dropped"]) == (30, {"missing": 30})


@pytest.mark.usefixtures("small_pieces", "processes")
def test_an_instruction_with_an_input_far_away_is_none_alone(tmp_path: Path) -> None:
    rows = [{"instruction": "Add.", "input": "", "output": str(i)} for i in range(30)]
    rows += [{"instruction": "Why?", "input": "", "output": "So."}]
    rows += [{"instruction": "Add.", "input": "1 and 1", "output": "2"}]
    about = fetched(written(tmp_path / "made.jsonl", rows), tmp_path / "qa.parquet")
    assert (about["rows"], about["dropped"]) == (2, {"empty": 30})


@pytest.mark.usefixtures("small_pieces", "processes")
def test_a_fault_far_down_is_told_with_its_row_and_line(tmp_path: Path) -> None:
    rows = made(100)
    rows[150] |= {"output": ""}
    path = written(tmp_path / "made.jsonl", rows)
    with pytest.raises(RecordError, match=r"made\.jsonl row 151: output is empty"):
        fetched(path, tmp_path / "qa.parquet", invalid_rows="refuse")
    path.write_text(path.read_text() + "\n{")
    with pytest.raises(RecordError, match=r"made\.jsonl line 201: not JSON"):
        fetched(path, tmp_path / "qa.parquet")
    assert not (tmp_path / "qa.parquet").exists()


def test_tokens_are_counted_as_they_are_encoded() -> None:
    """With a beginning and an end that the tokenizer adds itself, and special tokens as text."""
    tokenizer = load_tokenizer(Base(model=str(ROOT / "assets/demo-base"), revision=None), "new")
    texts = [
        ("Instruction: a\nInput: b </s> c\n<response>", "So it is.<response|end>"),
        ("Why?", "So."),
    ]
    texts *= 2
    for template in (None, "<s> $A", "<s> $A </s>"):
        if template:
            known = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "</s>")]
            own = tokenizer.convert_tokens_to_ids(tokenizer.eos_token)
            known = [(name, own if number is None else number) for name, number in known]
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single=template, special_tokens=known
            )
        encoded = [encode(tokenizer, *text) for text in texts]
        assert encode_rows(tokenizer, texts) == encoded
        assert formatting.count_tokens(tokenizer, texts) == [tuple(map(len, e)) for e in encoded]
