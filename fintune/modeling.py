"""Base model and adapter: load, extend by the two tokens, save.

Only safetensors weights are read and no code from a model's folder is run.
"""

import gc
import inspect
import json
import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import ValidationError
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from fintune.hub import explain_model_error, weights_fingerprint
from fintune.params import Base, Lora, UserError
from fintune.prompts import SPECIAL_TOKENS

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
    torch's variable-length flash kernels, and a CPU runs sdpa on the documents side by side.

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
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    return attend(q, k, v, cu_seq_lens_q, max_length_q, sliding_window, scaling)[None], None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    window: int | None,
    scale: float | None,
) -> torch.Tensor:
    """Causal attention within each document.

    Args:
        query: (tokens, heads, head size); `key` and `value` may have fewer heads.
        bounds: int32, (documents + 1,): where each document starts, then the end.
        longest: tokens of the longest document.
        window: how many tokens each one sees, itself included; None for all before it.

    Returns:
        (tokens, heads, head size).
    """
    if query.is_cuda and query.dtype != torch.float32:  # flash kernels take 16 bits alone
        return _varlen(query, key, value, bounds, longest, window, scale)
    return _side_by_side(query, key, value, bounds, longest, window, scale)


def _side_by_side(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    window: int | None,
    scale: float | None,
) -> torch.Tensor:
    """One sdpa call on documents padded at their ends, where no earlier token looks.

    A CPU has no variable-length kernel, nor has a GPU one for float32, and a call for each document costs
    more than the padding.
    """
    repeats = query.shape[1] // key.shape[1]  # enable_gqa would take the slow path of a CPU
    key, value = (states.repeat_interleave(repeats, dim=1) for states in (key, value))
    place = torch.arange(longest, device=bounds.device)
    starts, lengths = bounds[:-1, None].long(), bounds.diff()[:, None]
    inside = place < lengths
    where = (starts + place).clamp(max=len(query) - 1).flatten()
    shape = (len(starts), longest, *query.shape[1:])
    q, k, v = (s.index_select(0, where).view(shape).transpose(1, 2) for s in (query, key, value))
    mask = None
    if window is not None and longest > window:
        mask = q.new_ones(longest, longest, dtype=torch.bool).tril().triu(1 - window)
    output = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale
    )
    flat = output.transpose(1, 2).flatten(0, 1)
    return flat.index_select(0, inside.flatten().nonzero().flatten())


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    window: int | None,
    scale: float | None,
) -> torch.Tensor:
    """torch's flash kernels; before torch 2.12 they take fewer key heads without being told."""
    from torch.nn.attention.varlen import varlen_attn

    options: Any = {"enable_gqa": True} if _must_be_told_of_groups() else {}
    seen = (window - 1 if window and window < longest else -1, 0)
    output: Any = varlen_attn(
        query,
        key,
        value,
        bounds,
        bounds,
        longest,
        longest,
        scale=scale,
        window_size=seen,
        **options,
    )
    return output  # type: ignore[no-any-return]


@cache
def _must_be_told_of_groups() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _mask_unless_packed(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """No mask for packed rows, which `packed_attention` keeps apart by their bounds.

    transformers finds them by their positions, and forbids then to leave the mask to sdpa.
    """
    if kwargs.get("attention_mask") is None and not kwargs.get("allow_is_causal_skip", True):
        return None
    return sdpa_mask(*args, **kwargs)


ATTENTION = "packed"
AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, _mask_unless_packed)


@dataclass(frozen=True)
class Trained:
    """What an adapter's folder says of its training: `base` and `train` parameters, and more.

    `instruction` is the one that most of its training rows had.
    """

    base: Base
    train: dict[str, Any]
    instruction: str

    @property
    def dtype(self) -> torch.dtype:
        """What its matrix products are computed in here."""
        return compute_dtype(self.train["precision"])

    @property
    def four_bits(self) -> torch.dtype | None:
        """What the products of its 4-bit base are computed in; None where the base is in 16 bits."""
        return self.dtype if self.train["quantization"] == "nf4" else None


def write_training(adapter: Path, base: Base, train: dict[str, Any], instruction: str) -> None:
    """Write `training.json` into an adapter's folder, for `read_training`."""
    said = {
        "base": base.model_dump(),
        "base_fingerprint": weights_fingerprint(base),
        "instruction": instruction,
        "train": train,
    }
    text = json.dumps(said, indent=2, ensure_ascii=False) + "\n"
    (adapter / "training.json").write_text(text, encoding="utf-8")


def read_training(adapter: Path) -> Trained:
    """Read an adapter's `training.json` and make sure that its base is still the one it was trained on.

    Raises:
        UserError: there is no adapter, or an older version's; its base is not here, or holds other
            weights now.
    """
    file = adapter / "training.json"
    if not file.is_file():
        raise UserError(
            f"{adapter}: no adapter there; `dvc repro train` makes it, `dvc pull` fetches it"
        )
    said = json.loads(file.read_text(encoding="utf-8"))
    if missing := [key for key in ("base_fingerprint", "instruction") if key not in said]:
        raise UserError(
            f"{file}: has no {' and no '.join(missing)}: it was trained by an older version of this project; "
            "`dvc repro train` trains it again"
        )
    try:
        base = Base(**said["base"])
    except ValidationError:
        raise UserError(
            f"{adapter} was trained on {said['base']['model']}, a folder that is not here; work in the "
            "folder that holds it"
        ) from None
    if said["base_fingerprint"] != weights_fingerprint(base):
        raise UserError(
            f"{adapter} was trained on other weights than {base.model}"
            f"{f' at {base.revision}' if base.revision else ''} holds now; bring that base back, or "
            "`dvc repro train` to train on this one"
        )
    return Trained(base, said["train"], said["instruction"])


def device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def free_memory() -> None:
    """Give a dropped model's memory back before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
    """Write LoRA weights and the two tokens' rows, not the whole resized embedding.

    PEFT keeps names in sets and writes them in the order of a hash that each process draws anew; sorted,
    equal adapters are equal files.
    """
    for config in model.peft_config.values():
        for name, value in vars(config).items():
            if isinstance(value, set):
                setattr(config, name, sorted(value))
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


def load_another_adapter(model: PeftModel, folder: Path, name: str) -> None:
    """Put a second saved adapter beside the first, which stays the active one; `set_adapter` switches.

    To be called before the model has computed anything: PEFT reads the model's state here, and on some
    CPUs bitsandbytes rounds the 4-bit weights' scales once more when its state is read after a pass.

    Raises:
        UserError: the adapter does not fit this base.
    """
    try:
        model.load_adapter(str(folder), adapter_name=name)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{folder}: the adapter does not fit its base: {error}") from error
    model.eval()


def load_plain(folder: Path) -> PreTrainedModel:
    """Load a merged folder as any user of transformers would: in its own type, or without a GPU in float32.

    There float32 is faster than 16 bits, and exact.
    """
    dtype = "auto" if device().type == "cuda" else torch.float32
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map={"": device()}, use_safetensors=True
    )
    return model
