"""The test rows' answers in MLflow: each once, the models side by side, with what they were judged by."""

from typing import Any

import mlflow
import pytest
from mlflow.entities import LoggedModelStatus
from mlflow.tracking import MlflowClient

from fintune.registry import answers
from fintune.registry.answers import DATA_SET, log_answers_or_later
from fintune.tracking.models import TYPE, model_of_run


def row(i: int, champion: str | None = None, **more: Any) -> dict[str, Any]:
    """Return a line of the table of predictions; the base is wrong, the tuned model right."""
    line = {"instruction": "Answer.", "question": f"What is {i} + 1?", "reference": f"{i + 1}."}
    line |= {"result": str(i + 1), "kind": "sum", "tuned_greedy": f"{i + 1}."}
    texts = {"base": f"base says {i}", "tuned": f"tuned says {i}", "champion": champion}
    for name, text in texts.items():
        there = text is not None
        line |= {name: text, f"{name}_right": name == "tuned" if there else None}
        line |= {f"{name}_stopped": True if there else None}
        line |= {f"{name}_loss": 1.5 if there else None, f"{name}_rouge_l": 0.25 if there else None}
    return line | more


@pytest.fixture
def run_id(client: MlflowClient) -> str:
    """Start a run that has made a model."""
    run = client.create_run("1", run_name="ours")
    model = client.create_logged_model("1", "ours", run.info.run_id, model_type=TYPE)
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    return str(run.info.run_id)


def traces(client: MlflowClient, run_id: str) -> list[Any]:
    found = client.search_traces(locations=["1"], run_id=run_id, max_results=500)
    return sorted(found, key=lambda trace: trace.info.request_preview)


def assessed(trace: Any) -> dict[str, Any]:
    names = [each.name for each in trace.info.assessments]
    assert len(names) == len(set(names))
    return {each.name: each.value for each in trace.info.assessments}


def test_a_row_is_a_trace_with_all_models_and_what_they_were_judged_by(
    client: MlflowClient, run_id: str
) -> None:
    unjudged = {"result": None, "base_right": None, "tuned_right": None}
    log_answers_or_later(client, run_id, [row(1, champion="champion says 1"), row(2, **unjudged)])
    first, second = traces(client, run_id)
    (span,) = first.data.spans
    texts = {name: f"{name} says 1" for name in ("base", "champion", "tuned")}
    assert span.outputs == texts
    assert span.inputs == {"instruction": "Answer.", "question": "What is 1 + 1?"}
    expected: dict[str, Any] = {"expected_response": "2.", "result": "2"}
    for name in texts:
        expected |= {f"correct_{name}": name == "tuned", f"stopped_{name}": True}
        expected |= {f"loss_{name}": 1.5, f"rouge_l_{name}": 0.25}
    assert assessed(first) == expected
    figures = {
        f"{key}_{name}" for key in ("stopped", "loss", "rouge_l") for name in ("base", "tuned")
    }
    assert set(assessed(second)) == figures | {"expected_response"}
    model = model_of_run(client, run_id)
    assert model and first.info.trace_metadata["mlflow.modelId"] == model.model_id
    sources = {each.metadata["mlflow.assessment.sourceRunId"] for each in first.info.assessments}
    assert sources == {run_id}  # the run's page shows no others


def test_traces_are_found_by_what_they_were_judged(client: MlflowClient, run_id: str) -> None:
    log_answers_or_later(client, run_id, [row(1), row(2, tuned_right=False)])
    wrong = client.search_traces(locations=["1"], filter_string="feedback.correct_tuned = 'false'")
    assert [trace.info.request_preview for trace in wrong] == ["What is 2 + 1?"]


