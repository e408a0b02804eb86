"""train.end_token: base. The base's own end token ends an answer, and no token's row is trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fintune.data.prompt import (
    encode,
    end_token,
    end_token_id,
    load_tokenizer,
    render_completion,
    render_prompt,
)
from fintune.errors import UserError
from fintune.generation.tuned import generation_config, load_tuned, prompt_tokens
from fintune.hardware import device
from fintune.merging.merge import merge_into_folder
from fintune.model.adapter import add_adapter, read_training, write_adapter
from fintune.model.base import load_base
from fintune.model.batch import pack
from fintune.model.fused.model import FusedModel
from fintune.model.likelihood import answer_logits
from fintune.model.plain import PlainModel
from fintune.params import Base, Lora

LORA = Lora(r=4, alpha=8, dropout=0.0, target_modules="all-linear")
TRAIN = {"quantization": "none", "precision": "float32", "end_token": "base"}
GREEDY = {"temperature": 0, "top_p": 1, "min_p": 0, "top_k": 0, "repetition_penalty": 1}


@pytest.fixture(scope="module")
def own(base: Base) -> Any:
    return load_tokenizer(base, "base")


@pytest.fixture(scope="module")
def rows(own: Any) -> list[tuple[list[int], list[int]]]:
    texts = [("Say.", "What is a bond?", "A loan."), ("Say.", "Why save?", "For later, mostly.")]
    return [encode(own, render_prompt(a, b), render_completion(c)) for a, b, c in texts]


def tuned_model(base: Base, tokenizer: Any) -> PeftModel:
    """Make an adapter in which every matrix has an effect."""
    model = add_adapter(load_base(base, tokenizer, "none", torch.float32), tokenizer, LORA, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def adapter(base: Base, own: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    write_adapter(tuned_model(base, own), folder, base, TRAIN, "Say.")
    return folder


def test_a_row_is_text_and_the_bases_end_token(own: Any, rows: Any, base: Base) -> None:
    plain = AutoTokenizer.from_pretrained(base.model)
    assert own.get_vocab() == plain.get_vocab()
    assert end_token(own) == plain.eos_token and end_token_id(own) == plain.eos_token_id
    prompt, completion = rows[0]
    assert own.decode(prompt, skip_special_tokens=True) == render_prompt("Say.", "What is a bond?")
    assert own.decode(completion) == f"A loan.{plain.eos_token}"
    assert completion.count(plain.eos_token_id) == 1 and plain.eos_token_id not in prompt


def test_a_base_without_an_end_token_is_refused(base: Base, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base.model)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"train\.end_token: base: .* no end token .* set new"):
        load_tokenizer(Base(model=str(tmp_path), revision=None), "base")
    assert end_token(load_tokenizer(Base(model=str(tmp_path), revision=None), "new"))


def test_the_adapter_holds_lora_alone_and_plain_peft_computes_the_same(
    base: Base, own: Any, adapter: Path, rows: Any
) -> None:
    """No resizing, no rows: the base as it is, with PEFT or a server of adapters."""
    assert all(".lora_" in name for name in load_file(adapter / "adapter_model.safetensors"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] is None and config["modules_to_save"] is None
    plain = AutoModelForCausalLM.from_pretrained(base.model, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(plain, adapter).eval()
    ours, tokenizer = load_tuned(adapter)
    assert len(tokenizer) <= plain.get_input_embeddings().weight.shape[0]
    for (prompt, completion), logits in zip(rows, answer_logits(ours, rows), strict=True):
        ids = torch.tensor([prompt + completion])
        expected = theirs(ids).logits[0, len(prompt) - 1 : -1]
        assert torch.allclose(logits, expected, atol=1e-4)


def test_the_folder_is_used_as_it_was_trained(
    base: Base, own: Any, adapter: Path, rows: Any, tmp_path: Path
) -> None:
    trained = read_training(adapter)
    tokenizer = trained.load_tokenizer()
    tokenizer.chat_template = AutoTokenizer.from_pretrained(adapter).chat_template
    merge_into_folder(base, tokenizer, adapter, tmp_path, torch.float32, None)
    merged, loaded = load_tuned(tmp_path)
    before = AutoModelForCausalLM.from_pretrained(base.model).config
    assert merged.config.vocab_size == before.vocab_size
    assert merged.config.eos_token_id == own.eos_token_id
    tuned, _ = load_tuned(adapter)
    for a, b in zip(answer_logits(tuned, rows), answer_logits(merged, rows), strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    assert prompt_tokens(loaded, "Why save?", None) == rows[1][0]
    turns = [
        {"role": "user", "content": "What is a bond?"},
        {"role": "assistant", "content": "A loan."},
    ]
    said = loaded.apply_chat_template(turns, tokenize=False)
    assert said.endswith(f"A loan.{own.eos_token}")
    ends = generation_config(loaded, GREEDY | {"max_new_tokens": 4}).eos_token_id
    assert ends == [own.eos_token_id]


def test_fused_and_plain_loss_and_gradients_agree(base: Base, own: Any, rows: Any) -> None:
    model = tuned_model(base, own)
    part = pack(rows, device())
    found = []
    for computed in (PlainModel(model), FusedModel(model, torch.float32)):
        model.zero_grad()
        loss = computed.answer_loss(computed.answer_states(part), part.targets)
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        assert gradients and all(g is not None and g.abs().max() > 0 for g in gradients)
        found.append((loss.detach(), torch.cat([g.flatten() for g in gradients if g is not None])))
    (a, da), (b, db) = found
    assert torch.allclose(a, b, rtol=1e-5)
    assert (da - db).norm() < 1e-4 * da.norm()
