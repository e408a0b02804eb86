"""The comparison of models: what must not change it, and what the gate has to catch.

The adapters of a tiny base are made good or bad by a few seconds of training or by damage.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fintune.data.formatting import format_row
from fintune.data.prompt import encode
from fintune.data.questions import questions_of
from fintune.data.records import read_passages
from fintune.errors import UserError
from fintune.evaluation.collected import Collected, describe_collected
from fintune.evaluation.measure import measure
from fintune.evaluation.report import conclude
from fintune.evaluation.rows import select_rows
from fintune.generation.decoding import GREEDY
from fintune.hardware import has_fp8
from fintune.model.adapter import add_adapter, save_adapter, write_training
from fintune.model.base import load_base
from fintune.params import Base, Evaluate, Generation, Lora, Sampler, read_params
from fintune.registry import versions
from fintune.registry.champion import Champion, fetch_champion
from support.processes import in_processes

ROOT = Path(__file__).parents[2]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = Lora(r=8, alpha=16, dropout=0.0, target_modules=LINEAR)
WEIGHTS = "adapter_model.safetensors"
STEPS = 60
GREEDILY = Generation(decoding=Sampler(**GREEDY), max_new_tokens=16)
SAMPLED = Sampler(temperature=0.8, top_p=1.0, min_p=0.1, top_k=0, repetition_penalty=1.0)
Tokens = list[tuple[list[int], list[int]]]


@pytest.fixture(scope="module")
def base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Base:
    """Save the tiny base with a scaled-up head, since the random one is not sure of any token."""
    folder = shutil.copytree(tiny_base, tmp_path_factory.mktemp("loud") / "base")
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    with torch.no_grad():
        model.lm_head.weight *= 15
    model.save_pretrained(folder)
    return Base(model=str(folder), revision=None)


@pytest.fixture(scope="module")
def passages() -> list[str]:
    """Return the first words of six passages."""
    whole = read_passages(str(ROOT / "assets/general-text.jsonl"))[:6]
    return [" ".join(passage.split()[:16]) for passage in whole]


@pytest.fixture(scope="module")
def rows(tokenizer: Any) -> list[dict[str, Any]]:
    """Return eight formatted rows of seven questions."""
    texts = {
        "A loan.": "What is a bond?",
        "A part of a firm.": "What is a share?",
        "Prices rise.": "Why do rates rise?",
        "In April, or later.": "When is tax due?",
        "It is ten.": "How much is five and five?",
        "Money that is put aside.": "What are savings?",
        "It is six.": "How much is three and three?",
        "A loan to a state.": "What is a bond?",
    }
    records = [
        {"instruction": f"Answer {'briefly' if i % 2 else 'well'}.", "input": q, "output": a}
        for i, (a, q) in enumerate(texts.items())
    ]
    formatted = [format_row(tokenizer, record, 192, "drop")[0] for record in records]
    return [row for row in formatted if row]


@pytest.fixture
def params(monkeypatch: pytest.MonkeyPatch) -> Evaluate:
    monkeypatch.chdir(ROOT)
    demo = read_params().evaluate
    rules = demo.gate.model_copy(update={"min_accuracy_gain": None})
    small = {"max_rows": None, "rows_per_batch": 5, "bootstrap_samples": 200, "gate": rules}
    return demo.model_copy(update={**small, "samples_per_prompt": 2})


@pytest.fixture(scope="module")
def train(
    base: Base, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Return a function that fits an adapter to tokens and saves it as the train stage does."""

    def laid_out(tokens: Tokens) -> dict[str, torch.Tensor]:
        width = max(len(p) + len(c) for p, c in tokens)
        ids = torch.zeros(len(tokens), width, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for i, (prompt, completion) in enumerate(tokens):
            ids[i, : len(prompt) + len(completion)] = torch.tensor(prompt + completion)
            labels[i, len(prompt) : len(prompt) + len(completion)] = torch.tensor(completion)
        return {"input_ids": ids, "labels": labels}

    def fit(tokens: Tokens, steps: int = STEPS, unlearned: Tokens | None = None) -> Path:
        model = add_adapter(load_base(base, tokenizer, "none", torch.float32), tokenizer, LORA, 0)
        weights = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(weights, lr=0.01)
        batch, other = laid_out(tokens), laid_out(unlearned or tokens)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(**batch).loss
            if unlearned:
                loss = loss - 0.1 * model(**other).loss.clamp(max=16)
            loss.backward()
            optimizer.step()
        folder = tmp_path_factory.mktemp("adapter")
        save_adapter(model, folder)
        settings = {"quantization": "none", "precision": "float32", "learning_rate": 0.02}
        settings |= {"epochs": 1, "lora": LORA.model_dump()}
        write_training(folder, base, settings, "Answer.")
        return folder

    return fit


@pytest.fixture(scope="module")
def tokens(tokenizer: Any, rows: list[dict[str, Any]]) -> Tokens:
    return [encode(tokenizer, row["prompt"], row["completion"]) for row in rows]


@pytest.fixture(scope="module")
def general(tokenizer: Any, passages: list[str]) -> Tokens:
    """Return the passages as prompts of one token and completions."""
    return [(ids[:1], ids[1:]) for ids in tokenizer(passages)["input_ids"]]


@pytest.fixture(scope="module")
def good(train: Callable[..., Path], tokens: Tokens, general: Tokens) -> Path:
    """Train an adapter that knows the answers by heart, and the general text no worse than the base."""
    return train(tokens + general)


@pytest.fixture(scope="module")
def forgetful(train: Callable[..., Path], tokens: Tokens, general: Tokens) -> Path:
    """Train an adapter that knows the answers by heart, and unlearns the general text."""
    return train(tokens, unlearned=general)


def damaged(
    adapter: Path, folder: Path, damage: Callable[[str, torch.Tensor], torch.Tensor]
) -> Path:
    shutil.copytree(adapter, folder)
    weights = load_file(adapter / WEIGHTS)
    save_file({name: damage(name, w).contiguous() for name, w in weights.items()}, folder / WEIGHTS)
    return folder


def evaluate(
    adapter: Path,
    rows: list[dict[str, Any]],
    passages: list[str],
    params: Evaluate,
    champion: Path | None = None,
    generation: Generation = GREEDILY,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Compute the report and the predictions from a table of rows, as the stage does."""
    chosen = select_rows(rows, questions_of(rows), params.max_rows)
    measured = measure(adapter, champion, chosen, chosen, passages, params, generation)
    report, table = conclude(
        measured, chosen, Champion(folder=champion, version="1", run_id="r"), params
    )
    report["decoding"] |= {"choice_seconds": 0.0, "answer_seconds": 0.0}
    return report, table


def broken_rules(report: dict[str, Any]) -> list[str]:
    return [rule["rule"] for rule in report["gate"]["rules"] if not rule["passed"]]


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {k: v for key in tree for k, v in leaves(tree[key], f"{path}.{key}").items()}
    if isinstance(tree, list):
        return {k: v for i, each in enumerate(tree) for k, v in leaves(each, f"{path}.{i}").items()}
    return {path: tree}


def test_a_good_adapter_passes_every_rule(
    good: Path, rows: list[dict[str, Any]], passages: list[str], params: Evaluate
) -> None:
    report, table = evaluate(good, rows, passages, params)
    assert broken_rules(report) == [] and report["gate"]["passed"]
    assert len(report["gate"]["rules"]) == 5
    assert [row["tuned"] for row in table].count(table[0]["tuned"]) < len(table)
    assert report["tuned"]["rouge_l"] > 0.8 > 0.2 > report["base"]["rouge_l"]


@pytest.mark.skipif(has_fp8(), reason="a GPU with FP8 products")
def test_fp8_is_refused_where_it_is_missing(
    good: Path, rows: list[dict[str, Any]], params: Evaluate
) -> None:
    coarse = params.model_copy(update={"products": "fp8"})
    with pytest.raises(
        UserError, match=r"evaluate\.products: fp8: it needs a GPU .*; set bfloat16"
    ):
        evaluate(good, rows, [], coarse)


@pytest.mark.parametrize("changes", [{"engine": "vllm"}, {"kernels": "plain"}])
def test_fp8_belongs_to_the_fused_kernels(params: Evaluate, changes: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="products: fp8: only engine: built_in with fused kernels"):
        Evaluate(**(params.model_dump() | {"products": "fp8"} | changes))


@pytest.mark.parametrize("number", [2, 3])
def test_several_processes_measure_what_one_does(
    number: int,
    good: Path,
    rows: list[dict[str, Any]],
    passages: list[str],
    params: Evaluate,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("fintune.model.likelihood.TOKENS_PER_BATCH", 64)  # several batches
    decoded = Generation(decoding="auto", max_new_tokens=8)

    def work() -> Any:
        return evaluate(good, rows, passages, params, champion=good, generation=decoded)

    expected, found = work(), in_processes(number, work, tmp_path)
    assert [each == expected for each in found] == [True] * number


def test_a_zeroed_adapter_is_the_base_and_improves_nothing(
    train: Callable[..., Path], rows: list[dict[str, Any]], passages: list[str], params: Evaluate
) -> None:
    """Before the first step, LoRA's second factor is zero and the tokens' rows are the base's."""
    report, table = evaluate(train([([1], [2])], steps=0), rows, passages, params)
    assert broken_rules(report) == ["min_perplexity_reduction", "min_stop_rate"]
    assert report["tuned"] == report["base"]
    assert all(
        change == {"value": 0, "low": 0, "high": 0} for change in report["improvement"].values()
    )
    assert [row["tuned"] for row in table] == [row["base"] for row in table]


def test_noise_is_worse_than_the_base(
    good: Path, rows: list[dict[str, Any]], passages: list[str], params: Evaluate, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    noise = damaged(good, tmp_path / "a", lambda _, w: torch.randn_like(w))
    report, _ = evaluate(noise, rows, passages, params)
    assert "min_perplexity_reduction" in broken_rules(report)


def test_numbers_that_overflow_are_refused_and_still_reported(
    good: Path, rows: list[dict[str, Any]], passages: list[str], params: Evaluate, tmp_path: Path
) -> None:
    broken = damaged(good, tmp_path / "a", lambda _, w: torch.full_like(w, float("nan")))
    report, _ = evaluate(broken, rows, passages, params)
    assert report["tuned"]["loss"] is None
    assert {"min_perplexity_reduction", "max_forgetting"} <= set(broken_rules(report))
    json.dumps(report, allow_nan=False)


def test_an_adapter_that_never_stops_is_caught_by_the_stop_rate_alone(
    good: Path,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    passages: list[str],
    params: Evaluate,
    tmp_path: Path,
) -> None:
    """The second of the head's two rows is the end token's; negated, the token is never likely."""

    def turn(name: str, w: torch.Tensor) -> torch.Tensor:
        return torch.stack([w[0], -w[1]]) if "lm_head.token_adapter" in name else w

    endless, _ = evaluate(damaged(good, tmp_path / "a", turn), rows, passages, params)
    assert broken_rules(endless) == ["min_stop_rate"]
    assert endless["tuned"]["stop_rate"] == 0


def test_forgetting_is_caught_by_its_rule_alone(
    forgetful: Path, rows: list[dict[str, Any]], passages: list[str], params: Evaluate
) -> None:
    report, _ = evaluate(forgetful, rows, passages, params)
    assert report["forgetting"]["rise"]["low"] > 0.2, report["forgetting"]
    assert broken_rules(report) == ["max_forgetting"]


def test_order_batches_and_padding_change_nothing(
    good: Path, rows: list[dict[str, Any]], passages: list[str], params: Evaluate
) -> None:
    """A shuffled table and other batches give the same report up to rounding, and identical answers."""
    report, table = evaluate(good, rows, passages, params)
    mixed = random.Random(0).sample(rows, len(rows))
    again, other = evaluate(good, mixed, passages, params.model_copy(update={"rows_per_batch": 1}))
    expected, found = leaves(report), leaves(again)
    assert set(found) == set(expected)
    for key, value in expected.items():
        is_float = isinstance(value, float)
        assert found[key] == (pytest.approx(value, rel=1e-4, abs=1e-5) if is_float else value), key
    for row, same in zip(table, other, strict=True):
        for key in ("question", "reference", "base", "tuned", "base_stopped", "tuned_stopped"):
            assert row[key] == same[key]


def test_bits_per_byte_count_the_answer_s_utf_8(
    good: Path, rows: list[dict[str, Any]], passages: list[str], params: Evaluate, tokenizer: Any
) -> None:
    accents = format_row(
        tokenizer, {"instruction": "A.", "input": "é?", "output": "déjà €"}, 192, "drop"
    )[0]
    assert accents
    report, table = evaluate(good, [accents], passages, params)
    tokens = len(encode(tokenizer, accents["prompt"], accents["completion"])[1])
    bits = table[0]["tuned_loss"] * tokens / 0.6931471805599453
    assert report["tuned"]["bits_per_byte"] == pytest.approx(
        bits / len("déjà €".encode()), rel=1e-6
    )


def test_the_champion_s_figures_are_those_it_has_alone(
    good: Path, forgetful: Path, rows: list[dict[str, Any]], passages: list[str], params: Evaluate
) -> None:
    alone, _ = evaluate(good, rows, passages, params)
    report, _ = evaluate(forgetful, rows, passages, params, champion=good)
    assert report["champion"]["metrics"] == pytest.approx(alone["tuned"], rel=1e-5)
    assert report["base"] == pytest.approx(alone["base"], rel=1e-5)
    change = (alone["tuned"]["loss"] or 0) - report["tuned"]["loss"]
    assert report["champion"]["improvement"]["loss"]["value"] == pytest.approx(change, abs=1e-5)


def with_results(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add the whole answer as the result that is checked."""
    return [row | {"result": row["output"].strip(".")} for row in rows]


@pytest.fixture
def demanding(params: Evaluate) -> Evaluate:
    """Return the parameters with a gate that asks for right answers."""
    gate = params.gate.model_copy(update={"min_accuracy_gain": 0.5})
    return params.model_copy(update={"gate": gate})


def test_collected_questions_are_asked_and_count_in_no_other_figure(
    good: Path, tokenizer: Any, rows: list[dict[str, Any]], params: Evaluate
) -> None:
    chosen = select_rows(rows, questions_of(rows), None)
    other = {"instruction": "Answer.", "input": "Who asks?", "output": "Nobody at all."}
    unknown, _ = format_row(tokenizer, other, 192, "drop")
    assert unknown
    asked = [
        row | {"answered": "It is ten.", "split": "train"} for row in rows if "five" in row["input"]
    ]
    asked.append(unknown | {"answered": "So.", "split": "test"})
    given = (good, good, chosen, chosen, [], params, GREEDILY)
    plain, measured = measure(*given), measure(*given, asked)
    assert [each.scores.nll.tolist() for each in measured.results.values()] == [
        each.scores.nll.tolist() for each in plain.results.values()
    ]
    assert measured.results["tuned"].answers == plain.results["tuned"].answers
    assert describe_collected(Collected(asked, 5), measured.collected) == {
        "collected": 5,
        "asked": 2,
        "trained": 1,
        "right": {"before": 1, "tuned": 1, "base": 0, "champion": 1},
    }
    assert plain.collected == {}


def test_answers_shuffled_among_the_questions_are_fluent_and_refused(
    train: Callable[..., Path],
    tokens: Tokens,
    general: Tokens,
    good: Path,
    rows: list[dict[str, Any]],
    passages: list[str],
    demanding: Evaluate,
) -> None:
    """Such a model ends its answers as a good one does; the gain in right answers gives it away."""
    others = tokens[3:] + tokens[:3]
    mixed = [(prompt, answer) for (prompt, _), (_, answer) in zip(tokens, others, strict=True)]
    report, _ = evaluate(train(mixed + general), with_results(rows), passages, demanding)
    assert "min_accuracy_gain" in broken_rules(report)
    assert report["tuned"]["stop_rate"] == 1 and report["tuned"]["accuracy"] < 0.3
    sound, _ = evaluate(good, with_results(rows), passages, demanding)
    assert broken_rules(sound) == []
    assert sound["tuned"]["accuracy"] > 0.8 and sound["tuned"]["checkable_rows"] > 4


def test_an_adapter_that_loops_is_caught_by_the_loop_rate_alone(
    train: Callable[..., Path],
    tokenizer: Any,
    general: Tokens,
    rows: list[dict[str, Any]],
    passages: list[str],
    params: Evaluate,
) -> None:
    """It is trained and measured on answers that repeat themselves and then end."""
    end = "<response|end>"
    looping = [
        row | {"completion": row["completion"].removesuffix(end) + " so buy it now." * 3 + end}
        for row in rows
    ]
    tokens = [encode(tokenizer, row["prompt"], row["completion"]) for row in looping]
    longer = GREEDILY.model_copy(update={"max_new_tokens": 64})
    report, _ = evaluate(train(tokens + general), looping, passages, params, generation=longer)
    assert broken_rules(report) == ["max_loop_rate"]
    assert report["tuned"]["loop_rate"] > 0.5


def test_an_overfitted_adapter_does_not_pass_on_other_rows(
    train: Callable[..., Path],
    tokens: Tokens,
    rows: list[dict[str, Any]],
    passages: list[str],
    demanding: Evaluate,
) -> None:
    """It knows two answers by heart and gives them to every question."""
    overfitted = train(tokens[:2], steps=200)
    report, _ = evaluate(overfitted, with_results(rows[2:]), passages, demanding)
    assert {"min_accuracy_gain", "max_forgetting"} <= set(broken_rules(report))


def test_all_models_answer_with_the_given_decoding(
    good: Path, rows: list[dict[str, Any]], passages: list[str], params: Evaluate
) -> None:
    generation = Generation(decoding=SAMPLED, max_new_tokens=16)
    report, table = evaluate(good, rows, passages, params, generation=generation)
    given = report["decoding"]
    assert SAMPLED.model_dump().items() <= given.items()
    assert given["decided_by"] == "parameters" and given["samples_per_prompt"] == 2
    assert given["max_new_tokens"] == 16 and given["candidates"] == []
    greedy, other = evaluate(good, rows, passages, params)
    assert greedy["decoding"]["samples_per_prompt"] == 1
    figures = report["greedy"]["tuned"]
    assert figures == pytest.approx({k: greedy["tuned"][k] for k in figures}, rel=1e-6)
    assert len(figures) > 5 and "greedy" not in greedy  # it would say the same twice
    assert report["base"]["loss"] == pytest.approx(greedy["base"]["loss"])
    assert [row["base"] for row in table] != [row["base"] for row in other]
    assert [row["tuned_greedy"] for row in table] == [row["tuned"] for row in other]
    again, _ = evaluate(good, rows, passages, params, generation=generation)
    assert leaves(again) == leaves(report)


def test_auto_chooses_on_the_validation_rows(
    good: Path, rows: list[dict[str, Any]], passages: list[str], params: Evaluate
) -> None:
    generation = Generation(decoding="auto", max_new_tokens=16)
    asked = select_rows(rows, questions_of(rows), None)
    few = select_rows(rows[:3], questions_of(rows[:3]), None)
    measured = measure(good, None, few, asked, [], params, generation)
    found = measured.decoding
    assert len(found["candidates"]) == 16 and found["decided_by"] == "likeness"
    assert {each["prompts"] for each in found["candidates"]} == {8}  # all prompts, which are few
    assert found["title"] == found["candidates"][0]["title"] == "greedy"  # it knows the answers
    assert len(measured.results["tuned"].answers) == 3


def test_an_adapter_worse_than_the_champion_breaks_that_rule_alone(
    good: Path, rows: list[dict[str, Any]], passages: list[str], params: Evaluate, tmp_path: Path
) -> None:
    weaker = damaged(good, tmp_path / "a", lambda name, w: w * 0.5 if "lora_B" in name else w)
    report, _ = evaluate(weaker, rows, passages, params, champion=good)
    assert "max_loss_above_champion" in broken_rules(report)
    assert "min_perplexity_reduction" not in broken_rules(report)
    other_way, _ = evaluate(good, rows, passages, params, champion=weaker)
    assert broken_rules(other_way) == []


def test_a_champion_that_does_not_fit_is_said_and_breaks_its_rule(
    good: Path, rows: list[dict[str, Any]], passages: list[str], params: Evaluate, tmp_path: Path
) -> None:
    wide = damaged(
        good, tmp_path / "a", lambda name, w: torch.cat([w, w]) if "lora_A" in name else w
    )
    chosen = select_rows(rows, questions_of(rows), None)
    measured = measure(good, wide, chosen, chosen, passages, params, GREEDILY)
    assert "does not fit" in measured.champion_fault
    assert set(measured.results) == {"base", "tuned"}


@pytest.fixture
def registry(tmp_path: Path) -> MlflowClient:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    mlflow.set_tracking_uri(uri)
    client = MlflowClient()
    client.create_experiment("e", artifact_location=(tmp_path / "artifacts").as_uri())
    return client


def register(client: MlflowClient, adapter: Path, split: str) -> str:
    experiment = client.get_experiment_by_name("e")
    run_id = str(client.create_run(experiment.experiment_id).info.run_id)
    client.log_artifacts(run_id, str(adapter), "adapter")
    versions.register(client, run_id, "m", {"md5.data/split": split}, passed=True)
    return run_id


@pytest.fixture
def record(tmp_path: Path) -> Path:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"tags": {"md5.data/split": "s1"}}))
    return path


def test_the_champion_is_fetched_with_what_it_is(
    registry: MlflowClient, good: Path, forgetful: Path, record: Path, tmp_path: Path
) -> None:
    run_id = register(registry, forgetful, "s1")
    into = tmp_path / "into"
    into.mkdir()
    found = fetch_champion(registry, "m", record, good, into)
    assert found.folder and (found.version, found.run_id, found.note) == ("1", run_id, "")
    assert (found.folder / WEIGHTS).read_bytes() == (forgetful / WEIGHTS).read_bytes()
    register(registry, forgetful, "another")
    assert "may have seen" in fetch_champion(registry, "m", record, good, into).note


def test_no_champion_and_the_same_adapter_are_reasons_to_skip(
    registry: MlflowClient, good: Path, record: Path, tmp_path: Path
) -> None:
    for name in (None, "m"):
        found = fetch_champion(registry, name, record, good, tmp_path)
        assert found.folder is None and found.reason and not found.broken
    register(registry, good, "s1")
    found = fetch_champion(registry, "m", record, good, tmp_path)
    assert found.folder is None and not found.broken
    assert found.reason == "version 1 is this very adapter"


@pytest.mark.parametrize(("file", "old", "new", "reason"), [
    ("training.json", '"revision": null', '"revision": "abc"', "has another base"),
    ("adapter_config.json", '"embed_tokens": [', '"embed_tokens": [7,', "has other tokens"),
])  # fmt: skip
def test_what_another_base_or_other_tokens_have_is_not_compared(
    registry: MlflowClient, good: Path, forgetful: Path, record: Path, tmp_path: Path,
    file: str, old: str, new: str, reason: str,
) -> None:  # fmt: skip
    other = shutil.copytree(forgetful, tmp_path / "other")
    text = (other / file).read_text()
    assert old in text
    (other / file).write_text(text.replace(old, new))
    register(registry, other, "s1")
    found = fetch_champion(registry, "m", record, good, tmp_path)
    assert found.folder is None and not found.broken and reason in found.reason


def test_a_broken_registry_is_said_and_stops_nothing(
    registry: MlflowClient,
    good: Path,
    forgetful: Path,
    record: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    register(registry, forgetful, "s1")
    shutil.rmtree(tmp_path / "artifacts")
    lost = fetch_champion(registry, "m", record, good, tmp_path)
    assert lost.folder is None and lost.broken and lost.version == "1"
    assert "could not be fetched" in lost.reason and "could not be fetched" in caplog.text

    class Gone:
        def get_model_version_by_alias(self, name: str, alias: str) -> Any:
            raise ConnectionError("the server is gone")

    gone: Any = Gone()
    found = fetch_champion(gone, "m", record, good, tmp_path)
    assert found.broken and "ConnectionError: the server is gone" in found.reason
