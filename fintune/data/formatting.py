"""Format rows: render prompt and completion, and fit them to the token limit."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fintune.data.chat import WAY_OUT, Refused
from fintune.data.parts import made_once
from fintune.data.prompt import (
    SPECIAL_TOKENS,
    Tokenizer,
    encode_text,
    has_own_template,
    render_row,
)
from fintune.data.records import counted, warn_of_dropped
from fintune.data.stream import batches, in_threads, open_rows, ordered, writer
from fintune.data.tables import COLUMNS, LISTED
from fintune.data.tokens import count_tokens, describe_tokens, read_whole
from fintune.data.unpacking import Row
from fintune.data.words import sentence_ends, word_ends
from fintune.errors import UserError, brief
from fintune.params import Format

LONGEST_WORD = 40  # characters
# Characters of a text that are read, and at least so many for each token of max_tokens: what is beyond would
# not fit, as no token but white space is as long. Tokenizing 10 MB takes gigabytes.
READ, READ_A_TOKEN = 100_000, 64
AT_ONCE = 2_048  # rows
ADDED = ("prompt", "completion", "tokens")

# a dropped row: its number from 1, the reason, the beginning of its question
Lost = tuple[int, str, str]


def schema_of(given: pa.Schema) -> pa.Schema:
    """Return the columns of formatted rows and their types; `result` and `kind` only where rows have them."""
    optional = [name for name in ("result", "kind") if name in given.names]
    texts = (*COLUMNS, *optional, "prompt", "completion")
    return pa.schema([*((name, pa.string()) for name in texts), ("tokens", pa.int32())])


def format_row(
    tokenizer: Tokenizer,
    row: dict[str, str],
    max_tokens: int,
    overlong: Literal["truncate", "drop"],
) -> tuple[dict[str, Any] | None, str | None]:
    """Render a record and fit it to `max_tokens`.

    An answer that is too long is cut after its last whole sentence that fits, or after its last whole
    word if that would lose over half of the room. It keeps its end token, so the model does not learn
    answers that never stop.

    Returns:
        The record with `prompt`, `completion` and `tokens` (their total number) added, or None if the
        row is dropped; and the event: None, `truncated`, `too_long` (with overlong=drop),
        `prompt_too_long` (it leaves no room for a word of the answer), `no_word_end` (the answer begins with
        a string that is no word), or `special_token` (one of the three texts contains one of the prompt's
        special tokens).

    Raises:
        Refused: the base's chat template refuses the row, or changes its answer.
    """
    rendered, event = _render(tokenizer, row, max_tokens, overlong)
    if rendered is None:
        return None, event
    (counts,) = count_tokens(tokenizer, [rendered[:2]])
    fitted, event = _fit(tokenizer, row, rendered, counts, max_tokens, overlong)
    kept = {name: text for name, text in row.items() if name != "turns"}
    return kept | dict(zip(ADDED, fitted, strict=True)) if fitted else None, event


def _render(
    tokenizer: Tokenizer, row: Row, max_tokens: int, overlong: str, is_marked: bool = True
) -> tuple[tuple[str, str, str] | None, str | None]:
    """Return a row's prompt and completion, and as much of the answer as is read; or why it is dropped.

    Args:
        is_marked: whether a special token may be in its texts.
    """
    if is_marked and any(token in row[name] for name in COLUMNS for token in SPECIAL_TOKENS):
        return None, "special_token"
    read = max(READ, READ_A_TOKEN * max_tokens)
    if len(row["instruction"]) + len(row["input"]) > read:
        return None, "too_long" if overlong == "drop" else "prompt_too_long"
    whole = row["output"][:read]
    if len(whole) < len(row["output"]) and overlong == "drop":
        return None, "too_long"
    return (*render_row(tokenizer, row, whole), whole), None


def _fit(
    tokenizer: Tokenizer,
    row: Row,
    rendered: tuple[str, str, str],
    counts: tuple[int, int],
    max_tokens: int,
    overlong: str,
) -> tuple[tuple[str, str, int] | None, str | None]:
    """Return a row's prompt, completion and tokens, its answer cut if need be, or why it is dropped."""
    prompt, completion, whole = rendered
    happened = None
    room = max_tokens - counts[0] - 1  # one for the end token
    while (over := sum(counts) - max_tokens) > 0:
        if overlong == "drop":
            return None, "too_long"
        room -= over if happened else 0  # a template's white space takes some of it
        answer = _cut(tokenizer, whole, room)
        if not answer:
            ends = word_ends(whole, LONGEST_WORD + 1)
            return None, "prompt_too_long" if room < 1 or ends else "no_word_end"
        happened = "truncated"
        prompt, completion = render_row(tokenizer, row, answer)
        (counts,) = count_tokens(tokenizer, [(prompt, completion)])
    return (prompt, completion, sum(counts)), happened


def _cut(tokenizer: Tokenizer, text: str, room: int) -> str:
    """Return the longest prefix of whole sentences, or else of whole words, that fits `room` tokens."""
    if room < 1:
        return ""
    encoded = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
    )
    head = text[: encoded["offset_mapping"][:room][-1][1]]
    sentences = [end for end in sentence_ends(head) if end > len(head) / 2]
    # A prefix encoded alone can take one token more than within the text.
    for ends in (lambda: sentences, lambda: word_ends(text, len(head))):
        for end in reversed(ends()):
            if len(encode_text(tokenizer, head[:end])) <= room:
                return head[:end]
    return ""


class Formatted(NamedTuple):
    """A batch of formatted rows, and what became of the others."""

    rows: pa.RecordBatch
    events: Counter[str]
    lost: list[Lost]  # number in the batch, reason, beginning of its question
    reason: str  # a chat template's, for refusing a row


