"""Decoding settings, and the draw of a token from logits."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fintune import paths
from fintune.errors import UserError
from fintune.params import Generation

SETTINGS = ("temperature", "top_p", "min_p", "top_k", "repetition_penalty")
LARGEST = 1 - 2**-20  # nearer to 1, the product with a float32 sum can round to the sum


@dataclass(frozen=True)
class Decoding:
    """Decoding settings: greedy at temperature 0, else sampling.

    `end_id` is the end token of an answer. `top_p` is the probability mass to sample from (Holtzman et al.
    2020), `min_p` the least probability relative to the most likely token's (Nguyen et al. 2024), `top_k`
    the number of tokens, 0 for all. `repetition_penalty` (Keskar et al. 2019) counts prompt and answer.
    """

    end_id: int
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    @property
    def is_greedy(self) -> bool:
        """True if the most likely token is always taken."""
        return self.temperature == 0

    @property
    def settings(self) -> dict[str, float]:
        """The five values that params.yaml can set."""
        return {name: getattr(self, name) for name in SETTINGS}

    def using(self, settings: Mapping[str, Any]) -> "Decoding":
        """Return the decoding with these settings; other keys are ignored."""
        return replace(self, **{name: settings[name] for name in SETTINGS})


GREEDY = Decoding(end_id=0, max_new_tokens=0).settings


def options(settings: Mapping[str, float]) -> dict[str, Any]:
    """Return the settings as transformers' `GenerationConfig` takes them; unused ones are None."""
    sampled = settings["temperature"] > 0
    return {
        "do_sample": sampled,
        "temperature": settings["temperature"] if sampled else None,
        "top_p": settings["top_p"] if sampled else None,
        "min_p": settings["min_p"] or None if sampled else None,
        "top_k": int(settings["top_k"]) if sampled else None,
        "repetition_penalty": settings["repetition_penalty"],
    }


def title(settings: Mapping[str, float]) -> str:
    """Describe the settings in a few words: `temperature 0.7, top-p 0.95`."""
    sampled = settings["temperature"] > 0
    words = [f"temperature {settings['temperature']:g}" if sampled else "greedy"]
    if sampled and settings["top_k"]:
        words.append(f"top-k {settings['top_k']:g}")
    if sampled and settings["top_p"] < 1:
        words.append(f"top-p {settings['top_p']:g}")
    if sampled and settings["min_p"]:
        words.append(f"min-p {settings['min_p']:g}")
    if settings["repetition_penalty"] != 1:
        words.append(f"penalty {settings['repetition_penalty']:g}")
    return ", ".join(words)


def check_decoding(given: Generation, evaluated: Mapping[str, float]) -> None:
    """Check that an evaluation was made with the parameters' decoding.

    Raises:
        UserError: it was made with another.
    """
    asked: dict[str, float] = {"max_new_tokens": given.max_new_tokens}
    if given.decoding != "auto":
        asked |= given.decoding.model_dump()
    for name, value in asked.items():
        if evaluated[name] != value:
            raise UserError(
                f"generation: {name} is {value:g}, and {evaluated[name]:g} in {paths.EVALUATION}; "
                "what is shipped has to be what was measured: run `dvc repro evaluate`"
            )


class TokenDraw:
    """Choose the next tokens of a batch with the probabilities of transformers' processors.

    Rows may have different settings. A row's random number is given, so its tokens do not depend on the
    other rows.
    """

    def __init__(self, decodings: Sequence[Decoding]) -> None:
        """Leave out the steps that none of these settings needs."""
        sampled = [each for each in decodings if not each.is_greedy]
        self.samples = bool(sampled)
        self.penalizes = any(each.repetition_penalty != 1 for each in decodings)
        self.most_tokens = max((each.top_k for each in sampled), default=0)
        self.cuts_mass = any(each.top_p < 1 for each in sampled)
        self.cuts_unlikely = any(each.min_p > 0 for each in sampled)

    def scores(self, logits: Tensor, seen: Tensor, settings: Tensor) -> Tensor:
        """Return the processed logits, (rows, vocabulary), in float32, in transformers' order of steps.

        Args:
            logits: (rows, vocabulary).
            seen: of the same shape, true for the tokens of the row's prompt and answer; of any shape
                without a penalty.
            settings: (rows, 5), in the order of SETTINGS.
        """
        temperature, top_p, min_p, top_k, penalty = settings[:, :, None].unbind(dim=1)
        scores = logits.float()
        if self.penalizes:
            penalized = torch.where(scores < 0, scores * penalty, scores / penalty)
            scores = torch.where(seen, penalized, scores)
        if not self.samples:
            return scores
        scores = scores / torch.where(temperature > 0, temperature, 1)
        if self.most_tokens:
            best = scores.topk(min(self.most_tokens, scores.shape[-1])).values
            last = best.gather(-1, (top_k.long() - 1).clamp(0, best.shape[-1] - 1))
            scores = scores.masked_fill((scores < last) & (top_k > 0), -torch.inf)
        if self.cuts_mass:
            ascending, order = scores.sort(dim=-1)
            outside = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
            outside[:, -1] = False
            scores = scores.masked_fill(outside.scatter(1, order, outside), -torch.inf)
        if self.cuts_unlikely:
            probabilities = scores.softmax(dim=-1)
            least = min_p * probabilities.amax(dim=-1, keepdim=True)
            scores = scores.masked_fill(probabilities < least, -torch.inf)
        return scores

    def __call__(self, logits: Tensor, seen: Tensor, settings: Tensor, uniform: Tensor) -> Tensor:
        """Return a token for each row, (rows,): the likeliest, or one by the inverse distribution function.

        Args:
            uniform: a random number from 0 to 1 for each row, (rows,).
        """
        if not (self.samples or self.penalizes):
            return logits.argmax(dim=-1)
        scores = self.scores(logits, seen, settings)
        likeliest = scores.argmax(dim=-1)
        if not self.samples:
            return likeliest
        probabilities = scores.softmax(dim=-1)
        cumulative = probabilities.cumsum(dim=-1)
        reached = cumulative > (uniform * cumulative[:, -1])[:, None]
        # a parallel sum may fall a little from one token to the next
        drawn = (reached & (probabilities > 0)).to(torch.uint8).argmax(dim=-1)
        return torch.where(settings[:, 0] > 0, drawn, likeliest)


def uniforms(prompts: Sequence[Sequence[int]], decodings: Sequence[Decoding]) -> Tensor:
    """Draw the random numbers of each prompt's answer, (prompts, max_new_tokens), from 0 to 1.

    They depend on the seed, the prompt's tokens and how often the prompt came before with this decoding,
    but not on the other prompts: a second answer to a prompt is another draw. Two decodings of a prompt
    get the same numbers, which makes their answers easier to compare.
    """
    before: Counter[tuple[bytes, Decoding]] = Counter()
    rows = []
    for prompt, decoding in zip(prompts, decodings, strict=True):
        if decoding.is_greedy:
            rows.append(torch.zeros(decoding.max_new_tokens))
            continue
        text = np.asarray(prompt, dtype=np.int64).tobytes()
        name = f"{decoding.seed} {before[text, decoding]} ".encode() + text
        before[text, decoding] += 1
        seed = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") >> 1
        generator = torch.Generator().manual_seed(seed)
        rows.append(torch.rand(decoding.max_new_tokens, generator=generator))
    return torch.stack(rows).clamp_(max=LARGEST)


def table(decodings: Sequence[Decoding]) -> Tensor:
    """Return the settings as `TokenDraw` takes them, (rows, 5)."""
    return torch.tensor([[float(value) for value in d.settings.values()] for d in decodings])
