"""The check of a base's paths against its family's own forward."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from fintune.data.prompt import encode, end_token_id, load_tokenizer
from fintune.errors import UserError
from fintune.generation.decoding import GREEDY, Decoding
from fintune.generation.generate import generate
from fintune.generation.tuned import generation_config
from fintune.merging.merge import merge_into_folder
from fintune.model import conformance
from fintune.model.adapter import add_adapter, load_adapter, save_adapter
from fintune.model.base import add_rows, load_base
from fintune.model.conformance import agreement_of, fused_differs
from fintune.model.fused import families
from fintune.model.fused import model as fused_model
from fintune.model.likelihood import likelihood
from fintune.model.sizes import ModelSize
from fintune.model.tiny import tiny_model
from fintune.params import Base, Lora
from fintune.training.plan import plan_execution
from fintune.training.train import make_plan, train
from support.training import PARAMS, TEXTS

FUSED = {  # and their options
    "llama": ({}, {"attention_bias": True, "mlp_bias": True}),
    "mistral": ({}, {"sliding_window": None}),
    "qwen2": ({}, {"use_sliding_window": True, "max_window_layers": 2}),
    "qwen3": ({}, {"attention_bias": True}),
    "gemma2": ({}, {"attn_logit_softcapping": None}, {"final_logit_softcapping": None}),
    "gemma3_text": ({}, {"final_logit_softcapping": 9.0}),
    "phi3": ({}, {"sliding_window": 9}),
}
PACKED = ("cohere", "cohere2", "exaone4", "gemma", "glm4", "gpt2", "gpt_bigcode", "gpt_neox")
PACKED += ("gptj", "granite", "granitemoe", "olmo2", "opt", "phi", "phimoe", "qwen2_moe")
PACKED += ("qwen3_moe", "mixtral", "smollm3", "starcoder2")
PADDED = ("bloom", "falcon", "gpt_oss", "jamba", "mpt", "nemotron_h", "stablelm")
EAGER = ("bloom", "gemma2", "gpt_oss", "gptj", "mpt")  # their attention has no other implementation


@pytest.mark.parametrize(
    ("kind", "options"), [(kind, each) for kind, some in FUSED.items() for each in some], ids=str
)
def test_the_fused_kernels_agree_for_their_families(kind: str, options: dict[str, Any]) -> None:
    found = agreement_of(AutoConfig.for_model(kind, **options))
    assert found.fused and found.packed and not found.differences
    assert found.padded == ("eager" if kind in EAGER else "sdpa")


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("phi3", {"partial_rotary_factor": 0.5}, "a rotary embedding of part of each head"),
        ("llama", {"rope_type": "dynamic", "factor": 2.0}, "rotary angles of type dynamic"),
    ],
)
def test_angles_that_the_fused_kernels_do_not_know_are_left_to_the_family_s_own(
    kind: str, options: dict[str, Any], reason: str
) -> None:
    rope = {"rope_type": "default", "rope_theta": 10_000.0} | options
    config = AutoConfig.for_model(kind, rope_parameters=rope)
    assert agreement_of(config).packed and not agreement_of(config).fused
    assert fused_differs(tiny_model(config, "eager")) == reason


def test_kernels_that_differ_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads the model, whether to train or to measure."""
    original = families.make_layers

    def without_norms(*arguments: Any, **more: Any) -> list[Any]:
        return [replace(layer, head_norms=None) for layer in original(*arguments, **more)]

    monkeypatch.setattr(fused_model, "make_layers", without_norms)
    config = AutoConfig.for_model("qwen3", num_hidden_layers=3)
    assert "loss" in (fused_differs(tiny_model(config, "eager")) or "")
    assert agreement_of(config).packed


@pytest.mark.parametrize("kind", PACKED)
def test_what_a_family_does_after_its_head_is_kept(kind: str) -> None:
    found = agreement_of(AutoConfig.for_model(kind))
    assert found.packed and not found.fused
    assert found.padded == ("eager" if kind in EAGER else "sdpa")


@pytest.mark.parametrize("kind", PADDED)
def test_rows_that_would_see_each_other_are_padded(kind: str) -> None:
    found = agreement_of(AutoConfig.for_model(kind))
    assert not found.packed and found.padded == ("eager" if kind in EAGER else "sdpa")
    assert "off" in found.differences["packed rows"]


def test_convolutions_are_seen_where_a_list_of_layers_tells_them() -> None:
    found = agreement_of(AutoConfig.for_model("lfm2", num_hidden_layers=4, full_attn_idxs=[1, 3]))
    assert not found.packed and "gradients" in found.differences["packed rows"]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("bert", "see those after them"), ("t5", "no causal language model")],
)
def test_other_models_are_refused_by_their_type(kind: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"type {kind} is not supported: .*{reason}"):
        agreement_of(AutoConfig.for_model(kind))


