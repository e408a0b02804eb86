"""The program that makes the base model, on a few paragraphs and a very small model."""

import math
import random
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tools.base_model import Shape, head_loss, hidden_states, make_model, summed_nats, windows
from tools.base_training import (
    TrainingResult,
    TrainingSettings,
    add_residual_dropout,
    learning_rate_at,
    steps_that_fit,
    train_model,
)
from tools.byte_bpe import train_tokenizer
from tools.corpus import (
    BOS,
    Documents,
    InputError,
    byte_count,
    encode_stream,
    read_documents,
    shared_share,
    split_documents,
    token_id,
)
from tools.practice import practice_texts
from tools.pretrain_base import Practice, main, parse, pretrain

SHAPE = Shape(
    vocab_size=384,
    hidden_size=32,
    intermediate_size=64,
    layers=2,
    heads=2,
    kv_heads=1,
    positions=128,
)
SETTINGS = TrainingSettings(
    steps=60,
    minutes=10.0,
    rows=8,
    context=32,
    learning_rate=5e-3,
    warmup_steps=10,
    weight_decay=0.1,
    dropout=0.0,
    seed=3,
    log_steps=20,
    compile=False,
)
PRACTICE = Practice(repeats=20, sheets=200)
PARAGRAPHS = [
    "Shops in the harbour towns sold more coats than a year ago, and fewer boats.",
    "Bankers say that loans to bakeries grew a little; rates on deposits did not move.",
    "Two mills closed for repairs. Orders for paper were steady, prices rose 3 percent.",
    "Farmers expect a good crop of barley, though rain delayed the planting in the north.",
]
HOSTILE = {
    "plain": "Prices rose 3.5% in Q2.",
    "leading and trailing spaces": "  two  before , two after  ",
    "line ends": "a\nb\r\nc\rd\n\n",
    "tabs and no-break spaces": "\t\u00a0\u2003x\u200b\u00ad",
    "emoji": "👩🏽‍👩‍👧‍👦 🇨🇭 ☃️",
    "combining marks": "e\u0301 \u00e9 Z\u0351\u036b\u0343 क्षि",
    "right to left": "\u202eالسوق المالي\u202c שלום",
    "wide": "経済は回復。ＡＢＣ",
    "control characters": "".join(map(chr, [*range(32), *range(127, 160)])),
    "special-looking": "a<s> b</s><pad> <unk>c",
    "ends of Unicode": "\ufffd\ufffe\uffff\U0010ffff\ue000",
    "replacement of nothing": "",
    "apostrophes and punctuation": "don 't , isn't . ( x ) 's",
    "figures": "$1,234.50 million  12  007 3½ ² Ⅷ ٣٤ a1b2 -5%\n | 2004 | 9.9",
}


@dataclass(frozen=True)
class Made:
    """A small run: its folder and results."""

    folder: Path
    trained: TrainingResult
    documents: Documents


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(PARAGRAPHS * 3, 320, 128)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    rng = random.Random(0)
    texts = [
        f"This is report {i} of the harbour office. {' '.join(rng.sample(PARAGRAPHS, 4))} "
        f"The office will write again after {i} days."
        for i in range(400)
    ]
    documents = Documents(texts, empty=0, repeated=0)
    out = tmp_path_factory.mktemp("assets") / "base"
    device = torch.device("cpu")
    trained = pretrain(documents, out, SHAPE, SETTINGS, device, "made up", "python -m x", PRACTICE)
    return Made(out, trained, documents)


