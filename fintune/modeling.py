"""Base model and adapter: load, extend by the two tokens, save, merge.

Only safetensors weights are read and no code from a model's folder is run.
"""

import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from fintune.hub import explain_model_error
from fintune.params import Base, Lora, UserError
from fintune.prompts import SPECIAL_TOKENS, end_token_id

log = logging.getLogger("fintune")
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document of a packed row; other inputs go to sdpa.

    A packed row through sdpa takes a dense mask and time in the square of its length. Here a GPU runs
    torch's variable-length flash kernels, and a CPU runs sdpa on one document after another.

    Args:
        query: (1, heads, tokens, head size); `key` and `value` may have fewer heads.
        cu_seq_lens_q: int32, (documents + 1,): where each document starts, then the end; TRL's
            collator makes it when rows are packed.

    Returns:
        (1, tokens, heads, head size), and no attention weights.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    if query.is_cuda:
        return _varlen(
            query, key, value, scaling, cu_seq_lens_q, max_length_q, sliding_window
        ), None
    bounds = cu_seq_lens_q.tolist()
    documents = []
    for start, end in pairwise(bounds):
        q, k, v = (states[:, :, start:end] for states in (query, key, value))
        mask = None
        if sliding_window is not None and end - start > sliding_window:
            mask = q.new_ones(end - start, end - start, dtype=torch.bool).tril()
            mask = mask.triu(1 - sliding_window)
        documents.append(
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
            )
        )
    return torch.cat(documents, dim=2).transpose(1, 2), None


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    bounds: torch.Tensor,
    longest: int,
    sliding_window: int | None,
) -> torch.Tensor:
    """torch's own varlen_attn; torch 2.11 has no grouped heads there, so keys and values are repeated."""
    from torch.nn.attention.varlen import varlen_attn

    repeats = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(repeats, dim=1) for states in (key, value))
    q, k, v = (states[0].transpose(0, 1).contiguous() for states in (query, key, value))
    window = (sliding_window - 1 if sliding_window else -1, 0)
    output = varlen_attn(
        q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=window
    )
    return output.unsqueeze(0)  # type: ignore[union-attr]


def _mask_unless_packed(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """No mask without padding: `packed_attention` keeps documents apart by their bounds."""
    if kwargs.get("attention_mask") is None:
        return None
    return sdpa_mask(*args, **kwargs)


ATTENTION = "packed"
AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, _mask_unless_packed)


def device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def compute_dtype(precision: str) -> torch.dtype:
    """The type that matrix products are computed in; `auto` takes the best that this hardware has."""
    if precision != "auto":
        return DTYPES[precision]
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def load_base(
    base: Base,
    tokenizer: PreTrainedTokenizerBase,
    quantization: str,
    dtype: torch.dtype,
    on: torch.device | None = None,
) -> PreTrainedModel:
    """Load the base and give it rows for the new tokens in embedding and head.

    Args:
        quantization: `nf4` for 4-bit weights with double quantisation (QLoRA, Dettmers et al. 2023);
            embedding, norms and head stay in `dtype`. `none` keeps every weight in `dtype`.
        dtype: what weights are kept in and products are computed in.
        on: where to put it; the first GPU, or the CPU, when left out.

    Returns:
        The model with `max(rows of the base, len(tokenizer))` rows; new ones start as the mean of
        the base's, which is the same in every stage and on every device to rounding.
    """
    config = None
    if quantization == "nf4":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model: PreTrainedModel
    try:
        model = AutoModelForCausalLM.from_pretrained(
            base.model,
            revision=base.revision,
            dtype=dtype,
            quantization_config=config,
            device_map={"": on or device()},
            use_safetensors=True,
            attn_implementation=ATTENTION,
        )
    except OSError as error:
        reason = str(error)
        if not base.is_folder:
            reason = explain_model_error(error, base.model, base.revision)
        raise UserError(f"base.model: {base.model}: cannot be loaded: {reason}") from error
    _add_rows(model, len(tokenizer))
    model.config.use_cache = False
    return model


def _add_rows(model: PreTrainedModel, rows: int) -> None:
    old = model.get_input_embeddings().weight.shape[0]
    if rows <= old:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    tables = {id(w): w for w in (model.get_input_embeddings().weight, head_weight(model))}
    with torch.no_grad():
        for weight in tables.values():
            weight[old:] = weight[:old].float().mean(dim=0).to(weight.dtype)


def head_weight(model: PreTrainedModel) -> torch.Tensor:
    """The head's weight, (vocabulary, hidden); the embedding's own where the two are tied."""
    weight: torch.Tensor = model.get_output_embeddings().weight
    return weight


def add_adapter(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, lora: Lora, seed: int
) -> PeftModel:
    """Put a new LoRA adapter, drawn from `seed`, on the base and make the two tokens' rows trainable.

    LoRA alone would leave the new tokens untrained (artidoro/qlora#214): the model could not learn to
    end an answer.

    Raises:
        UserError: a name in train.lora.target_modules is no linear layer of this model.
    """
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    if unknown := [name for name in lora.target_modules if name not in names]:
        linear = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if _is_linear(m)}
        raise UserError(
            f"train.lora.target_modules: {', '.join(unknown)}: no such layer in this model; "
            f"it has {', '.join(sorted(linear - {'lm_head'}))}"
        )
    new_tokens = [int(i) for i in tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))]
    tables = ["embed_tokens"] if model.config.tie_word_embeddings else ["embed_tokens", "lm_head"]
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        trainable_token_indices=dict.fromkeys(tables, new_tokens),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    tuned: PeftModel = get_peft_model(model, config)
    return tuned


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear)


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write LoRA weights and the two tokens' rows, not the whole resized embedding."""
    model.save_pretrained(str(folder), save_embedding_layers=False)


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put a saved adapter on its base, for use, not for training.

    Raises:
        UserError: the folder holds no adapter, or one of another shape.
    """
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(
            f"{folder}: no adapter there; `dvc repro train` makes it, `dvc pull` fetches it"
        )
    try:
        tuned: PeftModel = PeftModel.from_pretrained(model, str(folder))
    except RuntimeError as error:
        raise UserError(f"{folder}: the adapter does not fit its base: {error}") from error
    return tuned.eval()


def merge(model: PeftModel) -> PreTrainedModel:
    """Fold the adapter into its base's weights; the model that remains needs no PEFT.

    Raises:
        ValueError: the base is in 4 bits, where merging would quantise again (huggingface/peft#2321).
    """
    if getattr(model.get_base_model(), "is_quantized", False):
        raise ValueError("an adapter is merged into 16-bit weights, never into 4-bit ones")
    merged: Any = model.merge_and_unload(safe_merge=True)
    return merged  # type: ignore[no-any-return]


def save_merged(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype
) -> None:
    """Write a plain Hugging Face folder: 16-bit safetensors, tokenizer with both tokens, stop token."""
    model = model.to(dtype)
    model.config.dtype = dtype
    model.config.use_cache = True
    model.config.eos_token_id = end_token_id(tokenizer)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = [end_token_id(tokenizer), tokenizer.eos_token_id]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(str(folder), max_shard_size="5GB")
    tokenizer.save_pretrained(str(folder))


def load_plain(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load a merged folder as any user of transformers would."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map={"": device()}, use_safetensors=True
    )
    return model
