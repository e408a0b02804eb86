"""A model as it stands in memory, its adapter folded in, as a plain folder that other programs read."""

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from fintune.fused import active_adapter, base_of, dequantize, token_table
from fintune.params import UserError
from fintune.preflight import GIB


def save_plain(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write base and active adapter, or in `disable_adapter()` the base alone, as a Hugging Face folder.

    It computes what the model does, to rounding: an adapter on a 4-bit base was trained against the
    dequantised weights, and those are written, in the type that products are computed in. Takes as
    much memory of the host as the folder.

    Raises:
        UserError: the folder's disk has no room for it.
    """
    base, dtype = base_of(model), compute_type(model)
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, dtype=dtype)
    places = {name: name.rpartition(".") for name in empty.state_dict()}
    if config.tie_word_embeddings:
        head = base.get_output_embeddings()
        places = {name: at for name, at in places.items() if base.get_submodule(at[0]) is not head}
    needed = sum(empty.state_dict()[name].nbytes for name in places)
    if needed > shutil.disk_usage(folder).free:
        raise UserError(
            f"{folder}: no room for a plain folder of the model, {needed / GIB:.1f} GiB; "
            "TMPDIR names another place for temporary files"
        )
    weights = {
        name: _tensor(base.get_submodule(module), kind).to("cpu", dtype).contiguous()
        for name, (module, _, kind) in places.items()
    }
    empty.save_pretrained(str(folder), state_dict=weights)
    tokenizer.save_pretrained(str(folder))


def compute_type(model: Any) -> torch.dtype:
    """What products are computed in, whatever the weights are stored in."""
    dtype: torch.dtype = base_of(model).get_output_embeddings().weight.dtype
    return dtype


@torch.no_grad()
def _tensor(module: Any, kind: str) -> Tensor:
    """A module's weight or bias with the adapter that it computes with."""
    layer: Any = getattr(module, "base_layer", module)
    if hasattr(module, "token_adapter"):
        table, rows, tokens = token_table(module)
        weight = table.clone()
        weight[tokens] = rows.to(weight.dtype)
        return weight
    if kind != "weight":
        return getattr(layer, kind)  # type: ignore[no-any-return]
    weight = dequantize(layer) if hasattr(layer.weight, "quant_state") else layer.weight
    name = active_adapter(module)
    return weight.float() + module.get_delta_weight(name).float() if name else weight
