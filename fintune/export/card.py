"""Write model cards from a model's records and measurements."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fintune import paths
from fintune.data.prompt import end_token, prompt_token_ids
from fintune.data.tables import read_rows
from fintune.generation.decoding import title
from fintune.hub.client import stated_license
from fintune.hub.models import local_folder
from fintune.metrics import METRICS, number
from fintune.model.adapter import AdapterInfo
from fintune.params import MergeExport
from fintune.reports import whole
from fintune.stage import read_json

EXAMPLE = 120  # characters of the question in the card's example, at most, if there is one


def read_records() -> dict[str, dict[str, Any]]:
    """Read the records for a card: `run`, `training`, `evaluation` and `manifest`."""
    files = {
        "run": paths.RUN,
        "training": paths.TRAIN_METRICS,
        "evaluation": paths.EVALUATION,
        "manifest": paths.MANIFEST,
    }
    return {name: whole(read_json(file)) for name, file in files.items()}


def write_card(
    folder: Path,
    trained: AdapterInfo,
    records: dict[str, dict[str, Any]],
    measured: dict[str, Any] | None,
    params: MergeExport,
) -> None:
    """Write `README.md` for a merged model, or for an adapter if `measured` is None.

    Args:
        records: as returned by `read_records`.
        measured: the losses of merged model, adapter and base.
    """
    run, evaluation, manifest = (records[name] for name in ("run", "evaluation", "manifest"))
    tags, base, tokenizer = run["tags"], trained.base, trained.load_tokenizer()
    on_hub = manifest["revision"] is not None
    metadata = ModelCardData(
        base_model=None if base.is_folder else base.model,
        base_model_relation=None if base.is_folder else "finetune" if measured else "adapter",
        datasets=[manifest["source"]] if on_hub else None,
        license=params.license,
        library_name="transformers" if measured else "peft",
        pipeline_tag="text-generation",
        tags=["qlora" if trained.nf4_compute_dtype else "lora"],
    )
    kept = trained.nf4_compute_dtype and params.weights == "trained_on"
    page = _template().render(
        metadata=f"---\n{metadata.to_yaml()}\n---",
        name=params.registered_model,
        base=f"[{base.model}](https://huggingface.co/{base.model})"
        if not base.is_folder
        else f"`{base.model}`",
        revision=f" at `{base.revision}`" if base.revision else "",
        licenses={
            "base": stated_license(local_folder(base)),
            "data": manifest["license"],
            "model": params.license,
        },
        in_fp8=trained.train.get("products") == "fp8",
        method="with QLoRA (4-bit NF4 base)" if trained.nf4_compute_dtype else "with LoRA",
        data=manifest,
        hashes=sorted(
            (key.removeprefix("md5."), tags[key]) for key in tags if key.startswith("md5.")
        ),
        commit=tags.get("git_commit"),
        dirty=tags.get("git_dirty") == "true",
        in_no_commit=tags.get("inputs_in_no_commit"),
        hardware=tags["hardware"],
        processes=int(tags.get("processes", 1)),
        run_id=run["run_id"],
        merged=measured is not None,
        own_template=trained.template == "base",
        new_tokens=bool(prompt_token_ids(tokenizer)),
        end_token=end_token(tokenizer),
        measured=measured,
        instruction=trained.instruction,
        training=records["training"],
        decoding=title(evaluation["decoding"]),
        evaluation=evaluation,
        metrics=list(metric_lines(evaluation)),
        forgetting=(evaluation.get("forgetting") or {}).get("rise"),
        weights="the adapter added to the 4-bit weights, dequantised"
        if kept
        else "the adapter added to the base's own",
        dtype=params.dtype,
        max_tokens=run["params"].get("format.max_tokens", "as many as its data has"),
        parameters=sorted((run["params"] | _found(run["params"], trained)).items()),
        question=json.dumps(example_question(), ensure_ascii=False),
        number=number,
    )
    (folder / "README.md").write_text(page, encoding="utf-8")


def example_question() -> str:
    """Return a short question of the test rows, of the same kind as those that the model has learned."""
    file = paths.rows(paths.FORMATTED, "test")
    if not file.is_file():
        return "YOUR QUESTION"
    questions = [row["input"] for row in read_rows(file, ["input"])]
    return min(questions, key=lambda text: (len(text) > EXAMPLE, abs(len(text) - EXAMPLE), text))


def metric_lines(evaluation: dict[str, Any]) -> Any:
    """Yield title, base, tuned model, and the difference with its interval for each metric."""
    for key, metric in METRICS.items():
        if key not in evaluation["tuned"]:
            continue
        gain = evaluation["improvement"][key]
        difference = f"{number(gain['value'])} ({number(gain['low'])} to {number(gain['high'])})"
        yield (
            metric.title,
            number(evaluation["base"][key]),
            number(evaluation["tuned"][key]),
            difference,
        )


def _found(params: dict[str, str], trained: AdapterInfo) -> dict[str, str]:
    """Return the learning rate that was found, in place of `auto`."""
    key = "train.learning_rate"
    return {key: f"{trained.train['learning_rate']:g} (auto)"} if params.get(key) == "auto" else {}


def _template() -> Any:
    loader = FileSystemLoader(Path(__file__).parent)
    plain = Environment(  # Markdown: no HTML escaping
        loader=loader, undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    return plain.get_template("card.md.jinja")
