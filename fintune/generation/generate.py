"""Generate answers, with the fused layers or with transformers' own loop."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from fintune.generation.decoding import Decoding
from fintune.generation.slots import FEWEST_ROWS, MOST_ROWS, generate_with_slots
from fintune.model.batch import batches_by_length
from fintune.model.fused.model import unsupported

log = logging.getLogger("fintune")


@dataclass(frozen=True)
class Answer:
    """A generated answer without its end token; `stopped` is true if it ended with the trained end token."""

    text: str
    tokens: int
    stopped: bool


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    decoding: Decoding,
    title: str,
    rows_at_once: int | str = "auto",
    kernels: str = "auto",
) -> list[Answer]:
    """Generate an answer to each prompt, up to the end token.

    The base's own end-of-text token also ends an answer, but does not count as stopped. Greedy answers are
    independent of each other; sampled ones are drawn together, and are reproducible for the same prompts,
    settings and hardware.

    Args:
        title: of the progress bar.
        rows_at_once: maximum batch size; `auto` takes as many as memory allows, up to a few hundred.
        kernels: `fused`, `plain` (transformers' own loop) or `auto`, as for training.

    Returns:
        One answer per prompt, in the order of the prompts.
    """
    model.eval()
    ends = end_tokens(tokenizer, decoding.end_id)
    torch.manual_seed(decoding.seed)
    plain = kernels == "plain" or (kernels == "auto" and unsupported(model) is not None)
    loop = _generate_with_transformers if plain else generate_with_slots
    tokens: dict[int, list[int]] = {}
    with tqdm(total=len(prompts), desc=title, unit="answer", leave=False) as bar:

        def finish(i: int, new: list[int]) -> None:
            tokens[i] = new
            bar.update()

        rows = rows_at_once
        while len(tokens) < len(prompts):
            left = [(i, prompt) for i, prompt in enumerate(prompts) if i not in tokens]
            try:
                loop(model, left, ends, decoding, rows, finish)
            except torch.OutOfMemoryError:
                tried = MOST_ROWS["cuda"] if rows == "auto" else int(rows)
                rows = min(tried, len(left)) // 2
                if not rows:
                    raise
                log.warning("warning: out of memory; going on with %d answers at once", rows)
                torch.cuda.empty_cache()
    return [to_answer(tokenizer, tokens[i], decoding.end_id) for i in range(len(prompts))]


def end_tokens(tokenizer: Any, end_id: int) -> list[int]:
    """Return the tokens that end an answer: the trained end token, then the base's own."""
    return [end_id] + [tokenizer.eos_token_id] * (tokenizer.eos_token_id not in (None, end_id))


def to_answer(tokenizer: Any, new: Sequence[int], end_id: int) -> Answer:
    """Decode generated tokens up to the first end token."""
    ends = end_tokens(tokenizer, end_id)
    length = next((k for k, token in enumerate(new) if token in ends), len(new))
    text = tokenizer.decode(new[:length], skip_special_tokens=True).strip()
    return Answer(text, length, stopped=length < len(new) and new[length] == end_id)


@torch.no_grad()
def _generate_with_transformers(
    model: Any,
    prompts: Sequence[tuple[int, list[int]]],
    ends: list[int],
    decoding: Decoding,
    rows: int | str,
    finish: Callable[[int, list[int]], None],
) -> None:
    """Generate in batches padded on the left, longest first; a batch runs until its last answer ends."""
    options: dict[str, Any] = {
        "do_sample": False,
        "temperature": None,
        "top_p": None,
        "top_k": None,
    }
    if not decoding.is_greedy:
        options = {"do_sample": True, "top_k": 0}
        options |= {"temperature": decoding.temperature, "top_p": decoding.top_p}
    at_once = FEWEST_ROWS if rows == "auto" else int(rows)
    for batch in batches_by_length([len(p) for _, p in prompts], 2**31, at_once):
        width = len(prompts[batch[0]][1])
        pads = [width - len(prompts[k][1]) for k in batch]
        ids = torch.tensor([[0] * pad + prompts[k][1] for pad, k in zip(pads, batch, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads])
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=decoding.max_new_tokens,
            eos_token_id=ends,
            pad_token_id=ends[0],
            use_cache=True,
            **options,
        )[:, width:].tolist()
        for k, new in zip(batch, output, strict=True):
            finish(prompts[k][0], new)