def test_a_base_on_which_nothing_agrees_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(self: Any, states: torch.Tensor) -> torch.Tensor:
        return self.plain.get_output_embeddings()(states) * 1.01

    monkeypatch.setattr(conformance.PlainModel, "logits", off)
    config = AutoConfig.for_model("olmo", num_hidden_layers=3)
    with pytest.raises(
        UserError, match=r"type olmo is not supported: padded rows, sdpa: loss .* off"
    ):
        agreement_of(config)


SMALL = {"vocab_size": 6144, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
OWN = {  # what each does beside Llama
    "granite": {"logits_scaling": 8.0, "num_key_value_heads": 1, "intermediate_size": 64},
    "cohere": {"logit_scale": 0.25, "num_key_value_heads": 1, "intermediate_size": 64},
    "phi": {"intermediate_size": 64},
    "gpt_neox": {"intermediate_size": 64},
    "gpt2": dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    "bloom": {},
    "stablelm": {"num_key_value_heads": 1, "intermediate_size": 64},
    "mixtral": {"num_key_value_heads": 1, "intermediate_size": 64, "num_local_experts": 3},
    "qwen2": {"num_key_value_heads": 1, "intermediate_size": 64, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 64},
    "gemma2": {"num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 64},
    "gemma3_text": {"num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 64}
    | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6},
    "phi3": {"num_key_value_heads": 1, "intermediate_size": 64, "pad_token_id": 0},
}


@pytest.fixture(params=OWN)
def family(request: pytest.FixtureRequest, base: Base, tmp_path: Path) -> Base:
    """A tiny random base of a family, with the demo's tokenizer."""
    config = AutoConfig.for_model(request.param, **SMALL, **OWN[request.param])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    folder = tmp_path / "base"
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((Path(base.model) / name).read_bytes())
    return Base(model=str(folder), revision=None)


def own_loss(model: Any, rows: list[Any]) -> float:
    """Compute nats an answer token by the model's own forward, one row at a time."""
    total = 0.0
    for prompt, answer in rows:
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(
            logits.float(), torch.tensor(answer), reduction="sum"
        )
        total += float(loss)
    return total / sum(len(answer) for _, answer in rows)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_family_trains_and_is_measured_as_its_own_forward_says(
    family: Base, tmp_path: Path, quantization: str
) -> None:
    tokenizer = load_tokenizer(family, "new")
    rows = [encode(tokenizer, *text) for text in TEXTS]
    params = PARAMS.model_copy(
        update={"lora": Lora(r=4, alpha=8, dropout=0.0, target_modules="all-linear")}
        | {"quantization": quantization}
    )

    def fresh() -> Any:
        return load_base(family, tokenizer, quantization, torch.float32)

    before = own_loss(fresh(), rows)
    tuned = add_adapter(fresh(), tokenizer, params.lora, 0)
    assert likelihood(tuned, rows, "").loss == pytest.approx(before, rel=1e-4)
    plan = make_plan(tuned, params, rows, torch.float32)
    assert plan.attention == ("padded" if family_of(family) in PADDED else "sdpa")
    assert plan.kernels == ("fused" if family_of(family) in FUSED else "plain")
    losses: list[float] = []

    def note(step: int, values: dict[str, float]) -> None:
        losses.extend([values["loss"]] if "loss" in values else [])

    result = train(
        tuned,
        tokenizer,
        rows,
        params.model_copy(update={"rows_per_step": len(rows), "learning_rate": 1e-3}),
        torch.float32,
        validate=lambda model, _: {"loss": likelihood(model, rows, "").loss},
        scratch=tmp_path / "scratch",
        on_log=note,
    )
    assert losses[0] == pytest.approx(before, rel=1e-4)
    assert result.metrics["validation_loss"] < before
    save_adapter(result.model, tmp_path / "adapter")
    loaded = load_adapter(fresh(), tmp_path / "adapter")
    found = likelihood(loaded, rows, "").loss
    assert found == pytest.approx(result.metrics["validation_loss"], rel=1e-4)
    assert found == pytest.approx(own_loss(loaded, rows), rel=1e-4)
    merged = tmp_path / "merged"
    merged.mkdir()
    compute = torch.float32 if quantization == "nf4" else None
    merge_into_folder(family, tokenizer, tmp_path / "adapter", merged, torch.float32, compute)
    plain = AutoModelForCausalLM.from_pretrained(merged)
    assert own_loss(plain, rows) == pytest.approx(found, rel=1e-4)
    decoding = Decoding(end_token_id(tokenizer), 8)
    prompts = [prompt for prompt, _ in rows[:6]]
    answers = generate(loaded, tokenizer, prompts, decoding, "")
    assert answers == generate(plain, tokenizer, prompts, decoding, "", kernels="plain")


def family_of(base: Base) -> str:
    return str(AutoConfig.from_pretrained(base.model).model_type)


def test_the_plan_counts_the_experts_of_a_mixture(base: Base, tokenizer: Any) -> None:
    """They stay as they are in a 4-bit base, and no size in its configuration tells them."""
    config = AutoConfig.for_model("mixtral", **SMALL, **OWN["mixtral"] | {"num_local_experts": 8})
    lora = Lora(r=4, alpha=8, dropout=0.0, target_modules="all-linear")
    made = AutoModelForCausalLM.from_config(config)
    add_rows(made, len(tokenizer))
    model = add_adapter(made, tokenizer, lora, 0)
    params = PARAMS.model_copy(update={"quantization": "nf4", "lora": lora})
    plan = make_plan(model, params, [([3, 4], [5, 6])] * 4, torch.float32)
    experts = sum(p.numel() for name, p in model.named_parameters() if "experts" in name)
    weights = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert experts > weights / 6
    assert plan.memory["weights"] >= weights * 4 / 2**30


def test_a_row_longer_than_the_base_can_read_is_refused(base: Base, tokenizer: Any) -> None:
    """A prompt with the base's own end token is a few tokens longer than `format` counts."""
    model = load_base(base, tokenizer, "none", torch.float32)
    model.config.max_position_embeddings = 20
    tuned = add_adapter(model, tokenizer, PARAMS.lora, 0)
    make_plan(tuned, PARAMS, [([3] * 10, [4] * 10)], torch.float32)
    with pytest.raises(UserError, match=r"rows of 21 tokens are longer than the 20 that the base"):
        make_plan(tuned, PARAMS, [([3] * 11, [4] * 10)], torch.float32)


@pytest.fixture
def copied(base: Base, tmp_path: Path) -> Path:
    folder = tmp_path / "copied"
    shutil.copytree(base.model, folder)
    return folder


def test_a_weight_that_the_files_lack_is_named(copied: Path, tokenizer: Any) -> None:
    weights = load_file(copied / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"layers\.1\.mlp\.up_proj\.weight is not among the weights"
    ):
        load_base(Base(model=str(copied), revision=None), tokenizer, "none", torch.float32)


def test_the_base_s_own_decoding_is_not_used(base: Base, copied: Path, tokenizer: Any) -> None:
    own = {"repetition_penalty": 9.0, "suppress_tokens": list(range(3, 3000)), "do_sample": True}
    (copied / "generation_config.json").write_text(json.dumps(own))
    prompts = [encode(tokenizer, *text)[0] for text in TEXTS[:4]]
    decoding = Decoding(end_token_id(tokenizer), 8)
    first, second = (
        generate(
            load_base(each, tokenizer, "none", torch.float32),
            *(tokenizer, prompts, decoding, ""),
            kernels="plain",
        )
        for each in (base, Base(model=str(copied), revision=None))
    )
    assert first == second


def test_a_tokenizer_without_special_tokens_ends_by_the_new_one(copied: Path) -> None:
    file = copied / "tokenizer_config.json"
    said = json.loads(file.read_text())
    for name in ("eos_token", "pad_token", "unk_token", "bos_token"):
        said.pop(name, None)
    file.write_text(json.dumps(said))
    whole = json.loads((copied / "tokenizer.json").read_text()) | {"post_processor": None}
    (copied / "tokenizer.json").write_text(json.dumps(whole))
    tokenizer = load_tokenizer(Base(model=str(copied), revision=None), "new")
    assert tokenizer.eos_token is None and tokenizer.pad_token == "<response>"
    config = generation_config(tokenizer, GREEDY | {"max_new_tokens": 8})
    assert config.eos_token_id == [end_token_id(tokenizer)]
    assert config.pad_token_id == tokenizer.convert_tokens_to_ids("<response>")


def test_rows_are_not_packed_by_force(base: Base, tokenizer: Any) -> None:
    size = ModelSize.of(AutoConfig.for_model("bloom"), PARAMS.lora)
    for attention, refused in (("sdpa", True), ("padded", False), ("auto", False)):
        params = PARAMS.model_copy(update={"attention": attention})
        arguments = (size, params, [20] * 8, 4, 8.0, False, "a base of type bloom", "loss off")
        if refused:
            with pytest.raises(UserError, match=r"attention: sdpa: .*packed rows \(loss off\)"):
                plan_execution(*arguments)
        else:
            assert plan_execution(*arguments).attention == "padded"
