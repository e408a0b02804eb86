"""Load what a training needs: tokens, tokenizer and the base with a new adapter."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from fintune.data.prompt import Tokenizer, encode, load_tokenizer, template_of
from fintune.hardware import check_disk, compute_dtype, describe_device
from fintune.hub.models import check_base
from fintune.model.adapter import add_adapter, describe_adapter
from fintune.model.base import load_base
from fintune.model.batch import TokenRow
from fintune.params import Base, Train
from fintune.training.quantization import quantization_cost

log = logging.getLogger("fintune")


@dataclass(frozen=True)
class Prepared:
    """What `train` takes; `tokens` by split, and `cost`, what four bits cost."""

    model: PeftModel
    tokenizer: Tokenizer
    tokens: dict[str, list[TokenRow]]
    dtype: torch.dtype
    cost: dict[str, float]


def prepare(
    base: Base, params: Train, rows: dict[str, list[dict[str, Any]]], scratch: Path
) -> Prepared:
    """Encode the rows, check the disk space, and load the base with a new adapter.

    Args:
        rows: of the splits `train` and `validation`.
        scratch: the training's folder.
    """
    tokenizer = load_tokenizer(base, params.end_token, template_of(rows["train"]))
    tokens = {
        split: [encode(tokenizer, row["prompt"], row["completion"]) for row in part]
        for split, part in rows.items()
    }
    dtype = compute_dtype(params.precision)
    log.info("device: %s", describe_device())
    check_disk(2 * check_base(base), Path.cwd())
    cost = quantization_cost(base, params, tokenizer, tokens["validation"], scratch)
    loaded = load_base(base, tokenizer, params.quantization, dtype)
    model = add_adapter(loaded, tokenizer, params.lora, params.seed)
    log.info("trainable: %s", describe_adapter(model))
    return Prepared(model, tokenizer, tokens, dtype, cost)
