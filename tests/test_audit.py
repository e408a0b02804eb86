"""The pinned packages are held against a database of vulnerabilities: here, one on loopback."""

import json
import os
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

from packaging.utils import canonicalize_name

from support.project import ROOT

FLAW = {
    "id": "GHSA-made-here-only",
    "summary": "made for a test",
    "details": "made for a test",
    "affected": [
        {
            "package": {"name": "safetensors", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "99"}]}],
        }
    ],
}


class Database(BaseHTTPRequestHandler):
    """What the database OSV answers to a question for one package."""

    flawed = ""
    asked: ClassVar[set[str]] = set()

    def do_POST(self) -> None:
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = question["package"]["name"]
        self.asked.add(f"{canonicalize_name(name)}=={question['version']}")
        answer = json.dumps({"vulns": [FLAW]} if name == self.flawed else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def audit(flawed: str) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """Run `make audit` with a database that knows one flawed package; return also what was asked for."""
    handler = type("Flawed", (Database,), {"flawed": flawed, "asked": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/v1/query"
    done = subprocess.run(
        ["make", "-o", ".venv/bin/ready", "audit", f"AUDIT=-s osv --osv-url {address}"],
        cwd=ROOT,
        env=os.environ | {"no_proxy": "127.0.0.1"},
        capture_output=True,
        text=True,
        check=False,
    )
    server.shutdown()
    server.server_close()
    return done, handler.asked  # type: ignore[attr-defined]


def test_a_package_with_a_known_vulnerability_is_named() -> None:
    done, _ = audit("safetensors")
    assert done.returncode != 0
    assert "safetensors" in done.stdout and "GHSA-made-here-only" in done.stdout


def test_every_pinned_package_is_asked_for() -> None:
    done, asked = audit("none")
    assert done.returncode == 0, done.stderr
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pinned = (line.split("==") for line in lines if "==" in line)
    expected = {f"{canonicalize_name(name)}=={version}" for name, version in pinned}
    assert asked == expected
