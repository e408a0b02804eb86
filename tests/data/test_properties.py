"""What holds for any input, tried with made ones; `--hypothesis-profile=fuzz` tries many more of them."""

import copy
import csv
import gzip
import io
import json
import tempfile
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from fintune.data.formatting import format_row
from fintune.data.parsing import columns_in, rows_in
from fintune.data.prompt import SPECIAL_TOKENS, encode, render_completion, render_prompt
from fintune.data.questions import normalize_question, normalized
from fintune.data.selection import Rules, select_columns
from fintune.data.selection import select_records as select_rows
from fintune.data.shapes import recognise
from fintune.data.tables import COLUMNS, read_source
from fintune.data.unpacking import Piece
from fintune.errors import RecordError, UserError
from fintune.params import Source, Split, read_params
from support.project import ROOT
from support.rows import select_records, split_rows

NAMES = ("instruction", "input", "output", "messages", "question", "answer", "", "İ", "x\n")
SIGNS = ",;\"'\n\r\t\\{}[]:0\ufeff\x00#\u200b</s><s><pad>### \U0001f600\u0e01\u4e2d\u0301"
TEXTS = st.text(max_size=40) | st.text(SIGNS, max_size=40)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
PLAIN = TEXTS.filter(lambda text: "\x00" not in text)
ENDINGS = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".csv.gz", ".jsonl.zst", "")


def as_csv(rows: list[dict[str, str]], separator: str = ",") -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]), delimiter=separator, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def as_parquet(rows: list[dict[str, str]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def written(rows: list[dict[str, str]]) -> dict[str, bytes]:
    """Write a table in each format."""
    lines = "\n".join(json.dumps(row) for row in rows).encode()
    return {
        "csv": as_csv(rows),
        "tsv": as_csv(rows, "\t"),
        "json": json.dumps(rows).encode(),
        "jsonl": lines,
        "ndjson": lines + b"\n",
        "parquet": as_parquet(rows),
        "jsonl.gz": gzip.compress(lines),
        "jsonl.zst": pa.Codec("zstd").compress(lines, asbytes=True),
    }


def parse(content: bytes, name: str) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        return read_source(str(path))


def read(content: bytes, name: str) -> list[dict[str, Any]] | None:
    """Parse a table; None where it is refused, in words that fit a screen."""
    try:
        rows = parse(content, name)
    except RecordError as error:
        assert 0 < len(str(error)) < 600 and "\n" not in str(error)
        return None
    assert all(isinstance(row, dict) for row in rows)
    return rows


@given(st.binary(max_size=200), st.sampled_from(ENDINGS))
def test_any_bytes_are_read_or_refused_in_words(content: bytes, ending: str) -> None:
    read(content, f"table{ending}")


@given(TEXTS, st.sampled_from(ENDINGS))
def test_any_text_is_read_or_refused_in_words(text: str, ending: str) -> None:
    read(text.encode("utf-8", "surrogatepass"), f"table{ending}")


@given(st.data())
def test_a_damaged_table_is_read_or_refused_in_words(data: st.DataObject) -> None:
    """Some bytes of a good table are changed, left out or written twice."""
    rows = [{"input": "Why?", "output": "So."}, {"input": "What is 5 %?", "output": "é\n中"}]
    ending, content = data.draw(st.sampled_from(sorted(written(rows).items())))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(start, min(len(content), start + 8)))
        content = content[:start] + data.draw(st.binary(max_size=8)) + content[end:]
    read(content, f"table.{ending}")


@given(st.lists(st.fixed_dictionaries({"input": PLAIN, "output": PLAIN}), min_size=1, max_size=4))
def test_a_table_is_the_same_in_every_format(rows: list[dict[str, str]]) -> None:
    """Of CSV, a line's end within a text is what the file has; a row of empty texts is no empty line."""
    for ending, content in written(rows).items():
        assert parse(content, f"table.{ending}") == rows, ending


@given(
    st.lists(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4), min_size=1, max_size=4),
    st.sampled_from(("columns", "messages", "auto")),
)
def test_every_row_is_a_record_or_counted(rows: list[dict[str, Any]], shape: str) -> None:
    """A conversation makes one record with `turns: last`."""
    path = ROOT / "recipes/demo.yaml"
    fetch = YAML(typ="safe").load(path.read_text())["fetch"]
    fetch |= {"columns": fetch["columns"] | {"result": None, "kind": None, "split": None}}
    chosen = {key: value for key, value in fetch.items() if key in Source.model_fields}
    params = Source.model_validate(chosen | {"shape": shape} | {"source": "table.json"})
    try:
        columns = recognise(dict.fromkeys(name for row in rows for name in row), params)
        records, dropped = select_records(rows, columns, "Answer.", "drop", "table.json")
    except RecordError as error:
        assert 0 < len(str(error)) < 1000
        return
    assert len(records) + sum(dropped.values()) == len(rows)
    for record in records:
        assert all(isinstance(record[name], str) for name in ("instruction", "input", "output"))
        assert record["input"].strip() and record["output"].strip()


