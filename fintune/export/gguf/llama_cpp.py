"""Generate greedy answers from a GGUF file with llama.cpp (PyPI's xllamacpp), in a separate process.

`python -m fintune.export.gguf.llama_cpp FILE` reads prompts as JSON from its input and prints the
answers. In a separate process, a crash of llama.cpp only fails the check, and its threads and torch's do
not interfere.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fintune.errors import UserError

INSTALL = "pip install 'gguf>=0.19' 'xllamacpp>=2026.10'"


@dataclass(frozen=True)
class Completion:
    """A greedy answer and its text; `prompt` includes bos, `answer` its end token."""

    prompt: list[int]
    answer: list[int]
    text: str


def is_installed() -> bool:
    """Return whether the package that runs llama.cpp is installed."""
    return find_spec("xllamacpp") is not None


def require_packages() -> None:
    """Check that the packages that write and run GGUF files are installed.

    Raises:
        UserError: one is not installed.
    """
    missing = [name for name in ("gguf", "xllamacpp") if find_spec(name) is None]
    if missing:
        raise UserError(
            f"merge_export.gguf: {' and '.join(missing)} not installed: {INSTALL}; "
            "merge_export.gguf: [] does without"
        )


def llama_cpp_answers(file: Path, prompts: Sequence[str], max_new_tokens: int) -> list[Completion]:
    """Generate greedy answers from a GGUF file with llama.cpp on the CPU and its own tokenizer.

    Raises:
        UserError: llama.cpp is not installed, or cannot load or run the file.
    """
    if not is_installed():
        raise UserError(f"gguf: llama.cpp is not installed, which checks the file: {INSTALL}")
    request = {"prompts": list(prompts), "max_new_tokens": max_new_tokens}
    done = subprocess.run(
        [sys.executable, "-m", "fintune.export.gguf.llama_cpp", str(file.resolve())],
        input=json.dumps(request),
        cwd=Path(__file__).parents[3],  # so that fintune can be imported
        env=os.environ | {"GGML_NO_BACKTRACE": "1"},  # otherwise a crash starts a debugger
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise UserError(f"gguf: {file}: llama.cpp cannot run it: {_reason(done)}")
    return [Completion(**answer) for answer in json.loads(done.stdout.splitlines()[-1])]


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """Return the first error that llama.cpp logged ("time E message") or died of, or else its exit status."""
    for line in done.stderr.splitlines():
        if " E " in line:
            return line.split(" E ", 1)[1].strip()
        if "GGML_ASSERT" in line or "what():" in line:
            return line.strip()
    if done.returncode < 0:
        return f"it crashed: {signal.strsignal(-done.returncode)}"
    return (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]


def _complete_all(file: str, prompts: list[str], max_new_tokens: int) -> list[Completion]:
    """Start a server on loopback, in this process, and request one answer after another."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = file
    # A token has at least one byte; two more for bos and a leading space.
    params.n_ctx = max((len(p.encode()) for p in prompts), default=0) + 2 + max_new_tokens
    params.n_gpu_layers = 0
    params.fit_params = False
    params.warmup = False
    params.ui = False
    params.verbosity = 1  # errors
    params.api_keys = [key := secrets.token_hex()]
    server = xllamacpp.Server(params)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            server.listening_address + path,
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
        )
        try:
            with opener.open(request) as response:
                content: dict[str, Any] = json.load(response)
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode(errors="replace")) from None
        return content

    answers = []
    for prompt in prompts:
        read = {"content": prompt, "add_special": True, "parse_special": True}
        prompt_ids = post("/tokenize", read)["tokens"]
        wanted = {"n_predict": max_new_tokens, "temperature": 0, "return_tokens": True}
        completed = post("/completion", {"prompt": prompt, "cache_prompt": False, **wanted})
        answers.append(Completion(prompt_ids, completed["tokens"], completed["content"]))
    return answers


def main() -> None:
    """Answer the prompts on standard input with the file named on the command line."""
    request = json.loads(sys.stdin.read())
    answers = _complete_all(sys.argv[1], request["prompts"], request["max_new_tokens"])
    print(json.dumps([asdict(answer) for answer in answers]))


if __name__ == "__main__":
    main()