def test_the_folder_loads_and_is_bf16_safetensors(made: Made) -> None:
    model = AutoModelForCausalLM.from_pretrained(made.folder, dtype="auto")
    assert model.config.model_type == "mistral"
    assert model.dtype == torch.bfloat16
    assert not model.config.tie_word_embeddings
    tokens = AutoTokenizer.from_pretrained(made.folder)
    assert tokens.is_fast
    assert (tokens.bos_token, tokens.eos_token) == ("<s>", "</s>")
    assert (tokens.pad_token, tokens.unk_token) == ("<pad>", "<unk>")
    assert tokens.clean_up_tokenization_spaces is False
    assert tokens.model_max_length == model.config.max_position_embeddings == 128
    assert model.generation_config.eos_token_id == tokens.eos_token_id
    assert tokens("x").input_ids[0] == tokens.bos_token_id
    assert sorted(file.name for file in made.folder.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert [entry.name for entry in made.folder.parent.iterdir()] == ["base"]


def test_the_loss_falls_and_the_best_weights_are_the_saved_ones(made: Made) -> None:
    losses = [held_out for _, _, held_out in made.trained.history]
    assert [step for step, _, _ in made.trained.history] == [20, 40, 60]
    assert losses[-1] < losses[0] - 0.5
    assert made.trained.best_loss == min(losses)
    saved = load_file(made.folder / "model.safetensors")
    assert saved.keys() == made.trained.best_weights.keys()
    for name, weight in made.trained.best_weights.items():
        assert weight.dtype == torch.float32
        assert torch.equal(saved[name], weight.to(torch.bfloat16))


def test_the_card_gives_the_figures_of_the_saved_weights_over_every_byte(made: Made) -> None:
    model = AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(made.folder)
    texts = split_documents(made.documents.texts)["test"]
    ids = encode_stream(tokens.backend_tokenizer, texts).tolist()
    bits, text = 0.0, ""
    for start in range(0, len(ids) - 1, SETTINGS.context):
        window = ids[start : start + SETTINGS.context + 1]
        with torch.no_grad():
            logits = model(torch.tensor([window[:-1]])).logits[0].double()
        for place, target in enumerate(window[1:]):
            if target != tokens.bos_token_id:
                bits -= logits[place].log_softmax(-1)[target].item() / math.log(2)
                text += str(tokens.decode([target], skip_special_tokens=True))
    assert text == "".join(texts)
    per_byte = bits / byte_count(texts)
    card = (made.folder / "README.md").read_text(encoding="utf-8")
    assert f"| this model | {per_byte:.4f} |" in card
    assert "| 60 | " in card
    assert "    python -m x\n" in card
    assert "made up" in card


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("more", [False, True], ids=["as made", "with added tokens"])
def test_text_comes_back_exactly(made: Made, text: str, more: bool) -> None:
    tokens = AutoTokenizer.from_pretrained(made.folder)
    if more:
        added = ["<response>", "<response|end>"]
        assert tokens.add_special_tokens({"additional_special_tokens": added}) == 2
        both = tokens.encode(f"{text}<response>{text}<response|end>", add_special_tokens=False)
        assert tokens.decode(both) == f"{text}<response>{text}<response|end>"
        assert both.count(tokens.convert_tokens_to_ids("<response>")) == 1
    assert tokens.decode(tokens.encode(text, add_special_tokens=False)) == text
    assert tokens.decode(tokens.encode(text)) == "<s>" + text
    literal = tokens.encode(text, split_special_tokens=True)
    assert tokens.decode(literal, skip_special_tokens=True) == text


def test_every_digit_is_a_token(made: Made, tokenizer: PreTrainedTokenizerFast) -> None:
    for tokens in (tokenizer, AutoTokenizer.from_pretrained(made.folder)):
        texts = [tokens.decode([number]) for number in range(len(tokens))]
        assert set("0123456789") <= set(texts)
        assert [text for text in texts if sum(map(str.isnumeric, text)) > 1] == []
        assert [text for text in texts if len(text) > 1 and any(map(str.isdigit, text))] == []


def test_practice_is_added_to_training_and_validation_alone(made: Made) -> None:
    """Each part's passages repeat its own documents; the test part is what it was."""
    parts = split_documents(made.documents.texts)
    train = list(practice_texts(parts["train"], 20, 200, "train"))
    assert len(train) == 220
    tokenizer = AutoTokenizer.from_pretrained(made.folder)
    tokens = tokenizer.backend_tokenizer
    card = (made.folder / "README.md").read_text(encoding="utf-8")
    count = len(encode_stream(tokens, [*parts["train"], *train]))
    assert f"{byte_count([*parts['train'], *train]):,} bytes, {count:,} tokens" in card
    assert f"20 repeated passages and 200 fact sheets, {byte_count(train):,} bytes" in card
    assert f"{byte_count(parts['test']):,} bytes" in card

    share = len(parts["validation"]) / len(parts["train"])
    sizes = (round(20 * share), round(200 * share))
    assert min(sizes[1], round(200 * len(parts["test"]) / len(parts["train"]))) > 0
    texts = [*parts["validation"], *practice_texts(parts["validation"], *sizes, "validation")]
    stream = encode_stream(tokens, texts)
    model = make_model(SHAPE, tokenizer, seed=0)
    model.load_state_dict(made.trained.best_weights)
    counted = windows(stream, SETTINGS.context, tokenizer.bos_token_id)
    mean = summed_nats(model, *counted) / int((counted[1] != -100).sum())
    assert mean == pytest.approx(made.trained.best_loss)


def test_every_code_point_comes_back(tokenizer: PreTrainedTokenizerFast) -> None:
    points = [point for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    random.Random(0).shuffle(points)
    for start in range(0, len(points), 100_000):
        text = "".join(map(chr, points[start : start + 100_000 : 10]))
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_a_document_cannot_forge_a_boundary(tokenizer: PreTrainedTokenizerFast) -> None:
    backend = tokenizer.backend_tokenizer
    stream = encode_stream(backend, ["a </s><s> b", "<pad>"]).tolist()
    assert stream.count(token_id(backend, BOS)) == stream.count(token_id(backend, "</s>")) == 2
    assert token_id(backend, "<pad>") not in stream
    # the caller's tokenizer still recognizes its special tokens
    assert backend.encode("<pad>", add_special_tokens=False).ids == [token_id(backend, "<pad>")]


def test_the_split_depends_on_the_texts_alone() -> None:
    texts = [f"document {number}" for number in range(3000)]
    parts = split_documents(texts)
    assert sorted(chain.from_iterable(parts.values())) == sorted(texts)
    assert 10 < len(parts["validation"]) < 60
    assert 10 < len(parts["test"]) < 60
    random.Random(1).shuffle(texts)
    assert split_documents(texts) == parts
    fewer = split_documents(texts[:2500])
    assert all(set(fewer[name]) <= set(parts[name]) for name in parts)
    with pytest.raises(InputError, match="part is empty"):
        split_documents(["one"])


def test_reading_counts_what_it_leaves_out(tmp_path: Path) -> None:
    pd.DataFrame({"text": ["a", "  ", None, "b", "a"]}).to_parquet(tmp_path / "x.parquet")
    (tmp_path / "y.txt").write_bytes(b"c\r\nd")
    assert read_documents(tmp_path) == Documents(["a", "b", "c\r\nd"], empty=2, repeated=1)


def test_bad_input_is_named_and_nothing_is_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pd.DataFrame({"body": ["a"]}).to_parquet(tmp_path / "x.parquet")
    (tmp_path / "good.txt").write_text("Prices rose.")
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "thesis.tex").write_text("years of work")
    cases = {
        "no column 'text' among ['body']": [tmp_path / "x.parquet", tmp_path / "out"],
        "no .parquet or .txt file there": [tmp_path / "absent", tmp_path / "out"],
        "holds something other than a model": [tmp_path / "good.txt", strange],
    }
    for message, (text, out) in cases.items():
        with pytest.raises(SystemExit, match="error: ") as stop:
            main(["--text", str(text), "--out", str(out)])
        assert message in str(stop.value)
    assert (strange / "thesis.tex").exists()
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        parse(["--text", "x", "--out", "y", "--context", "4096"])
    assert "--context 4096 is more than --positions 2048" in capsys.readouterr().err


def test_windows_predict_every_token_once() -> None:
    stream = torch.randint(5, 50, (103,)).numpy()
    stream[[0, 40]] = 1
    inputs, targets = windows(stream, 10, bos_id=1)
    assert inputs.shape == targets.shape == (11, 10)
    predicted = targets[targets != -100].tolist()
    assert predicted == [token for token in stream[1:].tolist() if token != 1]
    assert inputs.flatten()[:102].tolist() == stream[:-1].tolist()


def test_a_run_cut_by_time_equals_a_run_of_fewer_steps(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.base_training.steps_that_fit", lambda planned, *_: min(planned, 60))
    stream = encode_stream(tokenizer.backend_tokenizer, PARAGRAPHS * 5)
    shape = replace(SHAPE, hidden_size=16, intermediate_size=16)
    base = replace(SETTINGS, rows=2, context=8, warmup_steps=50, dropout=0.1, log_steps=1000)

    def run(settings: TrainingSettings) -> TrainingResult:
        model = make_model(shape, tokenizer, seed=0)
        return train_model(model, stream, stream[:100], 1, settings, log=lambda _: None)

    cut = run(replace(base, steps=5000))
    assert cut.steps_planned == cut.steps_done == 60
    short = run(replace(base, steps=60))
    assert short.steps_done == 60
    assert cut.history == short.history
    for name, weight in cut.best_weights.items():
        assert torch.equal(weight, short.best_weights[name])
    stopped = run(replace(base, steps=5000, minutes=0.0, log_steps=10))
    assert stopped.steps_done == 10


def test_the_steps_that_fit_are_done() -> None:
    assert steps_that_fit(6000, seconds_per_step=0.01, seconds_left=20) == 2050
    assert steps_that_fit(6000, seconds_per_step=0.01, seconds_left=200) == 6000
    assert steps_that_fit(6000, seconds_per_step=0.01, seconds_left=-5) == 51


def test_the_weights_of_the_lowest_validation_loss_are_kept(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    # Learning one text makes the other, random tokens, less and less likely.
    train = encode_stream(tokenizer.backend_tokenizer, PARAGRAPHS * 5)
    validation = torch.randint(5, 300, (161,), generator=torch.Generator().manual_seed(0)).numpy()
    model = make_model(SHAPE, tokenizer, seed=0)
    settings = replace(SETTINGS, log_steps=5, steps=30)
    result = train_model(model, train, validation, 1, settings, log=lambda _: None)
    losses = [held_out for _, _, held_out in result.history]
    assert result.best_step == 5 * (1 + losses.index(min(losses))) < 30
    kept = make_model(SHAPE, tokenizer, seed=0)
    kept.load_state_dict(result.best_weights)
    assert summed_nats(kept, *windows(validation, 32, 1)) / 160 == pytest.approx(min(losses))


def test_the_learning_rate_warms_up_and_ends_at_a_tenth() -> None:
    settings = replace(SETTINGS, learning_rate=1.0, warmup_steps=4)
    rates = [learning_rate_at(step, 104, settings) for step in range(105)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[54] == pytest.approx(0.55)
    assert rates[104] == pytest.approx(0.1)
    assert all(later <= earlier for earlier, later in pairwise(rates[4:]))


def test_dropout_acts_in_training_only(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model(SHAPE, tokenizer, seed=0)
    inputs = torch.randint(5, 300, (2, 16))
    before = hidden_states(model, inputs)
    add_residual_dropout(model, 0.5)
    model.train(False)
    assert torch.equal(hidden_states(model, inputs), before)
    model.train()
    assert not torch.allclose(hidden_states(model, inputs), before, atol=0.1)


def test_the_loss_is_the_sum_over_targets(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model(SHAPE, tokenizer, seed=0)
    rows = torch.randint(5, 300, (2, 17))
    mine = head_loss(hidden_states(model, rows[:, :-1]), model.lm_head.weight, rows[:, 1:])
    theirs = model(input_ids=rows, labels=rows).loss
    assert mine.item() / 32 == pytest.approx(theirs.item(), rel=1e-5)


def test_shared_sequences_are_found() -> None:
    train = torch.arange(1000).numpy()
    assert shared_share(train, train[200:300]) == 1.0
    assert shared_share(train, train[::-1].copy()) == 0.0
    half = torch.cat([torch.arange(50, 100), torch.arange(5000, 5050)]).numpy()
    assert shared_share(train, half) == pytest.approx(38 / 88)


def test_the_model_as_shipped_is_small_enough_for_git(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    args = vars(parse(["--text", "x", "--out", "y"]))
    shape = Shape(**{name: args[name] for name in Shape.__dataclass_fields__})
    with torch.device("meta"):
        parameters = make_model(shape, tokenizer, seed=0).num_parameters()
    assert 5e6 < parameters < 8.3e6
    tokenizer_bytes = 500_000
    assert 2 * parameters + tokenizer_bytes < 16 * 2**20
