"""Generate answers with a temporary vLLM server; an optional extra.

vLLM pins other versions than this project, so it has an environment of its own and is never imported. It
rejects adapters with token rows, so it gets the model as a plain folder.
"""

import asyncio
import logging
import os
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import torch
from tqdm.auto import tqdm

from fintune.data.prompt import end_tokens
from fintune.errors import UserError
from fintune.generation import process
from fintune.generation.decoding import Decoding
from fintune.generation.generate import Answer, of_each, to_answer
from fintune.generation.process import running
from fintune.hardware import device, free_memory

log = logging.getLogger("fintune")

VARIABLE = "FINTUNE_VLLM"
AT_ONCE = 512  # concurrent requests; the server chooses its own batch size
SHARE = 0.9  # of the GPU's free memory
CPU_CACHE_GIB = "2"  # for the KV cache; the default is nearly all of the machine's memory
LAST_LINES, TELLING_LINES = 10, 5


class Refused(Exception):
    """A rejected request, with the server's message."""


@dataclass(frozen=True)
class Server:
    """A running server with one model, whose name there is its folder."""

    process: subprocess.Popen[bytes]
    address: str
    folder: Path
    log: Path
    at_once: int

    def generate(
        self,
        tokenizer: Any,
        prompts: Sequence[list[int]],
        decoding: Decoding | Sequence[Decoding],
        title: str,
    ) -> list[Answer]:
        """Generate answers as `generate.generate` does, but sample each from a seed of its own.

        Raises:
            UserError: the server has died or has rejected a request.
        """
        decodings = of_each(decoding, prompts)
        body = {
            "model": str(self.folder),
            "max_tokens": decodings[0].max_new_tokens,
            "stop_token_ids": end_tokens(tokenizer, decodings[0].end_id),
            "ignore_eos": True,  # only stop_token_ids end an answer
            "return_token_ids": True,
        }
        bodies = [
            body | each.settings | {"prompt": prompt, "seed": each.seed + i}
            for i, (prompt, each) in enumerate(zip(prompts, decodings, strict=True))
        ]
        with tqdm(total=len(prompts), desc=title, unit="answer", leave=False) as bar:
            try:
                tokens = asyncio.run(self._ask(bodies, bar.update))
            except Refused as error:
                raise self.failure(str(error)) from error
            except aiohttp.ClientError as error:
                with suppress(subprocess.TimeoutExpired):  # give it time to log the reason
                    self.process.wait(process.PATIENCE)
                raise self.failure(f"died while it generated ({error})") from error
        return [to_answer(tokenizer, new, decodings[0].end_id) for new in tokens]

    async def _ask(
        self, bodies: Sequence[dict[str, Any]], done: Callable[[], Any]
    ) -> list[list[int]]:
        # the server may close a kept-alive connection just as it is reused
        connector = aiohttp.TCPConnector(limit=self.at_once, force_close=True)
        forever = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, timeout=forever) as session:

            async def one(body: dict[str, Any]) -> list[int]:
                async with session.post(f"{self.address}/v1/completions", json=body) as response:
                    if response.status != 200:
                        raise Refused(f"responded {response.status}: {await response.text()}")
                    choice = (await response.json())["choices"][0]
                if choice.get("token_ids") is None:
                    raise Refused("gives no token_ids with its answers; a newer vLLM does")
                done()
                return list(choice["token_ids"])

            return await asyncio.gather(*(one(body) for body in bodies))

    async def version(self) -> str:
        """Wait until the server is ready and return its version; loading and compiling may take minutes.

        Raises:
            UserError: the server has exited.
        """
        async with aiohttp.ClientSession() as session:
            while True:
                if self.process.poll() is not None:
                    raise self.failure(f"ended with status {self.process.returncode} at its start")
                with suppress(aiohttp.ClientError):
                    async with session.get(f"{self.address}/health") as response:
                        if response.status == 200:
                            break
                await asyncio.sleep(0.2)
            async with session.get(f"{self.address}/version") as response:
                return str((await response.json())["version"])

    def failure(self, what: str) -> UserError:
        """Build an error with excerpts of the log, and save the whole log."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        number, kept = tempfile.mkstemp(prefix="fintune-vllm-", suffix=".log")
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(text)
        lines = [line for line in text.splitlines() if line.strip()]
        # with several processes, the last lines often only report that another one has died
        telling = [line for line in lines if re.search(r"\w(Error|Exception)\b", line)]
        shown = [*telling[:TELLING_LINES], *lines[-LAST_LINES:]]
        quoted = "".join(f"\n  {line[:300]}" for line in dict.fromkeys(shown))
        return UserError(
            f"evaluate.engine: vLLM {what}; evaluate.engine: built_in does without it, "
            f"{kept} has all of its log, in short:{quoted}"
        )


def find_vllm() -> Path:
    """Return the program named by FINTUNE_VLLM, or else the first vllm on the PATH.

    Raises:
        UserError: there is none.
    """
    named = os.environ.get(VARIABLE)
    found = shutil.which(named or "vllm")
    if found is None:
        fault = f"{VARIABLE}: {named} is no program" if named else "there is no vllm on the PATH"
        raise UserError(
            f"evaluate.engine: {fault}; install it in an environment of its own, "
            f"`python -m venv ENV && ENV/bin/pip install vllm`, and set {VARIABLE}=ENV/bin/vllm, "
            "or set evaluate.engine: built_in"
        )
    return Path(found).absolute()


@contextmanager
def serving(
    write: Callable[[Path], None],
    dtype: torch.dtype,
    max_tokens: int,
    rows_at_once: int | str,
    title: str,
) -> Iterator[tuple[Server, str]]:
    """Run a vLLM server on loopback for the block; yield it and its version.

    Our own model stays loaded. A GPU needs room for a second copy of the weights in 16 bits; vLLM may use
    most of its free memory for them and the KV cache.

    Args:
        write: writes the model to a folder, as a plain one.
        dtype: of the matrix products.
        max_tokens: of a prompt and its answer together.
        rows_at_once: maximum batch size; `auto` leaves it to vLLM.

    Raises:
        UserError: vLLM is not installed or does not start, or there is no room for the folder.
    """
    program = find_vllm()
    with tempfile.TemporaryDirectory(prefix="fintune-vllm-") as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        write(folder)
        free_memory()
        port = _free_port()
        command = [str(program), "serve", str(folder), "--host", "127.0.0.1", "--port", str(port)]
        command += ["--dtype", str(dtype).removeprefix("torch.")]
        command += ["--max-model-len", str(max_tokens)]
        # requests set the sampling, not the base's generation config
        command += ["--generation-config", "vllm", "--disable-uvicorn-access-log"]
        if rows_at_once != "auto":
            command += ["--max-num-seqs", str(rows_at_once)]
        if device().type == "cuda":
            free, total = torch.cuda.mem_get_info()
            command += ["--gpu-memory-utilization", f"{SHARE * free / total:.3f}"]
        else:
            command.append("--enforce-eager")  # compiling takes longer than it saves
        at_once = AT_ONCE if rows_at_once == "auto" else int(rows_at_once)
        written = Path(scratch) / "log"
        log.info("%s: starting %s", title, program)
        with running(command, _environment(program), written) as process:
            server = Server(process, f"http://127.0.0.1:{port}", folder, written, at_once)
            yield server, asyncio.run(server.version())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment(program: Path) -> dict[str, str]:
    ours = {key: value for key, value in os.environ.items() if key != "VLLM_API_KEY"}
    return {
        "VLLM_CPU_KVCACHE_SPACE": CPU_CACHE_GIB,
        **ours,
        "PATH": f"{program.resolve().parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "HF_HUB_OFFLINE": "1",  # the folder is complete
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # accept the same prompt lengths as the built-in engine
    }
