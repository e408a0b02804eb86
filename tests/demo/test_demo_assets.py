"""The shipped assets: the demo base predicts text, its tokenizer is lossless, its questions split cleanly."""

import random
import sys
import unicodedata
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from fintune.data.prompt import SPECIAL_TOKENS, load_tokenizer
from fintune.data.questions import normalize_question
from fintune.data.tables import read_source
from fintune.params import Params, read_params
from support.rows import select_records, split_rows

ROOT = Path(__file__).parents[2]
BASE = ROOT / "assets/demo-base"
PROSE = "Retail sales were up slightly from a year ago, and prices were little changed."


@pytest.fixture
def params(monkeypatch: pytest.MonkeyPatch) -> Params:
    monkeypatch.chdir(ROOT)
    return read_params(Path("recipes/demo.yaml"))


def test_the_base_is_a_small_safetensors_mistral() -> None:
    assert not [f for f in BASE.iterdir() if f.suffix in {".bin", ".pt", ".pkl", ".py"}]
    weights = list(BASE.glob("*.safetensors"))
    assert sum(f.stat().st_size for f in weights) <= 16 * 2**20
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype="auto", use_safetensors=True)
    assert model.config.model_type == "mistral"
    assert 5e6 <= model.num_parameters() <= 12e6
    with safe_open(weights[0], "pt") as file:
        kept = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert kept == {torch.bfloat16}
    assert (BASE / "README.md").is_file()


def test_the_base_prefers_prose_to_its_words_in_disorder(params: Params) -> None:
    tokenizer = load_tokenizer(params.base, "new")
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    words = PROSE.split()
    shuffled = [" ".join(random.Random(seed).sample(words, len(words))) for seed in range(5)]

    def nats(text: str) -> float:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            return float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)

    assert nats(PROSE) < min(map(nats, shuffled)) - 20
    assert nats(PROSE) / 0.6931 / len(PROSE) < 1.5  # bits per byte; 8 without any knowledge


@pytest.mark.parametrize("seed", range(4))
def test_the_tokenizer_round_trips_any_unicode(params: Params, seed: int) -> None:
    tokenizer = load_tokenizer(params.base, "new")
    rng = random.Random(seed)
    for _ in range(200):
        limit = rng.choice([128, 0x800, 0x10000, sys.maxunicode + 1])
        points = [rng.randrange(limit) for _ in range(rng.randrange(1, 60))]
        text = "".join(chr(p) for p in points if unicodedata.category(chr(p)) != "Cs")
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_the_two_tokens_are_single_and_new(params: Params) -> None:
    tokenizer = load_tokenizer(params.base, "new")
    for token in SPECIAL_TOKENS:
        (token_id,) = tokenizer(token, add_special_tokens=False).input_ids
        assert token_id >= len(AutoTokenizer.from_pretrained(BASE))


def test_every_digit_is_a_token(params: Params) -> None:
    """So the model reads and writes figures digit by digit, as the demo's questions need it."""
    tokenizer = load_tokenizer(params.base, "new")
    texts = tokenizer.batch_decode([[number] for number in range(len(tokenizer))])
    assert [text for text in texts if len(text) > 1 and any(map(str.isdigit, text))] == []
    row = read_source(str(ROOT / params.fetch.source))[-1]
    figures = "".join(filter(str.isdigit, row["input"]))
    tokens = tokenizer.tokenize(row["input"])
    assert "".join(token for token in tokens if token.isdigit()) == figures != ""


def test_the_card_says_what_the_base_practised() -> None:
    """The base has seen more than documents, some of it like the questions."""
    card = " ".join((BASE / "README.md").read_text(encoding="utf-8").split())
    facts = card[card.index("tools/practice.py") : card.index("- Shape:")]
    for said in (
        "none of the questions' companies, passages or prompts",
        "share the names of measures",
    ):
        assert said in facts


def test_every_demo_question_stays_in_the_split_of_its_row(params: Params) -> None:
    fetch = params.fetch
    selection = (fetch.columns.model_dump(), fetch.default_instruction, fetch.invalid_rows)
    rows = read_source(str(ROOT / fetch.source))
    records, dropped = select_records(rows, *selection, fetch.source)
    assert len(records) >= 1500
    assert sum(dropped.values()) == 0
    splits, left_out, _ = split_rows(records, params.split)
    assert left_out["duplicate"] == 0
    assert left_out["held_out_question"] <= 2  # near-duplicates of held-out questions
    assert all(row["split"] == name for name, part in splits.items() for row in part)
    asked = {name: {normalize_question(r["input"]) for r in part} for name, part in splits.items()}
    assert all(asked.values())
    for name, questions in asked.items():
        others = set().union(*(asked[other] for other in asked if other != name))
        assert not questions & others
