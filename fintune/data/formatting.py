"""Format rows: render prompt and completion, and fit them to the token limit."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import pyarrow as pa
from tqdm.auto import tqdm

from fintune.data.chat import WAY_OUT, Refused
from fintune.data.parsing import Row
from fintune.data.prompt import (
    SPECIAL_TOKENS,
    Tokenizer,
    encode,
    encode_text,
    render_row,
)
from fintune.data.records import warn_of_dropped
from fintune.data.tables import COLUMNS, optional_columns
from fintune.data.words import sentence_ends, word_ends
from fintune.errors import UserError, brief
from fintune.params import Format

LONGEST_WORD = 40  # characters
# Characters of a text that are read, and at least so many for each token of max_tokens: what is beyond would
# not fit, as no token but white space is as long. Tokenizing 10 MB takes gigabytes.
READ, READ_A_TOKEN = 100_000, 64


def schema_of(rows: list[Row]) -> dict[str, pa.DataType]:
    """Return the columns of formatted rows and their types; `result` and `kind` only where rows have them."""
    optional = [name for name in optional_columns(rows) if name not in ("split", "group", "turns")]
    texts = (*COLUMNS, *optional, "prompt", "completion")
    return {**dict.fromkeys(texts, pa.string()), "tokens": pa.int32()}


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
    if any(token in row[column] for column in COLUMNS for token in SPECIAL_TOKENS):
        return None, "special_token"
    read = max(READ, READ_A_TOKEN * max_tokens)
    if len(row["instruction"]) + len(row["input"]) > read:
        return None, "too_long" if overlong == "drop" else "prompt_too_long"
    whole = row["output"][:read]
    if len(whole) < len(row["output"]) and overlong == "drop":
        return None, "too_long"
    prompt, completion = render_row(tokenizer, row, whole)
    prompt_ids, completion_ids = encode(tokenizer, prompt, completion)
    happened = None
    room = max_tokens - len(prompt_ids) - 1  # one for the end token
    while (over := len(prompt_ids) + len(completion_ids) - max_tokens) > 0:
        if overlong == "drop":
            return None, "too_long"
        room -= over if happened else 0  # a template's white space takes some of it
        answer = _cut(tokenizer, whole, room)
        if not answer:
            ends = word_ends(whole, LONGEST_WORD + 1)
            return None, "prompt_too_long" if room < 1 or ends else "no_word_end"
        happened = "truncated"
        prompt, completion = render_row(tokenizer, row, answer)
        prompt_ids, completion_ids = encode(tokenizer, prompt, completion)
    formatted = {
        **{name: text for name, text in row.items() if name != "turns"},
        "prompt": prompt,
        "completion": completion,
        "tokens": len(prompt_ids) + len(completion_ids),
    }
    return formatted, happened


def _cut(tokenizer: Tokenizer, text: str, room: int) -> str:
    """Return the longest prefix of whole sentences, or else of whole words, that fits `room` tokens."""
    if room < 1:
        return ""
    encoded = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
    )
    head = text[: encoded["offset_mapping"][:room][-1][1]]
    sentences = [end for end in sentence_ends(head) if end > len(head) / 2]
    for end in [*reversed(sentences), *reversed(word_ends(text, len(head)))]:
        # A prefix encoded alone can take one token more than within the text.
        if len(encode_text(tokenizer, head[:end])) <= room:
            return head[:end]
    return ""


def format_rows(
    tokenizer: Tokenizer, rows: list[Row], params: Format, split: str
) -> tuple[list[Row], dict[str, Any]]:
    """Format the rows of one split.

    Returns:
        The rows that fit; and their token counts, with the rows truncated and dropped, by reason.

    Raises:
        UserError: no row is left.
    """
    kept, events, examples, reason = [], Counter[str](), [], ""
    for row in tqdm(rows, desc=f"format {split}", unit="row", leave=False):
        try:
            formatted, event = format_row(tokenizer, row, params.max_tokens, params.overlong)
        except Refused as refused:
            formatted, event, reason = None, "template", str(refused)
        if formatted:
            kept.append(formatted)
        if event:
            events[event] += 1
        if not formatted:
            said = f"is {str(event).replace('_', ' ')}"
            said = f"fails: the base's chat template {reason}" if event == "template" else said
            examples.append(f"{brief(row['input'], 60)!r} {said}")
    warn_of_dropped(f"format {split}", examples, len(rows))
    if not kept and set(events) <= {"too_long", "prompt_too_long"}:
        raise UserError(
            f"format: no {split} row fits into format.max_tokens: {params.max_tokens}; raise it"
        )
    if not kept and set(events) == {"template"}:
        raise UserError(
            f"format: no {split} row is left of {len(rows)}: the base's chat template {reason}; {WAY_OUT}"
        )
    if not kept:
        raise UserError(
            f"format: no {split} row is left of {len(rows)}; dropped: {dict(events)}; special_token: a "
            f"text holds {' or '.join(SPECIAL_TOKENS)}, which frame the answer; mend the source"
        )
    truncated = events.pop("truncated", 0)
    return kept, {
        **describe_tokens([row["tokens"] for row in kept]),
        "rows_truncated": truncated,
        "rows_dropped": len(rows) - len(kept),
        "dropped": dict(sorted(events.items())),
    }


def describe_tokens(tokens: Sequence[int]) -> dict[str, float]:
    """Summarise token counts: rows, total, p50, p95, p99 and max."""
    import numpy as np

    if not tokens:
        return {"rows": 0, "tokens": 0}
    p50, p95, p99 = (float(q) for q in np.percentile(tokens, [50, 95, 99]))
    return {
        "rows": len(tokens),
        "tokens": sum(tokens),
        "p50": p50,
        "p95": p95,
        "p99": p99,
        "max": max(tokens),
    }
