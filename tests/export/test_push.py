"""Pushing models to the local hub and loading them from there: permissions and contents."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fintune.export.push import explain_push_error
from fintune.integrity import hash_files, write_sums
from fintune.model.adapter import add_adapter, save_adapter
from fintune.model.base import load_base
from fintune.params import Base, Lora
from support.hub import Hub
from support.project import ROOT

pytestmark = pytest.mark.end_to_end

WRITER, READER, INVALID = "hf_writerDDDD", "hf_readerEEEE", "hf_invalidFFFF"
COMMIT = "a" * 40
LORA = Lora(r=4, alpha=8, dropout=0.0, target_modules=["q_proj", "v_proj"])
LOAD = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
merged, adapter, base, revision, prompt = sys.argv[1:]
tokens = AutoTokenizer.from_pretrained(merged)(prompt, return_tensors="pt")
model = AutoModelForCausalLM.from_pretrained(merged, use_safetensors=True)
print(float(model(**tokens).logits.float().square().sum()))
model = AutoModelForCausalLM.from_pretrained(base, revision=revision, use_safetensors=True)
model.resize_token_embeddings(tokens["input_ids"].max() + 2, mean_resizing=False)
print(PeftModel.from_pretrained(model, adapter).base_model.model.model.layers[0].self_attn.q_proj
      .lora_B["default"].weight.double().sum().item())
"""
PROMPT = "Input: What is a bond?\n<response>"

Push = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def hub(tiny_base: Path) -> Iterator[Hub]:
    """Run a hub where one user may write acme's models, and all may read them."""
    with Hub() as hub:
        hub.add("models", "acme/tiny", tiny_base, revision=COMMIT)
        hub.allow(WRITER, "acme")
        hub.allow(READER)
        yield hub


@pytest.fixture
def merged(tiny_base: Path, tokenizer: Any, tmp_path: Path) -> Path:
    """Write a project's models/merged, in shards, with the other files of an export."""
    folder = tmp_path / "models/merged"
    base = Base(model=str(tiny_base), revision=None)
    model = load_base(base, tokenizer, "none", torch.bfloat16, torch.device("cpu"))
    model.save_pretrained(folder, max_shard_size="500KB")
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA model.\n")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "tiny-f16.gguf").write_bytes(b"GGUF")
    assert len(list(folder.glob("*.safetensors"))) > 1
    write_sums(folder, hash_files(folder))
    return folder


@pytest.fixture
def adapter(tiny_base: Path, tokenizer: Any, tmp_path: Path) -> Path:
    """Write a project's models/adapter, of a base on the hub, with weights that are not 0."""
    folder = tmp_path / "models/adapter"
    base = Base(model=str(tiny_base), revision=None)
    model = load_base(base, tokenizer, "none", torch.float32, torch.device("cpu"))
    tuned = add_adapter(model, tokenizer, LORA, seed=0)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    save_adapter(tuned, folder)
    change(folder / "adapter_config.json", base_model_name_or_path="acme/tiny", revision=COMMIT)
    (folder / "README.md").write_text("---\nbase_model: acme/tiny\n---\nAn adapter.\n")
    return folder


@pytest.fixture
def push(hub: Hub, tmp_path: Path) -> Push:
    """Return a function that runs the command in the project and checks that no output shows the token."""

    def run(*arguments: str, token: str = WRITER, **extra: str) -> subprocess.CompletedProcess[str]:
        environment = hub.environment(tmp_path / "home") | {
            "PYTHONPATH": str(ROOT),
            "HF_TOKEN": token,
        }
        done = subprocess.run(
            [sys.executable, "-m", "fintune", "push", *arguments],
            cwd=tmp_path,
            env=environment | extra,
            capture_output=True,
            text=True,
            check=False,
        )
        assert not token or token not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    return run


def change(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | values))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(done: subprocess.CompletedProcess[str], *expected: str) -> None:
    assert done.returncode == 1, done.stdout
    message = done.stderr[done.stderr.index("error: ") :]
    assert [part for part in expected if part not in message] == [], message


def writes(hub: Hub) -> list[str]:
    return [path for method, path, _ in hub.requests if method in ("POST", "PUT")]


