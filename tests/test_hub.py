"""The local hub serves the real clients, each in a process of its own.

The snippets print one JSON line. They document what the libraries raise, which our own code and
its messages rely on.
"""

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub import Hub

A, B, UNKNOWN = "a" * 40, "b" * 40, "c" * 40

# Reports the result of a call, or its error: names of the classes, HTTP status, causes, text.
OUTCOME = """
import json

def outcome(call, *args, **kwargs):
    try:
        return call(*args, **kwargs)
    except Exception as error:
        chain = [error]
        while chain[-1].__cause__:
            chain.append(chain[-1].__cause__)
        return {
            "error": type(error).__name__,
            "kinds": [kind.__name__ for kind in type(error).__mro__],
            "status": getattr(getattr(error, "response", None), "status_code", None),
            "causes": [type(cause).__name__ for cause in chain[1:]],
            "text": str(error),
        }
"""
DATASETS = (
    OUTCOME
    + """
from datasets import load_dataset

def load(repo, revision, **kwargs):
    return load_dataset(repo, split="train", revision=revision, **kwargs)

def rows(*args, **kwargs):
    return outcome(lambda: list(load(*args, **kwargs)["question"]))
"""
)


def client(hub: Hub, home: Path, source: str, **environment: str) -> Any:
    """What the snippet prints last, run in a new process against the hub, caching in `home`."""
    done = subprocess.run(
        [sys.executable, "-c", source],
        env=os.environ | hub.environment(home) | environment,
        cwd=home.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def resolved(hub: Hub, repo: str, file: str, method: str = "GET") -> list[bool]:
    """Whether each download of the file carried a token."""
    return [
        request.authorized
        for request in hub.requests
        if request.method == method and request.path == f"/{repo}/resolve/{A}/{file}"
    ]


def parquet(folder: Path, questions: list[str]) -> Path:
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"question": questions}), folder / "train.parquet")
    return folder


def test_load_dataset_online_then_offline(tmp_path: Path) -> None:
    home = tmp_path / "home"
    notes = tmp_path / "notes" / "data"
    notes.mkdir(parents=True)
    (notes / "train.jsonl").write_text('{"question": "é?"}\n{"question": "d"}\n', encoding="utf-8")
    with Hub() as hub:
        hub.add("datasets", "acme/qa", parquet(tmp_path / "1", ["a", "b"]), revision=A)
        hub.add("datasets", "acme/qa", parquet(tmp_path / "2", ["c"]), revision=B)
        hub.add("datasets", "acme/notes", notes.parent, revision=A)
        online = f"""{DATASETS}
print(json.dumps([rows("acme/qa", "{A}"), rows("acme/qa", "{B}"), rows("acme/notes", "{A}")]))
"""
        assert client(hub, home, online) == [["a", "b"], ["c"], ["é?", "d"]]
        stray = "hf_not_a_token_of_this_hub"
        warm = f'{DATASETS}\nprint(json.dumps(rows("acme/qa", "{A}", token="{stray}")))'
        # A warm cache hides the refusal, and the rows are those of the other revision.
        assert client(hub, home, warm) == ["c"]

    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(hub.url.rpartition(":")[2])))
    offline = f"""{DATASETS}
path = load("acme/qa", "{A}").cache_files[0]["filename"]
print(json.dumps([rows("acme/notes", "{A}"), rows("acme/qa", "{A}"), path,
                  rows("acme/other", "{A}")]))
"""
    notes_rows, qa_rows, path, other = client(hub, home, offline, HF_HUB_OFFLINE="1")
    assert notes_rows == ["é?", "d"]
    # Offline, datasets takes the last revision that it cached, whichever is asked for. Only the
    # path of the cache tells them apart.
    assert qa_rows == ["c"]
    assert Path(path).parent.name == B
    assert other["error"] == "ConnectionError"


