"""lm-evaluation-harness with a local two-choice task; no network."""

import json
import sys
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from fintune.errors import UserError
from fintune.evaluation.harness import run_harness
from fintune.model.adapter import add_adapter
from fintune.model.base import load_base
from fintune.params import Base, Harness, Lora

# one token each; a random model would prefer the shorter choice
WORDS = ("loan", "price", "plan", "part", "tax", "bank", "rate", "market", "money", "state")
QUESTIONS = [
    (f"A {thing} is", f" a {first}", f" a {second}")
    for thing in ("bond", "share", "budget")
    for first, second in pairwise(WORDS)
]
TASK = """\
task: two_choices
dataset_path: json
dataset_kwargs:
  data_files: {test: FILE}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{[first, second]}}"
doc_to_target: 0
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
OFF = Harness(tasks=[], include_path=None, limit=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a task with data and one without; the harness indexes a folder once."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = [dict(zip(("question", "first", "second"), q, strict=True)) for q in QUESTIONS]
    data = tmp_path_factory.mktemp("data") / "questions.json"
    data.write_text("\n".join(json.dumps(line) for line in lines))
    (folder / "two_choices.yaml").write_text(TASK.replace("FILE", str(data)))
    lost = TASK.replace("FILE", str(data.with_name("lost.json")))
    (folder / "no_data.yaml").write_text(lost.replace("two_choices", "no_data"))
    return folder


@pytest.fixture
def tasks(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Harness:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    return Harness(tasks=["two_choices"], include_path=str(folder), limit=None)


@pytest.fixture(scope="module")
def model(base: Base, tokenizer: Any) -> Any:
    """Load the tiny base with an adapter that changes it."""
    lora = Lora(r=4, alpha=8, dropout=0.0, target_modules=["q_proj", "down_proj"])
    tuned = add_adapter(load_base(base, tokenizer, "none", torch.float32), tokenizer, lora, 0)
    torch.manual_seed(1)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=2.0)
    return tuned.eval()


def accuracy(model: Any, tokenizer: Any, questions: list[tuple[str, str, str]]) -> float:
    """Compute without the harness how often the first choice is likelier."""

    def chance(question: str, choice: str) -> float:
        start = tokenizer(question)["input_ids"]
        ids = tokenizer(question + choice)["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        return sum(float(logits[k - 1, ids[k]]) for k in range(len(start), len(ids)))

    right = [chance(q, first) > chance(q, second) for q, first, second in questions]
    return sum(right) / len(right)


def sides(model: Any) -> dict[str, Any]:
    return {"base": model.disable_adapter, "tuned": nullcontext}


def test_both_sides_get_the_accuracy_that_they_have(
    model: Any, tokenizer: Any, tasks: Harness
) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    results = run_harness(model, tokenizer, tasks, sides(model), 3, 0)
    found = results["two_choices"]["acc"]
    with model.disable_adapter():
        assert found["base"] == accuracy(model, tokenizer, QUESTIONS)
    assert found["tuned"] == accuracy(model, tokenizer, QUESTIONS)
    assert found["base"] != found["tuned"]
    assert 0 < found["base_stderr"] < 1
    assert set(results["two_choices"]) == {"acc"}
    json.dumps(results, allow_nan=False)


def test_the_limit_takes_the_first_questions(model: Any, tokenizer: Any, tasks: Harness) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    two = tasks.model_copy(update={"limit": 2})
    found = run_harness(model, tokenizer, two, sides(model), 3, 0)["two_choices"]["acc"]
    assert found["tuned"] == accuracy(model, tokenizer, QUESTIONS[:2])


def test_an_unknown_task_and_a_missing_folder_are_named(
    model: Any, tokenizer: Any, tasks: Harness
) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    for change, told in (
        ({"tasks": ["two_choice"]}, "two_choice: not among the harness's tasks"),
        ({"include_path": "nowhere"}, "nowhere: no such folder"),
    ):
        with pytest.raises(UserError, match=told):
            run_harness(model, tokenizer, tasks.model_copy(update=change), sides(model), 3, 0)


def test_a_task_whose_data_is_missing_is_named(model: Any, tokenizer: Any, tasks: Harness) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    lost = tasks.model_copy(update={"tasks": ["no_data"]})
    with pytest.raises(UserError, match=r"evaluate\.harness: no_data: "):
        run_harness(model, tokenizer, lost, sides(model), 3, 0)


def test_without_the_package_the_way_out_is_named(
    model: Any, tokenizer: Any, tasks: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UserError, match="pip install lm-eval"):
        run_harness(model, tokenizer, tasks, sides(model), 3, 0)
    assert run_harness(model, tokenizer, OFF, sides(model), 3, 0) == {}