def test_what_was_pushed_loads_and_is_private(
    hub: Hub, push: Push, merged: Path, adapter: Path, tmp_path: Path
) -> None:
    (merged / ".cache").mkdir()
    (merged / ".cache/hidden.json").write_text("{}")
    (merged / "other.safetensors.partial-1").write_text("unfinished")
    done = push("acme/merged")
    assert done.returncode == 0, done.stderr
    sha, _ = hub.commit("models", "acme/merged", "main", WRITER)
    assert done.stdout == f"{hub.url}/acme/merged (private)\ncommit {sha}\n"
    shutil.rmtree(merged / ".cache")
    (merged / "other.safetensors.partial-1").unlink()
    assert hub.files("acme/merged") == contents(merged)

    done = push("acme/adapter", "models/adapter")
    assert done.returncode == 0 and "warning" not in done.stderr
    assert hub.files("acme/adapter") == contents(adapter)
    assert hub.private == {("models", "acme/merged"), ("models", "acme/adapter")}
    assert hub.commits("acme/merged") == ["Push merged"]

    names = ["acme/merged", "acme/adapter", "acme/tiny", COMMIT, PROMPT]
    environment = hub.environment(tmp_path / "home") | {"HF_TOKEN": WRITER}
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD, *names],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert loaded.returncode == 0, loaded.stderr
    model = AutoModelForCausalLM.from_pretrained(merged)
    tokens = AutoTokenizer.from_pretrained(merged)(PROMPT, return_tensors="pt")
    with torch.no_grad():
        expected = float(model(**tokens).logits.float().square().sum())
    tuned = PeftModel.from_pretrained(model, adapter)
    layer = tuned.base_model.model.model.layers[0].self_attn.q_proj
    summed = layer.lora_B["default"].weight.double().sum().item()
    assert [float(line) for line in loaded.stdout.split()] == pytest.approx([expected, summed])


def test_the_commit_names_the_registered_version(hub: Hub, push: Push, merged: Path) -> None:
    project = merged.parent.parent
    (project / "reports").mkdir()
    report = {"registered_model": "financial-qa", "version": "3", "run_id": "0123abcd"}
    (project / "reports/export.json").write_text(json.dumps(report))
    assert push("acme/merged").returncode == 0
    (project / "reports/export.json").write_text(json.dumps(report | {"version": None}))
    assert push("acme/failed").returncode == 0
    assert hub.commits("acme/failed") == ["financial-qa, not registered, MLflow run 0123abcd"]
    elsewhere = shutil.copytree(merged, project / "copy")
    assert push("acme/copy", str(elsewhere)).returncode == 0
    assert hub.commits("acme/merged") == ["financial-qa version 3, MLflow run 0123abcd"]
    assert hub.commits("acme/copy") == ["Push copy"]


def test_pushing_again_sends_and_deletes_what_has_changed(
    hub: Hub, push: Push, merged: Path
) -> None:
    push("acme/merged")
    first = hub.commit("models", "acme/merged", "main", WRITER)[0]
    assert push("acme/merged").stdout.endswith(f"commit {first}\n")
    for stale in ("model.safetensors", "model-00001-of-00009.safetensors"):
        hub.files("acme/merged")[stale] = b"former"
    hub.files("acme/merged")["NOTES.md"] = b"written there"
    (merged / "README.md").write_text("Another card.\n")
    write_sums(merged, hash_files(merged))
    hub.requests.clear()
    done = push("acme/merged")
    assert done.returncode == 0 and "model.safetensors: deleted there" in done.stderr
    assert hub.files("acme/merged") == contents(merged) | {"NOTES.md": b"written there"}
    assert not any(path.startswith("/lfs/") for path in writes(hub))
    assert len(hub.commits("acme/merged")) == 2


def test_public_is_asked_for(hub: Hub, push: Push, merged: Path) -> None:
    done = push("--public", "acme/open")
    assert done.stdout.startswith(f"{hub.url}/acme/open (public)\n")
    assert hub.private == set()

    (merged / "README.md").write_text("Not for everybody.\n")
    write_sums(merged, hash_files(merged))
    refused(push("acme/open"), "acme/open is public", "push with --public")
    assert len(hub.commits("acme/open")) == 1
    assert hub.files("acme/open")["README.md"] != b"Not for everybody.\n"
    assert push("--public", "acme/open").returncode == 0

    push("acme/secret")
    refused(push("--public", "acme/secret"), "acme/secret is private", "/acme/secret/settings")
    assert hub.private == {("models", "acme/secret")}
    assert len(hub.commits("acme/secret")) == 1


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        (
            ["acme/new"],
            {"token": ""},
            ["set HF_TOKEN to a token of type write", "/settings/tokens"],
        ),
        (["acme/new"], {"token": INVALID}, ["HF_TOKEN is not valid", "of type write"]),
        (["acme/new"], {"token": READER}, ["does not let HF_TOKEN write", "type write"]),
        (["other/new"], {}, ["does not let HF_TOKEN write", "if other is somebody else"]),
        (["merged"], {}, ["merged: not the name of a repository", "OWNER/NAME"]),
        (["acme/a b"], {}, ["acme/a b: not the name of a repository"]),
        (["acme/a--b"], {}, ["acme/a--b: not the name of a repository"]),
        (["acme/new"], {"HF_HUB_OFFLINE": "1"}, ["HF_HUB_OFFLINE is set"]),
        (
            ["acme/new"],
            {"HF_ENDPOINT": "http://127.0.0.1:9"},
            ["while pushing to http://127.0.0.1:9"],
        ),
        (["acme/new", "models/nothing"], {}, ["models/nothing: not found"]),
        (["acme/new", "models"], {}, ["models/pickle.bin: can run code"]),
    ],
    ids=[
        "no token",
        "invalid",
        "reader",
        "owner",
        "name",
        "space",
        "dashes",
        "offline",
        "no hub",
        "no folder",
        "pickle",
    ],
)
def test_a_refusal_is_explained_and_nothing_is_pushed(
    hub: Hub,
    push: Push,
    merged: Path,
    arguments: list[str],
    environment: dict[str, str],
    expected: list[str],
) -> None:
    (merged.parent / "pickle.bin").write_bytes(b"")
    done = push(*arguments, **environment)
    refused(done, *expected)
    assert hub.stored == {} and hub.private == set()


