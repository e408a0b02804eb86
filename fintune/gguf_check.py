"""Load a GGUF file with llama.cpp and compare its greedy answers with those of the folder it comes from.

llama.cpp (PyPI's xllamacpp) runs in a process of its own: `python -m fintune.gguf_check FILE` reads the
prompts as JSON from its input and prints the answers. A file that makes it crash fails the check alone,
and its threads and torch's do not meet.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any

from fintune.params import UserError
from fintune.prompts import encode

INSTALL = "pip install 'gguf>=0.19' 'xllamacpp>=2026.10'"


@dataclass(frozen=True)
class Greedy:
    """A greedy answer: tokens of the prompt, beginning included, and of the answer, its end included."""

    prompt: list[int]
    answer: list[int]
    text: str


@dataclass(frozen=True)
class Agreement:
    """How alike two lists of greedy answers are.

    All are shares from 0 to 1. `equal_prompts`: prompts that became the same tokens. `equal_answers`:
    answers that are equal to the last token. `equal_tokens`: places that hold the same token, of the
    places of the longer answer; after a first difference the rest differs too, as a rule.
    `equal_choices` leaves the rest out: of the tokens chosen after equal ones, those that are equal.
    """

    answers: int
    equal_prompts: float
    equal_answers: float
    equal_tokens: float
    equal_choices: float


def is_installed() -> bool:
    """Whether the package that runs llama.cpp is there."""
    return find_spec("xllamacpp") is not None


def require_packages() -> None:
    """What writes GGUF files and what runs them.

    Raises:
        UserError: one is not installed.
    """
    missing = [name for name in ("gguf", "xllamacpp") if find_spec(name) is None]
    if missing:
        raise UserError(
            f"merge_export.gguf: {' and '.join(missing)} not installed: {INSTALL}; "
            "merge_export.gguf: [] does without"
        )


def check_gguf(
    file: Path,
    expected: Sequence[Greedy],
    prompts: Sequence[str],
    max_new_tokens: int,
    min_equal_choices: float,
) -> Agreement:
    """Answer the prompts with llama.cpp and hold the answers against `expected`.

    Raises:
        UserError: the file cannot be run, a prompt became other tokens, or `equal_choices` is
            less than `min_equal_choices`.
    """
    found = llama_cpp_answers(file, prompts, max_new_tokens)
    agreement = compare(expected, found)
    if agreement.equal_prompts < 1:
        i = next(
            i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if a.prompt != b.prompt
        )
        raise UserError(
            f"gguf: {file}: llama.cpp reads {prompts[i]!r} as the tokens {found[i].prompt}, and "
            f"transformers as {expected[i].prompt}; the file is not the same model"
        )
    if agreement.equal_choices < min_equal_choices:
        raise UserError(
            f"gguf: {file}: after equal tokens, llama.cpp chose the folder's next token in "
            f"{agreement.equal_choices:.2%} of the cases, which is less than {min_equal_choices:.2%}"
        )
    return agreement


def compare(expected: Sequence[Greedy], found: Sequence[Greedy]) -> Agreement:
    """Compare answers to the same prompts, pair by pair."""
    pairs = list(zip(expected, found, strict=True))
    places = sum(max(len(a.answer), len(b.answer)) for a, b in pairs)
    equal = sum(x == y for a, b in pairs for x, y in zip(a.answer, b.answer, strict=False))
    before = sum(_until_different(a.answer, b.answer) for a, b in pairs)
    different = sum(a.answer != b.answer for a, b in pairs)
    return Agreement(
        answers=len(pairs),
        equal_prompts=sum(a.prompt == b.prompt for a, b in pairs) / max(1, len(pairs)),
        equal_answers=sum(a.answer == b.answer for a, b in pairs) / max(1, len(pairs)),
        equal_tokens=equal / max(1, places),
        equal_choices=before / max(1, before + different),
    )


def _until_different(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def transformers_answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int
) -> list[Greedy]:
    """Greedy answers by transformers' own loop, ended by what the generation config says.

    To compare with a file in f16, load the folder in float32: bfloat16's roundings are larger.

    Args:
        prompts: as `fintune.prompts.render_prompt` makes them.
    """
    import torch  # here, because the process that runs llama.cpp has no use for it

    answers = []
    for prompt in prompts:
        asked, _ = encode(tokenizer, prompt, "")
        ids = torch.tensor([asked], device=model.device)
        tokens = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
        )[0].tolist()
        answer = tokens[len(asked) :]
        text = tokenizer.decode(answer, skip_special_tokens=True)
        answers.append(Greedy(asked, answer, text))
    return answers


def llama_cpp_answers(file: Path, prompts: Sequence[str], max_new_tokens: int) -> list[Greedy]:
    """Greedy answers of a GGUF file by llama.cpp on the CPU, its own tokenizer included.

    Raises:
        UserError: llama.cpp is not installed, or cannot load or run the file.
    """
    if not is_installed():
        raise UserError(f"gguf: llama.cpp is not installed, which checks the file: {INSTALL}")
    request = {"prompts": list(prompts), "max_new_tokens": max_new_tokens}
    done = subprocess.run(
        [sys.executable, "-m", "fintune.gguf_check", str(file.resolve())],
        input=json.dumps(request),
        cwd=Path(__file__).parent.parent,  # where fintune is found
        env=os.environ | {"GGML_NO_BACKTRACE": "1"},  # a crash would start a debugger
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise UserError(f"gguf: {file}: llama.cpp cannot run it: {_reason(done)}")
    return [Greedy(**answer) for answer in json.loads(done.stdout.splitlines()[-1])]


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """The first error that llama.cpp logged ("time E what") or died of, and else how it ended."""
    for line in done.stderr.splitlines():
        if " E " in line:
            return line.split(" E ", 1)[1].strip()
        if "GGML_ASSERT" in line or "what():" in line:
            return line.strip()
    if done.returncode < 0:
        return f"it crashed: {signal.strsignal(-done.returncode)}"
    return (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]


def _answer_all(file: str, prompts: list[str], max_new_tokens: int) -> list[Greedy]:
    """Runs in the process of its own: a server on loopback, asked for one answer after the other."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = file
    # A token is a byte or more; one for the beginning and one for a space before the text.
    params.n_ctx = max((len(p.encode()) for p in prompts), default=0) + 2 + max_new_tokens
    params.n_gpu_layers = 0
    params.fit_params = False
    params.warmup = False
    params.ui = False
    params.verbosity = 1  # errors
    params.api_keys = [key := secrets.token_hex()]
    server = xllamacpp.Server(params)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            server.listening_address + path,
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
        )
        with opener.open(request) as answer:
            content: dict[str, Any] = json.load(answer)
            return content

    answers = []
    for prompt in prompts:
        read = {"content": prompt, "add_special": True, "parse_special": True}
        asked = ask("/tokenize", read)["tokens"]
        wanted = {"n_predict": max_new_tokens, "temperature": 0, "return_tokens": True}
        said = ask("/completion", {"prompt": prompt, "cache_prompt": False, **wanted})
        answers.append(Greedy(asked, said["tokens"], said["content"]))
    return answers


def main() -> None:
    """Answer the prompts on the standard input with the file that the command line names."""
    request = json.loads(sys.stdin.read())
    answers = _answer_all(sys.argv[1], request["prompts"], request["max_new_tokens"])
    print(json.dumps([asdict(answer) for answer in answers]))


if __name__ == "__main__":
    main()
