"""Fine-tune the adapter, its run live in MLflow."""

import csv
import io
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from fintune.modeling import add_adapter, compute_dtype, load_base, save_adapter, write_training
from fintune.params import Params, read_params
from fintune.preflight import check_base, check_disk, describe_device, hardware
from fintune.prompts import add_chat_template, encode, load_tokenizer
from fintune.records import read_rows
from fintune.scoring import likelihood
from fintune.stage import log, project_root, run, whole_folder, write_json, write_text
from fintune.tracking import (
    connect,
    describe_run,
    live_logger,
    log_table,
    log_training_or_later,
    sweep_run,
    training_run,
)
from fintune.training import TrainingResult, fingerprint, total_steps, train

DATA = Path("data/formatted")
ADAPTER = Path("models/adapter")
RUN = Path("models/run.json")
METRICS = Path("reports/train.json")
CURVE = Path("reports/train_curve.csv")
VALIDATIONS = Path("reports/validation_curve.csv")  # apart: DVC's plots draw an empty cell as 0
CODE = (
    "fintune/fused.py",
    "fintune/kernels.py",
    "fintune/modeling.py",
    "fintune/training.py",
    "fintune/prompts.py",
    "fintune/scoring.py",
    "stages/train.py",
)


def main() -> None:
    params = read_params()
    root = project_root()
    client = connect(root)
    rows = {
        name: read_rows(DATA / f"{name}.parquet", ["instruction", "prompt"])
        for name in ("train", "validation")
    }
    inputs = [DATA / f"{name}.parquet" for name in rows]
    sections = {"base": params.base.model_dump(), "train": params.train.model_dump()}
    scratch = root / ".checkpoints" / fingerprint([*inputs, *map(Path, CODE)], sections)
    scratch.mkdir(parents=True, exist_ok=True)
    name = f"{Path(params.base.model).name} r{params.train.lora.r} lr{params.train.learning_rate:g}"
    with training_run(scratch / "run_id", name, sweep_run(client, root)) as run_id:
        record = describe_run(run_id, sections, hardware(), Path.cwd())
        for split, path in zip(rows, inputs, strict=True):
            log_table(run_id, rows[split], split, "training" if split == "train" else split, path)
        result = fine_tune(params, rows, scratch, run_id)
        with whole_folder(ADAPTER) as folder:
            save_adapter(result.model, folder)
            (folder / "README.md").unlink()  # PEFT's form to be filled in
            usual = usual_instruction(rows["train"])
            tokenizer = load_tokenizer(params.base)
            add_chat_template(tokenizer, usual)
            tokenizer.save_pretrained(folder)
            write_training(folder, params.base, sections["train"], usual)
        write_json(METRICS, result.metrics)
        write_text(CURVE, as_csv(result.curve))
        write_text(VALIDATIONS, as_csv(validations(result.curve)))
        write_json(RUN, record)
        log_training_or_later(client, record, result.metrics, ADAPTER)
    shutil.rmtree(scratch)
    shown = ("train_loss", "validation_loss", "tokens_per_second", "peak_memory_gib")
    log.info("  ".join(f"{key} {result.metrics[key]:.4g}" for key in shown))


def fine_tune(
    params: Params, rows: dict[str, list[dict[str, Any]]], scratch: Path, run_id: str
) -> TrainingResult:
    """Check, load, train; says before the first step what it will take."""
    tokenizer = load_tokenizer(params.base)
    tokens = {
        split: [encode(tokenizer, row["prompt"], row["completion"]) for row in part]
        for split, part in rows.items()
    }
    dtype = compute_dtype(params.train.precision)
    log.info("device: %s", describe_device())
    check_disk(2 * check_base(params.base), Path.cwd())
    model = load_base(params.base, tokenizer, params.train.quantization, dtype)
    tuned = add_adapter(model, tokenizer, params.train.lora, params.train.seed)
    trainable, total = tuned.get_nb_trainable_parameters()
    log.info(
        "trainable: %s of %s parameters (%.3f %%)",
        f"{trainable:,}",
        f"{total:,}",
        100 * trainable / total,
    )
    log.info(
        "%d rows, %d steps of %d rows",
        len(tokens["train"]),
        total_steps(params.train, len(tokens["train"])),
        params.train.rows_per_step,
    )
    return train(
        tuned,
        tokenizer,
        tokens["train"],
        params.train,
        dtype,
        validate=lambda m: likelihood(m, tokens["validation"], "validate").loss,
        scratch=scratch,
        on_log=live_logger(run_id),
    )


def usual_instruction(rows: list[dict[str, Any]]) -> str:
    """The one that most rows have; of equally frequent ones the first in the alphabet."""
    counts = Counter(row["instruction"] for row in rows)
    return str(min(counts, key=lambda text: (-counts[text], text)))


def validations(curve: list[dict[str, float | None]]) -> list[dict[str, float | None]]:
    """The steps after which the validation loss was measured, and the loss."""
    names = ("step", "validation_loss")
    return [
        {name: point[name] for name in names}
        for point in curve
        if point["validation_loss"] is not None
    ]


def as_csv(curve: list[dict[str, float | None]]) -> str:
    """The curve as CSV, an empty cell where a value was not measured at that step."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(curve[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(curve)
    return text.getvalue()


if __name__ == "__main__":
    run(main)
