"""Merge an adapter into its base, shard by shard: a plain Hugging Face folder that needs no PEFT.

Memory stays near one shard and the adapter: the base is never loaded as a model.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fintune.data.prompt import Tokenizer, end_token_id
from fintune.errors import UserError
from fintune.hardware import check_disk, device
from fintune.hub.models import local_folder
from fintune.merging.lora_update import apply_update, nf4_round_trip, read_updates
from fintune.params import Base

SHARD_SIZE = "5GB"


def merge_into_folder(
    base: Base,
    tokenizer: Tokenizer,
    adapter: Path | None,
    folder: Path,
    dtype: torch.dtype,
    nf4_compute_dtype: torch.dtype | None,
) -> None:
    """Write the base, with the two tokens' rows and an adapter merged in, as a plain folder.

    Sums are computed in float32 and rounded once, to `dtype`; weights are not quantized again.

    Args:
        adapter: a folder written by training; None for the base alone.
        dtype: of the written weights.
        nf4_compute_dtype: None adds the adapter to the base's original weights. The compute type of a 4-bit
            base adds it to the weights that it was trained on: the base's after an NF4 round trip.

    Raises:
        UserError: a shard is missing, cut off or damaged, the disk is too small, or the adapter does
            not belong to this base.
    """
    source = local_folder(base)
    config = AutoConfig.from_pretrained(source)
    with torch.device("meta"):
        skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    shapes = dict(skeleton.state_dict())
    table, head = _tables(skeleton)
    if config.tie_word_embeddings:
        del shapes[head]  # same as the embedding
    quantized = _linear_weights(skeleton) - {head} if nf4_compute_dtype else set()
    updates = read_updates(adapter) if adapter else {}
    rows = max(len(tokenizer), shapes[table].shape[0])
    for name in {table, head} & set(shapes):
        shapes[name] = torch.empty(rows, shapes[name].shape[1], device="meta")
    with Checkpoint(source) as weights:
        if lacking := sorted((set(shapes) | set(updates)) - set(weights.places)):
            raise UserError(
                f"{base.model}: {lacking[0]} is not among the weights in its files, so the adapter "
                "cannot be merged shard by shard; the adapter is whole and can be used with PEFT"
            )
        plan = split_torch_state_dict_into_shards(
            {name: shape.to(dtype) for name, shape in shapes.items()}, max_shard_size=SHARD_SIZE
        )
        check_disk(plan.metadata["total_size"], folder)
        with tqdm(total=len(shapes), desc="merge", unit="weight", leave=False) as bar:
            for file, inside in plan.filename_to_tensors.items():
                shard = {}
                for name in inside:
                    weight = weights.read(name).to(device())
                    if name in quantized:
                        assert nf4_compute_dtype
                        weight = nf4_round_trip(weight.to(nf4_compute_dtype))
                    elif weight.shape != shapes[name].shape:
                        weight = _with_rows(weight, rows, nf4_compute_dtype or dtype)
                    shard[name] = apply_update(weight, updates.get(name), name).to(dtype).cpu()
                    bar.update()
                _save(shard, folder / file)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    config.dtype, config.vocab_size, config.use_cache = dtype, rows, True
    config.eos_token_id, config.pad_token_id = end_token_id(tokenizer), tokenizer.pad_token_id
    config.architectures = [type(skeleton).__name__]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_checksums(folder: Path) -> None:
    """Write `SHA256SUMS` of all files, for `sha256sum --check SHA256SUMS`."""
    lines = []
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n")
    (folder / "SHA256SUMS").write_text("".join(lines))


def _save(shard: dict[str, torch.Tensor], file: Path) -> None:
    try:
        save_file(shard, file, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{file.parent.parent.resolve()}: the merged weights could not be written: {error}; make room "
            "(dvc gc -w removes outputs of other experiments from the cache)"
        ) from error


def _tables(model: PreTrainedModel) -> tuple[str, str]:
    """Return the names of the embedding's and the head's weight."""
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    return names[id(model.get_input_embeddings())], names[id(model.get_output_embeddings())]


def _linear_weights(model: PreTrainedModel) -> set[str]:
    """Return the names of the weights that loading in 4 bits quantizes, and the head's, which it does not."""
    linear = torch.nn.Linear
    return {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, linear)}


def _with_rows(weight: torch.Tensor, rows: int, dtype: torch.dtype) -> torch.Tensor:
    """Append rows, each the mean of the others, rounded as in training."""
    old = weight.to(dtype)
    mean = old.float().mean(dim=0, keepdim=True).to(dtype)
    return torch.cat([old, mean.expand(rows - len(old), -1)])


class Checkpoint:
    """Reader of the weights in a folder's safetensors files, one at a time."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            self.files = {*json.loads(index.read_text())["weight_map"].values()}
        else:
            self.files = {"model.safetensors"}
        self.folder = folder
        self.open: dict[str, Any] = {}
        self.places: dict[str, str] = {}

    def __enter__(self) -> "Checkpoint":
        for file in sorted(self.files):
            try:
                handle = safe_open(self.folder / file, "pt").__enter__()
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"{self.folder / file}: missing, cut off or damaged ({error}); fetch this file "
                    "again, then `dvc repro`"
                ) from error
            self.open[file] = handle
            self.places |= dict.fromkeys(handle.keys(), file)
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self.open.values():
            handle.__exit__(None, None, None)

    def read(self, name: str) -> torch.Tensor:
        weight: torch.Tensor = self.open[self.places[name]].get_tensor(name)
        return weight
