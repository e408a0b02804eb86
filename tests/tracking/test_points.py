"""A training's curve in MLflow: each point once, and no step waits for the server."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from fintune.tracking.points import LiveCurve, changed, log_missing, points_of

CURVE: list[dict[str, float | None]] = [
    {"step": 1, "loss": 3.0, "validation_loss": None},
    {"step": 2, "loss": 2.0, "validation_loss": 2.5},
    {"step": 3, "loss": 1.0, "validation_loss": None},
]


@pytest.fixture
def run_id(client: MlflowClient) -> str:
    return str(client.create_run("1").info.run_id)


def logged(client: MlflowClient, run_id: str, name: str) -> list[tuple[int, float]]:
    history = client.get_metric_history(run_id, f"curve/{name}")
    return [(point.step, point.value) for point in history]


def add(curve: LiveCurve, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        curve.add(row["step"], {k: v for k, v in row.items() if k != "step" and v is not None})


def test_a_training_that_goes_on_repeats_no_point(client: MlflowClient, run_id: str) -> None:
    """It was killed after step 2, and goes on from a checkpoint before it."""
    for rows in (CURVE[:2], CURVE[1:]):
        live = LiveCurve(client, run_id)
        add(live, rows)
        assert live.close()
    log_missing(client, run_id, points_of(CURVE), {})
    assert logged(client, run_id, "loss") == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert logged(client, run_id, "validation_loss") == [(2, 2.5)]


def wait_in(monkeypatch: pytest.MonkeyPatch, method: str, action: Callable[[], None]) -> list[int]:
    """Let a client's method do something first; return the number of points of each call."""
    original, calls = getattr(MlflowClient, method), []

    def slow(self: Any, run_id: str, metrics: Any = (), **more: Any) -> Any:
        calls.append(len(metrics))
        action()
        return original(self, run_id, metrics=metrics, **more)

    monkeypatch.setattr(MlflowClient, method, slow)
    return calls


def test_a_server_that_is_slow_holds_up_no_step(
    client: MlflowClient, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first answer comes after all steps; the points that waited go together."""
    asked, answers = threading.Event(), threading.Event()
    calls = wait_in(monkeypatch, "log_batch", lambda: asked.set() or answers.wait(60) or None)
    live = LiveCurve(client, run_id)
    live.add(0, {"learning_rate": 0.0})
    assert asked.wait(60)
    for step in range(1, 500):
        live.add(step, {"learning_rate": float(step)})
    assert not live.close(seconds=0.0) and calls == [1]
    answers.set()
    live._thread.join(60)
    assert logged(client, run_id, "learning_rate") == [(step, float(step)) for step in range(500)]
    assert len(calls) <= 3


def test_points_that_wait_are_bounded(
    client: MlflowClient, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = threading.Event()
    wait_in(monkeypatch, "log_batch", lambda: answers.wait(60) or None)
    monkeypatch.setattr("fintune.tracking.points.MOST_WAITING", 10)
    live = LiveCurve(client, run_id)
    for step in range(100):
        live.add(step, {"learning_rate": 0.0})
    assert not live.close(seconds=0.0)
    answers.set()
    assert live.close()
    assert 10 <= len(logged(client, run_id, "learning_rate")) <= 12


def test_a_server_that_goes_away_loses_no_point_that_can_be_sent_later(
    client: MlflowClient,
    run_id: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail() -> None:
        raise MlflowException("gone")

    with monkeypatch.context() as patch:
        wait_in(patch, "log_batch", fail)
        live = LiveCurve(client, run_id)
        add(live, CURVE)
        assert live.close()
    assert caplog.text.count("MLflow stopped responding (gone)") == 1
    log_missing(client, run_id, points_of(CURVE), {})
    assert logged(client, run_id, "loss") == [(1, 3.0), (2, 2.0), (3, 1.0)]


def test_a_final_metric_is_logged_again_only_with_another_value(
    client: MlflowClient, run_id: str
) -> None:
    for values in ({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 3.0}):
        client.log_batch(run_id, metrics=changed(client, run_id, values))
    history = {key: client.get_metric_history(run_id, key) for key in ("a", "b")}
    assert [point.value for point in history["a"]] == [1.0]
    assert [point.value for point in history["b"]] == [2.0, 3.0]


def test_the_same_evaluation_again_logs_no_other_times(client: MlflowClient, run_id: str) -> None:
    """Behind a kill, times alone differ; another result has its own."""
    tries = [
        {"accuracy": 0.5, "answer_seconds": 9.0},
        {"accuracy": 0.5, "answer_seconds": 8.0},
        {"accuracy": 0.7, "answer_seconds": 7.0},
    ]
    for values in tries:
        client.log_batch(run_id, metrics=changed(client, run_id, values))
    history = client.get_metric_history(run_id, "answer_seconds")
    assert [point.value for point in history] == [9.0, 7.0]