def test_the_questions_are_an_evaluation_data_set(client: MlflowClient, run_id: str) -> None:
    """Two experiments on the same rows share it; other rows make another one."""
    twice = row(1, reference="Two.")
    other, third = (client.create_run("1").info.run_id for _ in range(2))
    for run in (run_id, other):
        log_answers_or_later(client, run, [row(1), row(2), twice])
    (data,) = client.search_datasets(["1"])
    records = sorted(data.records, key=lambda record: record.inputs["question"])
    assert [each.inputs["question"] for each in records] == ["What is 1 + 1?", "What is 2 + 1?"]
    assert records[0].expectations == {"expected_response": "2.", "result": "2"}
    assert client.get_run(run_id).data.tags[DATA_SET] == data.name
    log_answers_or_later(client, third, [row(3)])
    assert len(client.search_datasets(["1"])) == 2


def test_a_data_set_that_was_filled_in_part_is_filled(client: MlflowClient, run_id: str) -> None:
    rows = [row(1), row(2)]
    log_answers_or_later(client, run_id, rows)
    (data,) = client.search_datasets(["1"])
    data.delete_records([data.records[0].dataset_record_id])
    log_answers_or_later(client, client.create_run("1").info.run_id, rows)
    (data,) = client.search_datasets(["1"])
    assert len(data.records) == 2


def test_what_is_logged_again_is_there_once(
    client: MlflowClient, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first try was killed after its traces; the third one finds all of them, and leaves them."""

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    rows = [row(1), row(2)]
    with monkeypatch.context() as patch:
        patch.setattr("mlflow.tracing.client.TracingClient.log_spans", killed)
        with pytest.raises(KeyboardInterrupt):
            log_answers_or_later(client, run_id, rows)
    begun = client.search_traces(locations=["1"], run_id=run_id, include_spans=False)
    assert len(begun) == 2
    log_answers_or_later(client, run_id, rows)
    before = traces(client, run_id)
    assert [len(trace.data.spans) for trace in before] == [1, 1]
    assert all(assessed(trace) for trace in before) and len(client.search_datasets(["1"])) == 1
    log_answers_or_later(client, run_id, rows)
    assert [t.info.request_time for t in before] == [
        t.info.request_time for t in traces(client, run_id)
    ]


def test_another_evaluation_takes_the_place_of_the_last(client: MlflowClient, run_id: str) -> None:
    """It has fewer rows, and no champion; what others have logged to the run stays."""
    log_answers_or_later(client, run_id, [row(1, champion="x"), row(2, champion="x")])
    with mlflow.start_run(run_id=run_id), mlflow.start_span("chat") as span:
        span.set_inputs("Z")
    mlflow.flush_trace_async_logging()
    log_answers_or_later(client, run_id, [row(1, tuned="another answer", tuned_right=False)])
    chat, trace = traces(client, run_id)
    assert chat.info.request_preview == '"Z"'
    assert trace.data.spans[0].outputs == {"base": "base says 1", "tuned": "another answer"}
    assert assessed(trace)["correct_tuned"] is False and "loss_champion" not in assessed(trace)


def test_a_table_of_an_earlier_release_is_logged(client: MlflowClient, run_id: str) -> None:
    """It has no column for the champion."""
    old = {key: value for key, value in row(1).items() if not key.startswith("champion")}
    log_answers_or_later(client, run_id, [old])
    assert len(traces(client, run_id)) == 1


def test_no_more_than_the_stated_number_of_rows_is_logged(
    client: MlflowClient, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "MOST_ROWS", 2)
    log_answers_or_later(client, run_id, [row(i) for i in range(4)])
    assert len(traces(client, run_id)) == len(client.search_datasets(["1"])[0].records) == 2


def test_a_server_that_cannot_take_them_costs_a_warning(
    client: MlflowClient, run_id: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def refuses(*_: Any, **__: Any) -> None:
        raise NotImplementedError("less than 3.4")

    with monkeypatch.context() as patch:
        patch.setattr("mlflow.tracing.client.TracingClient.log_spans", refuses)
        log_answers_or_later(client, run_id, [row(1)])
    assert "fintune restore" in caplog.text and "less than 3.4" in caplog.text
    log_answers_or_later(client, run_id, [row(1)])
    assert [len(trace.data.spans) for trace in traces(client, run_id)] == [1]
