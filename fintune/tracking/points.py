"""Metrics in MLflow, each point once: those of a curve while it trains, and final ones."""

import logging
import queue
import threading
import time
from collections.abc import Iterable
from contextlib import suppress

from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

log = logging.getLogger("fintune")

Curve = Iterable[dict[str, float | None]]

MOST_WAITING = 10_000  # points of a curve; it has some hundreds
MOST_AT_ONCE = 1000  # MLflow takes no more in one call
FIRST = "at_a_glance"  # MLflow sorts the sections of charts by name, so this one is before base
OF_CURVE = {"loss": f"{FIRST}/loss_training", "validation_loss": f"{FIRST}/loss_validation"}
VARIES = ("second", "memory", "mfu")  # parts of the names of what is measured anew each time
LAST_SECONDS = 60.0  # at the end of a training, for the points that wait


class LiveCurve:
    """A training's curve on its way to MLflow, from a thread of its own: no step waits for the server.

    All points that wait are sent in one call. After an error nothing more is sent, and training continues:
    `log_training` sends what is missing.
    """

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self._client, self._run_id = client, run_id
        self._waiting: queue.Queue[Metric | None] = queue.Queue(MOST_WAITING)
        self._thread = threading.Thread(target=self._send, name="live curve", daemon=True)
        self._thread.start()

    def add(self, step: int, values: dict[str, float]) -> None:
        """Add a step's values; they are left out here if too many wait."""
        for point in points_of([{"step": step, **values}]):
            try:
                self._waiting.put_nowait(point)
            except queue.Full:
                return

    def close(self, seconds: float = LAST_SECONDS) -> bool:
        """Send what waits, in this time at most; return whether nothing is under way any more."""
        with suppress(queue.Full):  # as after an error
            self._waiting.put(None, timeout=seconds if self._thread.is_alive() else 0)
        self._thread.join(seconds)
        if self._thread.is_alive():
            log.warning("MLflow took over %.0f s for the curve; evaluate logs the rest", seconds)
        return not self._thread.is_alive()

    def _send(self) -> None:
        logged: dict[str, set[int]] = {}
        while (point := self._waiting.get()) is not None:
            together = [point]
            while len(together) < MOST_AT_ONCE and not self._waiting.empty():
                if (point := self._waiting.get()) is None:
                    self._waiting.put(None)
                    break
                together.append(point)
            try:
                log_missing(self._client, self._run_id, together, logged)
            except Exception as error:  # no logging error may stop training
                log.warning("MLflow stopped responding (%s); the curve is logged at the end", error)
                return


def points_of(curve: Curve) -> list[Metric]:
    """Return the points of a training's curve, without the values that were not measured.

    The losses have a second name, in the section that MLflow's pages begin with.
    """
    return [
        Metric(key, value, now_ms(), int(row["step"] or 0))
        for row in curve
        for name, value in row.items()
        if name != "step" and value is not None and value == value
        for key in (f"curve/{name}", *([OF_CURVE[name]] if name in OF_CURVE else []))
    ]


def log_missing(
    client: MlflowClient, run_id: str, points: list[Metric], logged: dict[str, set[int]]
) -> None:
    """Log the points of steps that the run lacks: a training that goes on repeats some steps.

    Args:
        logged: the steps that each metric has; what is not there yet is asked for, once.
    """
    for key in {point.key for point in points} - set(logged):
        logged[key] = {point.step for point in client.get_metric_history(run_id, key)}
    new = [point for point in points if point.step not in logged[point.key]]
    for begin in range(0, len(new), MOST_AT_ONCE):
        part = new[begin : begin + MOST_AT_ONCE]
        client.log_batch(run_id, metrics=part)
        for point in part:
            logged[point.key].add(point.step)


def changed(client: MlflowClient, run_id: str, values: dict[str, float]) -> list[Metric]:
    """Return final metrics, without those that the run has with this value.

    Where nothing but times and the like differs, the same was done again after a kill, and there are none.
    """
    there = client.get_run(run_id).data.metrics
    new = {key: value for key, value in values.items() if there.get(key) != value}
    if all(key in there and any(part in key for part in VARIES) for key in new):
        return []
    return [Metric(key, value, now_ms(), 0) for key, value in new.items()]


def now_ms() -> int:
    """Return the current time in milliseconds since 1970, as MLflow expects."""
    return int(time.time() * 1000)
