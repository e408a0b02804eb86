"""An adapter into the model registry: as an MLflow model, with its card, lineage and quality."""

import tempfile
from pathlib import Path
from typing import Any

from fintune.answering import generation_config
from fintune.card import write_card
from fintune.modeling import Trained
from fintune.params import MergeExport
from fintune.prompts import load_tokenizer
from fintune.pyfunc import write_model_files
from fintune.tracking import register


def register_adapter(
    client: Any,
    run_id: str,
    trained: Trained,
    records: dict[str, dict[str, Any]],
    hashes: dict[str, str],
    params: MergeExport,
) -> tuple[str, list[str]]:
    """Make the run's adapter loadable by MLflow, register it and move the aliases.

    Args:
        records: as `card.read_records` gives them.
        hashes: the md5 of the data and the adapter, as tags.

    Returns:
        The version and its aliases.
    """
    evaluation = records["evaluation"]
    with tempfile.TemporaryDirectory() as scratch:
        files = Path(scratch) / "model"
        write_model_files(files, params.generation, run_id)
        tokenizer = load_tokenizer(trained.base)
        generation_config(tokenizer, params.generation).save_pretrained(files)
        write_card(files, trained, records, None, params)
        client.log_artifacts(run_id, str(files), "adapter")
    quality = {f"tuned_{key}": str(value) for key, value in evaluation["tuned"].items()}
    gate = {"gate": evaluation["gate"]["reason"]}
    tags = records["run"]["tags"] | hashes | quality | gate
    return register(client, run_id, params.registered_model, tags, evaluation["gate"]["passed"])
