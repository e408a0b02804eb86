"""Load what a training needs: tokens, tokenizer and the base with a new adapter."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from peft import PeftModel

from fintune.data.prompt import Tokenizer, encode, has_own_template, load_tokenizer, template_of
from fintune.data.stream import batches, in_threads, open_rows, ordered, spool
from fintune.data.tokens import encode_rows
from fintune.errors import UserError
from fintune.hardware import (
    check_disk,
    compute_dtype,
    describe_device,
    free_memory,
    free_memory_gib,
)
from fintune.hub.models import check_base
from fintune.model.adapter import add_adapter, describe_adapter
from fintune.model.base import load_base, read_config
from fintune.model.batch import STORED, TokenRow, TokenRows, lengths_of
from fintune.model.sizes import ModelSize
from fintune.params import Base, Train
from fintune.processes import count, of_all, of_first, rank
from fintune.training.memory import estimate_memory_gib
from fintune.training.plan import fits_whole
from fintune.training.quantization import quantization_cost
from fintune.training.rates import plan_rounds
from fintune.training.train import total_steps

log = logging.getLogger("fintune")

TOKENS = "train.arrow"  # in the training's folder
ROOM = 0.8  # of the free memory, for a base that is loaded whole before it is shared out


@dataclass(frozen=True)
class Prepared:
    """Arguments of `train`; `tokens` by split, and `cost`, the loss that four bits cost."""

    model: PeftModel
    tokenizer: Tokenizer
    tokens: dict[str, Sequence[TokenRow]]
    dtype: torch.dtype
    cost: dict[str, float]
    sharded: bool  # the processes are to share the base's weights


def prepare(
    base: Base, params: Train, training: Path, validation: list[dict[str, Any]], scratch: Path
) -> Prepared:
    """Encode the rows, check the disk space, and load the base with a new adapter.

    Args:
        training: the table of the training rows, which are not held in memory.
        validation: the validation rows.
        scratch: the training's folder.
    """
    tokenizer = load_tokenizer(base, params.end_token, template_of(validation))
    tokens: dict[str, Sequence[TokenRow]] = {
        "train": encode_table(tokenizer, training, scratch / TOKENS),
        "validation": [encode(tokenizer, row["prompt"], row["completion"]) for row in validation],
    }
    if params.learning_rate == "auto":
        plan_rounds(total_steps(params, len(tokens["train"])))  # raises, if there are too few
    dtype = compute_dtype(params.precision)
    log.info("device: %s", describe_device())
    check_disk(2 * check_base(base), Path.cwd())
    cost, loaded = quantization_cost(base, params, tokenizer, tokens["validation"], scratch)
    if count() > 1:
        loaded = None
    free_memory()
    parallel, on = _parallel(base, params, tokens["train"], dtype)
    if loaded is None:
        loaded = load_base(base, tokenizer, params.quantization, dtype, on, parallel == "fsdp")
    model = add_adapter(loaded, tokenizer, params.lora, params.seed)
    log.info("trainable: %s", describe_adapter(model))
    return Prepared(model, tokenizer, tokens, dtype, cost, parallel == "fsdp")


def encode_table(tokenizer: Tokenizer, source: Path, target: Path) -> TokenRows:
    """Encode a table of formatted rows to a file, in the first process; return its rows."""
    if rank() == 0:
        target.parent.mkdir(parents=True, exist_ok=True)
        rows = batches(
            open_rows(source, ["prompt", "completion"]), ["prompt", "completion"], "tokens"
        )
        with spool(target, STORED) as write:
            work = ordered if has_own_template(tokenizer) else in_threads
            for encoded in work(partial(_encode_batch, tokenizer), rows):
                write(encoded)
    of_first(None)  # the others wait for the file
    return TokenRows(target)


def _encode_batch(tokenizer: Tokenizer, batch: pa.RecordBatch) -> pa.RecordBatch:
    texts = list(zip(*(batch[name].to_pylist() for name in STORED.names), strict=True))
    encoded = zip(*encode_rows(tokenizer, texts), strict=True)
    columns = [pa.array(ids, STORED.field(0).type) for ids in encoded]
    return pa.record_batch(columns, schema=STORED)


def chosen_parallel(
    size: ModelSize, params: Train, longest: int, dtype: torch.dtype, free_gib: float
) -> str:
    """Return how several processes share the work: `ddp` where the whole base fits, else `fsdp`."""
    if params.parallel != "auto":
        return params.parallel
    return "ddp" if fits_whole(size, params, longest, dtype.itemsize, free_gib) else "fsdp"


def _parallel(
    base: Base, params: Train, rows: Sequence[TokenRow], dtype: torch.dtype
) -> tuple[str, torch.device | None]:
    """Decide whether processes share the base, and where to load it: on the CPU if it is too large.

    Raises:
        UserError: the validation would need the whole base.
    """
    if count() == 1:
        return "none", None
    size = ModelSize.of(read_config(base), params.lora)
    longest = max(lengths_of(rows))
    free = min(of_all(free_memory_gib())) / (1 if torch.cuda.is_available() else count())
    parallel = chosen_parallel(size, params, longest, dtype, free)
    log.info("parallel: %s", parallel)
    if parallel != "fsdp":
        return parallel, None
    if params.keep == "best_answers":
        raise UserError(
            "train.keep: best_answers: the base is shared among the processes (fsdp), which answer no "
            "questions then; set best_loss or last"
        )
    weights = estimate_memory_gib(
        size, params.quantization, dtype.itemsize, "fused", "full", False, longest
    )["weights"]
    return parallel, None if weights < ROOM * free else torch.device("cpu")
