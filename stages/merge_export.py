"""Merge the adapter into a 16-bit base, measure that it is the same model, register the adapter."""

import json
from pathlib import Path
from typing import Any

from fintune.modeling import (
    DTYPES,
    compute_dtype,
    free_memory,
    load_adapter,
    load_base,
    load_plain,
    merge,
    save_merged,
)
from fintune.params import Base, MergeExport, UserError, read_params
from fintune.prompts import encode, load_tokenizer
from fintune.records import read_rows
from fintune.restore import restore_evaluation, version_tags
from fintune.scoring import answer_logits, likelihood
from fintune.stage import log, project_root, run, whole_folder, write_json
from fintune.tracking import connect, data_hashes, log_results, register, run_of_adapter

TEST = Path("data/formatted/test.parquet")
ADAPTER = Path("models/adapter")
RUN = Path("models/run.json")
TRAIN_METRICS = Path("reports/train.json")
TRAIN_CURVE = Path("reports/train_curve.csv")
EVALUATION = Path("reports/evaluation.json")
OUT = Path("models/merged")
METRICS = Path("reports/export.json")
UPSTREAM = ("fetch", "split", "format", "train")
LOGIT_ROWS = 8  # their answers' logits are held in memory: rows x tokens x vocabulary


def main() -> None:
    params = read_params().merge_export
    client = connect(project_root())
    run_id = run_of_adapter(client, RUN, TRAIN_METRICS, TRAIN_CURVE, ADAPTER)
    with whole_folder(OUT) as folder:
        measured = export(folder, params)
    evaluation = json.loads(EVALUATION.read_text())
    restore_evaluation(client, run_id)
    tags = version_tags(evaluation, data_hashes(Path.cwd(), UPSTREAM))
    version, aliases = register(
        client, run_id, params.registered_model, tags, evaluation["gate"]["passed"]
    )
    report = {
        **measured,
        "registered_model": params.registered_model,
        "version": version,
        "aliases": aliases,
    }
    write_json(METRICS, report)
    log_results(client, run_id, measured, {"merge_export": params.model_dump()}, [METRICS])
    log.info(
        "%s version %s (%s); merged loss %.4f, adapter %.4f, logits within %.3g",
        params.registered_model,
        version,
        ", ".join(aliases),
        measured["merged_loss"],
        measured["adapter_loss"],
        measured["max_logit_difference"],
    )


def export(folder: Path, params: MergeExport) -> dict[str, Any]:
    """Write the merged model to `folder` and compare it with the adapter on test rows.

    Returns:
        `adapter_loss` of the adapter on its base as it was trained (4 bits where it was),
        `merged_loss` of the folder as plain transformers loads it, and `max_logit_difference`
        between the adapter on the 16-bit base and the folder: what merging itself costs.

    Raises:
        UserError: the two losses differ by more than `max_loss_difference`.
    """
    settings = json.loads((ADAPTER / "training.json").read_text())
    base = Base(**settings["base"])
    quantization, dtype = settings["train"]["quantization"], DTYPES[params.dtype]
    tokenizer = load_tokenizer(base)
    rows = read_rows(TEST, ["prompt", "completion"])[: params.check_rows]
    tokens = [encode(tokenizer, row["prompt"], row["completion"]) for row in rows]

    as_trained = compute_dtype(settings["train"]["precision"])
    model = load_adapter(load_base(base, tokenizer, quantization, as_trained), ADAPTER)
    adapter_loss = likelihood(model, tokens, "adapter").loss
    del model
    free_memory()
    model = load_adapter(load_base(base, tokenizer, "none", dtype), ADAPTER)
    before = answer_logits(model, tokens[:LOGIT_ROWS])
    save_merged(merge(model), tokenizer, folder, dtype)
    del model
    free_memory()
    plain = load_plain(folder, dtype)
    merged_loss = likelihood(plain, tokens, "merged").loss
    after = answer_logits(plain, tokens[:LOGIT_ROWS])
    difference = max(float((a - b).abs().max()) for a, b in zip(before, after, strict=True))
    if (
        not abs(merged_loss - adapter_loss) <= params.max_loss_difference
    ):  # nan is no number to accept
        raise UserError(
            f"merge_export: the merged model's loss is {merged_loss:.4f} and the adapter's "
            f"{adapter_loss:.4f}, further apart than merge_export.max_loss_difference: "
            f"{params.max_loss_difference}; nothing was exported"
        )
    return {
        "max_logit_difference": difference,
        "merged_loss": merged_loss,
        "adapter_loss": adapter_loss,
        "rows": len(rows),
    }


if __name__ == "__main__":
    run(main)
