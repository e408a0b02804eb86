"""Answers from vLLM, with a stand-in for its program and with the real one if it is installed."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import stages.evaluate
from fintune.data.formatting import format_row
from fintune.data.prompt import encode, end_token_id
from fintune.errors import UserError
from fintune.evaluation.measure import measure
from fintune.evaluation.rows import Chosen
from fintune.generation import process, vllm
from fintune.generation.decoding import Decoding
from fintune.generation.generate import Answer, generate
from fintune.generation.vllm import VARIABLE, serving
from fintune.merging.merge import merge_into_folder
from fintune.model.adapter import add_adapter, save_adapter, write_training
from fintune.model.base import load_base
from fintune.params import Base, Generation, Lora, Sampler, read_params
from support.project import SAMPLED

ROOT = Path(__file__).parents[2]
LIMIT = 24
NAMED = os.environ.get(VARIABLE)
REAL = shutil.which(NAMED or "vllm")
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tuned(base: Base, tokenizer: Any, quantization: str) -> Any:
    """Build a model that ends some of its answers early."""
    lora = Lora(r=4, alpha=8, dropout=0.3, target_modules=ALL)
    plain = load_base(base, tokenizer, quantization, torch.float32)
    model = add_adapter(plain, tokenizer, lora, 0)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            loud = 0.05 if "lora_" in name else 0.1
            parameter.data = torch.randn(parameter.shape, generator=generator) * loud
    return model.eval()


def folder_of(
    base: Base, tokenizer: Any, adapter: Path | None, quantization: str = "none"
) -> Callable[[Path], None]:
    """Return a function that writes the merged model of a base and an adapter."""
    nf4_compute_dtype = torch.float32 if quantization == "nf4" else None

    def write(folder: Path) -> None:
        merge_into_folder(base, tokenizer, adapter, folder, torch.float32, nf4_compute_dtype)

    return write


@pytest.fixture(scope="module")
def model(
    base: Base, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path], None]:
    adapter = tmp_path_factory.mktemp("tuned")
    save_adapter(tuned(base, tokenizer, "none"), adapter)
    return folder_of(base, tokenizer, adapter)


class StandIn:
    """Control of the stand-in, and its notes."""

    def __init__(self, notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.notes, self.set = notes, monkeypatch.setenv
        self.set("STANDIN_NOTES", str(notes))

    def noted(self) -> list[Any]:
        return [json.loads(line) for line in self.notes.read_text().splitlines()]

    def requests(self) -> list[dict[str, Any]]:
        return [line for line in self.noted() if isinstance(line, dict)]

    def command(self) -> list[str]:
        found: list[str] = self.noted()[1]
        return found

    def left(self) -> list[int]:
        """Return those of its processes that are still running."""
        return [pid for pid in self.noted()[0] if is_running(pid)]


def is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    program = tmp_path / "vllm"
    script = ROOT / "tests/support/vllm_standin.py"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')
    program.chmod(0o755)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv(VARIABLE, str(program))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    return StandIn(tmp_path / "notes", monkeypatch)


def ask(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    end: int | None = None,
    rows: int | str = "auto",
    **changes: Any,
) -> list[Answer]:
    with serving(model, torch.float32, 128, rows, "test") as (server, _):
        end = end or end_token_id(tokenizer)
        return server.generate(tokenizer, prompts, Decoding(end, LIMIT, **changes), "test")


def test_each_prompt_gets_its_own_answer_whichever_comes_first(
    model: Any, tokenizer: Any, stand_in: StandIn
) -> None:
    end = end_token_id(tokenizer)
    prompts = [[300 + n, n, end] for n in range(1, 13)]
    stand_in.set("STANDIN_TOGETHER", str(len(prompts)))
    given = ask(model, tokenizer, prompts)
    texts = [tokenizer.decode([300 + n] * n).strip() for n in range(1, 13)]
    assert given == [Answer(text, n + 1, True) for n, text in enumerate(texts)]
    asked = [request["prompt"][1] for request in stand_in.requests()]
    assert sorted(asked) == list(range(1, 13))


def test_tokens_and_stopped_mean_what_they_mean_without_vllm(
    model: Any, tokenizer: Any, stand_in: StandIn
) -> None:
    """The end token, the base's own, none within the limit, one just within it, and an empty answer."""
    end, own = end_token_id(tokenizer), tokenizer.eos_token_id
    cases = [(5, end), (5, own), (LIMIT + 3, end), (LIMIT - 1, end), (LIMIT, end), (0, end)]
    given = ask(model, tokenizer, [[300, times, last] for times, last in cases])
    found = [(answer.tokens, answer.stopped) for answer in given]
    full = LIMIT, False
    assert found == [(5, True), (5, False), full, (LIMIT - 1, True), full, (0, True)]
    assert given[-1].text == "" and given[0].text == given[1].text


