"""The test rows' answers in MLflow's evaluation view: a data set, a run a model, a trace an answer.

MLflow's own `mlflow.genai.evaluate` sends each assessment alone, under new names at each try. Here a trace
goes with its assessments in one call, under an id that follows from run and row: logged again, it is
replaced.
"""

import base64
import hashlib
import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mlflow.entities import (
    Assessment,
    AssessmentSource,
    DatasetInput,
    Expectation,
    Feedback,
    InputTag,
    LoggedModelInput,
    Run,
    Span,
    TraceInfo,
    TraceLocation,
    TraceState,
)
from mlflow.tracing.client import TracingClient
from mlflow.tracing.constant import AssessmentMetadataKey, SpanAttributeKey, TraceMetadataKey
from mlflow.tracing.constant import TraceTagKey as TraceTag
from mlflow.tracking import MlflowClient
from mlflow.utils import mlflow_tags as tags

from fintune import paths
from fintune.lineage import project_root
from fintune.tracking.client import store_lock
from fintune.tracking.models import model_of_run
from fintune.tracking.points import changed, now_ms

log = logging.getLogger("fintune")

MOST_ROWS = (
    100  # of the test rows, in the report's order, which is random; three models make 300 traces
)
LOGGED = "answers_logged"  # tag of an adapter's run: the digest of what was logged
OF_RUN, MODEL = "answers_of", "model"  # tags of an evaluation run
RECORDS = "records_digest"  # tag of an evaluation data set
AT_ONCE = 8  # requests to a server
MEASURED = ("stopped", "loss", "rouge_l")  # of each row
Row = dict[str, Any]


def log_answers_or_later(client: MlflowClient, run_id: str, report: Row, table: list[Row]) -> None:
    """Log the answers unless they are logged, but only warn on failure: merge_export and `restore` do it."""
    try:
        _log_answers(client, run_id, report, table[:MOST_ROWS])
    except Exception as error:  # servers before 3.4 have no traces that come whole
        first = (str(error).strip().splitlines() or [""])[0][:300]
        log.warning(
            "MLflow: the answers are not in its evaluation view (%s: %s); `python -m fintune restore` "
            "logs them again",
            type(error).__name__,
            first,
        )


def are_logged(client: MlflowClient, run_id: str, report: Row, table: list[Row]) -> bool:
    """Return whether a run's answers are in MLflow, and are these."""
    digest = _digest(_figures(report), table[:MOST_ROWS])
    return bool(client.get_run(run_id).data.tags.get(LOGGED) == digest)


def _log_answers(client: MlflowClient, run_id: str, report: Row, rows: list[Row]) -> None:
    if are_logged(client, run_id, report, rows):
        return
    run, figures = client.get_run(run_id), _figures(report)
    with store_lock(project_root()):  # experiments of a queue evaluate on the same rows
        data = _evaluation_set(client, run.info.experiment_id, rows)
    champion = report["champion"]
    of_model = {"tuned": run_id, "champion": champion["run"]}
    parent = None
    for name in ("tuned", "base", "champion"):
        if name not in figures or name not in rows[0]:  # a table of an earlier release
            continue
        shown = f"champion, version {champion['version']}" if name == "champion" else name
        evaluation = _run_of(client, run, name, f"{shown}: {run.info.run_name}", parent)
        model = model_of_run(client, of_model[name]) if name in of_model else None
        inputs = [LoggedModelInput(model.model_id)] if model else None
        context = [InputTag(tags.MLFLOW_DATASET_CONTEXT, "test")]
        client.log_inputs(evaluation, [DatasetInput(data._to_mlflow_entity(), context)], inputs)
        client.log_batch(evaluation, metrics=changed(client, evaluation, figures[name]))
        _log_traces(client, evaluation, name, rows, model.model_id if model else None)
        client.set_terminated(evaluation, "FINISHED")
        parent = parent or evaluation
    client.set_tag(run_id, LOGGED, _digest(figures, rows))


def _figures(report: Row) -> dict[str, dict[str, float]]:
    """Return each model's metrics, without those that could not be measured."""
    sides = {name: report[name] for name in ("base", "tuned")}
    if report["champion"]["compared"]:
        sides["champion"] = report["champion"]["metrics"]
    return {
        name: {key: float(f"{v:.6g}") for key, v in side.items() if v is not None}  # as in the file
        for name, side in sides.items()
    }


def _run_of(client: MlflowClient, run: Run, model: str, name: str, parent: str | None) -> str:
    """Find or create the run of a model's answers.

    The evaluation view hides a run below one that has made a model, so it is not nested in the adapter's.
    """
    experiment, run_id = run.info.experiment_id, run.info.run_id
    found = client.search_runs([experiment], f"tags.{OF_RUN} = '{run_id}'")
    known = [each for each in found if each.data.tags.get(MODEL) == model]
    if known:
        client.update_run(known[0].info.run_id, name=name)  # of another champion
        return str(known[0].info.run_id)
    about = {
        OF_RUN: run_id,
        MODEL: model,
        tags.MLFLOW_RUN_TYPE: tags.MLFLOW_RUN_TYPE_GENAI_EVALUATE,
        tags.MLFLOW_RUN_NOTE: f"Metrics on all test rows; traces of {MOST_ROWS} at most",
    }
    about |= {tags.MLFLOW_PARENT_RUN_ID: parent} if parent else {}
    return str(client.create_run(experiment, run_name=name, tags=about).info.run_id)


