"""Tiny models of a base's configuration, with random weights."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

LAYERS = 4  # at most, of those that the configuration does not tell apart
VOCABULARY = 256
WINDOW, CAP = 8, 2.0
SIZES = {  # the largest value of each
    "intermediate_size": 96,
    "ffn_dim": 96,
    "n_inner": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 2,
    "max_position_embeddings": 128,
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
}


def tiny_model(config: Any, attention: str) -> PreTrainedModel:
    """Create a model of few layers and small matrices in float32 on the CPU, with random weights.

    Every kind of layer that the configuration tells apart is in it, and a window is small enough to matter.

    Raises:
        Exception: what transformers raises for a configuration that it cannot build.
    """
    failed: Exception | None = None
    for smaller in _smaller(config):
        try:
            torch.manual_seed(0)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                smaller, dtype=torch.float32, attn_implementation=attention
            )
            with torch.no_grad():
                model(input_ids=torch.arange(2, 12)[None], use_cache=False)
                for weight in model.parameters():
                    # large enough for attention to tell tokens apart
                    size = weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.1
                    weight.add_(size * torch.randn_like(weight))
            return model
        except Exception as error:
            failed = failed or error
    assert failed is not None
    raise failed


def _smaller(config: Any) -> Iterator[Any]:
    """Yield configurations to try, the smallest first."""
    for widths in (True, False):
        made = copy.deepcopy(config)
        made.use_cache = False
        vars(made).pop("quantization_config", None)
        text = made.get_text_config()
        _cut_layers(text)
        for place, name in enumerate(("pad_token_id", "bos_token_id", "eos_token_id")):
            for each in (text, made):
                if getattr(each, name, None) is not None:
                    setattr(each, name, place)
        for name, most in SIZES.items():
            value = getattr(text, name, None)
            if isinstance(value, int) and value > most and (widths or name == "vocab_size"):
                setattr(text, name, most)
        if getattr(text, "sliding_window", None):
            text.sliding_window = WINDOW
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            if getattr(text, name, None):
                setattr(text, name, CAP)
        if widths:
            _cut_heads(text)
        yield made


def _cut_layers(text: Any) -> None:
    """Leave one layer of each kind, or the first ones where no list tells kinds."""
    count = text.num_hidden_layers
    lists = {
        name: value
        for name, value in vars(text).items()
        if isinstance(value, list | tuple) and len(value) == count
    }
    kinds: dict[Any, int] = {}
    telling = [value for name, value in lists.items() if not name.endswith(("idxs", "ids"))]
    for place, kind in enumerate(zip(*telling, strict=True)):
        kinds.setdefault(str(kind), place)
    places = sorted(kinds.values()) or list(range(min(LAYERS, count)))
    if len(places) == 1:
        places = places * 2
    for name, value in lists.items():
        setattr(text, name, [value[place] for place in places])
    text.num_hidden_layers = len(places)


def _cut_heads(text: Any) -> None:
    """Leave few heads of the same size, grouped as they were."""
    heads = getattr(text, "num_attention_heads", None)
    if not isinstance(heads, int):
        return
    size = getattr(text, "head_dim", None)
    own = isinstance(size, int)
    size = size if own else text.hidden_size // heads
    groups = getattr(text, "num_key_value_heads", None)
    if isinstance(groups, int):
        fewer = min(groups, 2)
        text.num_attention_heads = fewer * min(2, max(1, heads // groups))
        text.num_key_value_heads = fewer
    else:
        text.num_attention_heads = min(heads, 4)
    text.hidden_size = size * text.num_attention_heads
