"""Checks before minutes are spent: is the base there, is there room for it, what will compute it.

`python -m fintune.preflight` runs all of them on params.yaml and changes nothing.
"""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from fintune.params import Base, Train, UserError, read_params

log = logging.getLogger("fintune")
GIB = 2**30
NF4_BYTES = (
    0.516  # per weight: 4 bits, and a doubly quantised scale for every 64 (Dettmers et al. 2023)
)
ACTIVATION_BYTES = 40  # per token, layer and hidden unit in 16 bits, measured on Mistral-7B's shape


def check_base(base: Base) -> int:
    """Make sure that the base can be loaded.

    Returns:
        The size of its weights in bytes.

    Raises:
        UserError: a folder without config, tokenizer or safetensors weights; a hub model that is
            gated, missing or unreachable.
    """
    if not base.is_folder:
        from fintune.hub import check_model

        return check_model(base.model, base.revision or "")
    folder = Path(base.model)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"base.model: {folder} has no config.json; it is no Hugging Face model folder"
        )
    weights = list(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(
            f"base.model: {folder} has no safetensors weights; other formats can run code and are not loaded"
        )
    return sum(file.stat().st_size for file in weights)


def describe_device() -> str:
    """What will compute, and what happens without a GPU or without bfloat16; needs torch."""
    import torch

    if not torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return (
            f"no GPU: {cores} CPU cores, float32; right for the demo, hours or days for a 7B model"
        )
    properties = torch.cuda.get_device_properties(0)
    kind = (
        "bfloat16"
        if torch.cuda.is_bf16_supported()
        else "float16 with loss scaling (no bfloat16 here)"
    )
    return f"{properties.name}, {properties.total_memory / GIB:.0f} GiB, {kind}"


def estimate_memory_gib(
    config: Any, params: Train, tokens_per_pass: int, weight_bytes: int
) -> dict[str, float]:
    """The memory that training needs, by part.

    Args:
        config: the base's transformers config.
        tokens_per_pass: tokens that go through the model at once, padding included.
        weight_bytes: of one unquantised weight, 2 or 4.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    middle, vocabulary = config.intermediate_size, config.vocab_size
    head_size = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    wide, narrow = config.num_attention_heads * head_size, config.num_key_value_heads * head_size
    shapes = {
        "q_proj": (hidden, wide),
        "k_proj": (hidden, narrow),
        "v_proj": (hidden, narrow),
        "o_proj": (wide, hidden),
        "gate_proj": (hidden, middle),
        "up_proj": (hidden, middle),
        "down_proj": (middle, hidden),
    }
    linear = layers * sum(a * b for a, b in shapes.values())
    tables = 2 * vocabulary * hidden
    lora = layers * sum(
        params.lora.r * (a + b)
        for name, (a, b) in shapes.items()
        if name in params.lora.target_modules
    )
    per_linear = NF4_BYTES if params.quantization == "nf4" else weight_bytes
    kept = (
        2 * layers + ACTIVATION_BYTES
        if params.gradient_checkpointing
        else ACTIVATION_BYTES * layers
    )
    return {
        "weights": (linear * per_linear + tables * weight_bytes) / GIB,
        "adapter and optimizer": lora * 16 / GIB,  # weight, gradient and two moments in float32
        "activations": tokens_per_pass * hidden * kept * weight_bytes / 2 / GIB,
    }


def check_memory(parts: dict[str, float]) -> None:
    """Print the estimate beside what is there.

    Raises:
        UserError: the weights alone do not fit.
    """
    free, where = _free_memory_gib()
    total = sum(parts.values())
    listed = ", ".join(f"{name} {size:.1f}" for name, size in parts.items())
    log.info("memory: about %.1f GiB (%s); %.1f GiB free on the %s", total, listed, free, where)
    advice = "lower train.rows_per_pass, set train.gradient_checkpointing: true"
    if parts["weights"] > free:
        raise UserError(
            f"the base's weights take {parts['weights']:.1f} GiB and the {where} has {free:.1f} GiB free; "
            "use train.quantization: nf4, a smaller base, or other hardware"
        )
    if total > free:
        log.warning("warning: that is more than is free; if memory runs out, %s", advice)


def _free_memory_gib() -> tuple[float, str]:
    import psutil
    import torch

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] / GIB, "GPU"
    return psutil.virtual_memory().available / GIB, "machine"


def check_disk(needed_bytes: int, folder: Path) -> None:
    """Make sure that what will be written fits.

    Raises:
        UserError: it does not.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise UserError(
            f"{folder.resolve()}: {free / GIB:.1f} GiB free and about {needed_bytes / GIB:.1f} GiB needed; "
            "make room (dvc gc -w removes outputs of other experiments from the cache)"
        )


def main() -> None:
    """Check parameters, base, device and disk, and say what was found."""
    params = read_params()
    size = check_base(params.base)
    # the hub's cache or nothing, then the merged model in the workspace and in DVC's cache
    check_disk(2 * size + (0 if params.base.is_folder else size), Path.cwd())
    summary = {
        "parameters": "valid",
        "base": f"{params.base.model}, {size / GIB:.2f} GiB",
        "device": describe_device(),
    }
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    from fintune.stage import run

    run(main)
