"""Merging shard by shard: the folder matches the adapter's model, and errors name the wrong input."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fintune.data.prompt import (
    encode,
    end_token_id,
    load_tokenizer,
    render_completion,
    render_prompt,
)
from fintune.errors import UserError
from fintune.generation.decoding import Decoding
from fintune.generation.generate import generate
from fintune.hub.models import weights_fingerprint
from fintune.integrity import hash_files, write_sums
from fintune.merging import merge
from fintune.merging.lora_update import nf4_round_trip, read_updates
from fintune.merging.merge import merge_into_folder
from fintune.model.adapter import (
    add_adapter,
    load_adapter,
    read_training,
    save_adapter,
    write_training,
)
from fintune.model.base import load_base, load_plain
from fintune.model.likelihood import answer_logits, likelihood
from fintune.params import Base, Lora
from support.project import ROOT

FLOAT = torch.float32
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_adapter(base: Base, tokenizer: Any, folder: Path, quantization: str = "nf4") -> Path:
    """Make an adapter in which every matrix and every token row has an effect."""
    model = load_base(base, tokenizer, quantization, FLOAT)
    tuned = add_adapter(model, tokenizer, Lora(r=4, alpha=8, dropout=0.0, target_modules=LAYERS), 0)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name or "trainable_tokens" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    save_adapter(tuned, folder)
    write_training(folder, base, {"quantization": quantization, "precision": "float32"}, "Say.")
    return folder


@pytest.fixture(scope="module")
def adapter(base: Base, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tokenizer, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def rows(tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    texts = [("Say.", "What is a bond?", "A loan."), ("Say.", "Why save?", "For later, mostly.")]
    return [encode(tokenizer, render_prompt(a, b), render_completion(c)) for a, b, c in texts]


@pytest.mark.parametrize(("quantization", "nf4_compute_dtype"), [("nf4", FLOAT), ("none", None)])
def test_the_folder_computes_what_the_adapter_does(
    base: Base, tokenizer: Any, rows: Any, tmp_path: Path, quantization: str, nf4_compute_dtype: Any
) -> None:
    adapter = make_adapter(base, tokenizer, tmp_path / "adapter", quantization)
    tuned = load_adapter(load_base(base, tokenizer, quantization, FLOAT), adapter)
    merge_into_folder(base, tokenizer, adapter, tmp_path, FLOAT, nf4_compute_dtype)
    plain = load_plain(tmp_path)
    for a, b in zip(answer_logits(tuned, rows), answer_logits(plain, rows), strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    with tuned.disable_adapter():  # the adapter has an effect
        assert abs(likelihood(tuned, rows, "").loss - likelihood(plain, rows, "").loss) > 0.01
    prompts = [prompt for prompt, _ in rows]
    decoding = Decoding(end_token_id(tokenizer), 12)
    ask = lambda m: generate(m, tokenizer, prompts, decoding, "", 8)  # noqa: E731
    assert ask(plain) == ask(tuned)


def test_what_four_bits_made_of_the_weights_is_merged_into(
    base: Base, tokenizer: Any, rows: Any, adapter: Path, tmp_path: Path
) -> None:
    """The original weights would give another model; each weight shows which one was used."""
    for name, nf4_compute_dtype in (("trained_on", FLOAT), ("original", None)):
        (tmp_path / name).mkdir()
        merge_into_folder(base, tokenizer, None, tmp_path / name, FLOAT, nf4_compute_dtype)
    own = load_file(Path(base.model) / "model.safetensors")
    folders = {n: load_file(tmp_path / n / "model.safetensors") for n in ("trained_on", "original")}
    quantized = load_base(base, tokenizer, "nf4", FLOAT)
    linear = {
        f"{name}.weight"
        for name, module in quantized.named_modules()
        if hasattr(getattr(module, "weight", None), "quant_state")
    }
    assert len(linear) == 14
    for name, weight in own.items():
        assert torch.equal(folders["original"][name][: len(weight)], weight.float())
        changed = not torch.equal(folders["trained_on"][name][: len(weight)], weight.float())
        assert changed == (name in linear)
    plain = quantized.dequantize()
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight.float(), folders["trained_on"][name]), name


def test_small_shards_hold_the_same_model(
    base: Base, tokenizer: Any, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tmp_path / "one", tmp_path / "many", tmp_path / "from_many"]
    for folder in folders:
        folder.mkdir()
    merge_into_folder(base, tokenizer, adapter, folders[0], torch.float16, FLOAT)
    monkeypatch.setattr(merge, "SHARD_SIZE", "200KB")
    merge_into_folder(base, tokenizer, adapter, folders[1], torch.float16, FLOAT)
    shards = sorted(file.name for file in folders[1].glob("*.safetensors"))
    index = json.loads((folders[1] / "model.safetensors.index.json").read_text())
    assert len(shards) > 2 and shards == sorted(set(index["weight_map"].values()))
    sharded = Base(model=str(folders[1]), revision=None)
    merge_into_folder(sharded, tokenizer, None, folders[2], torch.float16, None)
    one, *others = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in folders)
    for other in others:
        assert one.keys() == other.keys()
        assert all(torch.equal(weight, other[name]) for name, weight in one.items())


def test_a_base_whose_head_is_its_embedding_stays_one(
    tiny_base: Path, tmp_path: Path, rows: Any
) -> None:
    folder = tmp_path / "tied"
    shutil.copytree(tiny_base, folder)
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    base = Base(model=str(folder), revision=None)
    tokenizer = load_tokenizer(base, "new")
    adapter = make_adapter(base, tokenizer, tmp_path / "adapter")
    merged = tmp_path / "merged"
    merged.mkdir()
    merge_into_folder(base, tokenizer, adapter, merged, FLOAT, FLOAT)
    assert "lm_head.weight" not in load_file(merged / "model.safetensors")
    tuned = load_adapter(load_base(base, tokenizer, "nf4", FLOAT), adapter)
    plain = load_plain(merged)
    for a, b in zip(answer_logits(tuned, rows), answer_logits(plain, rows), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_rounding_happens_once(base: Base, tokenizer: Any, adapter: Path, tmp_path: Path) -> None:
    """A weight of the folder is the rounded float32 sum, not a sum of rounded values."""
    merge_into_folder(base, tokenizer, adapter, tmp_path, torch.bfloat16, FLOAT)
    merged = load_file(tmp_path / "model.safetensors")
    own = load_file(Path(base.model) / "model.safetensors")
    for name, update in read_updates(adapter).items():
        if update.down is not None and update.up is not None:
            exact = nf4_round_trip(own[name].float()).double()
            exact += update.scale * (update.up.double() @ update.down.double())
            apart = (merged[name].double() - exact).abs()
            assert (apart <= exact.abs() * 2**-8 * 1.01 + 1e-8).all(), name  # half an ulp


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def lose(file: Path) -> None:
    file.unlink()


def scramble(file: Path) -> None:
    file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])


@pytest.mark.parametrize("damage", [truncate, lose, scramble])
def test_a_damaged_shard_is_named(
    tiny_base: Path, tokenizer: Any, adapter: Path, tmp_path: Path, damage: Any
) -> None:
    folder, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(tiny_base, folder)
    out.mkdir()
    damage(folder / "model.safetensors")
    broken = Base(model=str(folder), revision=None)
    with pytest.raises(UserError, match=r"model\.safetensors: missing, cut off or damaged"):
        merge_into_folder(broken, tokenizer, adapter, out, FLOAT, FLOAT)
    assert list(out.iterdir()) == []


def test_an_adapter_of_other_weights_is_refused(
    tiny_base: Path, adapter: Path, tmp_path: Path
) -> None:
    """Shapes and names are equal but not the values, as in two revisions of a base."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    moved = tmp_path / "adapter"
    shutil.copytree(adapter, moved)
    said = json.loads((moved / "training.json").read_text())
    said["base"]["model"] = str(folder)
    (moved / "training.json").write_text(json.dumps(said))
    assert read_training(moved).instruction == "Say."
    weights = {k: v + 0.01 for k, v in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"was trained on other weights than .*base holds now"):
        read_training(moved)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="a folder that is not here"):
        read_training(moved)


