"""Counts of tokens: of many rows at once, and their summary."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fintune.data.prompt import (
    RESPONSE,
    RESPONSE_END,
    Tokenizer,
    encode,
    end_token_id,
    has_own_template,
    prompt_token_ids,
)
from fintune.data.records import counted


def count_tokens(tokenizer: Tokenizer, rows: Sequence[tuple[str, str]]) -> list[tuple[int, int]]:
    """Return how many tokens `encode` makes of the prompt and completion of each row, many at once.

    Raises:
        Refused: the base's tokenizer makes a special token of a text.
    """
    if has_own_template(tokenizer):
        return [(len(one), len(other)) for one, other in (encode(tokenizer, *row) for row in rows)]
    return [
        (kept + len(opening), len(answer) + len(end))
        for _, kept, opening, answer, end in _encoded(tokenizer, rows)
    ]


def encode_rows(
    tokenizer: Tokenizer, rows: Sequence[tuple[str, str]]
) -> list[tuple[list[int], list[int]]]:
    """Encode the prompt and completion of each row as `encode` does, many at once.

    Raises:
        Refused: the base's tokenizer makes a special token of a text.
    """
    if has_own_template(tokenizer):
        return [encode(tokenizer, *row) for row in rows]
    return [
        (prompt.ids[:kept] + opening, answer.ids + end)
        for prompt, kept, opening, answer, end in _encoded(tokenizer, rows)
    ]


def _encoded(
    tokenizer: Tokenizer, rows: Sequence[tuple[str, str]]
) -> Iterator[tuple[Any, int, list[int], Any, list[int]]]:
    """Yield a prompt's encoding, how many of its tokens count, what follows them; the answer's, its end."""
    backend = tokenizer.backend_tokenizer
    read_whole(backend)
    opening, end = prompt_token_ids(tokenizer)[:1], [end_token_id(tokenizer)]
    prompts = list(
        dict.fromkeys(prompt for prompt, _ in rows)
    )  # a question often has several answers
    bodies = [prompt.removesuffix(RESPONSE) if opening else prompt for prompt in prompts]
    added = backend.encode("a").special_tokens_mask
    appended = next((i for i, is_added in enumerate(reversed(added)) if not is_added), len(added))
    encoded = dict(zip(prompts, backend.encode_batch_fast(bodies), strict=True))
    answers = [completion.removesuffix(RESPONSE_END) for _, completion in rows]
    encoded_answers = backend.encode_batch_fast(answers, add_special_tokens=False)
    for (prompt, completion), text, answer in zip(rows, answers, encoded_answers, strict=True):
        ends = end * (text != completion)
        kept = len(encoded[prompt]) - appended
        yield encoded[prompt], kept, opening * prompt.endswith(RESPONSE), answer, ends


def read_whole(backend: Any) -> None:
    """Let a tokenizer read special tokens as text, and texts to their end; unless it does: threads use it."""
    if backend.truncation or backend.padding or not backend.encode_special_tokens:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True


def describe_tokens(tokens: NDArray[np.int32]) -> dict[str, float]:
    """Summarise token counts: rows, total, p50, p95, p99 and max."""
    if not len(tokens):
        return {"rows": 0, "tokens": 0}
    p50, p95, p99 = (float(q) for q in np.percentile(tokens, [50, 95, 99]))
    return {
        "rows": len(tokens),
        "tokens": int(tokens.sum(dtype=np.int64)),
        "p50": p50,
        "p95": p95,
        "p99": p99,
        "max": int(tokens.max()),
    }


def tokens_told(report: dict[str, Any]) -> str:
    """Write a split's report as a sentence."""
    if not report["rows"]:
        return f"no row is left; dropped: {counted(report['dropped'])}"
    return (
        f"{report['rows']:,} rows of {report['tokens']:,} tokens; half have up to {report['p50']:.0f}, "
        f"95 % up to {report['p95']:.0f}, the longest {report['max']:,}; {report['rows_truncated']:,} cut, "
        f"dropped: {counted(report['dropped'])}"
    )
