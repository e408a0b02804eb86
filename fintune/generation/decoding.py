"""Decoding settings."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Decoding:
    """Decoding settings: greedy at temperature 0, else sampling.

    `end_id` is the end token of an answer. `top_p` is the probability mass to sample from.
    """

    end_id: int
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    @property
    def is_greedy(self) -> bool:
        """True if the most likely token is always taken."""
        return self.temperature == 0
