"""Load the base model, in 4 bits or unquantized, and add rows for the new tokens.

Reads only safetensors weights and runs no code from a model's folder.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fintune.errors import UserError
from fintune.hardware import device
from fintune.hub.client import explain_model_error
from fintune.hub.models import checked_folder
from fintune.model.conformance import agreement_of
from fintune.params import Base


def load_base(
    base: Base,
    tokenizer: PreTrainedTokenizerBase,
    quantization: str,
    dtype: torch.dtype,
    on: torch.device | None = None,
    shardable: bool = False,
) -> PreTrainedModel:
    """Load the base and extend its embedding and head for the new tokens.

    Args:
        quantization: `nf4` for 4-bit weights with double quantization (QLoRA, Dettmers et al. 2023);
            embedding, norms and head stay in `dtype`. `none` keeps every weight in `dtype`.
        dtype: type of the unquantized weights and of the matrix products.
        on: the device; by default the first GPU, or else the CPU.
        shardable: hold 4-bit weights as numbers of `dtype`, several in each, which FSDP can share out.

    Returns:
        The model with `max(rows of the base, len(tokenizer))` rows. New rows are the mean of the base's,
        so that every stage and device starts from the same values up to rounding.
    """
    config = None
    if quantization == "nf4":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=dtype if shardable else torch.uint8,
        )
    model: PreTrainedModel
    checked_folder(base)
    try:
        attention = agreement_of(read_config(base)).padded
        model, info = AutoModelForCausalLM.from_pretrained(
            base.model,
            revision=base.revision,
            dtype=dtype,
            quantization_config=config,
            device_map={"": on or device()},
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation=attention,
            output_loading_info=True,
        )
    except OSError as error:
        reason = str(error)
        if not base.is_folder:
            reason = explain_model_error(error, base.model, base.revision)
        raise UserError(f"base.model: {base.model}: cannot be loaded: {reason}") from error
    check_complete(base.model, info)
    for module in model.modules():
        # else the first evaluation converts 4-bit weights to a form without gradients, in bfloat16
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    add_rows(model, len(tokenizer))
    model.config.use_cache = False
    model.generation_config = GenerationConfig()  # the base's own, such as a penalty, is not used
    return model


def read_config(base: Base) -> Any:
    """Read a base's configuration.

    Raises:
        UserError: it is missing or damaged, or of a type that transformers does not know.
    """
    try:
        return AutoConfig.from_pretrained(
            base.model, revision=base.revision, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"base.model: {base.model}: is computed by code of its own (auto_map in its config.json), "
                "which is never run; docs/bases.md lists the types of bases that need none"
            ) from None
        reason = str(error).strip().splitlines()[0]
        if not base.is_folder:
            reason = explain_model_error(error, base.model, base.revision)
        raise UserError(f"base.model: {base.model}: cannot be loaded: {reason}") from error


def check_complete(model: str | Path, info: dict[str, Any]) -> None:
    """Check that no weight was made up because the files lack it.

    Args:
        info: what transformers says of the loading.

    Raises:
        UserError: a weight is missing.
    """
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"base.model: {model}: {missing[0]} is not among the weights in its files"
            + (f", nor are {len(missing) - 1} others" if len(missing) > 1 else "")
        )


def add_rows(model: PreTrainedModel, rows: int) -> None:
    """Extend embedding and head to this many tokens; new rows are the mean of the others."""
    old = model.get_input_embeddings().weight.shape[0]
    if rows <= old:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    tables = {id(w): w for w in (model.get_input_embeddings().weight, head_weight(model))}
    with torch.no_grad():
        for weight in tables.values():
            weight[old:] = weight[:old].float().mean(dim=0).to(weight.dtype)


def head_weight(model: PreTrainedModel) -> torch.Tensor:
    """Return the head's weight, (vocabulary, hidden); with tied weights this is the embedding."""
    weight: torch.Tensor = model.get_output_embeddings().weight
    return weight


def load_plain(folder: Path) -> PreTrainedModel:
    """Load a merged folder as any transformers user would: in its own type on a GPU, in float32 on a CPU.

    On a CPU, float32 is faster than 16 bits, and exact.
    """
    dtype = "auto" if device().type == "cuda" else torch.float32
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        device_map={"": device()},
        use_safetensors=True,
        trust_remote_code=False,
    )
    return model
