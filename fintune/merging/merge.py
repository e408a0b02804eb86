"""Merge an adapter into its base, shard by shard: a plain Hugging Face folder that needs no PEFT.

Memory stays near a few shards and the adapter: the base is never loaded as a model.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fintune.data.prompt import Tokenizer, end_token_id
from fintune.errors import UserError
from fintune.hardware import check_disk, device
from fintune.hub.models import checked_folder
from fintune.merging.lora_update import Update, apply_update, nf4_round_trip, read_updates
from fintune.model.base import add_rows, check_complete
from fintune.params import Base

SHARD_SIZE, SHARDS_AT_ONCE = "1GB", 4  # several files are hashed at once, too


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
    source = checked_folder(base)
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    with torch.device("meta"):
        skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    shapes = dict(skeleton.state_dict())
    table, head = _tables(skeleton)
    if config.tie_word_embeddings:
        del shapes[head]  # same as the embedding
    merging = _Merging(
        updates=read_updates(adapter) if adapter else {},
        quantized=_linear_weights(skeleton) - {head} if nf4_compute_dtype else set(),
        transposed={f"{n}.weight" for n, m in skeleton.named_modules() if isinstance(m, Conv1D)},
        rows=max(len(tokenizer), shapes[table].shape[0]),
        dtype=dtype,
        loaded=nf4_compute_dtype or dtype,
    )
    for name in {table, head, head.replace(".weight", ".bias")} & set(shapes):
        shapes[name] = torch.empty(merging.rows, *shapes[name].shape[1:], device="meta")
    with Checkpoint(source) as weights:
        if unknown := sorted(set(merging.updates) - set(shapes)):
            raise UserError(f"{adapter}: {unknown[0]} is no weight of {base.model}")
        if not set(shapes) <= set(weights.places):  # their names in the files are others
            _merge_in_memory(source, merging, folder)
            return _write_settings(config, skeleton, tokenizer, merging, folder)
        plan = split_torch_state_dict_into_shards(
            {name: shape.to(dtype) for name, shape in shapes.items()}, max_shard_size=SHARD_SIZE
        )
        check_disk(plan.metadata["total_size"], folder)
        with tqdm(total=len(shapes), desc="merge", unit="weight", leave=False) as bar:

            def write(file: str) -> None:
                shard = {}
                for name in plan.filename_to_tensors[file]:
                    weight = weights.read(name).to(device())
                    if weight.shape != shapes[name].shape:
                        weight = _with_rows(weight, merging.rows, merging.loaded)
                    shard[name] = merging.merge(name, weight).cpu()
                    bar.update()
                _save(shard, folder / file)

            with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:  # one merges while others are written
                list(pool.map(write, plan.filename_to_tensors))
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    _write_settings(config, skeleton, tokenizer, merging, folder)


@dataclass(frozen=True)
class _Merging:
    """The treatment of a base's weights, by name.

    `transposed` are stored as (inputs, outputs); `rows` is the number of tokens; `loaded` is the type in
    which training read the weights.
    """

    updates: dict[str, Update]
    quantized: set[str]
    transposed: set[str]
    rows: int
    dtype: torch.dtype
    loaded: torch.dtype

    def merge(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Return a weight as it was trained on, with the adapter's update."""
        turned = name in self.transposed
        weight = weight.t().contiguous() if turned else weight
        if name in self.quantized:
            weight = nf4_round_trip(weight.to(self.loaded))
        merged = apply_update(weight, self.updates.get(name), name).to(self.dtype)
        return merged.t().contiguous() if turned else merged


def _merge_in_memory(source: Path, merging: _Merging, folder: Path) -> None:
    """Merge a base whose weights have other names in its files; transformers reads and writes them."""
    model: PreTrainedModel
    model, info = AutoModelForCausalLM.from_pretrained(
        source,
        dtype="auto",
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    check_complete(source, info)
    add_rows(model, merging.rows)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.data = merging.merge(name, weight.to(device())).cpu()
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE)


def _write_settings(
    config: Any,
    skeleton: PreTrainedModel,
    tokenizer: Tokenizer,
    merging: _Merging,
    folder: Path,
) -> None:
    config.dtype, config.use_cache = merging.dtype, True
    config.get_text_config().vocab_size = merging.rows
    config.eos_token_id, config.pad_token_id = end_token_id(tokenizer), tokenizer.pad_token_id
    config.architectures = [type(skeleton).__name__]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


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
    linear = torch.nn.Linear | Conv1D
    return {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, linear)}


def _with_rows(weight: torch.Tensor, rows: int, dtype: torch.dtype) -> torch.Tensor:
    """Append rows, each the mean of the others, rounded as in training; to a bias, zeros."""
    old = weight.to(dtype)
    if old.ndim == 1:
        return torch.nn.functional.pad(old, (0, rows - len(old)))
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