@given(TEXTS)
def test_spellings_of_a_question_are_one(text: str) -> None:
    """Canonically equal characters, and more white space where there is some."""
    question = normalize_question(text)
    assert question
    for form in ("NFC", "NFD"):
        assert normalize_question(unicodedata.normalize(form, text)) == question
    assert normalize_question(f"\n{text.replace(' ', '  ')} ") == question


COMMON = st.text("abcDEFn0159 .,?!-/()'\"%$&_\t\n\x1c", max_size=16)


@given(st.lists(COMMON | TEXTS, max_size=8), st.integers(0, 3))
@example(["Left out", " Why,  then:\x1cso-so?! ", "?", "1.5 a", "a -b", "It's 9"], 1)
def test_a_column_is_normalised_as_each_text_is(texts: list[str], begin: int) -> None:
    column = pa.array(texts, pa.string()).slice(begin)
    assert normalized(column).to_pylist() == list(map(normalize_question, texts[begin:]))


ANSWERS = (
    st.sampled_from(("So it is.", "Yes", "nan", "none  .", "null ", "", "5", "é is so")) | TEXTS
)
ROW = st.fixed_dictionaries(dict.fromkeys(COLUMNS, ANSWERS), optional={"more": st.none() | TEXTS})
LACKING = st.dictionaries(st.sampled_from(COLUMNS), ANSWERS | st.none(), max_size=3)


@given(st.lists(ROW | LACKING, min_size=1, max_size=6), st.booleans())
@example(
    [dict.fromkeys(COLUMNS, text) for text in ("nan", "A bond.", "null ", "A loan.", "none ")], True
)
def test_columns_are_selected_as_the_rows_are_one_by_one(
    rows: list[dict[str, Any]], own: bool
) -> None:
    columns = dict.fromkeys(COLUMNS) | {name: name for name in COLUMNS[not own :]}
    rules = Rules(columns, "Answer.", "drop", "made.jsonl")
    content = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    piece = Piece(content, 1)
    table = columns_in(piece, set(filter(None, columns.values())))
    assert table is not None
    (told, records), (expected, given) = (
        select_columns(table, rules),
        select_rows(rows_in(piece), rules),
    )
    assert records.equals(given)
    told.names = expected.names = {}  # a column that no row has is a column
    assert told == expected


@pytest.mark.parametrize(
    "lines",
    [
        b'{"input": 5}',
        b'{"input": "a", "input": "b"}',
        b'{"input": "a", "x": "b", "x": "c"}',
        b'{"input":\n"a"}\n{"input": "b"}{"input": "c"}',
        b'{"input": "a"}{"input": "b"}',
        b'{"input": "\\ud800"}',
        b'{"input": "a\tb"}',
        b'{"input": "a"} x',
        b'{"input": "a", "x": ' + b"[" * 10**6,
        b'{"input": "a", "x": ' + b'{"x": ' * 10**5 + b"1" + b"}" * 10**5 + b"}",
    ],
)
def test_lines_that_arrow_might_read_otherwise_are_left_to_python(lines: bytes) -> None:
    assert columns_in(Piece(lines, 1), {"input"}) is None