def test_load_dataset_errors(tmp_path: Path) -> None:
    folder = parquet(tmp_path / "qa", [f"question {i}" for i in range(2000)])
    with Hub() as hub:
        for repo in ("acme/qa", "acme/gated", "acme/cut"):
            hub.add("datasets", repo, folder, revision=A)
        hub.gate("datasets", "acme/gated", token="hf_yes", accepted=True)
        hub.gate("datasets", "acme/gated", token="hf_no", accepted=False)
        hub.cut("acme/cut", "train.parquet", after_bytes=1000)
        source = f"""{DATASETS}
print(json.dumps({{
    "repo": rows("acme/nothing", "{A}"),
    "revision": rows("acme/qa", "{UNKNOWN}"),
    "file": rows("acme/qa", "{A}", data_files="other.parquet"),
    "anonymous": rows("acme/gated", "{A}"),
    "stranger": rows("acme/gated", "{A}", token="hf_no"),
    "invalid": rows("acme/gated", "{A}", token="hf_invalid"),
    "cut": rows("acme/cut", "{A}"),
    "accepted": rows("acme/gated", "{A}", token="hf_yes"),
}}))
"""
        got = client(hub, tmp_path / "home", source)
        assert len(got["accepted"]) == 2000
        assert resolved(hub, "datasets/acme/gated", "train.parquet") == [True]
        assert got["repo"]["error"] == got["revision"]["error"] == "DatasetNotFoundError"
        assert "doesn't exist on the Hub or cannot be accessed" in got["repo"]["text"]
        assert f"Revision '{UNKNOWN}' doesn't exist" in got["revision"]["text"]
        assert got["revision"]["causes"][0] == "RevisionNotFoundError"
        assert got["file"]["error"] == "FileNotFoundError"
        assert got["anonymous"]["error"] == got["stranger"]["error"] == "DatasetNotFoundError"
        assert "You must be authenticated" in got["anonymous"]["text"]
        assert "to ask for access" in got["stranger"]["text"]
        assert (got["invalid"]["error"], got["invalid"]["status"]) == ("HfHubHTTPError", 401)
        assert "Invalid credentials" in got["invalid"]["text"]
        assert got["cut"]["error"] == "RemoteProtocolError"
        assert "TransportError" in got["cut"]["kinds"]
        assert "OSError" not in got["cut"]["kinds"]
        hub.mend()
        again = client(hub, tmp_path / "home", f'{DATASETS}\nprint(len(rows("acme/cut", "{A}")))')
        assert again == 2000


