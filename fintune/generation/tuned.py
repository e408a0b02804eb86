"""Load a tuned model, an adapter on its base or a merged folder, and encode questions for it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from fintune.data.chat import Refused, prompt_of
from fintune.data.prompt import (
    SPECIAL_TOKENS,
    Tokenizer,
    encode,
    end_token_id,
    end_tokens,
    has_own_template,
)
from fintune.errors import UserError
from fintune.generation.decoding import options
from fintune.hardware import device
from fintune.model.adapter import load_adapter, read_training
from fintune.model.base import load_base, load_plain


def load_tuned(folder: Path) -> tuple[Any, Tokenizer]:
    """Load an adapter on the base that it was trained on, or a merged model.

    Without a GPU, everything is computed in float32, which is faster there, and exact.

    Raises:
        UserError: the folder contains neither, or its base cannot be loaded.
    """
    if (folder / "adapter_config.json").is_file():
        return _load_tuned_base(folder)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: neither a merged model nor an adapter is there; `dvc repro` makes both, "
            "`dvc pull` fetches them"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise UserError(f"{folder}: not a model of this project: its tokenizer lacks the prompt")
    return load_plain(folder), tokenizer


def _load_tuned_base(adapter: Path) -> tuple[Any, Tokenizer]:
    trained = read_training(adapter)
    tokenizer = AutoTokenizer.from_pretrained(adapter, trust_remote_code=False)
    quantization = trained.train["quantization"]
    base: PreTrainedModel = load_base(trained.base, tokenizer, quantization, trained.dtype)
    if quantization == "nf4" and device().type == "cpu":
        base = base.dequantize()  # 4-bit products are computed in bfloat16 on a CPU
    base.config.use_cache = True
    return load_adapter(base, adapter), tokenizer


def generation_config(tokenizer: Tokenizer, decoding: Mapping[str, float]) -> GenerationConfig:
    """Build the generation config of the tuned model: decoding and end tokens.

    Args:
        decoding: the settings and `max_new_tokens`, as evaluation.json has them.
    """
    return GenerationConfig(
        **options(decoding),
        max_new_tokens=int(decoding["max_new_tokens"]),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end_tokens(tokenizer, end_token_id(tokenizer)),
        pad_token_id=tokenizer.pad_token_id,
    )


def prompt_tokens(tokenizer: Tokenizer, question: str, instruction: str | None) -> list[int]:
    """Encode a question's prompt, by default with the most frequent training instruction.

    Raises:
        UserError: the question is empty, or the text contains a special token of the prompt.
    """
    if not question.strip():
        raise UserError("the question is empty")
    if used := [t for t in SPECIAL_TOKENS if t in question or t in (instruction or "")]:
        raise UserError(f"{used[0]} stands in the text, and is a token of the prompt itself")
    if has_own_template(tokenizer):
        usual = tokenizer.init_kwargs.get("usual_instruction", "")
        row = {"instruction": (instruction or "").strip() or usual, "input": question.strip()}
        try:
            return encode(tokenizer, prompt_of(tokenizer, row), "")[0]
        except Refused as refused:
            raise UserError(f"the model's chat template {refused}") from None
    messages = [{"role": "user", "content": question.strip()}]
    if instruction and instruction.strip():
        messages.insert(0, {"role": "system", "content": instruction.strip()})
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    ids: list[int] = encoded["input_ids"]
    return ids
