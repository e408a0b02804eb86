"""Exchanges with a model: kept in files, and sent to MLflow as traces with the user's feedback.

An exchange is a question and one model's answer. Its file is written first, and removed when MLflow
has all of it, so nothing is lost while the server is away.
"""

import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import mlflow
from filelock import FileLock
from mlflow.entities import AssessmentSource, Expectation, Feedback
from mlflow.tracking import MlflowClient

from fintune import paths
from fintune.errors import first_line, redacted
from fintune.registry.traces import ENDED, MODEL, TAG, Answered, start_trace
from fintune.stage import write_text
from fintune.tracking.client import connect, experiment_name

log = logging.getLogger("fintune")
os.environ.setdefault("MLFLOW_ENABLE_ASYNC_TRACE_LOGGING", "false")  # a failure has to show

APPROVED, EXPECTED = "approved", "expected_response"  # MLflow's scorers read the second
USER = AssessmentSource("HUMAN", "chat")
WAIT_SECONDS = 30  # until MLflow is asked again
PAGE = 500  # traces at a time


@dataclass
class Exchange:
    """A question, a model's answer, and what the user says of it.

    `model` is NAME/VERSION or a folder, `logged_model` MLflow's id of it, if it has one; `at` is in seconds
    since 1970; `ended` is false where an answer was cut off; `error` says why there is none.
    """

    question: str
    model: str
    decoding: dict[str, float]
    passage: str = ""
    instruction: str | None = None
    logged_model: str | None = None
    answer: str = ""
    ended: bool = False
    tokens: int = 0
    seconds: float = 0.0
    error: str = ""
    approved: bool | None = None
    correction: str | None = None
    trace: str | None = None
    sent: list[Any] = field(default_factory=lambda: [None, None])  # of approved and correction
    at: float = field(default_factory=time.time)
    id: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def input(self) -> str:
        """The text that the model is asked: passage and question, as a source's context and question."""
        return f"{self.passage}\n\n{self.question}" if self.passage.strip() else self.question

    @property
    def is_sent(self) -> bool:
        """Return whether MLflow has all of it."""
        return self.trace is not None and self.sent == [self.approved, self.correction]


class Log:
    """The exchanges of this project: files that a thread sends to MLflow."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root / paths.EXCHANGES
        self.open: dict[str, Exchange] = {}  # those whose feedback may still change
        self.wake, self.lock = threading.Event(), threading.RLock()
        self.fault = ""  # why MLflow has not taken the last one

    def start(self) -> None:
        """Send in the background what there is and what comes."""
        self.wake.set()
        threading.Thread(target=self._serve, name="exchanges", daemon=True).start()

    def keep(self, exchange: Exchange) -> None:
        """Write an exchange that is new or has new feedback, and have it sent."""
        with self.lock:
            self.open[exchange.id] = exchange
            self._write(exchange)
        self.wake.set()

    def waiting(self) -> list[Exchange]:
        """Return the exchanges that MLflow does not have yet."""
        found = [self.open.get(path.stem) or read(path) for path in self.folder.glob("*.json")]
        return sorted((each for each in found if each), key=lambda each: each.at)

    def send(self, client: MlflowClient) -> int:
        """Send all that waits, and return how many that were; raises MLflow's errors."""
        if not self.folder.is_dir():
            return 0
        with FileLock(self.folder / "lock"):  # another process may be sending the same
            waiting = self.waiting()
            for exchange in waiting:
                send(client, exchange, self._write)
                with self.lock:
                    if exchange.is_sent:
                        self._file(exchange).unlink(missing_ok=True)
        return len(waiting)

    def _write(self, exchange: Exchange) -> None:
        with self.lock:
            write_text(self._file(exchange), json.dumps(asdict(exchange), ensure_ascii=False))

    def _file(self, exchange: Exchange) -> Path:
        return self.folder / f"{exchange.id}.json"

    def _serve(self) -> None:
        while True:
            self.wake.wait(WAIT_SECONDS)
            self.wake.clear()
            if not any(self.folder.glob("*.json")):
                continue
            try:
                self.send(connect(self.root))
                self.fault = ""
            except Exception as error:  # each store raises its own library's errors
                said = redacted(first_line(error))
                if said != self.fault:
                    log.warning("MLflow: %s; exchanges wait in %s", said, self.folder)
                self.fault = said


def read(path: Path) -> Exchange | None:
    """Read an exchange's file; None if it is gone or none, which is said."""
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        return Exchange(**{each.name: given[each.name] for each in fields(Exchange)})
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        log.warning("%s: no exchange; mend it or remove it", path)
        return None


