"""Secrets of every kind, planted where users have them, are in nothing that is written or printed."""

import base64
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest

from support.project import Project

pytestmark = pytest.mark.end_to_end

USER, QUERY, SIGNATURE = "ann", "query-0f1e2d3c", "signed-4b5a6978"
PASSWORD, TOKEN = "password-8796a5b4", "hf_tokenQwErTyUiOp"
ENVIRONMENT = {
    "HF_TOKEN": TOKEN,
    "MLFLOW_TRACKING_TOKEN": "bearer-c3d2e1f0",
    "AWS_SECRET_ACCESS_KEY": "aws-13579bdf",
    "AWS_SESSION_TOKEN": "session-02468ace",
}
SECRETS = {QUERY, SIGNATURE, PASSWORD, *ENVIRONMENT.values()}
ENCODED = {base64.b64encode(f"{USER}:{each}".encode()).decode() for each in SECRETS}


class Echo(BaseHTTPRequestHandler):
    """A server that refuses everything, with what it was sent in its answer; /moved leads to a signed URL."""

    status = 403

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", f"/{self.status}?X-Amz-Signature={SIGNATURE}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        text = f"{self.requestline}\n{self.headers}"
        body = json.dumps({"error_code": "INTERNAL_ERROR", "message": text}).encode()
        self.send_response(self.status, text.splitlines()[0])
        self.send_header("X-Error-Message", text.replace("\r", "").replace("\n", " "))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = answer

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def echo(answers: int) -> Iterator[str]:
    handler = type("Answers", (Echo,), {"status": answers})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def leaks(text: bytes) -> set[str]:
    return {each for each in SECRETS | ENCODED if each.encode() in text}


def written(folder: Path) -> dict[str, set[str]]:
    """Return the files with a secret, by their path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    found = {str(path.relative_to(folder)): leaks(path.read_bytes()) for path in files}
    return {name: secrets for name, secrets in found.items() if secrets}


class Trained(NamedTuple):
    """A project after a whole run, and the modes that its files and folders had before DVC linked them."""

    project: Project
    modes: dict[str, int]


STAGES = ("fetch", "split", "format", "train", "evaluate", "merge_export")


@pytest.fixture(scope="module")
def trained(make_project: Callable[..., Project]) -> Trained:
    """Make a project after a whole run with secrets in its environment, and a umask of 027."""
    project = make_project(train__max_steps=2, train__validate_every_steps=2, evaluate__max_rows=4)
    project.environment |= ENVIRONMENT
    project.commit_all()
    before = os.umask(0o027)
    try:
        said = [project.stage(stage) for stage in STAGES]
        modes = {
            path.relative_to(project.folder).as_posix(): path.stat().st_mode & 0o777
            for path in project.folder.rglob("*")
            if path.parts[len(project.folder.parts)] in ("data", "models", "reports")
        }
        said.append(project.run("dvc", "commit", "--force"))  # its links have a mode of their own
    finally:
        os.umask(before)
    assert leaks("".join(each.stdout + each.stderr for each in said).encode()) == set()
    return Trained(project, modes)


def test_a_run_writes_no_secret_of_its_environment(trained: Trained) -> None:
    assert written(trained.project.folder) == {}


def test_files_follow_the_umask(trained: Trained) -> None:
    before = {"data", "data/source", "data/source/.gitkeep"}
    opened = {name for name, mode in trained.modes.items() if mode & 0o027}
    assert opened == before
    assert trained.modes["models/adapter/adapter_model.safetensors"] == 0o640


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        *[("query", 200), ("user", 200), ("signed", 403), ("signed", 429), ("signed", 500)],
        *[
            ("hub", 403),
            ("hub", 429),
            ("base", 401),
            ("base", 500),
            ("mlflow", 403),
            ("mlflow", 500),
        ],
    ],
)
def test_a_failure_tells_and_writes_no_secret(
    trained: Trained, tmp_path: Path, kind: str, status: int
) -> None:
    """A server answers with the headers and the address that it was sent."""
    project = Project(tmp_path / "project")
    shutil.copytree(trained.project.folder, project.folder, symlinks=True)
    project.environment |= ENVIRONMENT
    with echo(status) as address:
        more, stage = {}, "fetch"
        if kind == "query":
            project.set(fetch__source=f"http://{address}/qa.csv?token={QUERY}")
        elif kind == "user":
            project.set(fetch__source=f"http://{USER}:{PASSWORD}@{address}/qa.csv")
        elif kind == "signed":
            project.set(fetch__source=f"http://{address}/moved/qa.csv")
        elif kind == "hub":
            project.set(fetch__source="acme/qa", fetch__revision="a" * 40)
            more = {"HF_ENDPOINT": f"http://{address}", "HF_HOME": str(tmp_path / "home")}
        elif kind == "base":
            project.set(base__model="acme/tiny", base__revision="a" * 40)
            more = {"HF_ENDPOINT": f"http://{address}", "HF_HOME": str(tmp_path / "home")}
            stage = "format"
        else:
            more = {
                "MLFLOW_TRACKING_URI": f"http://{USER}:{PASSWORD}@{address}",
                "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
            }
            stage = "merge_export"
        done = project.stage(stage, check=False, **more)
    said = done.stdout + done.stderr
    assert done.returncode == 1 and "error: " in said and "Traceback" not in said, said
    assert leaks(said.encode()) == set(), said
    allowed = {"params.yaml"} if kind in ("query", "user") else set()
    assert set(written(project.folder)) == allowed
