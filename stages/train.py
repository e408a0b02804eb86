"""Fine-tune the adapter, and log the run to MLflow live."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fintune import paths
from fintune.data.prompt import template_of
from fintune.data.tables import read_columns, read_rows, usual_instruction
from fintune.evaluation.validation import validator
from fintune.hardware import hardware
from fintune.lineage import project_root
from fintune.model.adapter import write_adapter
from fintune.params import PLACE, Params, read_params
from fintune.processes import check_same, rank, start
from fintune.reports import OF_TRAINING, compact
from fintune.stage import log, run, whole_folder, write_json, write_text
from fintune.tracking import runs
from fintune.tracking.client import connect
from fintune.tracking.datasets import describe_table, log_data_set
from fintune.tracking.scratch import keep_until_locked
from fintune.training.checkpoints import fingerprint
from fintune.training.curve import as_csv, validations
from fintune.training.prepare import prepare
from fintune.training.train import TrainingResult, train

SHOWN = ("train_loss", "validation_loss", "tokens_per_second", "peak_memory_gib")
INPUTS = {split: paths.rows(paths.FORMATTED, split) for split in ("train", "validation")}


def main() -> None:
    params = read_params()
    if start("train", params.train.wanted_processes):
        return
    root = project_root()
    client = connect(root) if rank() == 0 else None
    validation = read_rows(INPUTS["validation"], ["instruction", "prompt"])
    sections = {"base": params.base.model_dump(), "train": params.train.model_dump()}
    learned = sections | {"train": params.train.model_dump(exclude=PLACE)}
    scratch = root / paths.SCRATCH / fingerprint(list(INPUTS.values()), learned)
    check_same({"data, parameters or code": scratch.name})
    if client is None:
        fine_tune(params, validation, scratch, lambda *_: None)
        return
    name = f"{Path(params.base.model).name} r{params.train.lora.r} lr{params.train.learning_rate}"
    with runs.training_run(scratch, name, runs.sweep_run(client, root)) as (run_id, live):
        run_record = runs.describe_run(run_id, sections, hardware(), Path.cwd())
        read = ((read_columns(path), split, path) for split, path in INPUTS.items())
        run_record["datasets"] = [describe_table(*each) for each in read]
        for described in run_record["datasets"]:
            log_data_set(client, run_id, described)
        result = fine_tune(params, validation, scratch, live.add)
        with whole_folder(paths.ADAPTER) as folder:
            said = learned["train"] | result.computed, usual_instruction(INPUTS["train"])
            write_adapter(result.model, folder, params.base, *said, template_of(validation))
        write_json(paths.TRAIN_METRICS, compact(result.metrics, OF_TRAINING))
        write_text(paths.TRAIN_CURVE, as_csv(result.curve))
        write_text(paths.VALIDATION_CURVE, as_csv(validations(result.curve)))
        run_record |= result.record | {"tags": run_record["tags"] | result.tags}
        write_json(paths.RUN, run_record)
        runs.log_training_or_later(live, client, run_record, result.metrics, result.curve)
        keep_until_locked(scratch)
    log.info("  ".join(f"{key} {result.metrics[key]:.4g}" for key in SHOWN))


def fine_tune(
    params: Params,
    validation: list[dict[str, Any]],
    scratch: Path,
    on_log: Callable[[int, dict[str, float]], None],
) -> TrainingResult:
    """Load the base and train the adapter; each process does."""
    ready = prepare(params.base, params.train, INPUTS["train"], validation, scratch)
    result = train(
        ready.model,
        ready.tokenizer,
        ready.tokens["train"],
        params.train,
        ready.dtype,
        validate=validator(params.train, ready.tokenizer, validation, ready.tokens),
        scratch=scratch,
        on_log=on_log,
        sharded=ready.sharded,
    )
    result.metrics.update(ready.cost)
    return result


if __name__ == "__main__":
    run(main)
