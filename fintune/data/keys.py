"""Keys of rows: hashes by which rows are equal, in order, or joined; they are kept in files."""

import json
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fintune.data.parts import made_once
from fintune.data.prompt import render_prompt
from fintune.data.questions import normalize_question, normalized
from fintune.data.records import hash_of, hashes_of
from fintune.data.stream import batches, in_threads
from fintune.data.tables import COLUMNS, SPLITS

NEXT = "\nInput: "  # within an instruction or an input, two rows can have one prompt
HASHES = ("order", "row", "row_too", "leader", "side", "asked", "prompt", "group")
OTHERS = {"given": pa.int8(), "assigned": pa.int8()}
SCHEMA = pa.schema({**dict.fromkeys(HASHES, pa.uint64()), **OTHERS, "text": pa.string()}.items())
GROUPS_KEPT = 8  # row groups of a part
Numbers = NDArray[Any]


class Keys:
    """Keys of a table's rows, and the texts by which questions are compared, in files."""

    def __init__(self, files: list[Path], rows: int) -> None:
        self.files, self.rows = files, rows

    def _batches(self) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Yield all batches, and the number of rows before each; they are valid until the next."""
        begin = 0
        for path in self.files:
            with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
                for batch in stream:
                    yield begin, batch
                    begin += batch.num_rows

    def __getitem__(self, name: str) -> Numbers:
        """Return a key of all rows."""
        found = np.zeros(self.rows, SCHEMA.field(name).type.to_pandas_dtype())
        for begin, batch in self._batches():
            values = batch.column(name).to_numpy()
            if values.any():  # else no memory is taken
                found[begin : begin + len(values)] = values
        return found

    def texts(self, rows: Numbers) -> Iterator[pa.Array]:
        """Yield the texts of some rows, in ascending order."""
        for begin, batch in self._batches():
            low, high = np.searchsorted(rows, (begin, begin + batch.num_rows))
            yield batch.column("text").take(pa.array(rows[low:high] - begin))


def read_keys(file: pq.ParquetFile, seed: int, folder: Path, is_kept: bool) -> Keys:
    """Write the keys of a table's rows to files in a folder; those that are there are done."""
    present = [
        name for name in (*COLUMNS, "split", "group", "turns") if name in file.schema_arrow.names
    ]
    files, count = [], file.num_row_groups
    size = GROUPS_KEPT if is_kept else count
    for begin in range(0, count, size):
        files.append(folder / f"keys-{begin}.arrow")
        if not files[-1].is_file():
            groups = range(begin, min(count, begin + size))
            found = in_threads(
                partial(keys_of, seed=seed), batches(file, present, "split: hash", groups=groups)
            )
            made = ((keys, dict[str, Any]()) for keys in found)
            deque(made_once(files[-1], SCHEMA, made, None, is_kept), maxlen=0)
    return Keys(files, file.metadata.num_rows)


def keys_of(batch: pa.RecordBatch, seed: int) -> pa.RecordBatch:
    """Return hashes of each row: what makes two rows equal, or their questions, or joins them; 0 is none.

    Conversations are compared by what the user said: the answers of one assistant, and a transcript's
    labels, are alike.
    """
    instructions, inputs, outputs = (batch.column(name) for name in COLUMNS)
    question = compared = normalized(inputs)
    found: dict[str, Numbers] = {key: np.zeros(len(batch), np.uint64) for key in HASHES}
    found |= {key: np.zeros(len(batch), np.int8) for key in OTHERS}
    for key, name in (("order", f"order {seed}"), ("leader", "leader"), ("side", f"side {seed}")):
        found[key] = hashes_of(name, question)[:, 0]
    whole = pc.binary_join_element_wise(instructions, inputs, outputs, "\0")
    found["row"], found["row_too"] = hashes_of("row", whole, words=2).T
    several = pc.or_(pc.match_substring(instructions, NEXT), pc.match_substring(inputs, NEXT))
    for i in np.flatnonzero(several):  # no other row has the prompt of the others
        prompt = render_prompt(instructions[i].as_py(), inputs[i].as_py())
        found["prompt"][i] = hash_of("prompt", prompt)
    optional = {name: batch.column(name) for name in batch.schema.names if name not in COLUMNS}
    if "turns" in optional:
        turns = optional["turns"]
        has_turns = pc.greater(pc.fill_null(pc.binary_length(turns), 0), 0)
        said = pa.array(map(_said, turns.filter(has_turns).to_pylist()), pa.string())
        compared = pc.replace_with_mask(question, has_turns, said)
        found["asked"][has_turns] = hashes_of("asked", said)[:, 0]
    if "group" in optional:
        has_group = pc.greater(pc.fill_null(pc.binary_length(optional["group"]), 0), 0)
        found["group"][has_group] = hashes_of("group", optional["group"].filter(has_group))[:, 0]
    if "split" in optional:
        given = [SPLITS.index(name or "train") for name in optional["split"].to_pylist()]
        found["given"] = np.array(given, np.int8)
        found["assigned"] = pc.is_valid(optional["split"]).to_numpy(False).astype(np.int8)
    return pa.record_batch([*found.values(), compared], schema=SCHEMA)


def _said(turns: str) -> str:
    """Return the normalised text of what the user said."""
    return normalize_question("\n".join(text for role, text in json.loads(turns) if role == "user"))