def format_batch(batch: pa.RecordBatch, tokenizer: Tokenizer, params: Format) -> Formatted:
    """Format some rows; their tokens are counted together."""
    rows, rendered, reason = batch.to_pylist(), [], ""
    is_marked = any(
        pc.any(pc.match_substring(batch.column(name), token)).as_py()
        for name in COLUMNS
        for token in SPECIAL_TOKENS
    )
    for row in rows:
        try:
            rendered.append(_render(tokenizer, row, params.max_tokens, params.overlong, is_marked))
        except Refused as refused:
            rendered.append((None, "template"))
            reason = str(refused)
    counts = iter(count_tokens(tokenizer, [texts[:2] for texts, _ in rendered if texts]))
    found, kept, events, lost = (
        list[tuple[str, str, int]](),
        list[int](),
        Counter[str](),
        list[Lost](),
    )
    for number, (row, (texts, event)) in enumerate(zip(rows, rendered, strict=True)):
        fitted = None
        if texts:
            try:
                fitted, event = _fit(
                    tokenizer, row, texts, next(counts), params.max_tokens, params.overlong
                )
            except Refused as refused:
                event, reason = "template", str(refused)
        if event:
            events[event] += 1
        if fitted:
            found.append(fitted)
            kept.append(number)
        else:
            lost.append((number + 1, str(event), brief(row["input"], 100)))
    schema = schema_of(batch.schema)
    given = batch if len(kept) == len(rows) else batch.take(pa.array(kept, pa.int32()))
    added = list(zip(*found, strict=True)) or [(), (), ()]
    columns = [
        pa.array(added[ADDED.index(name)], type_) if name in ADDED else given.column(name)
        for name, type_ in zip(schema.names, schema.types, strict=True)
    ]
    return Formatted(pa.record_batch(columns, schema=schema), events, lost, reason)


def format_rows(
    tokenizer: Tokenizer,
    source: Path,
    target: Path,
    params: Format,
    split: str,
    kept_in: Path | None = None,
) -> tuple[dict[str, Any], list[Lost]]:
    """Format the rows of one split, from one table to another.

    Args:
        kept_in: a folder where each row group that is done is kept, and read if it is there.

    Returns:
        The token counts of the rows that fit, with the rows truncated and dropped, by reason; and the first
        of those that were dropped: number, reason and beginning.

    Raises:
        UserError: no row is left.
    """
    file = open_rows(source, COLUMNS)
    count = file.metadata.num_rows
    events, lost, reason, begin = Counter[str](), list[Lost](), "", 0
    tokens = [np.empty(0, np.int32)]
    work = partial(format_batch, tokenizer=tokenizer, params=params)
    # the tokenizer's own work needs no process of its own, a chat template's does
    each = partial(ordered if has_own_template(tokenizer) else in_threads, work)
    read_whole(tokenizer.backend_tokenizer)
    with writer(target, schema_of(file.schema_arrow)) as write:
        for done in _formatted(file, each, f"format {split}", kept_in and kept_in / split):
            write(pa.Table.from_batches([done.rows]))
            tokens.append(done.rows.column("tokens").to_numpy())
            events += done.events
            lost += [(begin + number, event, text) for number, event, text in done.lost]
            del lost[LISTED:]
            begin += done.rows.num_rows + len(done.lost)
            reason = done.reason or reason
        kept = np.concatenate(tokens)
        _check_kept(len(kept), count, events, reason, params, split)
    examples = (
        f"{brief(text, 60)!r} "
        + (
            f"fails: the base's chat template {reason}"
            if event == "template"
            else f"is {event.replace('_', ' ')}"
        )
        for _, event, text in lost
    )
    warn_of_dropped(f"format {split}", count - len(kept), examples, count)
    report = describe_tokens(kept)
    report |= {"rows_truncated": events.pop("truncated", 0), "rows_dropped": count - len(kept)}
    return report | {"dropped": dict(sorted(events.items()))}, lost


def _formatted(
    file: pq.ParquetFile,
    each: Callable[[Iterable[pa.RecordBatch]], Iterator[Formatted]],
    shown: str,
    kept: Path | None,
) -> Iterator[Formatted]:
    """Yield all batches, formatted; those of row groups that were kept are read."""
    if kept is None:
        yield from each(batches(file, None, shown, AT_ONCE))
        return
    count = file.num_row_groups
    for group in range(count):
        done = each(batches(file, None, f"{shown} {group + 1}/{count}", AT_ONCE, [group]))
        made = (
            (one.rows, {"events": one.events, "lost": one.lost, "reason": one.reason})
            for one in done
        )
        path = kept.with_name(f"{kept.name}-{group}.arrow")
        for rows, told in made_once(path, schema_of(file.schema_arrow), made):
            lost = [(number, event, text) for number, event, text in told["lost"]]
            yield Formatted(rows, Counter(told["events"]), lost, told["reason"])


def _check_kept(
    kept: int, count: int, events: Counter[str], reason: str, params: Format, split: str
) -> None:
    if not kept and set(events) <= {"too_long", "prompt_too_long"}:
        raise UserError(
            f"format: no {split} row fits into format.max_tokens: {params.max_tokens}; raise it"
        )
    if not kept and set(events) == {"template"}:
        raise UserError(
            f"format: no {split} row is left of {count}: the base's chat template {reason}; {WAY_OUT}"
        )
    if not kept:
        raise UserError(
            f"format: no {split} row is left of {count}; dropped: {counted(events)}; special_token: a "
            f"text holds {' or '.join(SPECIAL_TOKENS)}, which frame the answer; mend the source"
        )
