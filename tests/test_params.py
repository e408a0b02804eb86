"""Validation of params.yaml: all problems at once, by dotted key."""

from pathlib import Path

import pytest
from dvc.utils.serialize import modify_yaml
from ruamel.yaml import YAML

from fintune.errors import UserError
from fintune.params import Params, left_out, read_name, read_params, with_usual

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "recipes/demo.yaml"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run from the project's root: the recipe names its base by a relative path."""
    monkeypatch.chdir(ROOT)


RATE = "train.learning_rate: give auto or a number above 0"


def changed(tmp_path: Path, *edits: tuple[str, str]) -> Path:
    """Write the demo recipe with pieces of its text replaced."""
    text = DEMO.read_text(encoding="utf-8")
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "params.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_params(path)
    return str(caught.value)


def test_all_problems_are_listed_with_keys_and_near_matches(tmp_path: Path) -> None:
    path = changed(
        tmp_path,
        ("  learning_rate:", "  learning_rte:"),
        ("    r: 32", "    r: 0\n    typo: 3"),
        ("overlong: truncate", "overlong: cut"),
        ("max_steps:", "max_steps: '10'"),
        ("validation_fraction:", "validation_fraction: 0.1"),
        ("test_fraction:", "test_fraction: 0.99"),
    )
    message = problems(path)
    assert "7 problems" in message
    for line in (
        "train.learning_rte: unknown key; did you mean learning_rate?",
        "train.learning_rate: missing",
        "train.lora.r: ",
        "train.lora.typo: unknown key",
        "format.overlong: input should be 'truncate' or 'drop', not 'cut'",
        "train.max_steps: ",
        "split: validation_fraction and test_fraction leave nothing to train on",
    ):
        assert line in message


