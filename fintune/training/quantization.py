"""Measure what four bits cost: the base's loss on answers, unquantized and in NF4."""

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fintune.errors import UserError
from fintune.hardware import GIB, compute_dtype, free_memory, room_gib
from fintune.hub.models import check_base
from fintune.model.base import load_base
from fintune.model.batch import TokenRow
from fintune.model.likelihood import likelihood
from fintune.params import Base, Train
from fintune.processes import of_first, rank

log = logging.getLogger("fintune")

ROWS = 32  # of validation
LARGE = 0.5  # nats an answer token; Mistral-like bases lose less than a tenth


def quantization_cost(
    base: Base, train: Train, tokenizer: Any, rows: Sequence[TokenRow], scratch: Path
) -> tuple[dict[str, float], Any]:
    """Measure the base's loss before any training, and warn of a large cost.

    A model that was fine-tuned and merged loses most of what it learned when it is quantized anew, because
    that lies in small differences of its weights.

    Args:
        rows: of validation; the first ones are measured.
        scratch: folder that keeps the result for a training that goes on.

    Returns:
        `unquantized_base_loss` and `quantized_base_loss` in nats per answer token; nothing without
        `quantization: nf4`, or where the unquantized base does not fit into memory. And the quantized base,
        if it was loaded.

    Raises:
        UserError: a loss is not finite.
    """
    if train.quantization != "nf4":
        return {}, None
    model = None
    file, dtype = scratch / "quantization.json", compute_dtype(train.precision)
    if not of_first(file.is_file()):
        if of_first(check_base(base) / GIB * dtype.itemsize / 2 > 0.8 * room_gib()):
            log.info(
                "what 4 bits cost is not measured: in 16 bits, the base does not fit into memory"
            )
            return {}, None
        found = {}
        for name, quantization in (("unquantized", "none"), ("quantized", "nf4")):
            model = None
            free_memory()
            model = load_base(base, tokenizer, quantization, dtype)
            found[f"{name}_base_loss"] = likelihood(model, rows[:ROWS], f"{name} base").loss
        if not all(map(math.isfinite, found.values())):
            raise UserError(
                f"base.model: {base.model}: its loss is {found['unquantized_base_loss']}, in 4 bits "
                f"{found['quantized_base_loss']}: it has weights that are not finite, or overflows in "
                f"train.precision: {train.precision}"
            )
        if rank() == 0:
            file.write_text(json.dumps(found))
    losses: dict[str, float] = of_first(json.loads(file.read_text()) if rank() == 0 else {})
    before, after = losses["unquantized_base_loss"], losses["quantized_base_loss"]
    log.info("the base's loss is %.3f nats an answer token, in 4 bits %.3f", before, after)
    if after - before > LARGE:
        log.warning(
            "warning: in 4 bits the base's loss is %.2f instead of %.2f nats an answer token, as of a base "
            "that was fine-tuned and merged before; set train.quantization: none to keep what it knows",
            after,
            before,
        )
    return losses, model
