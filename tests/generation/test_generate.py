"""Generation in slots against transformers' own loop."""

import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from fintune.data.prompt import encode, end_token_id
from fintune.generation import generate as loop
from fintune.generation import slots
from fintune.generation.decoding import Decoding
from fintune.generation.generate import Answer, generate
from fintune.model.adapter import add_adapter
from fintune.model.base import load_base
from fintune.params import Base, Lora

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LIMIT = 24


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Use one thread: with thousands of tiny steps, syncing a second one costs more than it saves."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[list[int]]:
    """Draw random tokens of different lengths, one a single token, in random order."""
    draw = random.Random(0)
    found = [[draw.randrange(5, 2000) for _ in range(n)] for n in range(1, 21)]
    draw.shuffle(found)
    return found


def tuned(base: Base, tokenizer: Any, quantization: str = "none") -> Any:
    """Build a model that ends some of its answers early."""
    model = load_base(base, tokenizer, quantization, torch.float32)
    lora = Lora(r=4, alpha=8, dropout=0.3, target_modules=ALL)
    model = add_adapter(model, tokenizer, lora, 0)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
            if "lora_" not in name:
                parameter.data *= 2
    return model


def answers(
    model: Any, tokenizer: Any, prompts: list[list[int]], rows: int | str = "auto", **changes: Any
) -> list[Answer]:
    kernels = changes.pop("kernels", "auto")
    decoding = Decoding(end_token_id(tokenizer), LIMIT, **changes)
    return generate(model, tokenizer, prompts, decoding, "answers", rows, kernels)


@pytest.mark.parametrize("state", ["tuned", "bare", "windowed"])
def test_the_tokens_are_those_of_transformers_loop(
    base: Base, tokenizer: Any, prompts: list[list[int]], state: str
) -> None:
    model = tuned(base, tokenizer)
    if state == "windowed":
        model.config.sliding_window = 6
        for layer in model.get_base_model().get_decoder().layers:
            layer.self_attn.sliding_window = 6
    with model.disable_adapter() if state == "bare" else nullcontext():
        ours = answers(model, tokenizer, prompts)
        plain = answers(model, tokenizer, prompts, kernels="plain")
    assert ours == plain
    assert len({answer.text for answer in ours}) > len(prompts) // 2
    if state == "tuned":
        assert {answer.stopped for answer in ours} == {True, False}
        assert all(a.tokens < LIMIT if a.stopped else a.tokens <= LIMIT for a in ours)


def test_a_4_bit_base_answers_as_its_dequantised_weights_do(
    base: Base, tokenizer: Any, prompts: list[list[int]]
) -> None:
    from bitsandbytes.functional import dequantize_4bit

    model, plain = tuned(base, tokenizer, "nf4"), tuned(base, tokenizer)
    full = dict(plain.named_modules())
    for name, module in model.named_modules():
        if hasattr(getattr(module, "weight", None), "quant_state"):
            weight = module.weight
            full[name].weight.data = dequantize_4bit(weight.data, weight.quant_state).float()
    assert answers(model, tokenizer, prompts) == answers(plain, tokenizer, prompts, kernels="plain")


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_neither_the_number_of_slots_nor_the_order_matters(
    base: Base, tokenizer: Any, prompts: list[list[int]], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "FEWEST_ROWS", 2)  # so that batches also shrink
    monkeypatch.setattr(slots, "PREFILL_TOKENS", 50)
    model = tuned(base, tokenizer)
    expected = answers(model, tokenizer, prompts)
    assert answers(model, tokenizer, prompts, rows) == expected
    order = random.Random(rows).sample(range(len(prompts)), len(prompts))
    shuffled = answers(model, tokenizer, [prompts[i] for i in order], rows)
    assert [shuffled[order.index(i)] for i in range(len(prompts))] == expected


