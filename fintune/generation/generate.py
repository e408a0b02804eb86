"""Generate answers, with the fused layers or with transformers' own loop."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LogitsProcessor, LogitsProcessorList

from fintune.data.prompt import end_tokens
from fintune.generation.decoding import Decoding, TokenDraw, table, uniforms
from fintune.generation.slots import FEWEST_ROWS, MOST_ROWS, Prompt, generate_with_slots
from fintune.model.batch import batches_by_length
from fintune.model.conformance import fused_differs
from fintune.processes import count, of_all, rank

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
    decoding: Decoding | Sequence[Decoding],
    title: str,
    rows_at_once: int | str = "auto",
    kernels: str = "auto",
    fp8: bool = False,
) -> list[Answer]:
    """Generate an answer to each prompt, up to the end token.

    The base's own end-of-text token also ends an answer, but does not count as stopped. Each answer depends
    on its prompt, the seed and how often the prompt came before, not on the other prompts or the batch. So
    the stage's processes share the prompts.

    Args:
        decoding: of all prompts, or of each; they may differ in their settings alone.
        title: of the progress bar.
        rows_at_once: maximum batch size; `auto` takes as many as memory allows, up to a few hundred.
        kernels: `fused`, `plain` (transformers' own loop) or `auto`, as for training.
        fp8: multiply by the base's 4-bit weights in FP8; the kernels are fused then.

    Returns:
        One answer per prompt, in the order of the prompts.
    """
    model.eval()
    decodings = of_each(decoding, prompts)
    end_id = decodings[0].end_id
    ends = end_tokens(tokenizer, end_id)
    plain = kernels == "plain" or (kernels == "auto" and fused_differs(model) is not None)
    loop = _generate_with_transformers if plain else partial(generate_with_slots, fp8=fp8)
    drawn = uniforms(prompts, decodings)
    tokens: dict[int, list[int]] = {}
    mine = range(rank(), len(prompts), count())
    with tqdm(total=len(mine), desc=title, unit="answer", leave=False) as bar:

        def finish(i: int, new: list[int]) -> None:
            tokens[i] = new
            bar.update()

        rows = rows_at_once
        while len(tokens) < len(mine):
            left = [Prompt(i, prompts[i], decodings[i], drawn[i]) for i in mine if i not in tokens]
            try:
                loop(model, left, ends, rows, finish)
            except torch.OutOfMemoryError:
                tried = MOST_ROWS["cuda"] if rows == "auto" else int(rows)
                rows = min(tried, len(left)) // 2
                if not rows:
                    raise
                log.warning("warning: out of memory; going on with %d answers at once", rows)
                torch.cuda.empty_cache()
    found = {i: new for part in of_all(tokens) for i, new in part.items()}
    return [to_answer(tokenizer, found[i], end_id) for i in range(len(prompts))]


def of_each(
    decoding: Decoding | Sequence[Decoding], prompts: Sequence[list[int]]
) -> list[Decoding]:
    """Return the decoding of each prompt."""
    return [decoding] * len(prompts) if isinstance(decoding, Decoding) else list(decoding)


def to_answer(tokenizer: Any, new: Sequence[int], end_id: int) -> Answer:
    """Decode generated tokens up to the first end token."""
    ends = end_tokens(tokenizer, end_id)
    length = next((k for k, token in enumerate(new) if token in ends), len(new))
    text = tokenizer.decode(new[:length], skip_special_tokens=True).strip()
    return Answer(text, length, stopped=length < len(new) and new[length] == end_id)


class _Draw(LogitsProcessor):
    """Leave only the token that `TokenDraw` chooses, so that transformers' greedy loop takes it."""

    def __init__(self, prompts: Sequence[Prompt], width: int, device: torch.device) -> None:
        decodings = [prompt.decoding for prompt in prompts]
        self.draw, self.width = TokenDraw(decodings), width
        self.settings = table(decodings).to(device)
        self.drawn = torch.stack([prompt.uniforms for prompt in prompts]).to(device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        seen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, input_ids, True)
        drawn = self.drawn[:, input_ids.shape[1] - self.width]
        chosen = self.draw(scores, seen, self.settings, drawn)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


@torch.no_grad()
def _generate_with_transformers(
    model: Any,
    prompts: Sequence[Prompt],
    ends: list[int],
    rows: int | str,
    finish: Callable[[int, list[int]], None],
) -> None:
    """Generate in batches padded on the left, longest first; a batch runs until its last answer ends."""
    greedy = dict.fromkeys(("temperature", "top_p", "min_p", "top_k", "repetition_penalty"))
    at_once = FEWEST_ROWS if rows == "auto" else int(rows)
    for batch in batches_by_length([len(each.tokens) for each in prompts], 2**31, at_once):
        chosen = [prompts[k] for k in batch]
        width = len(chosen[0].tokens)
        pads = [width - len(each.tokens) for each in chosen]
        # padded with its own first token, which a repetition penalty counts anyway
        ids = torch.tensor([p.tokens[:1] * n + p.tokens for n, p in zip(pads, chosen, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads])
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=chosen[0].decoding.max_new_tokens,
            eos_token_id=ends,
            pad_token_id=ends[0],
            use_cache=True,
            logits_processor=LogitsProcessorList([_Draw(chosen, width, model.device)]),
            do_sample=False,
            **greedy,
        )[:, width:].tolist()
        for each, new in zip(chosen, output, strict=True):
            finish(each.index, new)
