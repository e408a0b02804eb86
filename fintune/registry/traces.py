"""Traces of a version's answers in MLflow, as the chat page and the MLflow model make them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import mlflow
from mlflow.entities import SpanType

TAG, MODEL, ENDED = "fintune.exchange", "fintune.model", "fintune.ended"


@dataclass(frozen=True)
class Answered:
    """An answer to trace: `asked` has question, and passage and instruction if given; `at` is since 1970."""

    id: str
    model: str
    asked: Mapping[str, str]
    answer: str
    ended: bool
    tokens: int
    decoding: Mapping[str, float]
    at: float
    seconds: float
    error: str = ""
    logged_model: str | None = None


def start_trace(experiment: str, said: Answered) -> str:
    """Log the trace of an answer, and return its id; MLflow logs it if that fails, and raises nothing."""
    kept = {f"decoding.{name}": f"{value:g}" for name, value in said.decoding.items()}
    if said.logged_model:
        kept["mlflow.modelId"] = said.logged_model
    began = int(said.at * 1e9)
    span = mlflow.start_span_no_context(
        "answer",
        span_type=SpanType.CHAT_MODEL,
        inputs=dict(said.asked),
        attributes={"tokens": said.tokens, "model": said.model, **said.decoding},
        tags={TAG: said.id, MODEL: said.model, ENDED: json.dumps(said.ended)},
        metadata=kept,
        experiment_id=experiment,
        start_time_ns=began,
    )
    if said.error:
        span.set_attribute("error", said.error)
    span.set_outputs(said.answer)
    span.end(
        status="ERROR" if said.error else "OK",
        end_time_ns=began + int(said.seconds * 1e9),
    )
    return str(span.trace_id)