SAMPLED = {"temperature": 0.9, "top_p": 0.98, "min_p": 0.001, "repetition_penalty": 1.2}


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_samples_do_not_depend_on_batch_order_or_engine(
    base: Base, tokenizer: Any, prompts: list[list[int]], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "FEWEST_ROWS", 2)
    model = tuned(base, tokenizer)
    expected = answers(model, tokenizer, prompts, seed=4, **SAMPLED)
    assert answers(model, tokenizer, prompts, rows, seed=4, **SAMPLED) == expected
    assert answers(model, tokenizer, prompts, rows, kernels="plain", seed=4, **SAMPLED) == expected
    order = random.Random(rows).sample(range(len(prompts)), len(prompts))
    shuffled = answers(model, tokenizer, [prompts[i] for i in order], rows, seed=4, **SAMPLED)
    assert [shuffled[order.index(i)] for i in range(len(prompts))] == expected
    assert answers(model, tokenizer, prompts, rows, seed=5, **SAMPLED) != expected


def test_a_penalty_counts_prompt_and_answer(
    base: Base, tokenizer: Any, prompts: list[list[int]]
) -> None:
    model = tuned(base, tokenizer)
    once = answers(model, tokenizer, prompts, repetition_penalty=50.0)
    assert once == answers(model, tokenizer, prompts, kernels="plain", repetition_penalty=50.0)
    assert once != answers(model, tokenizer, prompts)
    for prompt, answer in zip(prompts, once, strict=True):
        new = tokenizer(answer.text, add_special_tokens=False)["input_ids"]
        assert not set(new) & set(prompt)


def test_little_temperature_or_mass_is_greedy(
    base: Base, tokenizer: Any, prompts: list[list[int]]
) -> None:
    model = tuned(base, tokenizer)
    greedy = answers(model, tokenizer, prompts)
    for settings in ({"temperature": 1e-4}, {"temperature": 1.0, "top_p": 1e-6}):
        assert answers(model, tokenizer, prompts, seed=1, **settings) == greedy
    for settings in ({"top_k": 1}, {"min_p": 0.999}):
        assert answers(model, tokenizer, prompts, temperature=1.0, **settings) == greedy


def test_sampled_tokens_have_the_models_probabilities(base: Base, tokenizer: Any) -> None:
    model = tuned(base, tokenizer)
    prompt = encode(tokenizer, "Input: why?\n<response>", "")[0]
    with torch.no_grad():
        shares = model.eval()(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    likeliest = int(shares.argmax())
    text = tokenizer.decode([likeliest]).strip()
    decoding = Decoding(end_token_id(tokenizer), max_new_tokens=1, temperature=1.0)
    found = generate(model, tokenizer, [prompt] * 2000, decoding, "draws", 2000)
    share = sum(answer.text == text for answer in found) / 2000
    expected = float(shares[[i for i in range(len(shares)) if decoded(tokenizer, i) == text]].sum())
    assert share == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 2000) ** 0.5)


def decoded(tokenizer: Any, token: int) -> str:
    return str(tokenizer.decode([token], skip_special_tokens=True)).strip()


def test_out_of_memory_means_fewer_at_once_and_the_same_answers(
    base: Base,
    tokenizer: Any,
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(slots, "room_gib", lambda: 8.0)  # whatever other programs leave
    model = tuned(base, tokenizer)
    expected = answers(model, tokenizer, prompts)
    step = slots.DecodingSlots._step

    def scarce(self: Any, slots: torch.Tensor) -> None:
        if self.spare > 6:
            raise torch.OutOfMemoryError
        step(self, slots)

    monkeypatch.setattr(slots.DecodingSlots, "_step", scarce)
    assert answers(model, tokenizer, prompts) == expected
    assert "going on with 5 answers at once" in caplog.text


def test_other_architectures_go_through_transformers(
    base: Base, tokenizer: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tuned(base, tokenizer)
    expected = answers(model, tokenizer, prompts)
    monkeypatch.setattr(loop, "fused_differs", lambda _: "a base of another type")
    monkeypatch.delattr(slots, "DecodingSlots")
    assert answers(model, tokenizer, prompts) == expected


def test_a_merged_model_is_answered_with_as_well(
    base: Base, tokenizer: Any, prompts: list[list[int]], tmp_path: Path
) -> None:
    model = load_base(base, tokenizer, "none", torch.float32)
    assert answers(model, tokenizer, prompts) == answers(model, tokenizer, prompts, kernels="plain")
