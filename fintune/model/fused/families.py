"""The families whose decoder layers the fused layers compute, and what tells them apart."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from fintune.model.adapter import base_of
from fintune.model.fused.layers import Layer
from fintune.model.fused.ops import functions_for
from fintune.model.fused.projections import Projections, Workspace

FAMILIES = ("mistral", "llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")
OFFSET_NORMS = ("gemma2", "gemma3_text")  # their norms multiply by 1 + weight, in float32
ACTIVATIONS = {"silu": False, "gelu_pytorch_tanh": True}  # whether it is GELU
VARYING_ANGLES = ("dynamic", "longrope")  # they depend on the longest row


def unsupported(model: PeftModel | PreTrainedModel) -> str | None:
    """Return why this model is not supported, or None if it is."""
    config = base_of(model).config
    if config.model_type not in FAMILIES:
        return f"a base of type {config.model_type}"
    if _activation(config) not in ACTIVATIONS:
        return f"the activation {_activation(config)}"
    rope = config.rope_parameters or {}
    for each in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        if each.get("rope_type") in VARYING_ANGLES:
            return f"rotary angles of type {each['rope_type']}"
        if each.get("partial_rotary_factor", 1.0) != 1.0:
            return "a rotary embedding of part of each head"
    return None


def head_size(config: Any) -> int:
    """Return the size of an attention head."""
    size: int = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    return size


def make_layers(
    config: Any,
    modules: Sequence[Any],
    dtype: torch.dtype,
    cache_weights: bool,
    training: bool,
    keeps_gate_up: bool,
    fp8: bool = False,
) -> list[Layer]:
    """Make the fused layers of a family's decoder layers."""
    group = functools.partial(
        Projections,
        dtype=dtype,
        workspace=Workspace(),
        cache_weights=cache_weights,
        training=training,
        fp8=fp8,
    )
    kinds = getattr(config, "layer_types", None) or [None] * len(modules)
    layers = []
    for module, kind in zip(modules, kinds, strict=True):
        attention, mlp = module.self_attn, module.mlp
        norm = functools.partial(_norm, config, module)
        heads = functools.partial(_norm, config, attention)
        if config.model_type in OFFSET_NORMS:
            norms = norm("input_layernorm"), norm("pre_feedforward_layernorm")
            after = norm("post_attention_layernorm"), norm("post_feedforward_layernorm")
        else:
            norms, after = (norm("input_layernorm"), norm("post_attention_layernorm")), None
        slides = kind in (None, "sliding_attention")
        layers.append(
            Layer(
                qkv=group(_present(attention, "qkv_proj", "q_proj", "k_proj", "v_proj")),
                output=group([attention.o_proj]),
                gate_up=group(_present(mlp, "gate_up_proj", "gate_proj", "up_proj")),
                down=group([mlp.down_proj]),
                norms=norms,
                after=after,
                head_norms=(heads("q_norm"), heads("k_norm"))
                if hasattr(attention, "q_norm")
                else None,
                eps=config.rms_norm_eps,
                heads=config.num_attention_heads,
                kv_heads=config.num_key_value_heads,
                head_size=head_size(config),
                scale=attention.scaling,
                softcap=getattr(config, "attn_logit_softcapping", None),
                window=getattr(config, "sliding_window", None) if slides else None,
                kind=kind if config.model_type == "gemma3_text" else None,
                gelu=ACTIVATIONS[_activation(config)],
                keeps_gate_up=keeps_gate_up,
                run=functions_for(module.input_layernorm.weight),
            )
        )
    return layers


def _activation(config: Any) -> str:
    name: str = getattr(config, "hidden_activation", None) or config.hidden_act
    return name


def _norm(config: Any, module: Any, name: str) -> Tensor:
    weight: Tensor = getattr(module, name).weight.detach()
    return 1 + weight.float() if config.model_type in OFFSET_NORMS else weight


def _present(module: Any, joint: str, *single: str) -> list[Any]:
    names = [joint] if hasattr(module, joint) else single
    return [getattr(module, name) for name in names]
