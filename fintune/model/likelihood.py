"""Measure the likelihood of the answers under a model, and its calibration."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from fintune.hardware import room_gib
from fintune.model.adapter import base_of
from fintune.model.batch import CHUNK, TokenRow, batches_by_length, pack, pad
from fintune.model.conformance import fused_differs
from fintune.model.fused.model import FusedModel, cached_weights_gib
from fintune.model.plain import PlainModel
from fintune.model.sharding import is_sharded
from fintune.processes import count, of_all, rank

log = logging.getLogger("fintune")

TOKENS_PER_BATCH = 8192  # padding included; bounds memory, affects results only by rounding
ROOM_GIB = 6  # reserved for a batch before weights are cached in 16 bits
FP8_ROWS, FP8_NATS = 256, 0.003  # in FP8 if the loss on so many rows changes by no more
BINS = 10  # of the calibration, of equal width


@dataclass(frozen=True)
class Likelihood:
    """Sums over each row's answer tokens, (rows,), in the order of the rows.

    `nll` is the negative log-likelihood in nats, `correct` the number of tokens with the highest probability,
    `tokens` the number of all of them, end token included. `calibration`, (BINS, 3), bins all tokens by the
    probability of the model's top prediction: count, sum of those probabilities, correct top predictions.
    """

    nll: np.ndarray
    correct: np.ndarray
    tokens: np.ndarray
    calibration: np.ndarray

    @property
    def loss(self) -> float:
        """Nats per answer token, weighted by token."""
        return float(self.nll.sum() / self.tokens.sum())

    @property
    def accuracy(self) -> float:
        """Share of the answer tokens that had the highest probability."""
        return float(self.correct.sum() / self.tokens.sum())


@torch.no_grad()
def likelihood(
    model: Any, rows: Sequence[TokenRow], title: str, kernels: str = "auto", fp8: bool = False
) -> Likelihood:
    """Compute the likelihood of the answers given their prompts.

    Only answer positions go through the head, in chunks, so that no logits are computed for the prompts. The
    stage's processes share the batches of one, so that the figures do not depend on their number.

    Args:
        model: a causal model, with or without an adapter; left in evaluation mode.
        title: of the progress bar.
        kernels: `fused` on packed rows, `plain` on padded ones, or `auto`, as for training.
        fp8: multiply by the base's 4-bit weights in FP8; the kernels are fused then.
    """
    forward = _Forward(model, kernels, fp8)
    nll, correct = np.zeros(len(rows)), np.zeros(len(rows))
    calibration = np.zeros((BINS, 3))
    lengths = [len(prompt) + len(completion) for prompt, completion in rows]
    most = TOKENS_PER_BATCH * (2 if forward.fused else 1)
    batches = list(batches_by_length(lengths, most, rows=256))
    share = range(rank(), len(batches), count())
    if is_sharded(model):  # all processes take part in each pass
        share = range(rank(), -(-len(batches) // count()) * count(), count())
    mine: dict[int, np.ndarray] = {}
    total = sum(len(batches[number]) for number in share if number < len(batches))
    with tqdm(total=total, desc=title, unit="row", leave=False) as bar:
        for number in share:
            if number >= len(batches):
                forward.answer_states(forward.lay_out([rows[batches[-1][-1]]], model.device))
                continue
            part = forward.lay_out([rows[i] for i in batches[number]], model.device)
            states = forward.answer_states(part)
            figures = [
                token_figures(forward.logits(chunk).float(), labels)
                for chunk, labels in zip(
                    states.split(CHUNK), part.targets.split(CHUNK), strict=True
                )
            ]
            mine[number] = np.concatenate(figures, axis=1)
            bar.update(len(batches[number]))
    found = {number: each for part in of_all(mine) for number, each in part.items()}
    for number, batch in enumerate(batches):
        losses, hits, confidence = found[number]
        owner = np.repeat(batch, [len(rows[i][1]) for i in batch])
        np.add.at(nll, owner, losses)
        np.add.at(correct, owner, hits)
        calibration += calibration_sums(confidence, hits)
    tokens = np.array([len(completion) for _, completion in rows], dtype=float)
    return Likelihood(nll, correct, tokens, calibration)


def fp8_is_near(model: Any, rows: Sequence[TokenRow]) -> bool:
    """Return whether FP8 leaves the loss on the first rows as it is; warn if it does not."""
    exact, coarse = (
        likelihood(model, rows[:FP8_ROWS], title, "fused", fp8).loss
        for title, fp8 in (("16 bits", False), ("FP8", True))
    )
    near = abs(coarse - exact) <= FP8_NATS
    if not near:
        log.warning(
            "warning: evaluate.products: fp8: the loss is %.4f nats an answer token in FP8 and %.4f in "
            "16 bits, more than %g apart; going on in 16 bits",
            *(coarse, exact, FP8_NATS),
        )
    return near


def token_figures(
    logits: torch.Tensor, labels: torch.Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute loss, correctness and confidence for each answer token.

    Args:
        logits: float32, (tokens, vocabulary), that predict the labels; labels: (tokens,).

    Returns:
        The losses in nats, 1 where the top prediction is correct and else 0, and the probability of the
        top prediction; float64, (tokens,) each.
    """
    total = logits.logsumexp(dim=-1)
    losses = total - logits.gather(-1, labels[:, None])[:, 0]
    top, favourite = logits.max(dim=-1)
    figures = torch.stack([losses, (favourite == labels).float(), (top - total).exp()])
    losses, hits, confidence = figures.double().cpu().numpy()
    return losses, hits, confidence


def calibration_sums(confidence: np.ndarray, hits: np.ndarray) -> np.ndarray:
    """Bin tokens by confidence: count, sum of confidence, number correct; (BINS, 3)."""
    places = np.clip(np.nan_to_num(confidence) * BINS, 0, BINS - 1).astype(int)
    columns = (np.ones_like(confidence), confidence, hits)
    return np.stack([np.bincount(places, each, minlength=BINS) for each in columns], axis=1)


@torch.no_grad()
def answer_logits(model: Any, rows: Sequence[TokenRow]) -> list[torch.Tensor]:
    """Return the logits that predict each row's answer; float32 on the CPU, (answer tokens, vocabulary)."""
    forward = _Forward(model, "auto")
    parts = [forward.lay_out([row], model.device) for row in rows]
    return [forward.logits(forward.answer_states(part)).float().cpu() for part in parts]


class _Forward:
    """A forward pass to the hidden states that predict answers, with the fused or the model's own layers."""

    def __init__(self, model: Any, kernels: str, fp8: bool = False) -> None:
        model.eval()
        self.plain, self.fused = PlainModel(model), None
        if kernels == "fused" or (kernels == "auto" and fused_differs(model) is None):
            cache = not is_sharded(model) and cached_weights_gib(model) + ROOM_GIB < room_gib()
            dtype = base_of(model).get_output_embeddings().weight.dtype
            self.fused = FusedModel(model, dtype, cache_weights=cache, training=False, fp8=fp8)
        self.lay_out = pack if self.fused else pad
        computed = self.fused or self.plain
        self.answer_states, self.logits = computed.answer_states, computed.logits