def _inputs(row: Row) -> dict[str, str]:
    """Return a row's question, as the MLflow model takes it."""
    return {"instruction": row["instruction"], "question": row["question"]}


def _expected(row: Row) -> dict[str, str]:
    result = {"result": row["result"]} if row.get("result") else {}
    return {"expected_response": row["reference"], **result}


def _evaluation_set(client: MlflowClient, experiment: str, rows: list[Row]) -> Any:
    """Find or create the evaluation data set of these rows; MLflow takes one record a question."""
    records: dict[str, Row] = {}
    for row in rows:
        record = {"inputs": _inputs(row), "expectations": _expected(row)}
        records.setdefault(json.dumps(record["inputs"]), record)
    digest = _digest(records)
    found = client.search_datasets([experiment], f"tags.{RECORDS} = '{digest}'")
    data = next(iter(found), None) or client.create_dataset(
        f"{client.get_experiment(experiment).name} test {digest[:8]}",
        [experiment],
        {RECORDS: digest, "source": str(paths.rows(paths.FORMATTED, "test"))},
    )
    if len(data.records) < len(records):
        data.merge_records(list(records.values()))
        data = client.get_dataset(data.dataset_id)  # with its digest
    return data


def _log_traces(
    client: MlflowClient, run_id: str, model: str, rows: list[Row], model_id: str | None
) -> None:
    """Log a trace for each row's answer, and remove those of an earlier, longer table."""
    experiment, now = client.get_run(run_id).info.experiment_id, now_ms()
    ids = [f"tr-{_digest(run_id, i)[:32]}" for i in range(len(rows))]
    traces = [
        _trace(experiment, run_id, trace_id, model, row, now - i, model_id)
        for i, (trace_id, row) in enumerate(zip(ids, rows, strict=True))
    ]
    tracing = TracingClient(client.tracking_uri)
    with ThreadPoolExecutor(AT_ONCE if client.tracking_uri.startswith("http") else 1) as pool:
        list(pool.map(tracing.start_trace, (info for info, _ in traces)))
    tracing.log_spans(experiment, [span for _, span in traces])
    there = client.search_traces(
        locations=[experiment], run_id=run_id, max_results=10 * MOST_ROWS, include_spans=False
    )
    if left := [each.info.trace_id for each in there if each.info.trace_id not in ids]:
        client.delete_traces(experiment, trace_ids=left)


def _trace(
    experiment: str,
    run_id: str,
    trace_id: str,
    model: str,
    row: Row,
    time: int,
    model_id: str | None,
) -> tuple[TraceInfo, Span]:
    """Build the trace of one answer, and its only span."""
    span_id, inputs, answer = _digest(trace_id)[:16], _inputs(row), row[model]
    assessments = []
    for assessment in _assessments(row, model):
        assessment.assessment_id = f"a-{_digest(trace_id, assessment.name)[:32]}"
        assessment.trace_id, assessment.span_id = trace_id, span_id
        assessment.metadata = {AssessmentMetadataKey.SOURCE_RUN_ID: run_id}
        assessments.append(assessment)
    info = TraceInfo(
        trace_id,
        TraceLocation.from_experiment_id(experiment),
        time,
        TraceState.OK,
        request_preview=row["question"],
        response_preview=answer,
        trace_metadata={TraceMetadataKey.SOURCE_RUN: run_id}
        | ({TraceMetadataKey.MODEL_ID: model_id} if model_id else {}),
        tags={TraceTag.TRACE_NAME: model} | ({"kind": row["kind"]} if row.get("kind") else {}),
        assessments=assessments,
    )
    attributes = {
        SpanAttributeKey.REQUEST_ID: trace_id,
        SpanAttributeKey.INPUTS: inputs,
        SpanAttributeKey.OUTPUTS: answer,
        SpanAttributeKey.SPAN_TYPE: "LLM",
    }
    span = Span.from_dict(
        {
            "name": model,
            "trace_id": _base64(trace_id.removeprefix("tr-")),
            "span_id": _base64(span_id),
            "parent_span_id": "",
            "start_time_unix_nano": time * 1_000_000,
            "end_time_unix_nano": time * 1_000_000,
            "status": {"code": "STATUS_CODE_OK", "message": ""},
            "events": [],
            "attributes": {key: json.dumps(value) for key, value in attributes.items()},
        }
    )
    return info, span


def _assessments(row: Row, model: str) -> Iterator[Assessment]:
    """Yield the figures of an answer, and what was expected; an answer that has no result is not judged."""
    code = AssessmentSource("CODE", "fintune.evaluation")
    if (right := row[f"{model}_right"]) is not None:
        said = f"the result is {row['result']}" if row.get("result") else None
        yield Feedback("correct", bool(right), source=code, rationale=said)
    for name in MEASURED:
        yield Feedback(name, row[f"{model}_{name}"], source=code)
    for name, value in _expected(row).items():
        yield Expectation(name, value, source=AssessmentSource("CODE", "test rows"))


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _base64(digits: str) -> str:
    return base64.b64encode(bytes.fromhex(digits)).decode()
