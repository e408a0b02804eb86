"""What four bits cost the base, measured before training."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from fintune.model.base import load_base
from fintune.model.likelihood import likelihood
from fintune.params import Base
from fintune.training import quantization
from fintune.training.quantization import quantization_cost
from support.training import PARAMS

NF4 = PARAMS.model_copy(update={"quantization": "nf4"})


def test_it_is_the_base_s_loss_in_both(
    base: Base, tokenizer: Any, rows: list[Any], tmp_path: Path
) -> None:
    found, loaded = quantization_cost(base, NF4, tokenizer, rows, tmp_path)
    for name, kind in (("unquantized", "none"), ("quantized", "nf4")):
        model = load_base(base, tokenizer, kind, torch.float32)
        expected = likelihood(model, rows[: quantization.ROWS], "").loss
        assert found[f"{name}_base_loss"] == pytest.approx(expected, rel=1e-6)
    assert found["quantized_base_loss"] != found["unquantized_base_loss"]
    assert loaded.is_loaded_in_4bit and likelihood(loaded, rows, "").loss == pytest.approx(
        likelihood(model, rows, "").loss, rel=1e-6
    )


def test_a_large_cost_is_warned_of_once_measured(
    base: Base,
    tokenizer: Any,
    rows: list[Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO, "fintune")
    (tmp_path / "quantization.json").write_text(
        '{"unquantized_base_loss": 2.81, "quantized_base_loss": 5.41}'
    )
    monkeypatch.setattr(quantization, "load_base", None)  # what was measured is not measured again
    assert quantization_cost(base, NF4, tokenizer, rows, tmp_path)[1] is None
    assert "loss is 2.810 nats an answer token, in 4 bits 5.410" in caplog.text
    assert "loss is 5.41 instead of 2.81" in caplog.text
    assert "set train.quantization: none" in caplog.text
    caplog.clear()
    (tmp_path / "quantization.json").write_text(
        '{"unquantized_base_loss": 2.81, "quantized_base_loss": 2.9}'
    )
    quantization_cost(base, NF4, tokenizer, rows, tmp_path)
    assert "warning" not in caplog.text


def test_it_is_left_out_where_it_cannot_be_measured(
    base: Base, tokenizer: Any, rows: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert quantization_cost(base, PARAMS, tokenizer, rows, tmp_path) == ({}, None)
    monkeypatch.setattr(quantization, "room_gib", lambda: 0.0001)
    assert quantization_cost(base, NF4, tokenizer, rows, tmp_path) == ({}, None)
    assert list(tmp_path.iterdir()) == []