@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        (["attention: padded", "kernels: fused"], "fused ones take packed rows"),
        (["attention: padded", "checkpointing: selective"], "selective needs kernels: fused"),
        (["kernels: plain", "checkpointing: selective"], "selective needs kernels: fused"),
        (["parallel: none", "processes: 2"], "processes: 2 with parallel: none, which is one"),
    ],
)
def test_settings_that_exclude_each_other(tmp_path: Path, edits: list[str], expected: str) -> None:
    changes = [(f"{edit.split(':')[0]}: auto", edit) for edit in edits]
    assert expected in problems(changed(tmp_path, *changes))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("seed: 13", "seed: 13.5", "split.seed"),
        ("seed: 13", "seed: true", "split.seed"),
        ("attention: auto", "attention: flash", "train.attention"),
        (
            "tokens_per_pass: auto",
            "tokens_per_pass: all",
            "train.tokens_per_pass: give auto or a number, not",
        ),
        (
            "tokens_per_pass: auto",
            "tokens_per_pass: 0",
            "train.tokens_per_pass: give auto or a number, not",
        ),
        ("parallel: auto ", "parallel: both ", "train.parallel"),
        ("  processes: auto", "  processes: 0", "train.processes: give auto or a number, not"),
        *(
            ("learning_rate: 3e-3", f"learning_rate: {wrong}", f"{RATE}, not {said}")
            for wrong, said in ((".inf", "inf"), ("'high'", "'high'"), ("0", "0"), ("true", "True"))
        ),
        ("default_instruction:", "default_instruction: Answer.", "fetch: give either"),
        ("more: []", "more: [{shar: 1.0}]", "fetch.more.0.shar: unknown key; did you mean share?"),
        (
            "\n    output: output",
            "",
            "fetch.columns: give input and output, or",
        ),
        ("more: []", "more: none", "fetch.more"),
        (
            "  lora:\n    r: 32",
            "  lora: 16\n  x:\n    r: 32",
            "train.lora: 16 where keys are expected",
        ),
        ("model: assets/demo-base", "model: some/where/else", "base: model: some/where/else"),
        ("model: assets/demo-base", "model: acme/tiny", "set revision to one of the commits"),
    ],
)
def test_a_wrong_value_names_its_key(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert expected in problems(changed(tmp_path, (old, new)))


@pytest.mark.parametrize("name", ["validation", "test"])
def test_a_null_fraction_needs_a_column(tmp_path: Path, name: str) -> None:
    other = {"validation": "test", "test": "validation"}[name]
    edits = [("\n    split: split", ""), (f"{other}_fraction:", f"{other}_fraction: 0.1")]
    message = problems(changed(tmp_path, *edits))
    assert f"  split.{name}_fraction: null takes" in message
    assert "fetch.columns.split" in message and f"{other}_fraction" not in message
    edits.append((f"  {name}_fraction:", f"  {name}_fraction: 0.1"))
    assert read_params(changed(tmp_path, *edits)).fetch.columns.split is None


def test_a_hub_base_must_be_pinned_to_a_commit(tmp_path: Path) -> None:
    text = changed(tmp_path, ("model: assets/demo-base", "model: acme/tiny")).read_text()
    head, _, tail = text.partition("base:\n")
    for revision, valid in (("main", False), ("0" * 40, True)):
        path = tmp_path / "hub.yaml"
        path.write_text(head + "base:\n" + tail.replace("revision:", f"revision: '{revision}'", 1))
        if valid:
            assert read_params(path).base.revision == "0" * 40
        else:
            assert "can move between two stages" in problems(path)


def test_numbers_are_read_as_dvc_reads_them(tmp_path: Path) -> None:
    """`dvc exp run -S train.learning_rate=3e-5` writes 3e-05, which PyYAML takes for a string."""
    path = changed(tmp_path, ("learning_rate: 3e-3", "learning_rate: 3e-05"))
    assert read_params(path).train.learning_rate == 3e-05
    for given, taken in (("auto", "auto"), ("1", 1.0)):
        path = changed(tmp_path, ("learning_rate: 3e-3", f"learning_rate: {given}"))
        assert read_params(path).train.learning_rate == taken


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "cp recipes/demo.yaml" in problems(tmp_path / "absent.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("fetch: [")
    assert "not valid YAML" in problems(broken)
    broken.write_text("")
    assert "empty or not a mapping" in problems(broken)
    twice = changed(tmp_path, ("split:\n  seed: 13", "split:\n  seed: 13\n  seed: 14"))
    assert "seed" in problems(twice)


def test_sections_cannot_be_changed() -> None:
    params = read_params(DEMO)
    with pytest.raises(ValueError, match="frozen"):
        params.train.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("edits", "told"),
    [
        ([("general_text: assets/general-text.jsonl", "general_text: null")], "general_text is null"),
        ([("champion: registered", "champion: null")], "champion is null"),
        ([("embedding:", "embedding: {model: a/b, revision: main}")], "evaluate.embedding: model: a/b"),
        ([("champion: registered", "champion: a/b")], "evaluate.champion: "),
        ([("tasks: []", "task: []")], "evaluate.harness.task: unknown key; did you mean tasks?"),
        ([("max_forgetting: 0.5", "max_forgetting: -1")], "evaluate.gate.max_forgetting: "),
    ],
)  # fmt: skip
def test_the_evaluation_s_parameters_fit_together(
    tmp_path: Path, edits: list[tuple[str, str]], told: str
) -> None:
    assert told in problems(changed(tmp_path, *edits))


def test_a_rule_and_what_it_judges_may_both_be_null(tmp_path: Path) -> None:
    path = changed(
        tmp_path,
        ("general_text: assets/general-text.jsonl", "general_text: null"),
        ("max_forgetting: 0.5", "max_forgetting: null"),
        ("champion: registered", "champion: null"),
        ("max_loss_above_champion: 0.05", "max_loss_above_champion: null"),
    )
    assert read_params(path).evaluate.gate.max_forgetting is None


@pytest.mark.parametrize(
    "part",
    ["ann:s3cret@data.org/qa.csv", "s3cret@data.org/qa.csv", "data.org/qa.csv?token=s3cret"]
    + [
        f"data.org/qa.csv?n=1&{key}=s3cret" for key in ("api_key", "X-Amz-Signature", "sig", "Auth")
    ],
)
def test_a_source_with_a_secret_is_refused_without_showing_it(tmp_path: Path, part: str) -> None:
    before = "source: assets/demo-questions.jsonl"
    message = problems(changed(tmp_path, (before, f"source: 'https://{part}'")))
    assert "fetch.source: holds a user name, a password or a token" in message
    assert "s3cret" not in message
    harmless = "source: 'https://data.org/a@b/qa.csv?page=2&format=csv'"
    read_params(changed(tmp_path, (before, harmless)))


@pytest.mark.parametrize("name", ["a@b", "a/b", "a:b"])
def test_a_model_whose_versions_could_not_be_named_is_refused(tmp_path: Path, name: str) -> None:
    """NAME@ALIAS and NAME/VERSION name a version."""
    path = changed(tmp_path, ("registered_model: financial-qa", f"registered_model: '{name}'"))
    assert "merge_export.registered_model: " in problems(path) and name in problems(path)


def test_one_name_is_followed_by_champion_and_experiment(tmp_path: Path) -> None:
    path = changed(tmp_path, ("registered_model: financial-qa", "registered_model: shop-faq"))
    params = read_params(path)
    assert params.evaluate.champion_of(params.merge_export.registered_model) == "shop-faq"
    assert read_name(path) == "shop-faq"
    other = read_params(changed(tmp_path, ("champion: registered", "champion: rival")))
    assert other.evaluate.champion_of("shop-faq") == "rival"
    (tmp_path / "cut.yaml").write_text("merge_export: [")
    assert read_name(tmp_path / "cut.yaml") is None is read_name(tmp_path / "none.yaml")


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_an_applied_experiment_changes_one_line(recipe: Path, tmp_path: Path) -> None:
    """`dvc exp apply` and `-S` write params.yaml anew, in DVC's form."""
    copied = tmp_path / "params.yaml"
    copied.write_bytes(recipe.read_bytes())
    with modify_yaml(copied) as params:
        params["train"]["learning_rate"] = 0.00123
    before, after = recipe.read_text().splitlines(), copied.read_text().splitlines()
    assert len(before) == len(after)
    changed_lines = [new for old, new in zip(before, after, strict=True) if old != new]
    assert [line.split("#")[0].rstrip() for line in changed_lines] == ["  learning_rate: 0.00123"]


def test_keys_with_a_usual_value_may_be_left_out(tmp_path: Path) -> None:
    """What is left out is taken as most recipes have it, and can be shown."""
    short = tmp_path / "short.yaml"
    short.write_text(SHORT)
    params = read_params(short)
    taken = left_out(params)
    assert taken["train.seed"] == 0 and taken["train.lora.target_modules"] == "all-linear"
    assert taken["fetch.share"] == 1.0 and taken["split.near_duplicate_similarity"] == 0.7
    assert taken["evaluate.harness"] == {"tasks": [], "include_path": None, "limit": None}
    given = YAML(typ="safe").load(short)
    assert not {f"{section}.{key}" for section in given for key in given[section]} & set(taken)
    assert Params.model_validate(with_usual(given)).model_dump() == params.model_dump()
    assert not left_out(Params.model_validate(with_usual(given)))
    assert not left_out(read_params(DEMO))


def test_a_required_key_is_named(tmp_path: Path) -> None:
    for key in ("registered_model", "learning_rate", "source"):
        short = tmp_path / "short.yaml"
        short.write_text("\n".join(each for each in SHORT.splitlines() if f" {key}:" not in each))
        assert f".{key}: missing" in problems(short)


SHORT = """
fetch:
  source: assets/demo-questions.jsonl
  columns: {input: input, output: output}
  default_instruction: Answer.
split:
  validation_fraction: 0.1
  test_fraction: 0.1
base:
  model: assets/demo-base
format:
  max_tokens: 256
train:
  lora: {r: 16, alpha: 32}
  learning_rate: 1e-3
  epochs: 1
  rows_per_step: 16
  validate_every_steps: 20
generation:
  max_new_tokens: 64
evaluate:
  max_rows: 64
  general_text: assets/general-text.jsonl
  gate:
    min_perplexity_reduction: 0.1
    min_stop_rate: 0.9
    max_loop_rate: 0.05
    min_accuracy_gain:
    max_forgetting: 0.5
    max_loss_above_champion: 0.05
merge_export:
  check_rows: 8
  registered_model: short
"""
