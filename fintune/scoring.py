"""Measuring a model on question-answer rows: how likely it finds the answers, and what it answers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

TokenRow = tuple[list[int], list[int]]  # prompt ids, completion ids
TOKENS_PER_BATCH = (
    8192  # padded; bounds the memory of a batch, and changes no result beyond rounding
)
BINS = 10  # of the calibration, equally wide


@dataclass(frozen=True)
class Likelihood:
    """Sums over each row's answer tokens, in the order of the rows; arrays of shape (rows,).

    `nll` is the negative log-likelihood in nats, `correct` counts the tokens that were the most
    likely ones, `tokens` counts all of them, the end token included. `calibration`, shape (BINS, 3),
    has all rows' tokens by the probability that the model gave to its own favourite: their number,
    the sum of those probabilities, and how often the favourite was right.
    """

    nll: np.ndarray
    correct: np.ndarray
    tokens: np.ndarray
    calibration: np.ndarray

    @property
    def loss(self) -> float:
        """Nats per answer token, each token counted alike."""
        return float(self.nll.sum() / self.tokens.sum())

    @property
    def accuracy(self) -> float:
        """Share of the answer tokens that were the most likely ones."""
        return float(self.correct.sum() / self.tokens.sum())


@dataclass(frozen=True)
class Answer:
    """A generated answer without its end token; `stopped` says that the end token came in time."""

    text: str
    tokens: int
    stopped: bool


def batches_by_length(lengths: Sequence[int], tokens: int, rows: int) -> Iterator[list[int]]:
    """Indices in batches of at most `rows` rows and `tokens` padded tokens, longest rows first."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) == rows or (len(batch) + 1) * lengths[batch[0]] > tokens):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@torch.no_grad()
def likelihood(model: Any, rows: Sequence[TokenRow], title: str) -> Likelihood:
    """How likely the model finds the answers, given their prompts.

    Only the answers' positions go through the head, so memory does not grow with the prompt and the
    vocabulary together.

    Args:
        model: a causal model, with or without an adapter; left in evaluation mode.
        title: of the progress bar.
    """
    model.eval()
    body, head = _body_and_head(model)
    nll, correct = np.zeros(len(rows)), np.zeros(len(rows))
    calibration = np.zeros((BINS, 3))
    lengths = [len(prompt) + len(completion) for prompt, completion in rows]
    with tqdm(total=len(rows), desc=title, unit="row", leave=False) as bar:
        for batch in batches_by_length(lengths, TOKENS_PER_BATCH, rows=256):
            width = lengths[batch[0]]
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            seen = torch.zeros_like(ids)
            answer = torch.zeros_like(ids, dtype=torch.bool)
            for k, i in enumerate(batch):
                prompt, completion = rows[i]
                ids[k, : lengths[i]] = torch.tensor(prompt + completion)
                seen[k, : lengths[i]] = 1
                answer[k, len(prompt) : lengths[i]] = True
            ids, seen, answer = (t.to(model.device) for t in (ids, seen, answer))
            hidden = body(input_ids=ids, attention_mask=seen, use_cache=False).last_hidden_state
            logits = head(hidden[:, :-1][answer[:, 1:]]).float()
            labels = ids[:, 1:][answer[:, 1:]]
            losses, hits, confidence = token_figures(logits, labels)
            owner = np.array(batch)[answer[:, 1:].nonzero()[:, 0].cpu().numpy()]
            np.add.at(nll, owner, losses)
            np.add.at(correct, owner, hits)
            calibration += calibration_sums(confidence, hits)
            bar.update(len(batch))
    tokens = np.array([len(completion) for _, completion in rows], dtype=float)
    return Likelihood(nll, correct, tokens, calibration)


def token_figures(
    logits: torch.Tensor, labels: torch.Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is measured at each answer token.

    Args:
        logits: float32, (tokens, vocabulary), that predict the labels; labels: (tokens,).

    Returns:
        The losses in nats, 1 where the most likely token was the right one and else 0, and the
        probability of the most likely token; float64, each of shape (tokens,).
    """
    total = logits.logsumexp(dim=-1)
    losses = total - logits.gather(-1, labels[:, None])[:, 0]
    top, favourite = logits.max(dim=-1)
    figures = torch.stack([losses, (favourite == labels).float(), (top - total).exp()])
    losses, hits, confidence = figures.double().cpu().numpy()
    return losses, hits, confidence


def calibration_sums(confidence: np.ndarray, hits: np.ndarray) -> np.ndarray:
    """Tokens by confidence: number, sum of confidence, number right; shape (BINS, 3)."""
    places = np.clip(np.nan_to_num(confidence) * BINS, 0, BINS - 1).astype(int)
    columns = (np.ones_like(confidence), confidence, hits)
    return np.stack([np.bincount(places, each, minlength=BINS) for each in columns], axis=1)


@torch.no_grad()
def answer_logits(model: Any, rows: Sequence[TokenRow]) -> list[torch.Tensor]:
    """The logits that predict each row's answer tokens; float32 on the CPU, (answer tokens, vocabulary)."""
    model.eval()
    body, head = _body_and_head(model)
    logits = []
    for prompt, completion in rows:
        ids = torch.tensor([prompt + completion], device=model.device)
        hidden = body(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1]
        logits.append(head(hidden).float().cpu())
    return logits


def _body_and_head(model: Any) -> tuple[Any, Any]:
    """The transformer without its head, and the head, with the adapter's layers still in them."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    return plain.get_decoder(), plain.get_output_embeddings()


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    end_id: int,
    max_new_tokens: int,
    rows_per_batch: int,
    title: str,
    sampling: dict[str, float] | None = None,
    seed: int = 0,
) -> list[Answer]:
    """Answer the prompts, greedily or with `sampling` (temperature, top_p), stopping at the end token.

    The base's own end-of-text token ends an answer too, but such an answer did not stop by itself in
    the way that was taught.

    Returns:
        One answer a prompt, in the order of the prompts.
    """
    model.eval()
    answers: list[Answer | None] = [None] * len(prompts)
    options: dict[str, Any] = {
        "do_sample": False,
        "temperature": None,
        "top_p": None,
        "top_k": None,
    }
    if sampling:
        options = {"do_sample": True, "top_k": 0, **sampling}
        torch.manual_seed(seed)
    ends = [end_id] + [tokenizer.eos_token_id] * (tokenizer.eos_token_id not in (None, end_id))
    with tqdm(total=len(prompts), desc=title, unit="answer", leave=False) as bar:
        for batch in batches_by_length([len(p) for p in prompts], 2**31, rows_per_batch):
            width = len(prompts[batch[0]])
            pads = [[0] * (width - len(prompts[i])) for i in batch]
            ids = torch.tensor([pad + prompts[i] for pad, i in zip(pads, batch, strict=True)])
            mask = torch.tensor([[0] * len(pad) + [1] * (width - len(pad)) for pad in pads])
            output = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                eos_token_id=ends,
                pad_token_id=tokenizer.pad_token_id,
                use_cache=True,
                **options,
            )[:, width:].tolist()
            for i, new in zip(batch, output, strict=True):
                answers[i] = _answer(tokenizer, new, end_id, ends)
            bar.update(len(batch))
    return [answer for answer in answers if answer is not None]


def _answer(tokenizer: Any, new: list[int], end_id: int, ends: Sequence[int]) -> Answer:
    length = next((k for k, token in enumerate(new) if token in ends), len(new))
    text = tokenizer.decode(new[:length], skip_special_tokens=True).strip()
    return Answer(text, length, stopped=length < len(new) and new[length] == end_id)