def test_an_adapter_of_an_older_version_is_refused(adapter: Path, tmp_path: Path) -> None:
    older = tmp_path / "adapter"
    shutil.copytree(adapter, older)
    said = json.loads((older / "training.json").read_text())
    del said["base_fingerprint"]
    (older / "training.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match="no base_fingerprint: it was trained by an older version"):
        read_training(older)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"use_rslora": True}, "rsLoRA"),
        ({"rank_pattern": {"q_proj": 2}}, "ranks or alphas by layer"),
    ],
)
def test_kinds_of_lora_that_are_not_made_here_are_refused(
    adapter: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    other = tmp_path / "adapter"
    shutil.copytree(adapter, other)
    config = json.loads((other / "adapter_config.json").read_text()) | change
    (other / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        read_updates(other)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("base_model.model.model.layers.0.mlp.up_proj.bias", (4,), "neither a LoRA matrix nor"),
        ("base_model.model.model.layers.9.mlp.up_proj.lora_A.weight", (4, 64), "layers.9.mlp"),
        ("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", (4, 63), "does not fit"),
    ],
)
def test_tensors_that_do_not_belong_are_named(
    base: Base,
    tokenizer: Any,
    adapter: Path,
    tmp_path: Path,
    name: str,
    shape: tuple[int, ...],
    message: str,
) -> None:
    other, out = tmp_path / "adapter", tmp_path / "out"
    shutil.copytree(adapter, other)
    out.mkdir()
    weights = load_file(other / "adapter_model.safetensors") | {name: torch.ones(shape)}
    save_file(weights, other / "adapter_model.safetensors")
    with pytest.raises(UserError, match=message):
        merge_into_folder(base, tokenizer, other, out, FLOAT, FLOAT)