def send_waiting(client: MlflowClient, root: Path) -> None:
    """Send what waits before traces are read."""
    if sent := Log(root).send(client):
        log.info("%d exchanges that had waited are sent to MLflow", sent)


def send(client: MlflowClient, exchange: Exchange, note: Callable[[Exchange], None]) -> None:
    """Send an exchange or its new feedback to MLflow; raises its errors.

    Args:
        note: writes it down when its trace exists, before feedback is sent.
    """
    if exchange.trace is None:
        known = client.search_traces(
            locations=[experiment_of(client)], filter_string=f"tags.`{TAG}` = '{exchange.id}'"
        )
        exchange.trace = known[0].info.trace_id if known else _start_trace(client, exchange)
        note(exchange)
    approved, correction = exchange.approved, exchange.correction
    for place, (value, name) in enumerate(((approved, APPROVED), (correction, EXPECTED))):
        if exchange.sent[place] == value:
            continue
        for old in client.get_trace(exchange.trace).info.assessments:
            if old.name == name and old.source.source_type == "HUMAN":
                mlflow.delete_assessment(exchange.trace, old.assessment_id)
        if value is not None and name == APPROVED:
            mlflow.log_feedback(trace_id=exchange.trace, name=name, value=value, source=USER)
        elif value is not None:
            mlflow.log_expectation(trace_id=exchange.trace, name=name, value=value, source=USER)
        exchange.sent[place] = value


def _start_trace(client: MlflowClient, exchange: Exchange) -> str:
    """Log the trace of an answer, and check that the store has it."""
    asked = {
        "question": exchange.question,
        "passage": exchange.passage,
        "instruction": exchange.instruction,
    }
    said = Answered(
        exchange.id,
        exchange.model,
        {name: text for name, text in asked.items() if text},
        exchange.answer,
        exchange.ended,
        exchange.tokens,
        exchange.decoding,
        exchange.at,
        exchange.seconds,
        exchange.error,
        exchange.logged_model,
    )
    trace = start_trace(experiment_of(client), said)
    if not client.get_trace(trace).data.spans:
        raise ConnectionError(f"the spans of trace {trace} did not arrive")
    return trace


def experiment_of(client: MlflowClient) -> str:
    """Return the id of the project's experiment, which `connect` has made."""
    return str(client.get_experiment_by_name(experiment_name()).experiment_id)


def exchanges(client: MlflowClient, since: float = 0.0) -> Iterator[Exchange]:
    """Yield the exchanges that MLflow has since a time in seconds since 1970, the oldest first."""
    wanted = f"tags.`{TAG}` IS NOT NULL AND timestamp_ms >= {int(since * 1000)}"
    token = None
    while True:
        found = client.search_traces(
            locations=[experiment_of(client)],
            filter_string=wanted,
            order_by=["timestamp_ms ASC"],
            max_results=PAGE,
            page_token=token,
        )
        yield from map(_exchange, found)
        if not (token := found.token):
            return


def _exchange(trace: Any) -> Exchange:
    info, span = trace.info, trace.data.spans[0]
    approved, correction = _latest(info, APPROVED, Feedback), _latest(info, EXPECTED, Expectation)
    decoding = {
        key.removeprefix("decoding."): float(value)
        for key, value in info.trace_metadata.items()
        if key.startswith("decoding.")
    }
    return Exchange(
        question=str(span.inputs["question"]),
        passage=str(span.inputs.get("passage") or ""),
        instruction=span.inputs.get("instruction"),
        model=info.tags.get(MODEL, ""),
        logged_model=info.trace_metadata.get("mlflow.modelId"),
        decoding=decoding,
        answer=str(span.outputs or ""),
        ended=info.tags.get(ENDED) == "true",
        tokens=int(span.get_attribute("tokens") or 0),
        seconds=(info.execution_duration or 0) / 1000,
        error=str(span.get_attribute("error") or ""),
        approved=approved if isinstance(approved, bool) else None,
        correction=str(correction) if correction is not None else None,
        trace=info.trace_id,
        sent=[approved, correction],
        at=info.request_time / 1000,
        id=info.tags[TAG],
    )


def _latest(info: Any, name: str, kind: Any) -> Any:
    """Return the value of the newest valid assessment by a human of this name."""
    found: list[Any] = [
        each
        for each in info.assessments
        if each.name == name
        and isinstance(each, kind)
        and each.valid is not False
        and each.source.source_type == "HUMAN"
    ]
    return max(found, key=lambda each: each.last_update_time_ms).value if found else None
