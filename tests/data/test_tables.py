"""Reading tables in every format and dropping unusable rows, by reason."""

import bz2
import gzip
import json
import lzma
import os
import zipfile
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fintune.data.parquet import open_parquet
from fintune.data.records import read_passages
from fintune.data.tables import check_sizes, read_rows, read_source, write_rows
from fintune.errors import RecordError
from support.rows import select_records

ROWS = [
    {"instruction": "Answer.", "input": "What is a bond?", "output": "A loan, in short."},
    {
        "instruction": "Answer.",
        "input": 'A "quoted", split\tone?',
        "output": "Né à Zürich — 5 €, nan.",
    },
]
COLUMNS = {"instruction": "instruction", "input": "input", "output": "output"}


def select(rows: list[dict[str, Any]], invalid_rows: str = "drop", **columns: str | None) -> Any:
    default = "Help." if "instruction" in columns and columns["instruction"] is None else None
    return select_records(rows, COLUMNS | columns, default, invalid_rows, "the source")  # type: ignore[arg-type]


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    frame = pd.DataFrame(rows)
    match path.suffix:
        case ".parquet":
            frame.to_parquet(path)
        case ".csv" | ".tsv":
            frame.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
        case ".json":
            path.write_text(json.dumps(rows))
        case ".jsonl" | ".ndjson":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", ["parquet", "csv", "tsv", "json", "jsonl", "ndjson"])
@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_formats_give_the_same_rows(tmp_path: Path, suffix: str, packed: str) -> None:
    path = written(tmp_path / f"qa.{suffix}", ROWS)
    content = path.read_bytes()
    if packed == ".gz":
        content = gzip.compress(content)
    elif packed == ".zst":
        content = pa.Codec("zstd").compress(content, asbytes=True)
    packed_path = tmp_path / f"packed.{suffix}{packed}"
    packed_path.write_bytes(content)
    assert read_source(str(packed_path)) == ROWS


@pytest.mark.parametrize("name", ["lines.json", "lines.txt", "lines", "a#b.jsonl", "a::b?c.jsonl"])
def test_json_lines_are_read_under_any_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert read_source(str(path)) == ROWS


def test_a_csv_file_may_have_semicolons(tmp_path: Path) -> None:
    path = tmp_path / "qa.csv"
    path.write_text('input;output\n"Why; how?";5,5 %\n')
    assert read_source(str(path)) == [{"input": "Why; how?", "output": "5,5 %"}]


VALUES = [5, 2.5, 1e-07, True, False, "None", "N/A", "NA", "0", "12345678901234567890"]


@pytest.mark.parametrize("suffix", ["parquet", "csv", "tsv", "json", "jsonl"])
def test_what_is_kept_does_not_depend_on_the_format(tmp_path: Path, suffix: str) -> None:
    for value in VALUES:
        row = {**ROWS[0], "output": value, "split": "train"}
        rows = read_source(str(written(tmp_path / f"qa.{suffix}", [row])))
        records, dropped = select(rows)
        assert [record["output"] for record in records] == [str(value)] and dropped == {}


def test_numbers_in_json_stay_as_written(tmp_path: Path) -> None:
    path = tmp_path / "qa.jsonl"
    path.write_text('{"a": 1.50, "b": 123456789012345678901234567890, "c": [1e3], "d": NaN}\n')
    assert read_source(str(path)) == [
        {"a": "1.50", "b": "123456789012345678901234567890", "c": ["1e3"], "d": None}
    ]


@pytest.mark.parametrize("suffix", ["parquet", "csv", "json", "jsonl"])
def test_only_the_chosen_columns_are_read(tmp_path: Path, suffix: str) -> None:
    rows = [{**row, "other": "x"} for row in ROWS]
    path = written(tmp_path / f"qa.{suffix}", rows)
    seen: list[str] = []
    found = read_source(str(path), lambda names: seen.extend(names) or ["input"])  # type: ignore[func-returns-value]
    assert seen == ["instruction", "input", "output", "other"]
    assert found == [{"input": row["input"]} for row in ROWS]


