"""Create and score the small base model."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from tools.corpus import BOS, IntArray, Score, token_id

IGNORED = -100
EVALUATION_ROWS = 16
PROMPT = "Retail sales in the District"


@dataclass(frozen=True)
class Shape:
    """The model's size; as shipped, 7.9 million parameters and less than 16 MiB in bf16."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    positions: int


def make_model(shape: Shape, tokenizer: PreTrainedTokenizerFast, seed: int) -> MistralForCausalLM:
    """Create a float32 model with random weights that depend only on the seed."""
    config = MistralConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.positions,
        sliding_window=None,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    return MistralForCausalLM(config)


def windows(stream: IntArray, context: int, bos_id: int) -> tuple[Tensor, Tensor]:
    """Cut a stream into inputs and targets, both int64 ``[rows, context]``, without overlap.

    Every token but the first is a target exactly once. ``<s>`` and the padding of the last row
    are ``IGNORED``: a document's start is given, not predicted.
    """
    rows = math.ceil((len(stream) - 1) / context)
    inputs = torch.full((rows * context,), bos_id)
    targets = torch.full((rows * context,), IGNORED)
    tokens = torch.from_numpy(stream)
    inputs[: len(stream) - 1] = tokens[:-1]
    targets[: len(stream) - 1] = tokens[1:].masked_fill(tokens[1:] == bos_id, IGNORED)
    return inputs.view(rows, context), targets.view(rows, context)


def head_loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Compute the summed cross-entropy in nats of ``hidden [rows, context, width]`` and the targets."""
    logits = F.linear(hidden, head).flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")


def hidden_states(model: MistralForCausalLM, inputs: Tensor) -> Tensor:
    """Compute the final hidden states, ``[rows, context, width]``."""
    # without a mask, attention uses the causal kernels
    states: Tensor = model.model(input_ids=inputs, use_cache=False).last_hidden_state
    return states


@torch.no_grad()
def summed_nats(model: MistralForCausalLM, inputs: Tensor, targets: Tensor) -> float:
    """Sum the nats of all targets ``[rows, context]`` that are not ``IGNORED``."""
    model.train(False)
    device = model.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    for start in range(0, len(inputs), EVALUATION_ROWS):
        part = slice(start, start + EVALUATION_ROWS)
        hidden = hidden_states(model, inputs[part].to(device))
        total += head_loss(hidden, model.lm_head.weight, targets[part].to(device))
    return float(total)


def score_folder(
    folder: Path, stream: IntArray, context: int, text_bytes: int, device: torch.device
) -> tuple[Score, str]:
    """Score the saved weights on a stream, in float32, and sample a continuation of ``PROMPT``."""
    model = MistralForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to(device)  # type: ignore[arg-type]  # transformers wraps `to` without its types
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs, targets = windows(stream, context, token_id(tokenizer.backend_tokenizer, BOS))
    nats = summed_nats(model, inputs, targets)
    torch.manual_seed(0)
    prompt = tokenizer(PROMPT, return_tensors="pt").to(device)
    sampled = model.generate(  # type: ignore[misc]  # it types `self` as a protocol
        **prompt, do_sample=True, temperature=0.8, top_p=0.95, max_new_tokens=80
    )[0]
    sample = str(tokenizer.decode(sampled, skip_special_tokens=True))
    return Score(nats, int((targets != IGNORED).sum()), text_bytes), " ".join(sample.split())
