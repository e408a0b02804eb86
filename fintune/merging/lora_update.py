"""Read an adapter's changes to the base's weights and apply them, weight by weight."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file

from fintune.errors import UserError
from fintune.hardware import device

PREFIX = "base_model.model."  # PEFT's prefix of module names


@dataclass
class Update:
    """An adapter's change to one weight: `scale` B A is added, and the rows of some tokens are replaced."""

    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    scale: float = 0.0
    rows: torch.Tensor | None = None
    tokens: list[int] = field(default_factory=list)


def read_updates(adapter: Path) -> dict[str, Update]:
    """Read an adapter's LoRA matrices and token rows, by the name of the base's weight.

    Raises:
        UserError: the adapter is missing or damaged, or of a kind that this project does not make.
    """
    file = adapter / "adapter_model.safetensors"
    try:
        tensors = load_file(file)
        config = LoraConfig.from_pretrained(str(adapter))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{file}: not there or damaged: {error}") from error
    if config.use_dora or config.use_rslora or config.alpha_pattern or config.rank_pattern:
        raise UserError(
            f"{adapter}: DoRA, rsLoRA and ranks or alphas by layer cannot be merged here"
        )
    rows: Any = config.trainable_token_indices or {}
    updates: dict[str, Update] = {}
    for key, tensor in tensors.items():
        module, _, kind = key.removeprefix(PREFIX).partition(".lora_")
        if kind in ("A.weight", "B.weight"):
            update = updates.setdefault(f"{module}.weight", Update())
            update.scale = config.lora_alpha / config.r
            if kind == "A.weight":
                update.down = tensor
            else:
                update.up = tensor
        elif key.endswith(".token_adapter.trainable_tokens_delta"):
            module = key.removeprefix(PREFIX).removesuffix(".token_adapter.trainable_tokens_delta")
            update = updates.setdefault(f"{module}.weight", Update())
            update.rows, update.tokens = tensor, rows[module.rsplit(".", 1)[-1]]
        else:
            raise UserError(f"{file}: {key} is neither a LoRA matrix nor rows of tokens")
    return updates


def nf4_round_trip(weight: torch.Tensor) -> torch.Tensor:
    """Quantize a weight to NF4 with double quantization, as loading in 4 bits does, and dequantize it."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn.modules import Params4bit

    options: Any = {"compress_statistics": True, "quant_type": "nf4"}
    packed: Any = Params4bit(weight, requires_grad=False, **options)
    packed = packed.to(device())
    plain: torch.Tensor = dequantize_4bit(packed.data, packed.quant_state)
    return plain


def apply_update(weight: torch.Tensor, update: Update | None, name: str) -> torch.Tensor:
    """Return the weight with an adapter's update, in float32; unchanged without an update.

    Raises:
        UserError: the adapter does not fit its base.
    """
    if update is None:
        return weight
    whole = weight.float()
    try:
        if update.down is not None and update.up is not None:
            down, up = (part.to(whole.device).float() for part in (update.down, update.up))
            whole = torch.addmm(whole, up, down, alpha=update.scale)
        if update.rows is not None:
            whole = whole.clone()
            whole[update.tokens] = update.rows.to(whole.device).float()
    except (RuntimeError, IndexError) as error:
        raise UserError(f"the adapter does not fit its base at {name}: {error}") from error
    return whole
