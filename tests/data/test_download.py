"""Downloads: the true reason of a failure, a bar, and a limit on silence alone."""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from fintune.data import download as module
from fintune.data.download import downloaded
from fintune.data.tables import read_source
from fintune.errors import RecordError
from support.project import ROOT

TABLE = b"input,output\nWhy?,So.\n"


class _Handler(BaseHTTPRequestHandler):
    given_up = threading.Event()
    sent: ClassVar[list[str]] = []
    states: ClassVar[dict[str, str]] = {}  # of names, what they are stated to be

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        name = self.path.split("?")[0].strip("/")
        if name == "endless" and self.command == "GET":
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):  # the other side hangs up
                while not self.given_up.is_set():
                    self.wfile.write(TABLE * 1000)
            return
        status = int(name) if name.isdigit() else 200
        self.send_response(status)
        self.send_header("Content-Length", str(len(TABLE) + 9 * (name in ("silent", "torn"))))
        if name in self.states:
            self.send_header("ETag", self.states[name])
        self.end_headers()
        if self.command == "GET":
            self.sent.append(name)
            self.wfile.write(TABLE)
            self.wfile.flush()
            if name == "silent":
                self.given_up.wait(20)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    _Handler.given_up.set()
    server.shutdown()
    server.server_close()


def test_a_url_s_path_names_the_format(address: str) -> None:
    assert read_source(f"{address}/qa.csv?download=true") == [{"input": "Why?", "output": "So."}]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("404", r"nothing at this address \(404\)"),
        ("403", r"refuses it \(403\)"),
        ("401", r"refuses it \(401\)"),
        ("500", "answered 500"),
        ("503", "answered 503"),
        ("torn", "broke off"),
    ],
)
def test_a_failure_is_told_with_its_reason(address: str, name: str, reason: str) -> None:
    with (
        pytest.raises(RecordError, match=f"{address}/{name}: .*{reason}"),
        downloaded(f"{address}/{name}"),
    ):
        pass


def test_a_refused_port_is_told_as_such() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        port = server.server_port
    with (
        pytest.raises(RecordError, match=r"no connection: .*check the address"),
        downloaded(f"http://127.0.0.1:{port}/qa.csv"),
    ):
        pass


def test_silence_ends_a_transfer_and_its_length_does_not(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    given: list[Any] = []
    plain = fsspec.url_to_fs
    monkeypatch.setattr(module, "SILENCE", 0.3)
    monkeypatch.setattr(
        fsspec, "url_to_fs", lambda url, **options: given.append(options) or plain(url, **options)
    )
    with (
        pytest.raises(RecordError, match=r"nothing came for 0\.3 seconds"),
        downloaded(f"{address}/silent"),
    ):
        pass
    assert given[0]["client_kwargs"]["timeout"].total is None


def test_a_stream_without_end_is_left_at_the_limit(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINTUNE_SOURCE_GIB", "0.001")
    with (
        pytest.raises(
            RecordError, match=r"/endless: it sends more than 0\.001 GiB; .*FINTUNE_SOURCE_GIB"
        ),
        downloaded(f"{address}/endless"),
    ):
        pass


KILLED = """
import os, signal, sys
from pathlib import Path
from fintune.data.download import downloaded

with downloaded(sys.argv[1], Path(sys.argv[2])):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_download_outlasts_a_kill_while_the_server_states_that_it_holds_the_same(
    address: str, tmp_path: Path
) -> None:
    def times_sent(name: str) -> int:
        """Download a file and be killed, and then do so again."""
        url, before = f"{address}/{name}", _Handler.sent.count(name)
        command = [sys.executable, "-c", KILLED, url, str(tmp_path)]
        assert subprocess.run(command, cwd=ROOT).returncode == -signal.SIGKILL
        with downloaded(url, tmp_path) as file:
            assert file.read_bytes() == TABLE
        return _Handler.sent.count(name) - before

    assert times_sent("unstated.csv") == 2
    _Handler.states["stated.csv"] = '"one"'
    assert times_sent("stated.csv") == 1
    _Handler.states["stated.csv"] = '"other"'
    assert times_sent("stated.csv") == 1
