"""What a model in training is validated by."""

from typing import Any

import pytest
import torch

from fintune.data.prompt import encode
from fintune.evaluation.validation import validator
from support.training import PARAMS, adapted

ROWS = [
    {"input": f"What is {n} and 1?", "output": f"It is {n + 1}.", "result": str(n + 1)}
    for n in range(40)
]


@pytest.fixture
def tokens(tokenizer: Any) -> dict[str, list[Any]]:
    prompt = "Instruction: Add.\nInput: {}\n<response>"
    encoded = [encode(tokenizer, prompt.format(r["input"]), r["output"]) for r in ROWS]
    return {"train": encoded * 5, "validation": encoded}


@pytest.mark.parametrize("keep", ["best_loss", "last"])
def test_the_loss_alone_needs_no_answers(
    base: Any, tokenizer: Any, tokens: dict[str, list[Any]], keep: str
) -> None:
    params = PARAMS.model_copy(update={"keep": keep})
    measured = validator(params, tokenizer, ROWS, tokens)(adapted(base, tokenizer, params), 2)
    assert list(measured) == ["loss"] and measured["loss"] > 0


def test_answers_are_scored_at_every_validation_on_a_cpu(
    base: Any, tokenizer: Any, tokens: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = PARAMS.model_copy(update={"keep": "best_answers", "validate_every_steps": 2})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    validate = validator(params, tokenizer, ROWS, tokens)
    model = adapted(base, tokenizer, params)
    first, second = validate(model, 2), validate(model, 4)
    assert first == second and 0 <= first["answers"] <= 1
    assert "answers" not in validate(model, 3)


def test_on_a_gpu_answers_wait_for_a_tenth_of_the_time(
    base: Any, tokenizer: Any, tokens: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token of the answers takes as long as training on 500, whatever their number."""
    params = PARAMS.model_copy(
        update={"keep": "best_answers", "validate_every_steps": 2, "rows_per_step": 32}
        | {"epochs": 40.0, "max_steps": 151}
    )
    row = sum(len(p) + len(c) for p, c in tokens["train"]) / len(tokens["train"])
    limit = max(len(c) for _, c in tokens["validation"])
    tenth = limit * 500 / (0.1 * params.rows_per_step * row)  # steps
    model = adapted(base, tokenizer, params)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        validate = validator(params, tokenizer, ROWS, tokens)
    with_answers = [step for step in range(2, 152, 2) if "answers" in validate(model, step)]
    assert 3 <= len(with_answers) <= 5
    assert with_answers[0] >= tenth > with_answers[0] - 2
    assert "answers" in validate(model, 151)