def test_download_errors(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    (folder / "sub").mkdir(parents=True)
    weights = bytes(range(256)) * 40
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "sub" / "config.json").write_text("{}")
    with Hub() as hub:
        for repo in ("acme/tiny", "acme/gated", "acme/cut"):
            hub.add("models", repo, folder, revision=A)
        hub.gate("models", "acme/gated", token="hf_yes", accepted=True)
        hub.gate("models", "acme/gated", token="hf_no", accepted=False)
        hub.cut("acme/cut", "model.safetensors", after_bytes=1000)
        source = f"""{OUTCOME}
import huggingface_hub as hub

def get(repo, file="model.safetensors", revision="{A}", **kwargs):
    return outcome(hub.hf_hub_download, repo, file, revision=revision, **kwargs)

api, fs = hub.HfApi(), hub.HfFileSystem()
info = api.model_info("acme/gated", files_metadata=True)
folders = api.get_paths_info("acme/tiny", ["sub", "nothing"], revision="{A}")
print(json.dumps({{
    "repo": get("acme/nothing"),
    "repo with token": get("acme/nothing", token="hf_yes"),
    "revision": get("acme/tiny", revision="{UNKNOWN}"),
    "file": get("acme/tiny", "nothing.json"),
    "anonymous": get("acme/gated"),
    "stranger": get("acme/gated", token="hf_no"),
    "snapshot": outcome(hub.snapshot_download, "acme/gated", revision="{A}", token="hf_no"),
    "invalid": get("acme/gated", token="hf_invalid"),
    "invalid elsewhere": get("acme/tiny", token="hf_invalid"),
    "cut": outcome(hub.snapshot_download, "acme/cut", revision="{A}"),
    "accepted": get("acme/gated", token="hf_yes"),
    "info": [info.id, info.sha, info.gated, info.private],
    "sizes": {{file.rfilename: file.size for file in info.siblings}},
    "folders": [folder.path for folder in folders],
    "tree": fs.find("acme/tiny"),
    "range": list(fs.cat_file("acme/tiny/model.safetensors", start=300, end=304)),
}}))
"""
        home = tmp_path / "home"
        got = client(hub, home, source)
        assert got["repo"]["error"] == "RepositoryNotFoundError"
        assert got["repo"]["status"] == 401
        assert got["repo with token"]["error"] == "RepositoryNotFoundError"
        assert got["repo with token"]["status"] == 404
        assert got["revision"]["error"] == "RevisionNotFoundError"
        assert got["file"]["error"] == "RemoteEntryNotFoundError"
        for who, status in (("anonymous", 401), ("stranger", 403), ("snapshot", 403)):
            assert (got[who]["error"], got[who]["status"]) == ("GatedRepoError", status), who
            assert "Access to model acme/gated is restricted" in got[who]["text"]
        for who in ("invalid", "invalid elsewhere"):  # a bad token is no question of the gate
            assert (got[who]["error"], got[who]["status"]) == ("HfHubHTTPError", 401), who
        assert Path(got["accepted"]).read_bytes() == weights
        # The cache names an LFS file by its SHA-256.
        assert Path(got["accepted"]).resolve().name == hashlib.sha256(weights).hexdigest()
        assert resolved(hub, "acme/gated", "model.safetensors") == [True]
        heads = resolved(hub, "acme/gated", "model.safetensors", "HEAD")
        assert heads == [False, True, True, True, True]  # anonymous, stranger, snapshot, ...
        assert got["info"] == ["acme/gated", A, "manual", False]
        assert got["sizes"] == {"model.safetensors": 10240, "sub/config.json": 2}
        assert got["folders"] == ["sub"]
        assert got["tree"] == ["acme/tiny/model.safetensors", "acme/tiny/sub/config.json"]
        assert got["range"] == [44, 45, 46, 47]

        assert got["cut"]["error"] == "RemoteProtocolError"
        assert "received 1000 bytes, expected 10240" in got["cut"]["text"]
        assert (
            len(resolved(hub, "acme/cut", "model.safetensors")) == 6
        )  # five retries, a second each
        assert not list(home.rglob("*.incomplete"))
        assert not list(home.glob("hub/models--acme--cut/snapshots/*/model.safetensors"))
        retry = f"{OUTCOME}\nimport huggingface_hub as hub\n"
        retry += f'print(json.dumps(outcome(hub.snapshot_download, "acme/cut", revision="{A}")))'
        offline = client(hub, home, retry, HF_HUB_OFFLINE="1")
        assert "LocalEntryNotFoundError" in offline["kinds"]
        hub.mend()
        assert (Path(client(hub, home, retry)) / "model.safetensors").read_bytes() == weights


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, float]]:
    """Two folders with a random Mistral and its tokenizer each, and the sum of a weight of each."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({"<unk>": 0, "</s>": 1, "what": 2, "why": 3}, "<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    saved = []
    for seed in range(2):
        folder = tmp_path_factory.mktemp("model")
        torch.manual_seed(seed)
        config = MistralConfig(
            vocab_size=8,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
        model = MistralForCausalLM(config)
        model.save_pretrained(folder)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>"
        ).save_pretrained(folder)
        saved.append((folder, model.lm_head.weight.sum().item()))
    return saved


def test_transformers(tmp_path: Path, tiny_models: list[tuple[Path, float]]) -> None:
    with Hub() as hub:
        for (folder, _), revision in zip(tiny_models, (A, B), strict=True):
            hub.add("models", "acme/tiny", folder, revision=revision)
        hub.add("models", "acme/gated", tiny_models[0][0], revision=A)
        hub.gate("models", "acme/gated", token="hf_yes", accepted=True)
        source = f"""{OUTCOME}
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

def weight(repo="acme/tiny", **kwargs):
    return AutoModelForCausalLM.from_pretrained(repo, **kwargs).lm_head.weight.sum().item()

print(json.dumps({{
    "tokens": AutoTokenizer.from_pretrained("acme/tiny", revision="{A}")("why what")["input_ids"],
    "hidden": AutoConfig.from_pretrained("acme/tiny", revision="{A}").hidden_size,
    "weights": [weight(revision="{A}"), weight(revision="{B}"), weight()],
    "snapshot": weight(snapshot_download("acme/tiny", revision="{A}")),
    "gated": outcome(weight, "acme/gated", revision="{A}"),
    "accepted": weight("acme/gated", revision="{A}", token="hf_yes"),
    "repo": outcome(weight, "acme/nothing", revision="{A}"),
    "revision": outcome(weight, revision="{UNKNOWN}"),
}}))
"""
        got = client(hub, tmp_path / "home", source)
    first, second = (weight for _, weight in tiny_models)
    assert (got["tokens"], got["hidden"]) == ([3, 2], 32)
    assert got["weights"] == pytest.approx([first, second, second])
    assert [got["snapshot"], got["accepted"]] == pytest.approx([first, first])
    assert first != pytest.approx(second)
    for what, cause in (
        ("gated", "GatedRepoError"),
        ("repo", "RepositoryNotFoundError"),
        ("revision", "RevisionNotFoundError"),
    ):
        assert got[what]["error"] == "OSError", what
        assert got[what]["causes"][0] == cause
    assert resolved(hub, "acme/gated", "model.safetensors") == [True]
