"""The sizes of a model that time and memory depend on."""

from dataclasses import dataclass
from typing import Any

from fintune.params import Lora


@dataclass(frozen=True)
class ModelSize:
    """The sizes of a base and its adapter that time and memory depend on."""

    hidden: int
    intermediate_size: int
    layers: int
    q_dim: int  # outputs of q
    kv_dim: int  # outputs of k, and of v
    heads: int
    vocabulary: int
    rank: int
    tuned: tuple[str, ...]

    @classmethod
    def of(cls, config: Any, lora: Lora) -> "ModelSize":
        """Read from a transformers config and the parameters."""
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(
            hidden=config.hidden_size,
            intermediate_size=config.intermediate_size,
            layers=config.num_hidden_layers,
            q_dim=heads * size,
            kv_dim=config.num_key_value_heads * size,
            heads=heads,
            vocabulary=config.vocab_size,
            rank=lora.r,
            tuned=tuple(lora.target_modules),
        )

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's linear layers."""
        return {
            "q_proj": (self.hidden, self.q_dim),
            "k_proj": (self.hidden, self.kv_dim),
            "v_proj": (self.hidden, self.kv_dim),
            "o_proj": (self.q_dim, self.hidden),
            "gate_proj": (self.hidden, self.intermediate_size),
            "up_proj": (self.hidden, self.intermediate_size),
            "down_proj": (self.intermediate_size, self.hidden),
        }

    @property
    def linear_weights(self) -> int:
        return self.layers * sum(a * b for a, b in self.linears.values())

    @property
    def adapter_weights(self) -> int:
        tuned = [self.linears[name] for name in self.tuned if name in self.linears]
        return self.layers * self.rank * sum(a + b for a, b in tuned)

    def flops(self, tokens: int, answer_tokens: int) -> float:
        """Of one training step, without what is computed twice to save memory.

        A frozen weight takes part in the product forward and in the gradient of the input, 4
        operations a token; a trained one in its own gradient as well, 6. The head sees answer tokens
        alone. Attention's scores are left out: rows of some hundred tokens make them a hundredth.
        """
        body = 4 * self.linear_weights + 6 * self.adapter_weights
        return float(tokens) * body + 4.0 * answer_tokens * self.vocabulary * self.hidden
