"""Create, write and load LoRA adapters: weights, tokenizer and training record."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from fintune.data.prompt import (
    Tokenizer,
    add_chat_template,
    load_tokenizer,
    pad_left,
    prompt_token_ids,
)
from fintune.errors import UserError
from fintune.hardware import compute_dtype
from fintune.hub.models import weights_fingerprint
from fintune.params import ALL_LINEAR, Base, Lora


@dataclass(frozen=True)
class AdapterInfo:
    """The training record of an adapter: its base, `train` parameters, most frequent instruction, layout."""

    base: Base
    train: dict[str, Any]
    instruction: str
    template: Literal["seed", "base"] = "seed"  # adapters of earlier versions do not say

    @property
    def dtype(self) -> torch.dtype:
        """Type of the matrix products on this hardware."""
        return compute_dtype(self.train["precision"])

    def load_tokenizer(self) -> Tokenizer:
        """Load the tokenizer that it was trained with; adapters of earlier versions have new tokens."""
        return load_tokenizer(self.base, self.train.get("end_token", "new"), self.template)

    @property
    def nf4_compute_dtype(self) -> torch.dtype | None:
        """Compute type of the 4-bit base; None where the base is not quantized."""
        return self.dtype if self.train["quantization"] == "nf4" else None


def write_training(
    adapter: Path,
    base: Base,
    train: dict[str, Any],
    instruction: str,
    template: Literal["seed", "base"] = "seed",
) -> None:
    """Write `training.json` into an adapter's folder, for `read_training`."""
    said = {
        "base": base.model_dump(),
        "base_fingerprint": weights_fingerprint(base),
        "instruction": instruction,
        "train": train,
        **({} if template == "seed" else {"template": template}),
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
    return AdapterInfo(base, said["train"], said["instruction"], said.get("template", "seed"))


def add_adapter(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, lora: Lora, seed: int
) -> PeftModel:
    """Add a new LoRA adapter, and make the rows of the prompt's new tokens trainable, if it has any.

    LoRA alone would leave the new tokens untrained (artidoro/qlora#214): the model could not learn to
    end an answer.

    Raises:
        UserError: a name in train.lora.target_modules is not a linear layer of this model.
    """
    return with_lora(model, lora, prompt_token_ids(tokenizer), seed)


def with_lora(model: PreTrainedModel, lora: Lora, tokens: list[int], seed: int) -> PeftModel:
    """Add a new LoRA adapter, initialized from `seed`, and make the rows of these tokens trainable.

    Raises:
        UserError: a name in train.lora.target_modules is not a linear layer of this model.
    """
    layers = linear_layers(model)
    targets = layers if lora.target_modules == ALL_LINEAR else list(lora.target_modules)
    if unknown := [name for name in targets if name not in layers]:
        raise UserError(
            f"train.lora.target_modules: {', '.join(unknown)}: no linear layer of this model; it has "
            f"{', '.join(layers)}; {ALL_LINEAR} takes them all"
        )
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        trainable_token_indices=dict.fromkeys(table_names(model), tokens) if tokens else None,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    tuned: PeftModel = get_peft_model(model, config)
    _keep_head_bias(tuned)
    return tuned


def _keep_head_bias(model: PeftModel) -> None:
    """Add the head's bias, which PEFT leaves out where it computes with trained rows."""
    plain = model.get_base_model()
    head = plain.get_output_embeddings()
    bias = getattr(getattr(head, "original_module", head), "bias", None)
    if bias is None or not hasattr(head, "token_adapter"):
        return

    def add(wrapper: Any, _: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits if wrapper.token_adapter.disable_adapters else logits + bias.to(logits.dtype)

    head.register_forward_hook(add)


def base_of(model: Any) -> Any:
    """Return the underlying transformers model, which may contain adapter layers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Return the last names of the linear layers that an adapter can change.

    Left out are the head, the routers of experts, which return more than a product, and what a state-space
    block's kernel reads past the adapter (PEFT refuses that).
    """
    head = model.get_output_embeddings()
    found = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    }
    convolves = any(isinstance(module, torch.nn.Conv1d) for module in model.modules())
    return sorted(found - {"router", "gate"} - ({"out_proj"} if convolves else set()))


def table_names(model: PreTrainedModel) -> list[str]:
    """Return the last names of the modules that hold the tokens' rows: embedding, and head if it has its own.

    Raises:
        UserError: the head has no rows of its own, or the model is no plain language model.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    modules = [embedding] if head is None or head.weight is embedding.weight else [embedding, head]
    names = {id(module): name.rsplit(".", 1)[-1] for name, module in model.named_modules()}
    return [names[id(module)] for module in modules]


def write_adapter(
    model: PeftModel,
    folder: Path,
    base: Base,
    train: dict[str, Any],
    instruction: str,
    template: Literal["seed", "base"] = "seed",
) -> None:
    """Write an adapter's folder: weights, `training.json`, and the tokenizer with its chat template.

    Args:
        train: the `train` parameters used.
        instruction: the most frequent one among the training rows.
        template: what laid out the training rows.
    """
    save_adapter(model, folder)
    (folder / "README.md").unlink()  # PEFT's model card template
    tokenizer = load_tokenizer(base, train["end_token"], template)
    add_chat_template(tokenizer, instruction)
    pad_left(tokenizer)
    tokenizer.save_pretrained(folder)
    write_training(folder, base, train, instruction, template)


def describe_adapter(model: PeftModel) -> str:
    """Format the number of trainable parameters and their share."""
    trainable, total = model.get_nb_trainable_parameters()
    return f"{trainable:,} of {total:,} parameters ({100 * trainable / total:.3f} %)"


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write LoRA weights and the new tokens' rows, not the whole resized embedding.

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
    _keep_head_bias(tuned)
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
