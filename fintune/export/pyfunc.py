"""Package the adapter as an MLflow model that maps a data frame of questions to one of answers.

    mlflow.pyfunc.load_model("models:/financial-qa@champion").predict(questions)

The model contains the adapter, the code that generates answers and the pinned packages. Its base is
referenced by revision, not copied.
"""

import importlib.metadata
import logging
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
from ruamel.yaml import YAML

from fintune.data.prompt import end_token_id
from fintune.errors import UserError, first_line
from fintune.stage import prepare

log = logging.getLogger("fintune")
TRACES = "FINTUNE_TRACES"  # the experiment in which answers are traced
PACKAGES = (
    "mlflow",
    "Jinja2",
    "accelerate",
    "bitsandbytes",
    "huggingface_hub",
    "numpy",
    "pandas",
    "peft",
    "psutil",
    "pydantic",
    "ruamel.yaml",
    "torch",
    "tqdm",
    "transformers",
)
ADDED = {  # to the adapter's folder, by `write_model_files`, register and MLflow's download
    *("MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt", "registered_model_meta"),
    *("input_example.json", "serving_input_example.json", "generation_config.json", "README.md"),
    *("SHA256SUMS", "SHA256SUMS.sig"),
}
EXAMPLE = {"question": "What is the difference between a stock and a bond?"}


class TunedModel:
    """The object that `mlflow.pyfunc.load_model` returns: a loaded model that answers questions."""

    def __init__(self, folder: Path) -> None:
        prepare()  # before torch is imported
        from fintune.generation.tuned import load_tuned

        self.model, self.tokenizer = load_tuned(folder)
        signature = mlflow.models.Model.load(str(folder)).signature
        self.decoding = {spec.name: spec.default for spec in signature.params}
        self.name = registered_name(folder)

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> Any:
        """Answer each row's `question`, with its `instruction` if it has one.

        Args:
            params: `temperature` (0 is greedy), `top_p`, `min_p`, `top_k`, `repetition_penalty`,
                `max_new_tokens`, `seed`; by default the decoding that was evaluated.

        Returns:
            A data frame with the column `answer` and the input's index.

        Raises:
            MlflowException: a question is empty or contains a special token; the message names the row.
        """
        from fintune.generation.decoding import Decoding
        from fintune.generation.generate import generate
        from fintune.generation.tuned import prompt_tokens

        wanted = self.decoding | (params or {})
        instructions = model_input.get("instruction", pd.Series(None, model_input.index))
        prompts = []
        for row, question, instruction in zip(
            model_input.index, model_input["question"], instructions, strict=True
        ):
            given = instruction if isinstance(instruction, str) else None
            try:
                prompts.append(prompt_tokens(self.tokenizer, str(question), given))
            except UserError as error:
                raise MlflowException(
                    f"row {row}: {error}", error_code=INVALID_PARAMETER_VALUE
                ) from None
        decoding = Decoding(end_token_id(self.tokenizer), **wanted)
        began = time.time()
        answers = generate(self.model, self.tokenizer, prompts, decoding, "answers")
        if experiment := os.environ.get(TRACES):
            log_answers(experiment, self.name, model_input, answers, wanted, began)
        return pd.DataFrame({"answer": [each.text for each in answers]}, index=model_input.index)


def registered_name(folder: Path) -> str:
    """Return NAME/VERSION of a downloaded version's folder, or the folder, if it is none."""
    meta = folder / "registered_model_meta"
    if not meta.is_file():
        return str(folder)
    said = YAML(typ="safe").load(meta.read_text(encoding="utf-8"))
    return f"{said['model_name']}/{said['model_version']}"


def log_answers(
    experiment: str,
    model: str,
    asked: pd.DataFrame,
    answers: Sequence[Any],
    decoding: Mapping[str, float],
    began: float,
) -> None:
    """Log a trace for each answer, as the chat page does; nothing but a warning comes of a failure.

    Args:
        experiment: its name.
        model: NAME/VERSION.
        asked: the questions, perhaps with instructions.
        decoding: settings and `max_new_tokens`.
        began: when they were asked, in seconds since 1970; they are answered together.
    """
    from fintune.registry.traces import Answered, start_trace

    seconds = time.time() - began
    settings = {name: value for name, value in decoding.items() if name != "seed"}
    try:
        known = mlflow.MlflowClient().get_experiment_by_name(experiment)
        if known is None:
            raise MlflowException(f"{TRACES}: there is no experiment {experiment}")
        for row, said in zip(asked.to_dict("records"), answers, strict=True):
            texts = {name: text for name, text in row.items() if isinstance(text, str) and text}
            given = (texts, said.text, said.stopped, said.tokens, settings, began, seconds)
            start_trace(known.experiment_id, Answered(secrets.token_hex(8), model, *given))
    except Exception as error:  # each store raises its own library's errors
        log.warning("no traces of these answers: %s", first_line(error))


def _load_pyfunc(path: str) -> TunedModel:
    """Load the model for MLflow; `path` is the model's folder, which is also the adapter's."""
    return TunedModel(Path(path))


def without_model_files(name: str) -> bool:
    """Return whether a file of a registered version is the adapter's own."""
    return name not in ADDED and not name.startswith("code/")


def write_model_files(
    folder: Path, decoding: Mapping[str, float], run_id: str, model_id: str | None = None
) -> None:
    """Add the files that make an adapter's folder an MLflow model: `MLmodel`, packages, code, example.

    Args:
        decoding: the settings and `max_new_tokens`, as evaluation.json has them.
        model_id: of the logged model; None where the files are artifacts of the run.
    """
    from fintune.generation.decoding import SETTINGS

    whole = ("top_k", "max_new_tokens")
    signature = ModelSignature(
        inputs=Schema(
            [ColSpec("string", "question"), ColSpec("string", "instruction", required=False)]
        ),
        outputs=Schema([ColSpec("string", "answer")]),
        params=ParamSchema(
            [
                *(
                    ParamSpec(name, "double", float(decoding[name]))
                    for name in SETTINGS
                    if name not in whole
                ),
                *(ParamSpec(name, "long", int(decoding[name])) for name in whole),
                ParamSpec("seed", "long", 0),
            ]
        ),
    )
    mlflow.pyfunc.save_model(
        str(folder),
        loader_module="fintune.export.pyfunc",
        code_paths=[str(Path(__file__).parents[1])],
        pip_requirements=[f"{name}=={_version(name)}" for name in PACKAGES],
        signature=signature,
        input_example=pd.DataFrame([EXAMPLE]),
        mlflow_model=mlflow.models.Model(
            run_id=run_id,
            artifact_path=f"models:/{model_id}" if model_id else "adapter",
            model_id=model_id,
        ),
    )


def _version(package: str) -> str:
    return importlib.metadata.version(package).split("+")[0]  # without the build's +cpu or +cu130
