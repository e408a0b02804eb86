"""Compute the model sizes that time and memory depend on."""

from dataclasses import dataclass
from typing import Any

from fintune.params import ALL_LINEAR, Lora

CODES = "its codes take the place of the 16-bit weights of a 4-bit base (dequantize: once)"
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


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
    tied: bool = False  # embedding and head are one table
    normed_heads: bool = False  # RMS norms of q and k
    normed_outputs: bool = False  # RMS norms of the outputs of attention and feed-forward

    @classmethod
    def of(cls, config: Any, lora: Lora) -> "ModelSize":
        """Read the sizes from a transformers config and the LoRA parameters."""
        config = config.get_text_config()
        heads = getattr(config, "num_attention_heads", None) or 1
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        groups = getattr(config, "num_key_value_heads", None) or heads
        inner = [
            getattr(config, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner")
        ]
        return cls(
            hidden=config.hidden_size,
            intermediate_size=next(
                (n for n in inner if isinstance(n, int)), 4 * config.hidden_size
            ),
            layers=config.num_hidden_layers,
            q_dim=heads * size,
            kv_dim=groups * size,
            heads=heads,
            vocabulary=config.vocab_size,
            rank=lora.r,
            tuned=LINEAR if lora.target_modules == ALL_LINEAR else tuple(lora.target_modules),
            tied=bool(config.tie_word_embeddings),
            normed_heads=config.model_type in ("qwen3", "gemma3_text"),
            normed_outputs=config.model_type in ("gemma2", "gemma3_text"),
        )

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each linear layer in a decoder layer."""
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
        """Return the FLOPs of one training step, without recompute.

        A frozen weight costs 4 FLOPs per token (forward pass and input gradient), a trained one 6 (its own
        gradient as well). The head only sees answer tokens. Attention scores are left out: with rows of a few
        hundred tokens they are about a hundredth.
        """
        body = 4 * self.linear_weights + 6 * self.adapter_weights
        return float(tokens) * body + 4.0 * answer_tokens * self.vocabulary * self.hidden


def lacks_for_fp8(size: ModelSize, quantization: str, kernels: str, has_fp8: bool) -> str | None:
    """Return why the base's products cannot be in FP8, or None if they can.

    Args:
        has_fp8: this GPU has FP8 products, and activations are in bfloat16.
    """
    if not has_fp8:
        return "it needs a GPU from Ada or Hopper on, and train.precision: bfloat16"
    if kernels != "fused":
        return "only fused kernels have it"
    if quantization != "nf4":
        return CODES
    if any(n % 16 for sizes in size.linears.values() for n in sizes):
        return "this base has sizes that are no multiples of 16"
    return None