@given(TEXTS, TEXTS, TEXTS)
def test_a_text_makes_no_special_token(
    tokenizer: Any, instruction: str, question: str, answer: str
) -> None:
    """But the prompt's own: the beginning, and the end of the answer, which alone is learned."""
    prompt = render_prompt(instruction, question)
    asked, answered = encode(tokenizer, prompt, render_completion(answer))
    ids = [*asked, *answered]
    framing = render_prompt("", ""), render_completion("")
    plain = [*encode(tokenizer, *framing)[0], *encode(tokenizer, *framing)[1]]
    special = set(tokenizer.all_special_ids) | {
        tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS
    }
    if not any(
        token in text for text in (instruction, question, answer) for token in SPECIAL_TOKENS
    ):
        assert [i for i in ids if i in special] == [i for i in plain if i in special]


@given(TEXTS, TEXTS, TEXTS, st.integers(1, 80), st.sampled_from(("truncate", "drop")))
def test_a_formatted_row_fits(
    tokenizer: Any, instruction: str, question: str, answer: str, room: int, overlong: Any
) -> None:
    row = {"instruction": instruction, "input": question, "output": answer}
    found, event = format_row(tokenizer, row, room, overlong)
    if found is None:
        assert event
        return
    asked, answered = encode(tokenizer, found["prompt"], found["completion"])
    assert len(asked) + len(answered) == found["tokens"] <= room
    assert answered[-1] == tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS[-1])
    assert found["completion"].removesuffix(render_completion("")) in answer


@given(
    st.lists(st.tuples(PLAIN, PLAIN, st.sampled_from(("", "1", "2"))), min_size=8, max_size=30),
    st.randoms(use_true_random=False),
)
def test_a_split_loses_no_row_and_shares_no_question(
    texts: list[tuple[str, str, str]], order: Any
) -> None:
    params = Split(
        seed=3, validation_fraction=0.2, test_fraction=0.3, near_duplicate_similarity=0.7
    )
    rows = [{"instruction": c, "input": a or "?", "output": b} for a, b, c in texts]
    try:
        splits, left_out, _ = split_rows(rows, params)
    except UserError as error:
        assert "would be empty" in str(error)
        return
    assert sum(map(len, splits.values())) + sum(left_out.values()) == len(rows)
    asked = [{normalize_question(row["input"]) for row in part} for part in splits.values()]
    assert sum(map(len, asked)) == len(set().union(*asked))
    order.shuffle(rows)
    assert split_rows(rows, params)[0] == splits


@given(st.data())
def test_any_params_are_taken_or_refused_in_words(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """A key is taken away, written wrong, or has another value; each problem is one line."""
    path = tmp_path_factory.getbasetemp() / "params.yaml"
    params = copy.deepcopy(DEMO)
    for _ in range(data.draw(st.integers(1, 3))):
        section = params
        while True:
            key = data.draw(st.sampled_from(sorted(section)))
            if not isinstance(section[key], dict) or not section[key] or data.draw(st.booleans()):
                break
            section = section[key]
        change = data.draw(st.sampled_from(("leave out", "rename", "replace")))
        value = section.pop(key)
        if change == "rename":
            section[data.draw(NAMED)] = value
        elif change == "replace":
            section[key] = data.draw(st.sampled_from((0, -1, 1e308, "auto", [], {})) | VALUES_YAML)
        if not section:
            break
    with path.open("w") as file:
        YAML(typ="safe").dump(params, file)
    try:
        read_params(path)
    except UserError as error:
        lines = str(error).splitlines()
        assert len(lines) > 1 and all(len(line) < 2000 for line in lines)


DEMO = YAML(typ="safe").load((ROOT / "recipes/demo.yaml").read_text())
NAMED = st.text("abcdefghij_ .%-", min_size=1, max_size=8)
VALUES_YAML = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("ab/:?@%. -", max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMED, inner, max_size=3),
    max_leaves=6,
)
