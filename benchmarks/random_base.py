"""Make a base of a known shape with random weights: right for memory and time, not for loss.

python benchmarks/random_base.py --tokenizer FOLDER --out FOLDER [--shape qwen2.5-7b] [--layers 32]
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

SHAPES: dict[str, dict[str, Any]] = {  # the values of each one's config.json
    "mistral-7b": {
        "model_type": "mistral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
    },
    "llama2-13b": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "max_position_embeddings": 4096,
    },
    "llama3-70b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
    },
    "gemma2-9b": {
        "model_type": "gemma2",
        "vocab_size": 256000,
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "max_position_embeddings": 8192,
        "sliding_window": 4096,
    },
    "llama3.2-1b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a fast tokenizer")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="mistral-7b")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    values = SHAPES[arguments.shape] | {"bos_token_id": 1, "eos_token_id": 2}
    if arguments.layers:
        values["num_hidden_layers"] = arguments.layers
    config = AutoConfig.for_model(**values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_weights(model, arguments.out)
    config.architectures = [type(model).__name__]
    config.dtype = "bfloat16"
    config.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


def write_weights(model: Any, folder: Path) -> None:
    """Draw and write a model's weights, a file for each decoder layer, without holding all of them."""
    weights = dict(model.named_parameters())  # a tied head is not among them
    files = [list(names) for _, names in groupby(weights, lambda name: name.split(".")[:3][-1])]
    named = {f"model-{k:05}.safetensors": names for k, names in enumerate(files)}
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def write(file: str) -> None:
        generator = torch.Generator(device).manual_seed(list(named).index(file))
        made = {name: draw(name, weights[name], generator) for name in named[file]}
        save_file(made, folder / file, {"format": "pt"})

    with ThreadPoolExecutor(8 if device == "cuda" else 1) as pool:
        list(pool.map(write, named))
    placed = {name: file for file, names in named.items() for name in names}
    index = {"metadata": {}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def draw(name: str, weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw a matrix with the deviation that is usual at the start; norms are one and biases zero."""
    if weight.ndim > 1:
        drawn = torch.randn(weight.shape, generator=generator, device=generator.device)
        return (0.02 * drawn).to(torch.bfloat16).cpu()
    return torch.full(weight.shape, float("norm" in name), dtype=torch.bfloat16)


def random_adapter(model: Any, tokenizer: Any) -> Any:
    """Add an adapter of rank 16 on all projections, with a random B instead of zeros."""
    from fintune.model.adapter import add_adapter
    from fintune.params import Lora

    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    tuned = add_adapter(
        model, tokenizer, Lora(r=16, alpha=32, dropout=0.1, target_modules=layers), 0
    )
    generator = torch.Generator().manual_seed(0)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            drawn = torch.randn(parameter.shape, generator=generator) * 1e-3
            parameter.data = drawn.to(parameter)
    return tuned


if __name__ == "__main__":
    main()