def test_a_column_that_nobody_asked_for_may_be_damaged(tmp_path: Path) -> None:
    """A date beyond what Python can hold is no error where its column is not read."""
    path = tmp_path / "qa.parquet"
    far = pa.array([2**62], pa.timestamp("ms"))
    pq.write_table(pa.table({"input": ["a"], "when": far}), path)
    assert read_source(str(path), lambda names: ["input"]) == [{"input": "a"}]
    with pytest.raises(RecordError, match="not a readable parquet table"):
        read_source(str(path))


def test_a_url_is_opened_by_fsspec() -> None:
    import fsspec

    with fsspec.open("memory://bucket/qa.jsonl", "w") as file:
        file.write(json.dumps(ROWS[0]))
    assert read_source("memory://bucket/qa.jsonl") == ROWS[:1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("qa.jsonl", '{"a": 1}\n{"a": \n', "line 2: not JSON"),
        ("qa.jsonl", '{"a": 1}\n\n[3]\n', "line 3: not a JSON object"),
        ("qa.json", '{"a": 1}', "list of objects"),
        ("qa.json", "[1", "not a readable json table"),
        ("qa.csv", "a,b\n1\n", "line 2: not as many values"),
        ("qa.csv", "a,b\n1,2,3\n", "line 2: not as many values"),
        ("qa.parquet", "not parquet", "not a readable parquet table"),
        ("qa.xlsx", "", "unknown format '.xlsx'"),
        ("qa.csv", 'a,b\n1,2\n"say "hi" now",3\n', "line 3: .*written twice"),
        ("qa.csv", 'a,b\n1,2\n"open,3\n4,5\n', "line 3: .*written twice"),
        ("qa.csv", "a,b,a\n1,2,3\n", "line 1: two columns have the name 'a'"),
        ("qa.tsv", "a\tb\n1\n", "line 2: not as many values"),
        ("qa.jsonl", '{"a": 1}\n{"a": 1, "a": 2}\n', "line 2: an object has two keys 'a'"),
        ("qa.jsonl", '{"a": 1}\n{"a": ' + "[" * 99999, "line 2: .*nested too deeply"),
        ("qa.json", "[" * 99999, "nested too deeply"),
        ("qa.json", '{"a": 1}\n{"a": \n', "line 2: not JSON"),
        ("qa.jsonl", '{"a": 1}\n"' + "x" * 10**6 + '"', "line 2: not a JSON object"),
        ("qa.csv", "a,b\n1,2," + "x" * 10**6, "line 2: not as many values"),
    ],
)
def test_broken_files_are_named_with_the_line(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(RecordError, match=message) as caught:
        read_source(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 400


def test_damaged_bytes_are_refused(tmp_path: Path) -> None:
    packed = gzip.compress(b"a,b\n1,2\n")
    page = bytearray(written(tmp_path / "whole.parquet", ROWS * 100).read_bytes())
    page[4:60] = b"\xff" * 56
    for name, content, message in (
        ("qa.csv.gz", packed[:-9], "not a readable csv table"),
        ("qa.csv.zst", b"\x28\xb5\x2f\xfd rest", "not a readable csv table"),
        ("qa.parquet", bytes(page), "not a readable parquet table"),
        ("qa.csv", "a,b\n1,2\nné,4\n".encode("latin-1"), "line 3: not UTF-8"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(RecordError, match=message):
            read_source(str(path))
    twins = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["x", "x"])
    pq.write_table(twins, tmp_path / "twins.parquet")
    with pytest.raises(RecordError, match="two columns have the name 'x'"):
        read_source(str(tmp_path / "twins.parquet"))


def test_a_link_to_itself_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "loop.csv").symlink_to(tmp_path / "loop.csv")
    with pytest.raises(RecordError, match="cannot be read: Too many levels"):
        read_source(str(tmp_path / "loop.csv"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"absent\.csv: cannot be read"):
        read_source(str(tmp_path / "absent.csv"))


def test_unusable_rows_are_dropped_and_counted_by_reason() -> None:
    bad: list[tuple[str, Any]] = [
        ("output", "nan"),
        ("output", " NULL "),
        ("input", "None"),
        ("output", "  \t"),
        ("output", "\u200b\u2060 \ufeff\u3164"),
        ("input", None),
        ("output", float("nan")),
        ("output", ["3"]),
        ("output", "half of an emoji \ud83d"),
    ]
    rows = [*ROWS, *({**ROWS[0], column: value} for column, value in bad), {"input": "no output?"}]
    records, dropped = select(rows)
    assert records == ROWS
    assert dropped == {
        "empty": 2,
        "literal_nan": 3,
        "lone_surrogate": 1,
        "missing": 3,
        "not_text": 1,
    }
    assert len(rows) == len(records) + sum(dropped.values())


def test_a_text_that_only_begins_with_nan_stays() -> None:
    row = {**ROWS[0], "output": "nan bread is not finance"}
    assert select([row]) == ([row], {})


def test_refusing_names_row_column_and_way_out() -> None:
    rows = [ROWS[0], {**ROWS[0], "output": "nan"}]
    with pytest.raises(RecordError, match=r"row 2: output is literal nan.*invalid_rows: drop"):
        select(rows, invalid_rows="refuse")
    assert select(ROWS, invalid_rows="refuse") == (ROWS, {})


def test_columns_are_mapped_and_a_default_instruction_fills_in() -> None:
    rows = [{"question": "Why?", "answer": "Because."}]
    records, _ = select(rows, instruction=None, input="question", output="answer")
    assert records == [{"instruction": "Help.", "input": "Why?", "output": "Because."}]


MORE = {"result": "answer_key", "kind": "topic", "split": "part"}


def test_optional_columns_are_carried_and_may_be_null(tmp_path: Path) -> None:
    """A result or a kind that is null, absent or empty makes no row unusable."""
    given: list[dict[str, Any]] = [
        {"answer_key": "42", "topic": "sums", "part": "train"},
        {"answer_key": None, "topic": float("nan"), "part": "test"},
        {"part": "validation"},
        {"answer_key": " ", "topic": "", "part": "train"},
        {"answer_key": "none", "topic": "nan", "part": "train"},
    ]
    records, dropped = select([{**ROWS[0], **more} for more in given], "refuse", **MORE)
    assert dropped == {}
    nothing = (None, None)
    expected = [("42", "sums"), nothing, nothing, nothing, ("none", "nan")]
    assert [(record["result"], record["kind"]) for record in records] == expected
    assert all({**ROWS[0], **record} == record for record in records)
    write_rows(tmp_path / "qa.parquet", records)
    assert read_rows(tmp_path / "qa.parquet") == records


def test_columns_that_are_not_named_are_not_carried(tmp_path: Path) -> None:
    more = {"result": "42", "kind": "sums", "split": "train"}
    unnamed = dict.fromkeys(more)
    assert select([{**row, **more} for row in ROWS], **unnamed) == select(ROWS)
    records, _ = select([{**row, **more} for row in ROWS], kind="kind")
    assert records == [{**row, "kind": "sums"} for row in ROWS]
    write_rows(tmp_path / "qa.parquet", ROWS)
    assert pq.read_schema(tmp_path / "qa.parquet").names == ["instruction", "input", "output"]


@pytest.mark.parametrize(
    ("names", "split"),
    [
        (["train", "Train", " TRAIN "], "train"),
        (["validation", "valid", "val", "dev", "eval", "VAL", "Dev"], "validation"),
        (["test", "Test"], "test"),
    ],
)
def test_usual_names_of_splits(names: list[str], split: str) -> None:
    records, _ = select([{**ROWS[0], "part": name} for name in names], split="part")
    assert [record["split"] for record in records] == [split] * len(names)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("result", {"a": 1}, r"row 2: answer_key is not text: {'a': 1}"),
        ("kind", ["a"], r"row 2: topic is not text: \['a'\]"),
        ("split", 1, r"row 2: part is '1', not one of train"),
        (
            "split",
            "holdout",
            r"row 2: part is 'holdout', not one of train, validation, test, .*null",
        ),
        ("split", None, r"row 2: part is None, not one of train"),
    ],
)
def test_a_wrong_value_of_an_optional_column_names_the_row(
    column: str, value: Any, message: str
) -> None:
    good = {**ROWS[0], "answer_key": "a", "topic": "b", "part": "train"}
    with pytest.raises(RecordError, match=message):
        select([good, {**good, MORE[column]: value}], **MORE)


@pytest.mark.parametrize("empty", ["", None])
def test_a_row_without_input_asks_with_its_instruction(empty: str | None) -> None:
    """Unless its instruction is one that other rows give with an input."""
    alone = {"instruction": "What is a bond?", "input": empty, "output": "A loan."}
    without = {**ROWS[0], "input": empty}
    records, dropped = select([*ROWS, alone, without], invalid_rows="drop")
    moved = {"instruction": "", "input": "What is a bond?", "output": "A loan."}
    assert records == [*ROWS, moved]
    assert dropped == {"missing" if empty is None else "empty": 1}


def test_many_dropped_rows_are_a_warning_that_names_three(caplog: pytest.LogCaptureFixture) -> None:
    bad = [{**ROWS[0], "output": None}] * 2 + [{**ROWS[0], "input": "nan"}] * 2
    select([*ROWS, *bad])
    (told,) = [record.message for record in caplog.records]
    assert "4 of 6 rows (67 %)" in told
    assert "row 3: output is missing; row 4: output is missing; row 5: input is literal nan" in told
    assert "row 6" not in told
    caplog.clear()
    select([*ROWS * 10, bad[0]])  # one of 21
    assert not caplog.records
    select([*ROWS * 9, bad[0]])
    assert len(caplog.records) == 1


def test_a_long_value_is_told_briefly() -> None:
    with pytest.raises(RecordError) as caught:
        select([{**ROWS[0], "output": ["x" * 10**7]}], invalid_rows="refuse")
    assert len(str(caught.value)) < 400


def test_nothing_usable_is_refused() -> None:
    with pytest.raises(RecordError, match="none of its 1 rows"):
        select([{**ROWS[0], "output": "nan"}])
    with pytest.raises(RecordError, match="no rows"):
        select([])


def test_equal_rows_give_equal_bytes_and_come_back(tmp_path: Path) -> None:
    one, two = tmp_path / "one.parquet", tmp_path / "two.parquet"
    write_rows(one, ROWS)
    write_rows(two, [dict(row) for row in ROWS])
    assert one.read_bytes() == two.read_bytes()
    assert read_rows(one) == ROWS
    assert sorted(tmp_path.iterdir()) == [one, two]


def test_a_failed_write_leaves_the_former_file(tmp_path: Path) -> None:
    path = tmp_path / "qa.parquet"
    write_rows(path, ROWS)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_rows(path, [{"instruction": 1, "input": object(), "output": None}])
    assert path.read_bytes() == before


def test_reading_a_table_without_a_column(tmp_path: Path) -> None:
    write_rows(tmp_path / "qa.parquet", ROWS)
    with pytest.raises(RecordError, match="no column prompt"):
        read_rows(tmp_path / "qa.parquet", ["prompt"])
    with pytest.raises(RecordError, match="dvc repro"):
        read_rows(tmp_path / "absent.parquet")


def test_passages_are_the_texts_of_a_table_and_the_shipped_ones_are_sixty(tmp_path: Path) -> None:
    shipped = read_passages(str(Path(__file__).parents[2] / "assets/general-text.jsonl"))
    assert len(shipped) == len(set(shipped)) == 60
    assert all(20 < len(text.split()) < 80 for text in shipped)
    path = tmp_path / "own.jsonl"
    path.write_text('{"text": "some words"}\n{"text": "one"}\n')
    with pytest.raises(RecordError, match="row 2: text is 'one'"):
        read_passages(str(path))
    path.write_text('{"text": "some words"}\n{"body": "no text"}\n')
    with pytest.raises(RecordError, match="row 2: text is None"):
        read_passages(str(path))


def test_a_source_is_read_up_to_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bombs of each packing, and plain files; what is smaller is read."""
    text = b"input,output\n" + b"Why?,So.\n" * 100_000
    write_rows(
        tmp_path / "packed.parquet",
        [dict.fromkeys(COLUMNS, "a" * 10**6 + str(i)) for i in range(9)],
    )
    (tmp_path / "packed.csv.gz").write_bytes(gzip.compress(text))
    with pa.CompressedOutputStream(str(tmp_path / "packed.csv.zst"), "zstd") as stream:
        stream.write(text)
    (tmp_path / "packed.csv.bz2").write_bytes(bz2.compress(text))
    (tmp_path / "packed.csv.xz").write_bytes(lzma.compress(text))
    (tmp_path / "plain.csv").write_bytes(text)
    for path in sorted(tmp_path.iterdir()):
        monkeypatch.setenv("FINTUNE_SOURCE_GIB", "1")
        assert read_source(str(path))
        monkeypatch.setenv("FINTUNE_SOURCE_GIB", "0.0005")
        with pytest.raises(
            RecordError, match=rf"{path}: .*it has more than 0\.0005 GiB; .* larger number"
        ):
            read_source(str(path))
        for wrong in ("no", "0", "nan", "inf"):
            monkeypatch.setenv("FINTUNE_SOURCE_GIB", wrong)
            with pytest.raises(RecordError, match=f"FINTUNE_SOURCE_GIB: '{wrong}' is no number"):
                read_source(str(path))


LONG = "a" * 2**20


@pytest.mark.parametrize(
    ("column", "encoding"),
    [
        (pa.array([LONG] * 300).dictionary_encode(), {}),
        (pa.array([LONG] * 300), {}),
        (pa.array([LONG] * 300), {"use_dictionary": False, "column_encoding": "DELTA_BYTE_ARRAY"}),
        (pa.array([[{"role": "user", "content": LONG}]] * 300), {}),
    ],
    ids=["dictionary", "dictionary of plain texts", "prefixes", "nested"],
)
def test_a_parquet_of_few_bytes_is_read_up_to_the_limit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    column: pa.Array,
    encoding: dict[str, Any],
) -> None:
    """A value of a megabyte is there once, and read 300 times: never all of them at a time."""
    path = tmp_path / "few.parquet"
    pq.write_table(pa.table({"input": column}), path, compression="zstd", **encoding)
    assert path.stat().st_size < 2**20
    monkeypatch.setattr("fintune.data.parquet.MOST_AT_ONCE", 2**24)
    names, batches = open_parquet(path)
    pieces = [len(piece.content) for piece in batches(names)]
    assert (sum(pieces), max(pieces)) == (300, 16) or (encoding and max(pieces) < 16)
    check_sizes([path])
    monkeypatch.setenv("FINTUNE_SOURCE_GIB", "0.25")
    read = 0
    with pytest.raises(RecordError, match=r"unpacked, it has more than 0\.25 GiB"):
        for piece in open_parquet(path)[1](names):
            read += len(piece.content)
    assert read < 256
    with pytest.raises(RecordError, match=r"few\.parquet: unpacked, it has more than"):
        check_sizes([path])


def test_the_files_of_a_data_set_are_bounded_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINTUNE_SOURCE_GIB", "0.001")
    text = b"input,output\n" + b"Why?,So.\n" * 80_000
    files = [tmp_path / "a.csv", tmp_path / "b.csv.gz", tmp_path / "c.zip"]
    files[0].write_bytes(text)
    files[1].write_bytes(gzip.compress(text))
    with zipfile.ZipFile(files[2], "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("c.csv", text)
    for file in files:
        check_sizes([file])
    for two in (files[:2], files[1:], files[::2]):
        with pytest.raises(RecordError, match=r"unpacked, its files have more than 0\.001 GiB"):
            check_sizes(two)
    (tmp_path / "d.7z").write_bytes(b"7z\xbc\xaf\x27\x1c")
    with pytest.raises(RecordError, match=r"d\.7z: an archive whose size is not known"):
        check_sizes([tmp_path / "d.7z"])


def test_what_may_never_end_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    for source in (tmp_path / "pipe.csv", Path("/dev/zero")):
        with pytest.raises(RecordError, match=f"{source}: a pipe, a socket or a device"):
            read_source(str(source))
