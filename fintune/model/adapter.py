"""Create, write and load LoRA adapters: weights, tokenizer and training record."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fintune.data.prompt import SPECIAL_TOKENS, add_chat_template, load_tokenizer
from fintune.errors import UserError
from fintune.hardware import compute_dtype
from fintune.hub.models import weights_fingerprint
from fintune.params import Base, Lora


@dataclass(frozen=True)
class AdapterInfo:
    """The training record of an adapter: its base, `train` parameters, and the most frequent instruction."""

    base: Base
    train: dict[str, Any]
    instruction: str

    @property
    def dtype(self) -> torch.dtype:
        """Type of the matrix products on this hardware."""
        return compute_dtype(self.train["precision"])

    @property
    def nf4_compute_dtype(self) -> torch.dtype | None:
        """Compute type of the 4-bit base; None where the base is not quantized."""
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


def read_training(adapter: Path) -> AdapterInfo:
    """Read an adapter's `training.json` and check that its base has not changed since.

    Raises:
        UserError: the adapter is missing or from an older version; its base is missing or has other weights.
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
    return AdapterInfo(base, said["train"], said["instruction"])


def add_adapter(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, lora: Lora, seed: int
) -> PeftModel:
    """Add a new LoRA adapter, initialized from `seed`, and make the two new tokens' rows trainable.

    LoRA alone would leave the new tokens untrained (artidoro/qlora#214): the model could not learn to
    end an answer.

    Raises:
        UserError: a name in train.lora.target_modules is not a linear layer of this model.
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


def write_adapter(
    model: PeftModel, folder: Path, base: Base, train: dict[str, Any], instruction: str
) -> None:
    """Write an adapter's folder: weights, `training.json`, and the tokenizer with its chat template.

    Args:
        train: the `train` parameters used.
        instruction: the most frequent one among the training rows.
    """
    save_adapter(model, folder)
    (folder / "README.md").unlink()  # PEFT's model card template
    tokenizer = load_tokenizer(base)
    add_chat_template(tokenizer, instruction)
    tokenizer.save_pretrained(folder)
    write_training(folder, base, train, instruction)


def describe_adapter(model: PeftModel) -> str:
    """Format the number of trainable parameters and their share."""
    trainable, total = model.get_nb_trainable_parameters()
    return f"{trainable:,} of {total:,} parameters ({100 * trainable / total:.3f} %)"


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write LoRA weights and the two tokens' rows, not the whole resized embedding.

    PEFT stores names in sets, whose order differs between processes. They are sorted here so that equal
    adapters give identical files.
    """
    for config in model.peft_config.values():
        for name, value in vars(config).items():
            if isinstance(value, set):
                setattr(config, name, sorted(value))
    model.save_pretrained(str(folder), save_embedding_layers=False)


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Load a saved adapter onto its base for inference.

    Raises:
        UserError: the folder has no adapter, or the adapter does not fit the base.
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
    """Load a second adapter beside the first, which stays active; `set_adapter` switches.

    Call it before any forward pass: PEFT reads the model's state here, and on some CPUs bitsandbytes rounds
    the scales of 4-bit weights again when their state is read after a forward pass.

    Raises:
        UserError: the adapter does not fit this base.
    """
    try:
        model.load_adapter(str(folder), adapter_name=name)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{folder}: the adapter does not fit its base: {error}") from error
    model.eval()