def test_the_server_is_told_how_to_answer(
    model: Any, tokenizer: Any, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "it would refuse us")
    ask(model, tokenizer, [[300, 1, 301]], rows=7)
    how = {"temperature": 0.2, "top_p": 0.9, "min_p": 0.1, "top_k": 9, "repetition_penalty": 1.1}
    options = dict(zip(stand_in.command()[3:], stand_in.command()[4:], strict=False))
    assert options["--host"] == "127.0.0.1" and options["--dtype"] == "float32"
    assert options["--max-model-len"] == "128" and options["--max-num-seqs"] == "7"
    (greedy,) = stand_in.requests()
    assert greedy["temperature"] == 0 and greedy["max_tokens"] == LIMIT
    assert greedy["stop_token_ids"] == [end_token_id(tokenizer), tokenizer.eos_token_id]
    stand_in.notes.unlink()
    ask(model, tokenizer, [[300, 1, 301]] * 3, seed=5, **how)
    sampled = stand_in.requests()
    assert all(request.items() >= how.items() for request in sampled)
    assert sorted(request["seed"] for request in sampled) == [5, 6, 7]


def test_a_server_that_dies_at_its_start_is_quoted(
    model: Any, tokenizer: Any, stand_in: StandIn, tmp_path: Path
) -> None:
    stand_in.set("STANDIN", "dies")
    with pytest.raises(UserError, match="ended with status 3") as refused:
        ask(model, tokenizer, [[300, 1, 301]])
    told = str(refused.value)
    assert "ValueError: what it stumbled over" in told and "line 39" in told
    assert "line 20" not in told and "evaluate.engine: built_in" in told
    (kept,) = (tmp_path / "tmp").iterdir()  # the model's folder was removed
    assert str(kept) in told and "line 20" in kept.read_text()


def test_a_server_that_dies_while_it_answers_is_quoted(
    model: Any, tokenizer: Any, stand_in: StandIn
) -> None:
    stand_in.set("STANDIN", "quits")
    with pytest.raises(UserError, match="died while it generated") as refused:
        ask(model, tokenizer, [[300, n, 301] for n in range(20)])
    assert "CudaError: out of memory" in str(refused.value)
    assert stand_in.left() == []


