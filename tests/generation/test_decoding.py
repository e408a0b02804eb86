"""The draw of a token: transformers' probabilities, and random numbers of a row's own."""

from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from fintune.errors import UserError
from fintune.generation.decoding import (
    GREEDY,
    LARGEST,
    Decoding,
    TokenDraw,
    check_decoding,
    options,
    table,
    title,
    uniforms,
)
from fintune.params import Generation, Sampler

VOCABULARY, ROWS = 500, 40
SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.95},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 0.8, "min_p": 0.05, "repetition_penalty": 1.1},
    {"temperature": 1.3, "top_k": 20, "repetition_penalty": 1.2},
    {"temperature": 0.5, "top_k": 50, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.05},
    {"temperature": 0.0, "repetition_penalty": 1.3},
]


@pytest.fixture(scope="module")
def logits() -> torch.Tensor:
    return 4 * torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    draw = torch.Generator().manual_seed(2)
    return torch.randint(VOCABULARY, (ROWS, 30), generator=draw)


def processed(settings: dict[str, float], tokens: torch.Tensor, logits: torch.Tensor) -> Any:
    """Process logits with the processors that transformers' own loop builds from the same options."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )
    config = GenerationConfig(**options(settings))
    prepared, _ = model._prepare_generation_config(config)
    chain = model._get_logits_processor(
        generation_config=prepared,
        input_ids_seq_length=tokens.shape[1],
        encoder_input_ids=tokens,
        prefix_allowed_tokens_fn=None,
        logits_processor=None,
    )
    return chain(tokens, logits.clone())


def draw_of(settings: list[dict[str, float]]) -> tuple[TokenDraw, torch.Tensor]:
    decodings = [Decoding(0, 1).using(GREEDY | each) for each in settings]
    return TokenDraw(decodings), table(decodings)


@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_the_probabilities_are_those_of_transformers(
    changes: dict[str, float], logits: torch.Tensor, tokens: torch.Tensor
) -> None:
    draw, settings = draw_of([changes] * ROWS)
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, tokens, True)
    ours = draw.scores(logits, seen, settings).softmax(-1)
    expected = processed(GREEDY | changes, tokens, logits).softmax(-1)
    assert torch.allclose(ours, expected, atol=1e-6, rtol=0)
    assert torch.equal(ours == 0, expected == 0)


def test_rows_of_a_batch_may_differ(logits: torch.Tensor, tokens: torch.Tensor) -> None:
    mixed = [SETTINGS[i % len(SETTINGS)] for i in range(ROWS)]
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, tokens, True)
    draw, settings = draw_of(mixed)
    uniform = torch.rand(ROWS, generator=torch.Generator().manual_seed(4))
    together = draw(logits, seen, settings, uniform)
    for i, changes in enumerate(mixed):
        alone, own = draw_of([changes])
        row = slice(i, i + 1)
        assert together[i] == alone(logits[row], seen[row], own, uniform[row])
        if changes["temperature"]:
            expected = processed(GREEDY | changes, tokens[row], logits[row]).softmax(-1)
            ours = draw.scores(logits, seen, settings)[row].softmax(-1)
            assert torch.allclose(ours, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("changes", SETTINGS[:-1], ids=str)
def test_tokens_are_drawn_with_these_probabilities(changes: dict[str, float]) -> None:
    count, nothing = 100_000, torch.zeros(0)
    draw, settings = draw_of([changes | {"repetition_penalty": 1.0}])
    logits = 2 * torch.randn(1, 50, generator=torch.Generator().manual_seed(3))
    expected = draw.scores(logits, nothing, settings).softmax(-1)[0]
    even = (torch.arange(count) + 0.5) / count
    drawn = draw(logits.expand(count, -1), nothing, settings.expand(count, -1), even)
    shares = torch.bincount(drawn, minlength=50) / count
    assert torch.allclose(shares, expected, atol=2e-5)
    assert not shares[expected == 0].any()


def test_the_ends_of_the_range_draw_a_possible_token(logits: torch.Tensor) -> None:
    draw, settings = draw_of([{"temperature": 1.0, "top_k": 3}] * ROWS)
    possible = draw.scores(logits, torch.zeros(0), settings).softmax(-1) > 0
    for end in (0.0, LARGEST):
        drawn = draw(logits, torch.zeros(0), settings, torch.full((ROWS,), end))
        assert possible.gather(1, drawn[:, None]).all()


def test_random_numbers_depend_on_seed_prompt_and_occurrence_alone() -> None:
    one, other = (Decoding(0, 12, temperature=1.0, seed=seed) for seed in (5, 6))
    prompts = [[1, 2], [3], [1, 2], [2, 1]]
    rows = uniforms(prompts, [one] * 4)
    assert rows.shape == (4, 12) and rows.min() >= 0 and rows.max() <= LARGEST
    assert len({tuple(row.tolist()) for row in rows}) == 4
    assert torch.equal(uniforms([[3], [1, 2]], [one] * 2), rows[[1, 0]])
    assert not torch.equal(uniforms(prompts, [other] * 4), rows)
    cold = Decoding(0, 12, temperature=0.5, seed=5)
    assert torch.equal(uniforms([[3], [3], [3]], [one, cold, one])[:2], rows[[1, 1]])


def test_titles_name_what_differs_from_plain_sampling() -> None:
    assert title(GREEDY) == "greedy"
    assert title(GREEDY | {"top_p": 0.5, "repetition_penalty": 1.1}) == "greedy, penalty 1.1"
    sampled = {"temperature": 0.7, "top_p": 0.95, "min_p": 0.05, "top_k": 40}
    assert title(GREEDY | sampled) == "temperature 0.7, top-k 40, top-p 0.95, min-p 0.05"


def test_what_is_shipped_must_be_what_was_measured() -> None:
    values = Sampler(temperature=0.7, top_p=0.9, min_p=0.0, top_k=0, repetition_penalty=1.0)
    measured = values.model_dump() | {"max_new_tokens": 64}
    check_decoding(Generation(decoding=values, max_new_tokens=64), measured)
    check_decoding(Generation(decoding="auto", max_new_tokens=64), measured)
    with pytest.raises(
        UserError, match=r"max_new_tokens is 32, and 64 in reports/evaluation\.json"
    ):
        check_decoding(Generation(decoding="auto", max_new_tokens=32), measured)
    other = values.model_copy(update={"temperature": 0.2})
    with pytest.raises(UserError, match=r"temperature is 0\.2, and 0\.7"):
        check_decoding(Generation(decoding=other, max_new_tokens=64), measured)
