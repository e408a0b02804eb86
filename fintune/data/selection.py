"""Records of a source's rows: mapped, and unusable ones dropped or refused."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fintune.data.parsing import names_of
from fintune.data.questions import normalize_question
from fintune.data.records import (
    fault_of,
    has_input,
    hash_of,
    optional_values,
    text_fault,
    to_text,
    warn_of_dropped,
)
from fintune.data.shapes import Columns, Unusable, rows_of
from fintune.data.tables import COLUMNS, LISTED, OPTIONAL
from fintune.data.unpacking import Row
from fintune.errors import RecordError, brief

log = logging.getLogger("fintune")

SOUND = r"(?s)^[A-Za-z].{3,}[!-~]$"  # shows, and is neither blank nor one of the short words for nothing
SCHEMA = pa.schema([(name, pa.string()) for name in (*COLUMNS, *OPTIONAL)])


class Rules(NamedTuple):
    """Rules by which a source's rows become records.

    `columns` are the source's names, as `fintune.data.shapes.recognise` returns them; `invalid_rows` drops
    unusable rows and counts them by reason, or refuses the source at the first; `source` is its name, for
    messages; `turns` says which answers of a conversation are learned; `not_alone` are hashes of instructions
    with which some row has an input.
    """

    columns: Columns
    default_instruction: str | None
    invalid_rows: Literal["drop", "refuse"]
    source: str
    turns: Literal["last", "all"] = "last"
    share: float = 1.0
    not_alone: frozenset[int] = frozenset()


@dataclass
class Selected:
    """Records of some rows, and what became of the others; `add` adds the rows that follow."""

    rows: int = 0  # of the source
    given: int = 0  # of these and the answers of conversations
    kept: int = 0
    moved: int = 0  # ask with their instruction
    dropped: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    examples: list[tuple[int, str]] = field(default_factory=list)  # a row's number and its fault
    names: dict[str, None] = field(default_factory=dict)  # of columns that rows have
    lost: list[tuple[int, str, str]] = field(default_factory=list)  # row, reason, its beginning
    present: set[str] = field(default_factory=set)  # optional columns of records
    asked: set[int] = field(default_factory=set)  # hashes of instructions of rows with an input
    alone: set[int] = field(default_factory=set)  # and of rows without one

    def add(self, other: "Selected") -> None:
        self.examples += [(self.rows + number, said) for number, said in other.examples]
        del self.examples[3:]
        self.lost += [(self.rows + number, why, text) for number, why, text in other.lost]
        del self.lost[LISTED:]
        for name in ("rows", "given", "kept", "moved"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("dropped", "faults", "names", "present", "asked", "alone"):
            getattr(self, name).update(getattr(other, name))

    def told(self) -> dict[str, Any]:
        """Return what JSON can hold of it."""
        values = ((each.name, getattr(self, each.name)) for each in fields(self))
        return {name: [*value] if isinstance(value, set) else value for name, value in values}

    @classmethod
    def of(cls, told: dict[str, Any]) -> "Selected":
        """Return what `told` was made of."""
        kinds = {name: type(value) for name, value in vars(cls()).items()}
        return cls(**{name: kinds[name](value) for name, value in told.items()})


def is_plain(rules: Rules) -> bool:
    """Return whether a row makes one record, of no more than instruction, input and output."""
    roles = {role for role, name in rules.columns.items() if name is not None}
    return roles <= set(COLUMNS) and {"input", "output"} <= roles and rules.share == 1


def select_columns(table: pa.Table, rules: Rules) -> tuple[Selected, pa.RecordBatch]:
    """Do as `select_records`, for the columns of a piece and plain rules.

    Rows whose texts need no second look, as nearly all do, are selected as columns.
    """
    named = {role: rules.columns[role] for role in COLUMNS if rules.columns.get(role)}
    missing = pa.nulls(len(table), pa.string())
    texts = {
        role: table[name].combine_chunks() if name in table.column_names else missing
        for role, name in named.items()
    }
    sound = np.ones(len(table), bool)
    for text in texts.values():
        sound &= pc.fill_null(pc.match_substring_regex(text, SOUND), False).to_numpy(False)
    count = int(sound.sum())
    told = Selected(names=dict.fromkeys(table.column_names), given=count, kept=count)
    told.present.update(COLUMNS if count else ())
    if "instruction" in texts:
        used = pc.unique(texts["instruction"].filter(pa.array(sound))).to_pylist()
        told.asked = {hash_of("instruction", instruction) for instruction in used}
    else:
        texts["instruction"] = pa.repeat(pa.scalar(rules.default_instruction or ""), len(table))
    columns = [texts.get(name, missing) for name in SCHEMA.names]
    records = pa.record_batch(columns, schema=SCHEMA).filter(pa.array(sound))
    numbers = np.flatnonzero(~sound)
    if len(numbers):
        rows = table.select(list(set(named.values()) & set(table.column_names))).take(
            pa.array(numbers)
        )
        others, kept = _select(rows.to_pylist(), rules, 0, (numbers + 1).tolist())
        told.add(others)
        every = pa.Table.from_batches([records, _batch_of([record for _, record in kept])])
        places = np.concatenate((np.flatnonzero(sound) + 1, [number for number, _ in kept]))
        every = every.take(pa.array(np.argsort(places, kind="stable")))
        records = every.combine_chunks().to_batches()[0] if len(every) else records
    told.rows = len(table)
    return told, records


def select_records(
    rows: list[Row], rules: Rules, begin: int = 0
) -> tuple[Selected, pa.RecordBatch]:
    """Map some of a source's rows to records, and drop or refuse the unusable ones.

    A row without an input asks with its instruction, if no row with an input has that instruction; its own
    is `default_instruction` then. Numbers, dates, true and false are taken as texts.

    Args:
        rows: their columns may differ.
        begin: the number of rows before them.

    Returns:
        What became of them, and the records, with all optional columns. Reasons for dropping a row:
        `missing` (null or absent), `not_text`, `empty` (nothing that shows), `literal_nan` (`nan`, `null` or,
        as a question, `none`, left by an earlier export), `lone_surrogate` (half a character),
        `beyond_share`, and of conversations `not_messages`, `unknown_role` and `no_answer`. An empty result
        or kind is None.

    Raises:
        RecordError: a row is unusable with `refuse`, a result or a kind is no text, or a split is not the
            name of one.
    """
    told, records = _select(rows, rules, begin, range(1, len(rows) + 1))
    told.rows, told.names = len(rows), dict.fromkeys(names_of(rows))
    return told, _batch_of([record for _, record in records])


def _batch_of(records: list[Row]) -> pa.RecordBatch:
    texts = [
        pa.array([record.get(name) for record in records], pa.string()) for name in SCHEMA.names
    ]
    return pa.record_batch(texts, schema=SCHEMA)


def _select(
    rows: list[Row], rules: Rules, begin: int, numbers: Iterable[int]
) -> tuple[Selected, list[tuple[int, Row]]]:
    """Return what became of rows of these numbers, and the number and record of each that is kept."""
    columns, told, records = rules.columns, Selected(), list[tuple[int, Row]]()
    hashes: dict[str, int] = {}
    has_instructions = columns.get("instruction") is not None
    for number, row, reason in _given(rows, columns, rules.turns, numbers):
        told.given += 1
        place = f"{rules.source} row {begin + number}"
        column = columns.get("messages") or ""
        record: Row = {}
        if not reason:
            record = {name: to_text(row.get(name)) for name in COLUMNS}
            alone = False
            if has_instructions:
                instruction, asks = str(row["instruction"]), has_input(row)
                if (of := hashes.get(instruction)) is None:
                    of = hashes[instruction] = hash_of("instruction", instruction)
                (told.asked if asks else told.alone).add(of)
                alone = not asks and of not in rules.not_alone
            elif not has_input(row):
                alone = True
            if has_instructions and alone and text_fault(record["instruction"]) is None:
                record |= {"instruction": None, "input": record["instruction"]}
                told.moved += 1
            elif has_instructions:
                alone = False
            checked: tuple[str, ...] = COLUMNS
            if record["instruction"] is None and (alone or not has_instructions):
                record["instruction"] = rules.default_instruction or ""
                checked = ("input", "output")
            for column in checked:
                if reason := fault_of(column, record[column]):
                    break
        if not reason:
            record |= optional_values(row, columns, place)
            told.present.update(record)
            if _is_taken(record, rules.share):
                records.append((number, record))
            else:
                told.dropped["beyond_share"] += 1
            continue
        shown = columns.get(column) or column
        said = f"{shown} is {reason.replace('_', ' ')}" if record else reason.replace("_", " ")
        value = f": {brief(repr(record[column]))}" if record else ""
        if rules.invalid_rows == "refuse":
            raise RecordError(
                f"{place}: {said}{value}; mend the source or set fetch.invalid_rows: drop"
            )
        told.dropped[reason] += 1
        if len(told.lost) < LISTED:
            told.lost.append((number, f"{shown or 'row'}: {reason}", _beginning(row)))
        told.faults[said] += 1
        if len(told.examples) < 3:
            told.examples.append((number, said))
    told.kept = len(records)
    return told, records


def _beginning(row: Row) -> str:
    """Return the beginning of what a row says."""
    said = (row.get(name) for name in ("input", "instruction", "output"))
    text = next((str(each) for each in said if each is not None and str(each).strip()), "")
    return brief(text, 100) if text else ""


def check_selected(told: Selected, source: str, hint: str) -> dict[str, int]:
    """Tell what became of a source's rows, and return the number dropped for each reason.

    Args:
        hint: what to set, where no row can be used.

    Raises:
        RecordError: there is no row, or none that can be used.
    """
    if not told.rows:
        raise RecordError(f"{source}: no rows")
    unusable = told.faults.total()
    if unusable == told.given:
        reasons = "; ".join(f"{reason} in {count}" for reason, count in told.faults.most_common())
        raise RecordError(f"{source}: none of its {told.rows} rows can be used: {reasons}{hint}")
    if told.moved:
        log.info("%s: %d rows have no input and ask with their instruction", source, told.moved)
    examples = (f"row {number}: {said}" for number, said in told.examples)
    warn_of_dropped(source, unusable, examples, told.given)
    return dict(sorted(told.dropped.items()))


def _is_taken(row: Row, share: float) -> bool:
    """Return whether a record is in the share, which depends on its question alone."""
    return share == 1 or hash_of(f"share {normalize_question(row['input'])}") / 2**64 < share


def _given(
    rows: list[Row], columns: Columns, turns: Literal["last", "all"], numbers: Iterable[int]
) -> Iterator[tuple[int, Row, str | None]]:
    """Yield the number of each source's row, what it says by role, and why that cannot be used."""
    for number, row in zip(numbers, rows, strict=True):
        try:
            for said in rows_of(row, columns, turns):
                yield number, {"instruction": None} | said, None
        except Unusable as unusable:
            yield number, {}, str(unusable)