def test_a_model_card_that_the_hub_refuses_is_named(hub: Hub, push: Push, adapter: Path) -> None:
    """PEFT's own card names the base by its path if that is a folder."""
    (adapter / "README.md").write_text("---\nbase_model: /home/me/base\n---\n")
    done = push("acme/adapter", "models/adapter")
    refused(done, "Invalid metadata in README.md", '"/home/me/base" is not valid', "mend it")
    assert "run it again" not in done.stderr and hub.files("acme/adapter") == {}


@pytest.mark.parametrize("name", ["optimizer.pt", "sub/data.pkl", "modeling_tiny.py", "a.bin"])
def test_what_can_run_code_is_refused(hub: Hub, push: Push, merged: Path, name: str) -> None:
    (merged / name).parent.mkdir(exist_ok=True)
    (merged / name).write_bytes(b"")
    refused(push("acme/merged"), f"models/merged/{name}", "can run code")
    assert hub.requests == []


def test_a_folder_without_weights_is_refused(hub: Hub, push: Push, merged: Path) -> None:
    for shard in merged.glob("*.safetensors"):
        shard.unlink()
    refused(push("acme/merged"), "models/merged: no safetensors weights", "dvc pull")
    assert hub.requests == []


def test_files_that_are_no_part_of_a_model_stay(hub: Hub, push: Push, merged: Path) -> None:
    (merged / "train.log").write_text("secret")
    done = push("acme/merged")
    assert "models/merged/train.log: not pushed" in done.stderr
    assert "train.log" not in hub.files("acme/merged")


def test_an_interrupted_upload_goes_on(hub: Hub, push: Push, merged: Path) -> None:
    hub.room = 1
    refused(push("acme/merged"), "Error while uploading", "the connection was idle", "run it again")
    assert len(hub.stored) == 1 and hub.files("acme/merged") == {}
    (arrived,) = hub.stored
    hub.mend()
    hub.requests.clear()
    assert push("acme/merged").returncode == 0
    assert hub.files("acme/merged") == contents(merged)
    sent = [path for path in writes(hub) if path.startswith("/lfs/")]
    large = [path for path in merged.iterdir() if path.suffix in (".safetensors", ".gguf")]
    assert f"/lfs/{arrived}" not in sent and len(sent) == len(large) - 1


def test_an_adapter_of_a_local_base_is_pushed_with_a_warning(
    hub: Hub, push: Push, adapter: Path, tiny_base: Path
) -> None:
    for base, revision in ((str(tiny_base), None), ("assets/demo-base", None)):
        settings = {"base_model_name_or_path": base, "revision": revision}
        change(adapter / "adapter_config.json", **settings)
        done = push("acme/adapter", "models/adapter")
        assert done.returncode == 0
        assert f"warning: the adapter's base is {base} on this disk" in done.stderr
    training = {"base": {"model": "acme/tiny", "revision": COMMIT}}
    (adapter / "training.json").write_text(json.dumps(training))
    change(adapter / "adapter_config.json", base_model_name_or_path="acme/tiny")
    assert "warning" not in push("acme/adapter", "models/adapter").stderr


def test_no_signature_of_an_upload_is_shown() -> None:
    error = RuntimeError("refused: PUT https://storage.example/oid?X-Signature=abc\nAccess denied")
    shown = explain_push_error(error, "acme/merged")
    assert "https://storage.example/oid Access denied" in shown and "abc" not in shown
