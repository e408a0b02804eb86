"""Fine-tune the adapter, and log the run to MLflow live."""

from pathlib import Path
from typing import Any

from fintune import paths
from fintune.data.prompt import encode, load_tokenizer, template_of
from fintune.data.records import usual_instruction
from fintune.data.tables import read_rows
from fintune.evaluation.validation import validator
from fintune.hardware import check_disk, compute_dtype, describe_device, hardware
from fintune.hub.models import check_base
from fintune.lineage import project_root
from fintune.model.adapter import add_adapter, describe_adapter, write_adapter
from fintune.model.base import load_base
from fintune.params import Params, read_params
from fintune.stage import log, run, whole_folder, write_json, write_text
from fintune.tracking import runs
from fintune.tracking.client import connect
from fintune.tracking.points import LiveCurve
from fintune.tracking.scratch import keep_until_locked
from fintune.training.checkpoints import fingerprint
from fintune.training.curve import as_csv, validations
from fintune.training.quantization import quantization_cost
from fintune.training.train import TrainingResult, total_steps, train

SHOWN = ("train_loss", "validation_loss", "tokens_per_second", "peak_memory_gib")
INPUTS = {split: paths.rows(paths.FORMATTED, split) for split in ("train", "validation")}


def main() -> None:
    params = read_params()
    client = connect(root := project_root())
    rows = {split: read_rows(path, ["instruction", "prompt"]) for split, path in INPUTS.items()}
    sections = {"base": params.base.model_dump(), "train": params.train.model_dump()}
    scratch = root / paths.SCRATCH / fingerprint(list(INPUTS.values()), sections)
    name = f"{Path(params.base.model).name} r{params.train.lora.r} lr{params.train.learning_rate:g}"
    with runs.training_run(scratch, name, runs.sweep_run(client, root)) as (run_id, live):
        run_record = runs.describe_run(run_id, sections, hardware(), Path.cwd())
        for split, path in INPUTS.items():
            context = "training" if split == "train" else split
            runs.log_table(run_id, rows[split], split, context, path)
        result = fine_tune(params, rows, scratch, live)
        with whole_folder(paths.ADAPTER) as folder:
            said = usual_instruction(rows["train"]), template_of(rows["train"])
            trained = sections["train"] | result.computed
            write_adapter(result.model, folder, params.base, trained, *said)
        write_json(paths.TRAIN_METRICS, result.metrics)
        write_text(paths.TRAIN_CURVE, as_csv(result.curve))
        write_text(paths.VALIDATION_CURVE, as_csv(validations(result.curve)))
        write_json(paths.RUN, run_record)
        runs.log_training_or_later(live, client, run_record, result.metrics, result.curve)
        keep_until_locked(scratch)
    log.info("  ".join(f"{key} {result.metrics[key]:.4g}" for key in SHOWN))


def fine_tune(
    params: Params, rows: dict[str, list[dict[str, Any]]], scratch: Path, live: LiveCurve
) -> TrainingResult:
    """Load the base, check the disk space and train the adapter."""
    tokenizer = load_tokenizer(params.base, params.train.end_token, template_of(rows["train"]))
    tokens = {
        split: [encode(tokenizer, row["prompt"], row["completion"]) for row in part]
        for split, part in rows.items()
    }
    dtype = compute_dtype(params.train.precision)
    log.info("device: %s", describe_device())
    check_disk(2 * check_base(params.base), Path.cwd())
    cost = quantization_cost(params.base, params.train, tokenizer, tokens["validation"], scratch)
    base = load_base(params.base, tokenizer, params.train.quantization, dtype)
    tuned = add_adapter(base, tokenizer, params.train.lora, params.train.seed)
    log.info("trainable: %s", describe_adapter(tuned))
    count, per_step = len(tokens["train"]), params.train.rows_per_step
    log.info("%d rows, %d steps of %d rows", count, total_steps(params.train, count), per_step)
    result = train(
        tuned,
        tokenizer,
        tokens["train"],
        params.train,
        dtype,
        validate=validator(params.train, tokenizer, rows["validation"], tokens),
        scratch=scratch,
        on_log=live.add,
    )
    result.metrics.update(cost)
    return result


if __name__ == "__main__":
    run(main)
