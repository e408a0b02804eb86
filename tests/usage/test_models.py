"""Opened models: their decoding as settings and back, the base without its adapter, and a stop."""

import shutil
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import GenerationConfig

from fintune.data.prompt import add_chat_template
from fintune.errors import UserError
from fintune.export.pyfunc import TRACES, TunedModel, registered_name
from fintune.generation.decoding import GREEDY
from fintune.generation.tuned import generation_config
from fintune.model.adapter import add_adapter
from fintune.model.base import load_base
from fintune.params import Base, Lora
from fintune.tracking.client import connect
from fintune.usage.exchanges import exchanges
from fintune.usage.models import Opened, answer, settings_of, with_settings
from fintune.usage.sides import Side, check_settings
from support.project import ROOT, SAMPLED

LORA = Lora(r=4, alpha=8, dropout=0.0, target_modules=["q_proj"])


def config_of(tokenizer: Any, settings: dict[str, float], tokens: int = 12) -> GenerationConfig:
    return generation_config(tokenizer, {**settings, "max_new_tokens": tokens})


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED, GREEDY | {"repetition_penalty": 1.2}])
def test_settings_come_back_and_change_nothing_else(
    tokenizer: Any, settings: dict[str, float]
) -> None:
    config = config_of(tokenizer, settings)
    assert settings_of(config) == {**settings, "max_new_tokens": 12}
    assert with_settings(config, settings_of(config)).to_dict() == config.to_dict()
    for other in (GREEDY, SAMPLED):
        wanted = config_of(tokenizer, other, 5).to_dict()
        assert with_settings(config, {**other, "max_new_tokens": 5}).to_dict() == wanted
    assert settings_of(config) == {**settings, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def opened(base: Base, tokenizer: Any) -> Opened:
    add_chat_template(tokenizer, "Answer the money question.")
    model = add_adapter(load_base(base, tokenizer, "none", torch.float32), tokenizer, LORA, 0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.5)
    return Opened(model, tokenizer, config_of(tokenizer, GREEDY))


def test_the_base_answers_without_the_adapter(opened: Opened) -> None:
    texts: list[str] = []
    tuned = answer(opened, "What is a bond?", None, texts.append)
    assert "".join(texts).strip() == tuned.text and tuned.tokens == 12 and not tuned.ended
    without = Opened(opened.model, opened.tokenizer, opened.config, adapted=False)
    base = answer(without, "What is a bond?", None, texts.append)
    assert base.text != tuned.text
    again = answer(opened, "What is a bond?", None, texts.append)
    assert again.text == tuned.text


def test_a_stop_ends_the_answer(opened: Opened) -> None:
    stop = Event()
    said = answer(opened, "What is a bond?", None, lambda _: stop.set(), stop=stop)
    assert 0 < said.tokens < 12 and not said.ended


def test_an_answer_that_ends_by_itself_says_so(opened: Opened) -> None:
    config = config_of(opened.tokenizer, GREEDY)
    config.eos_token_id = list(range(len(opened.tokenizer)))
    said = answer(opened, "What is a bond?", None, lambda _: None, config)
    assert said.ended and said.tokens == 1


def test_a_side_without_mlflow_is_called_as_it_was_asked_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked = []

    def names() -> tuple[str, str | None]:
        asked.append(1)
        raise UserError("no MLflow server responds at http://127.0.0.1:9")

    side = Side("tuned", "models/merged", lambda: SimpleNamespace(), names)  # type: ignore[arg-type,return-value]
    assert [side.identity() for _ in range(3)] == [("models/merged", None)] * 3
    assert len(asked) == 1, "MLflow is not asked again at each question"
    assert "which version models/merged is: no MLflow server responds" in caplog.text


def test_settings_out_of_range_are_named() -> None:
    good = {**SAMPLED, "max_new_tokens": 64.0}
    assert check_settings(good) == {**SAMPLED, "max_new_tokens": 64}
    for name, value in {"temperature": -0.1, "top_p": 0, "top_k": None}.items():
        with pytest.raises(UserError, match=f"{name.replace('_', ' ')}: a number from"):
            check_settings(good | {name: value})  # type: ignore[arg-type]


def test_the_mlflow_model_traces_its_answers_when_asked_to(
    opened: Opened, tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are exchanges like the page's; an experiment that is not there costs the trace, not the answer."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    shutil.copy(ROOT / "recipes/demo.yaml", tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    client = connect(tmp_path)
    (tmp_path / "registered_model_meta").write_text(
        "model_name: financial-qa\nmodel_version: '3'\n"
    )
    model = TunedModel.__new__(TunedModel)
    model.model, model.tokenizer = opened.model, opened.tokenizer
    model.name = registered_name(tmp_path)
    model.decoding = {**GREEDY, "max_new_tokens": 4, "seed": 0}
    asked = pd.DataFrame(
        {"question": ["What is a bond?", "And a share?"], "instruction": ["Be brief.", None]}
    )
    plain = model.predict(asked)
    assert list(exchanges(client)) == []
    for name in ("nowhere", "financial-qa"):
        monkeypatch.setenv(TRACES, name)
        assert model.predict(asked).equals(plain)
    found = list(exchanges(client))
    assert {(each.question, each.instruction) for each in found} == {
        ("What is a bond?", "Be brief."),
        ("And a share?", None),
    }
    assert {each.answer for each in found} == set(plain["answer"])
    assert {(each.model, each.ended, each.tokens) for each in found} == {
        ("financial-qa/3", False, 4)
    }
    assert found[0].decoding == {**GREEDY, "max_new_tokens": 4}
