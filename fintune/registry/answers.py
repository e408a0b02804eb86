"""The test rows' answers as MLflow's traces, with base, tuned model and champion side by side.

MLflow's own `mlflow.genai.evaluate` makes a run for each model, of which its view compares two, and sends
each assessment alone. Here a trace has the answers of all models to a row, belongs to the adapter's run, and
goes with its assessments in one call.
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
    Expectation,
    Feedback,
    LoggedModel,
    Run,
    Span,
    TraceInfo,
    TraceLocation,
    TraceState,
)
from mlflow.tracing.client import TracingClient
from mlflow.tracing.constant import (
    AssessmentMetadataKey,
    SpanAttributeKey,
    TraceMetadataKey,
    TraceTagKey,
)
from mlflow.tracking import MlflowClient

from fintune import paths
from fintune.lineage import project_root
from fintune.tracking.client import store_lock
from fintune.tracking.models import model_of_run
from fintune.tracking.points import now_ms

log = logging.getLogger("fintune")

MOST_ROWS = 100  # of the test rows that become traces, in the report's order, which is random
LOGGED = "answers_logged"  # tag of a run: the digest of what was logged
DATA_SET = "evaluation_data_set"  # tag of a run: the name of the data set
RECORDS = "records_digest"  # tag of an evaluation data set
AT_ONCE = 8  # requests to a server
TEST_ROW = "test row"  # name of the traces
MODELS = ("tuned", "champion", "base")
MEASURED = ("stopped", "loss", "rouge_l")  # of each answer
Row = dict[str, Any]


def log_answers_or_later(client: MlflowClient, run_id: str, table: list[Row]) -> None:
    """Log the answers unless they are logged, but only warn on failure: merge_export and `restore` do it."""
    try:
        if not _are_logged(client, run_id, table):
            _log_answers(client, client.get_run(run_id), table[:MOST_ROWS])
    except Exception as error:  # servers before 3.4 take no whole traces
        first = (str(error).strip().splitlines() or [""])[0][:300]
        log.warning(
            "MLflow: the answers are no traces of the run (%s: %s); `python -m fintune restore` logs them "
            "again",
            type(error).__name__,
            first,
        )


def _are_logged(client: MlflowClient, run_id: str, table: list[Row]) -> bool:
    tags = client.get_run(run_id).data.tags
    return bool(tags.get(LOGGED) == _digest(table[:MOST_ROWS]))


def _log_answers(client: MlflowClient, run: Run, rows: list[Row]) -> None:
    """Log the evaluation data set, and a trace for each row in place of those of an earlier evaluation."""
    experiment, run_id, now = run.info.experiment_id, run.info.run_id, now_ms()
    with store_lock(project_root()):  # experiments of a queue evaluate on the same rows
        client.set_tag(run_id, DATA_SET, _evaluation_set(client, experiment, rows))
    client.set_tag(run_id, LOGGED, "no")
    _forget(client, experiment, run_id)
    model = model_of_run(client, run_id)
    traces = [_trace(run, model, i, row, now - i) for i, row in enumerate(rows)]
    tracing = TracingClient(client.tracking_uri)
    with ThreadPoolExecutor(AT_ONCE if client.tracking_uri.startswith("http") else 1) as pool:
        list(pool.map(tracing.start_trace, (info for info, _ in traces)))
    tracing.log_spans(experiment, [span for _, span in traces])
    client.set_tag(run_id, LOGGED, _digest(rows))


def _forget(client: MlflowClient, experiment: str, run_id: str) -> None:
    """Remove the traces of an earlier evaluation, or of one that was killed."""
    ours = client.search_traces(
        locations=[experiment],
        run_id=run_id,
        filter_string=f"trace.name = '{TEST_ROW}'",
        max_results=MOST_ROWS,
        include_spans=False,
    )
    if ours:
        client.delete_traces(experiment, trace_ids=[each.info.trace_id for each in ours])


def _inputs(row: Row) -> dict[str, str]:
    """Return a row's question, as the MLflow model takes it."""
    return {"instruction": row["instruction"], "question": row["question"]}


def _expected(row: Row) -> dict[str, str]:
    result = {"result": row["result"]} if row.get("result") else {}
    return {"expected_response": row["reference"], **result}


def _evaluation_set(client: MlflowClient, experiment: str, rows: list[Row]) -> str:
    """Find or create the evaluation data set of these rows, a record a question; return its name."""
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
    return str(data.name)


def _trace(
    run: Run, model: LoggedModel | None, place: int, row: Row, time: int
) -> tuple[TraceInfo, Span]:
    """Build the trace of a row, and its only span: the models answered in batches, which have no times."""
    run_id, inputs = run.info.run_id, _inputs(row)
    trace_id, span_id = f"tr-{_digest(run_id, place)[:32]}", _digest(run_id, place)[32:48]
    answers = {name: row[name] for name in MODELS if row.get(name) is not None}
    assessments = []
    for assessment in _assessments(row, list(answers)):
        assessment.assessment_id = f"a-{_digest(trace_id, assessment.name)[:32]}"
        assessment.trace_id, assessment.span_id = trace_id, span_id
        assessment.metadata = {AssessmentMetadataKey.SOURCE_RUN_ID: run_id}
        assessments.append(assessment)
    info = TraceInfo(
        trace_id,
        TraceLocation.from_experiment_id(run.info.experiment_id),
        time,
        TraceState.OK,
        request_preview=row["question"],
        response_preview="\n".join(f"{name}: {text}" for name, text in answers.items()),
        trace_metadata={TraceMetadataKey.SOURCE_RUN: run_id}
        | ({TraceMetadataKey.MODEL_ID: model.model_id} if model else {}),
        tags={TraceTagKey.TRACE_NAME: TEST_ROW}
        | ({"kind": row["kind"]} if row.get("kind") else {}),
        assessments=assessments,
    )
    attributes = {
        SpanAttributeKey.REQUEST_ID: trace_id,
        SpanAttributeKey.INPUTS: inputs,
        SpanAttributeKey.OUTPUTS: answers,
        SpanAttributeKey.SPAN_TYPE: "LLM",
    }
    span = Span.from_dict(
        {
            "name": TEST_ROW,
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


def _assessments(row: Row, models: list[str]) -> Iterator[Assessment]:
    """Yield the figures of the answers, and what was expected; what has no result is not judged."""
    code = AssessmentSource("CODE", "fintune.evaluation")
    for name in models:
        if (right := row[f"{name}_right"]) is not None:
            said = f"the result is {row['result']}" if row.get("result") else None
            yield Feedback(f"correct_{name}", bool(right), source=code, rationale=said)
        for key in MEASURED:
            yield Feedback(f"{key}_{name}", row[f"{name}_{key}"], source=code)
    for name, value in _expected(row).items():
        yield Expectation(name, value, source=AssessmentSource("CODE", "test rows"))


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _base64(digits: str) -> str:
    return base64.b64encode(bytes.fromhex(digits)).decode()
