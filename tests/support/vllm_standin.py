"""Stand-in for the vllm program: the part of its command line and protocol that is used here.

STANDIN selects the behaviour: `dies` at startup, `quits` at the first request, `stubborn` ignores
SIGTERM, `weights` generates one token that depends only on the weights. Otherwise the answer follows
from the prompt's three values: a token, its number of repeats, and the token after it, in a cycle.
STANDIN_TOGETHER: respond only after this many requests have come, the last one first.
STANDIN_NOTES: a file for its process ids, its command line and the requests, each a line of JSON.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import cycle, islice
from pathlib import Path
from typing import Any

WAY = os.environ.get("STANDIN", "")
TOGETHER = int(os.environ.get("STANDIN_TOGETHER", "1"))
FOLDER = sys.argv[2]
waiting: list[threading.Event] = []
lock = threading.Lock()


def note(what: Any) -> None:
    with lock, Path(os.environ["STANDIN_NOTES"]).open("a") as file:
        file.write(json.dumps(what) + "\n")


def answer(body: dict[str, Any]) -> list[int]:
    if WAY == "weights":
        weights = Path(FOLDER, "model.safetensors").read_bytes()
        return [300 + zlib.crc32(weights) % 5000]
    word, times, last = body["prompt"]
    given: list[int] = []
    for token in islice(cycle([word] * times + [last]), body["max_tokens"]):
        given.append(token)
        if token in body["stop_token_ids"]:
            break
    return given


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Stay quiet."""

    def reply(self, status: int, content: Any) -> None:
        payload = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def do_GET(self) -> None:
        self.reply(200, {"version": "stand-in"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        note(body)
        if os.environ.get("VLLM_API_KEY") and "Authorization" not in self.headers:
            return self.reply(401, {"error": {"message": "a key, please"}})
        if WAY == "quits":
            print("CudaError: out of memory", flush=True)
            os._exit(7)
        if body["model"] != FOLDER:
            return self.reply(404, {"error": {"message": "no such model"}})
        turn = threading.Event()
        with lock:
            waiting.append(turn)
            if len(waiting) >= TOGETHER:
                turn.set()
        if not turn.wait(60):
            return self.reply(500, {"error": {"message": f"only {len(waiting)} requests came"}})
        self.reply(200, {"choices": [{"text": "", "token_ids": answer(body)}]})
        with lock:
            at = waiting.index(turn)
            if at:
                waiting[at - 1].set()
        return None


if WAY == "dies":
    print("ValueError: what it stumbled over", *(f"line {i}" for i in range(40)), sep="\n")
    sys.exit(3)
if WAY == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
note([os.getpid(), child.pid])
note(sys.argv)


class Server(ThreadingHTTPServer):
    request_queue_size = 64
    daemon_threads = True


options = dict(zip(sys.argv[3:], sys.argv[4:], strict=False))
Server((options["--host"], int(options["--port"])), Handler).serve_forever()