def test_a_refused_request_is_told_in_the_server_s_words(
    model: Any, tokenizer: Any, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = vllm.Server.generate

    def misnamed(self: Any, *args: Any, **changes: Any) -> Any:
        object.__setattr__(self, "folder", Path("another"))
        return command(self, *args, **changes)

    monkeypatch.setattr(vllm.Server, "generate", misnamed)
    with pytest.raises(UserError, match=r"responded 404: .*no such model"):
        ask(model, tokenizer, [[300, 1, 301]])
    assert stand_in.left() == []


@pytest.mark.parametrize("named", [True, False])
def test_a_missing_program_is_told_with_the_way_out(
    model: Any, tokenizer: Any, named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    if named:
        monkeypatch.setenv(VARIABLE, str(tmp_path / "vllm"))
    with pytest.raises(UserError, match="is no program" if named else "no vllm on the PATH") as no:
        ask(model, tokenizer, [])
    assert "pip install vllm" in str(no.value) and VARIABLE in str(no.value)


def test_the_stage_misses_the_program_before_it_looks_for_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = (ROOT / "params.yaml").read_text()
    changed = shipped.replace("engine: built_in", "engine: vllm")
    (tmp_path / "params.yaml").write_text(changed.replace(" assets/", f" {ROOT}/assets/"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(VARIABLE, "nowhere/vllm")
    with pytest.raises(UserError, match="nowhere/vllm is no program"):
        stages.evaluate.main()
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


@pytest.mark.parametrize("way", ["", "stubborn"])
@pytest.mark.parametrize("ending", [None, KeyboardInterrupt, ValueError])
def test_no_process_and_no_file_is_left(
    model: Any,
    tokenizer: Any,
    stand_in: StandIn,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    ending: type[BaseException] | None,
) -> None:
    """Neither the server nor its child remains, even if it ignores SIGTERM."""
    stand_in.set("STANDIN", way)
    monkeypatch.setattr(process, "PATIENCE", 0.1 if way else 20)
    with (
        pytest.raises(ending) if ending else nullcontext(),
        serving(model, torch.float32, 64, "auto", "test"),
    ):
        assert len(stand_in.left()) == 2
        if ending:
            raise ending
    assert stand_in.left() == []
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's end")
def test_the_server_ends_with_a_stage_that_is_killed(stand_in: StandIn, tmp_path: Path) -> None:
    code = """if True:
        import os, sys
        from fintune.generation.process import running
        from pathlib import Path
        command = [os.environ["FINTUNE_VLLM"], "serve", "m", "--host", "127.0.0.1", "--port", "0"]
        with running(command, dict(os.environ), Path(sys.argv[1])):
            print("running", flush=True)
            sys.stdin.read()
    """
    stage = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "log")],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert stage.stdout and stage.stdout.readline() == b"running\n"
    while not stand_in.notes.is_file() or len(stand_in.notes.read_text().splitlines()) < 2:
        assert stage.poll() is None
    server, child = (psutil.Process(pid) for pid in stand_in.noted()[0])
    stage.send_signal(signal.SIGKILL)
    stage.wait()
    assert psutil.wait_procs([server], timeout=30)[1] == []
    child.kill()


def test_the_folder_must_have_room(
    model: Any, tokenizer: Any, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(UserError, match="make room"):
        ask(model, tokenizer, [])


def test_base_tuned_model_and_champion_each_answer_from_their_own_weights(
    base: Base,
    tokenizer: Any,
    model: Any,
    stand_in: StandIn,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    stand_in.set("STANDIN", "weights")
    folders, tuned_model = {}, tuned(base, tokenizer, "none")
    for name, loud in {"tuned": 1.0, "champion": 0.5}.items():
        folders[name] = tmp_path / name
        with torch.no_grad():
            for parameter in filter(lambda p: p.requires_grad, tuned_model.parameters()):
                parameter *= loud
        save_adapter(tuned_model, folders[name])
        settings = {"quantization": "none", "precision": "float32", "learning_rate": 0.02}
        settings |= {"epochs": 1, "lora": {"r": 4}}
        write_training(folders[name], base, settings, "Say.")
    end = end_token_id(tokenizer)
    prompts = [[300, 1, end]]
    expected = {
        name: ask(folder_of(base, tokenizer, folder), tokenizer, prompts)[0]
        for name, folder in {**folders, "base": None}.items()
    }
    assert len({answer.text for answer in expected.values()}) == 3

    small = {"engine": "vllm", "general_text": None, "bootstrap_samples": 9}
    sampled = Generation(decoding=Sampler(**SAMPLED), max_new_tokens=8)
    params = read_params().evaluate.model_copy(update=small)
    texts = [
        ("A.", "What is a bond?", "A loan."),
        ("B.", "Why?", "Because."),
        ("B.", "Why?", "So."),
    ]
    records = [dict(zip(("instruction", "input", "output"), text, strict=True)) for text in texts]
    rows = [row for row in (format_row(tokenizer, r, 192, "drop")[0] for r in records) if row]
    stand_in.notes.unlink()
    chosen = Chosen(rows, [row["input"] for row in rows], [[row["output"]] for row in rows])
    adapters = (folders["tuned"], folders["champion"])
    measured = measure(*adapters, chosen, chosen, [], params, sampled)
    samples = params.samples_per_prompt
    assert {n: result.answers for n, result in measured.results.items()} == {
        name: [[answer] * samples] * 3 for name, answer in expected.items()
    }
    assert {n: r.greedy for n, r in measured.results.items()} == {
        name: [answer] * 3 for name, answer in expected.items()
    }
    drawn = [request for request in stand_in.requests() if request["temperature"]]
    assert all(request.items() >= SAMPLED.items() for request in drawn)
    assert len(drawn) == 3 * 2 * samples
    assert measured.about["engine"] == "vllm stand-in"
    greedy = [request for request in stand_in.requests() if not request["temperature"]]
    assert len(greedy) == 3 * 2  # a prompt shared by two rows is sent once


@pytest.mark.skipif(not REAL, reason=f"no vllm on the PATH or in {VARIABLE}")
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_in_float32_vllm_gives_the_answers_of_the_built_in_engine(
    tokenizer: Any, quantization: str, tmp_path: Path
) -> None:
    """Base and tuned model, on the demo's base: vLLM does not support the tiny base's head size."""
    texts = ["What is a bond?", "Why?", "The market", "How do a share and a bond differ?"]
    prompts = [encode(tokenizer, f"{text}<response>", "")[0] for text in texts]
    prompts += [[1, *range(300, 300 + 7 * n)] for n in range(1, 9)]
    base = Base(model=str(ROOT / "assets/demo-base"), revision=None)
    model, sides = tuned(base, tokenizer, quantization), []
    (end,) = tokenizer(".", add_special_tokens=False)["input_ids"]  # some answers reach it
    save_adapter(model, tmp_path)
    for state, adapter in ((nullcontext, tmp_path), (model.disable_adapter, None)):
        with state():
            sides.append(generate(model, tokenizer, prompts, Decoding(end, LIMIT), "built in"))
        write = folder_of(base, tokenizer, adapter, quantization)
        assert ask(write, tokenizer, prompts, end) == sides[-1]
    assert {answer.stopped for side in sides for answer in side} == {True, False}
    assert len({answer.text for side in sides for answer in side}) > len(prompts)