FULL = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from fintune.data.prompt import load_tokenizer
from fintune.integrity import hash_files, write_sums
from fintune.merging.merge import merge_into_folder
from fintune.params import Base
from fintune.stage import run, whole_folder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
base = Base(model=sys.argv[2], revision=None)
tokenizer = load_tokenizer(base, "new")
def main():
    with whole_folder(Path(sys.argv[4])) as folder:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        merge_into_folder(base, tokenizer, Path(sys.argv[3]), folder, torch.float32, torch.float32)
run(main)
"""


def test_a_disk_that_takes_no_more_leaves_the_former_export(
    base: Base, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    out.mkdir()
    (out / "config.json").write_text("former")
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(ROOT), base.model, str(adapter), str(out)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 1, done.stderr
    assert "the merged weights could not be written" in done.stderr and "make room" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    assert (out / "config.json").read_text() == "former"


def test_too_small_a_disk_is_told_before_anything_is_written(
    base: Base, tokenizer: Any, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="make room"):
        merge_into_folder(base, tokenizer, adapter, tmp_path, FLOAT, FLOAT)
    assert list(tmp_path.iterdir()) == []


def test_the_checksums_are_those_that_sha256sum_reads(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("a")
    (tmp_path / "b c.txt").write_bytes(bytes(range(256)))
    write_sums(tmp_path, hash_files(tmp_path))
    check = ["sha256sum", "--check", "SHA256SUMS"]
    assert subprocess.run(check, cwd=tmp_path, capture_output=True, check=False).returncode == 0
    (tmp_path / "a.json").write_text("b")
    assert subprocess.run(check, cwd=tmp_path, capture_output=True, check=False).returncode == 1


def test_the_fingerprint_looks_at_all_parts_of_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are longer than the part that is read, but a change in the far half is detected."""
    monkeypatch.setattr("fintune.hub.models.STRETCHES", 8)
    monkeypatch.setattr("fintune.hub.models.STRETCH_BYTES", 64)
    base, file = Base(model=str(tmp_path), revision=None), tmp_path / "model.safetensors"
    content = bytes(1_000_000)
    file.write_bytes(content)
    before = weights_fingerprint(base)
    assert weights_fingerprint(base) == before
    file.write_bytes(content[:500_000] + b"\1" * 500_000)
    other = weights_fingerprint(base)
    file.write_bytes(content + b"\0")
    assert len({before, other, weights_fingerprint(base)}) == 3
    file.write_bytes(content)
    (tmp_path / "consolidated.safetensors").write_bytes(b"a second copy that is not loaded")
    assert weights_fingerprint(base) == before
