"""The plain folder of a model as it stands."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fintune.modeling import add_adapter, load_base
from fintune.params import Base, Lora
from fintune.plain import save_plain
from fintune.prompts import SPECIAL_TOKENS
from fintune.scoring import likelihood

LORA = Lora(r=4, alpha=8, dropout=0.3, target_modules=["q_proj", "o_proj", "down_proj"])


@pytest.mark.parametrize("kind", ["none", "nf4", "tied"])
def test_it_computes_what_the_model_does(
    base: Base, tokenizer: Any, tmp_path: Path, kind: str
) -> None:
    """With its adapter and without; the two tokens' rows, which the adapter has trained, included."""
    if kind == "tied":
        plain = AutoModelForCausalLM.from_pretrained(base.model, tie_word_embeddings=True)
        plain.save_pretrained(tmp_path / "tied")
        tokenizer.save_pretrained(tmp_path / "tied")
        base = Base(model=str(tmp_path / "tied"), revision=None)
    quantization = "nf4" if kind == "nf4" else "none"
    model = load_base(base, tokenizer, quantization, torch.float32)
    model = add_adapter(model, tokenizer, LORA, 0).eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    new = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    rows = [([5, 300, 17, new[0]], [1000, 44, new[1]]), ([5], [new[1], 7, 8, new[0], 9])]
    losses = []
    for state in (nullcontext, model.disable_adapter):
        folder = tmp_path / state.__name__
        folder.mkdir()
        with state():
            save_plain(model, tokenizer, folder)
            expected = likelihood(model, rows, "as it stands").nll
        again = AutoModelForCausalLM.from_pretrained(folder)
        assert again.dtype == torch.float32
        losses.append(likelihood(again, rows, "plain").nll)
        assert losses[-1] == pytest.approx(expected, rel=1e-5)
        assert (
            AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(SPECIAL_TOKENS[1]) == new[1]
        )
        assert "quantization_config" not in json.loads((folder / "config.json").read_text())
        names = set(load_file(folder / "model.safetensors"))
        assert ("lm_head.weight" in names) == (kind != "tied")
        assert not any("lora" in name or "token_adapter" in name for name in names)
    assert losses[0] != pytest.approx(losses[1], rel=1e-2)
