"""The settings of decoding, as one value."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Decoding:
    """How answers are decoded: greedily at temperature 0, else sampled.

    `end_id` is the token that ends an answer. `top_p` keeps the likeliest tokens that make up this
    probability. `seed` is of the samples.
    """

    end_id: int
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    @property
    def is_greedy(self) -> bool:
        """Tell whether the most likely token is always taken."""
        return self.temperature == 0
