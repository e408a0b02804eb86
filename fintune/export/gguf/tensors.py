"""Convert the tensors of a folder to GGUF: names, types, order of rows."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fintune.errors import UserError

LAYER_TENSORS = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
LARGEST = torch.finfo(torch.float16).max


def _head_dim(config: Any) -> int:
    size = getattr(config, "head_dim", None)
    return int(size or config.hidden_size // config.num_attention_heads)


class Source(NamedTuple):
    """A tensor of the folder: its name, file and shape."""

    name: str
    file: Path
    shape: list[int]


def _tensors(folder: Path) -> dict[str, Source]:
    """List every tensor of the folder by name; checks each file's length and header."""
    index = folder / "model.safetensors.index.json"
    try:
        files = ["model.safetensors"]
        if index.is_file():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        tensors = {}
        for file in files:
            with safe_open(folder / file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  # not a mapping
                    shape = opened.get_slice(name).get_shape()
                    tensors[name] = Source(name, folder / file, shape)
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"gguf: {folder}: the weights cannot be read: {error}") from error
    return tensors


def _sources(folder: Path, config: Any) -> dict[str, Source]:
    """Map GGUF names to the folder's tensors, in the order of the file.

    Raises:
        UserError: a tensor is missing, or one does not belong to this architecture.
    """
    import gguf

    layers, tied = config.num_hidden_layers, config.tie_word_embeddings
    names = ["model.embed_tokens", "model.norm", *([] if tied else ["lm_head"])]
    names += [f"model.layers.{i}.{part}" for i in range(layers) for part in LAYER_TENSORS]
    wanted = [f"{name}.weight" for name in names]
    tensors = _tensors(folder)
    beside = {"lm_head.weight"} if tied else set()  # a copy of the embedding
    missing = [name for name in wanted if name not in tensors]
    extra = sorted(set(tensors) - set(wanted) - beside)
    if missing or extra:
        problem = f"{missing[0]} is missing" if missing else f"{extra[0]} has no place"
        raise UserError(f"gguf: {problem} in a plain {config.architectures[0]}")
    there = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    return {f"{there.get_name(name)}.weight": tensors[f"{name}.weight"] for name in names}


def _type(kind: str, shape: Sequence[int]) -> Any:
    """Choose the type: float32 for vectors, as llama.cpp requires; q8_0 only where 32 divides the rows."""
    import gguf

    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    if kind == "q8_0" and shape[-1] % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_0][0] == 0:
        return gguf.GGMLQuantizationType.Q8_0
    return gguf.GGMLQuantizationType.F16


def _bytes(shape: Sequence[int], kind: Any) -> int:
    import gguf

    weights_a_block, bytes_a_block = gguf.GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // weights_a_block * bytes_a_block


def _rope_factors(config: Any) -> np.ndarray | None:
    """Compute the divisor of each rotary frequency, (head size / 2,); None without scaling."""
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        return None
    scaled, attention_factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    assert attention_factor == 1, kind
    size = _head_dim(config)
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, size, 2).double() / size)
    factors: np.ndarray = (plain / scaled.double()).float().numpy()
    return factors


def _read(source: Source, config: Any) -> torch.Tensor:
    """Read a tensor with the row order of llama.cpp.

    For the rotary embedding, transformers pairs the first half of a head's rows with the second, llama.cpp
    each even row with the next, so the rows of queries and keys are permuted.
    """
    with safe_open(
        source.file, framework="pt"
    ) as file:  # opened per tensor: pages read from an open file count as memory
        tensor: torch.Tensor = file.get_tensor(source.name)
    heads = {
        "q_proj": config.num_attention_heads,
        "k_proj": config.num_key_value_heads,
    }.get(source.name.split(".")[-2])
    if heads is None:
        return tensor
    rows, columns = tensor.shape
    halves = tensor.view(heads, 2, rows // heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)


def _convert(tensor: torch.Tensor, kind: Any, name: str) -> np.ndarray:
    """Convert to float32, float16 or 8-bit blocks, ready to write."""
    import gguf

    largest = float(tensor.abs().max())
    if not largest <= LARGEST:  # also rejects nan
        raise UserError(
            f"gguf: {name} holds {largest}, which float16 cannot; its largest is {LARGEST}"
        )
    if kind == gguf.GGMLQuantizationType.F16:
        return tensor.to(torch.float16).numpy()
    converted: np.ndarray = gguf.quants.quantize(tensor.float().numpy(), kind)
    return converted
