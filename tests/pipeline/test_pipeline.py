"""The whole pipeline through the real DVC and MLflow: its files, its logs and its reruns.

One `dvc repro` and two experiments, on a random two-layer base.
"""

import csv
import json
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pyarrow.parquet as pq
import pytest
from dvc.dependency import ParamsDependency
from dvc.repo import Repo
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from ruamel.yaml import YAML
from safetensors import safe_open
from transformers import AutoTokenizer

from fintune.export.register import why_not
from fintune.integrity import hash_files, write_sums
from fintune.metrics import METRICS, number
from fintune.params import Params, read_params, with_usual
from fintune.reports import whole
from support.project import ROOT, Project

pytestmark = pytest.mark.end_to_end

TOKENS = {"rows", "tokens", "p50", "p95", "p99", "max", "rows_truncated", "rows_dropped"}
SPLITS = ("train", "validation", "test")
QUALITY = {"loss", "perplexity", "token_accuracy", "rouge_l", "stop_rate", "mean_answer_tokens"}
TRAINING = {
    "train_loss",
    "validation_loss",
    "tokens_per_second",
    "peak_memory_gib",
    "trainable_parameters",
    "trainable_percent",
    "steps",
    "seconds",
}
EXPORT = {
    "max_logit_difference",
    "merged_loss",
    "adapter_loss",
    "registered_model",
    "version",
    "aliases",
}
FILES = [
    "data/raw/qa.parquet",
    "data/raw/manifest.json",
    *(f"data/{folder}/{split}.parquet" for folder in ("split", "formatted") for split in SPLITS),
    "models/adapter/adapter_model.safetensors",
    "models/adapter/adapter_config.json",
    "models/adapter/tokenizer.json",
    "models/run.json",
    "models/merged/model.safetensors",
    "models/merged/config.json",
    "models/merged/tokenizer.json",
    "reports/train_curve.csv",
    "reports/predictions.parquet",
    "reports/evaluation.html",
]
LOAD_MERGED = """
import json, sys
sys.modules["peft"] = sys.modules["bitsandbytes"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
new = model.generate(**tokenizer("Input: a\\n<response>", return_tensors="pt"), max_new_tokens=2)
print(json.dumps({
    "class": type(model).__name__,
    "rows": [len(model.get_input_embeddings().weight), len(model.get_output_embeddings().weight)],
    "vocabulary": model.config.vocab_size,
    "tokenizer": len(tokenizer),
    "end": tokenizer.convert_tokens_to_ids("<response|end>"),
    "stops": model.generation_config.eos_token_id,
    "wrong": [sorted(loading[key]) for key in ("missing_keys", "unexpected_keys")],
    "answered": new.shape[1] > 0,
}))
"""


@dataclass(frozen=True)
class Finished:
    """A project after `dvc repro`, with the HEAD commit before it and DVC's output."""

    project: Project
    commit: str
    output: str


def git(project: Project, *arguments: str) -> str:
    return project.run("git", *arguments).stdout.strip()


USUAL = re.compile(r"^  (?:share|near_duplicate_similarity|overlong|max_grad_norm):.*\n", re.M)


@pytest.fixture(scope="module")
def finished(make_project: Callable[..., Project]) -> Finished:
    """Make a git repository in which the pipeline ran once and its results are committed.

    Its params.yaml leaves out keys with a usual value.
    """
    project = make_project(real=True)
    file = project / "params.yaml"
    file.write_text(USUAL.sub("", file.read_text()))
    project.commit_all()
    commit = git(project, "rev-parse", "HEAD")
    output = project.run("dvc", "repro").stdout
    git(project, "add", "--all")
    git(project, "commit", "--quiet", "--message", "results")
    return Finished(Project(project.folder), commit, output)  # what follows may run in forks


@pytest.fixture(scope="module")
def copy(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Project]:
    """Return a function that copies the finished project, for tests that change it."""

    def make() -> Project:
        folder = tmp_path_factory.mktemp("copy") / "project"
        shutil.copytree(finished.project.folder, folder, symlinks=True)
        return Project(folder)

    return make


@pytest.fixture(scope="module")
def experiment(copy: Callable[[], Project]) -> Finished:
    """Copy the project, and train with another learning rate and fewer steps by `dvc exp run`."""
    project = copy()
    commit = git(project, "rev-parse", "HEAD")
    changes = ("-S", "train.learning_rate=1e-4", "-S", "train.max_steps=3")
    return Finished(project, commit, project.run("dvc", "exp", "run", *changes).stdout)


def stages_run(output: str) -> list[str]:
    lines = [line for line in output.splitlines() if line.startswith("Running stage '")]
    return [line.split("'")[1] for line in lines]


def report(project: Project, name: str) -> dict[str, Any]:
    content = whole(json.loads((project / f"reports/{name}.json").read_text()))
    return content


def store(project: Project) -> MlflowClient:
    uri = f"sqlite:///{project / 'mlflow.db'}"
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def runs(project: Project) -> list[Run]:
    """Return all runs, the oldest first, except those that only group runs."""
    client = store(project)
    experiments = [each.experiment_id for each in client.search_experiments()]
    found = client.search_runs(experiments, order_by=["attributes.start_time ASC"])
    return [run for run in found if "experiments_on_commit" not in run.data.tags]


def run_of(project: Project) -> Run:
    return store(project).get_run(json.loads((project / "models/run.json").read_text())["run_id"])


def load_yaml(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = YAML(typ="safe").load(path.read_text())
    return content


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a tree's leaves by dotted key."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return leaves


def locked_md5(project: Project, *stages: str) -> dict[str, str]:
    """Read the md5 of the stages' data and adapter outputs by path, from dvc.lock."""
    locked = load_yaml(project / "dvc.lock")["stages"]
    written = {out["path"]: out["md5"] for stage in stages for out in locked[stage]["outs"]}
    return {
        path: md5 for path, md5 in written.items() if path.startswith(("data/", "models/adapter"))
    }


def md5_tags(tags: dict[str, str]) -> dict[str, str]:
    return {
        key.removeprefix("md5."): value for key, value in tags.items() if key.startswith("md5.")
    }


def read_back(text: str) -> Any:
    """Parse a logged parameter: JSON, or else a plain string."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def kind(value: Any) -> str:
    """Return the type that YAML and JSON share: 2 and 2.0 are both numbers, and true is not."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return "number" if is_number else type(value).__name__


def test_the_first_run_runs_every_stage_in_order(finished: Finished) -> None:
    order = ["fetch", "split", "format", "train", "evaluate", "merge_export"]
    assert stages_run(finished.output) == order


@pytest.mark.parametrize("name", FILES)
def test_named_file_is_there(finished: Finished, name: str) -> None:
    assert (finished.project / name).stat().st_size > 0


def test_metrics_have_the_named_keys(finished: Finished) -> None:
    split, tokens, train, evaluation, export = (
        report(finished.project, name)
        for name in ("split", "format", "train", "evaluation", "export")
    )
    for name in SPLITS:
        assert {"rows", "questions"} <= set(split[name])
        assert set(tokens[name]) >= TOKENS
    assert split["overlapping_questions"] == 0
    assert split["rows_in"] == sum(split[name]["rows"] for name in SPLITS) + sum(
        split["dropped"].values()
    )
    assert set(train) >= TRAINING
    measured = set(METRICS) - {"similarity"}  # needs a model that is not shipped
    assert set(evaluation["base"]) == set(evaluation["tuned"]) == measured >= QUALITY
    assert set(evaluation["improvement"]) == measured | {"perplexity_reduction"}
    for gain in evaluation["improvement"].values():
        assert gain["low"] <= gain["value"] <= gain["high"]
    assert isinstance(evaluation["gate"]["passed"], bool) and evaluation["gate"]["reason"]
    assert set(export) >= EXPORT


def test_a_second_repro_runs_nothing_and_leaves_git_clean(finished: Finished) -> None:
    done = finished.project.run("dvc", "repro")
    assert stages_run(done.stdout) == []
    assert len(runs(finished.project)) == 1
    assert git(finished.project, "status", "--porcelain") == ""


def test_the_adapter_holds_lora_and_two_token_rows_only(finished: Finished) -> None:
    folder = finished.project / "models/adapter"
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    lora = {name for name in shapes if ".lora_A." in name or ".lora_B." in name}
    rows = {name: shape for name, shape in shapes.items() if name not in lora}
    config = json.loads((finished.project / "base/config.json").read_text())
    assert len(lora) == config["num_hidden_layers"] * 7 * 2
    assert len(rows) == 2 and all("token" in name for name in rows)
    assert set(map(tuple, rows.values())) == {(2, config["hidden_size"])}
    assert sum(1 for name in rows if "lm_head" in name) == 1
    vocabulary = len(AutoTokenizer.from_pretrained(folder))
    assert not any(max(shape) >= vocabulary - 2 for shape in shapes.values())


def test_the_merged_folder_needs_transformers_only(finished: Finished, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOAD_MERGED, str(finished.project / "models/merged")],
        cwd=tmp_path,
        env=finished.project.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout.splitlines()[-1])
    base = AutoTokenizer.from_pretrained(finished.project / "base")
    assert loaded["class"] == "MistralForCausalLM"
    assert loaded["tokenizer"] == len(base) + 2
    assert {loaded["vocabulary"], *loaded["rows"]} == {loaded["tokenizer"]}
    assert loaded["end"] in loaded["stops"]
    assert loaded["wrong"] == [[], []]
    assert loaded["answered"]


def test_outputs_are_links_to_dvc_s_cache(finished: Finished) -> None:
    """Large files are stored once, and read-only: an edit in place would change the cache."""
    cached = {path.stat().st_ino for path in (finished.project / ".dvc/cache").rglob("*")}
    for name in ("models/merged/model.safetensors", "models/adapter/adapter_model.safetensors"):
        output = (finished.project / name).stat()
        assert output.st_ino in cached and output.st_mode & 0o222 == 0


def test_one_run_is_logged_with_every_parameter(finished: Finished) -> None:
    (run,) = runs(finished.project)
    assert run.info.status == "FINISHED"
    assert run.info.run_id == run_of(finished.project).info.run_id
    params = load_yaml(finished.project / "params.yaml")
    sections = ("fetch", "split", "base", "format", "train")
    expected = flat(with_usual({name: params[name] for name in sections}))
    logged = {key: read_back(value) for key, value in run.data.params.items()}
    assert logged == expected
    assert {key: kind(value) for key, value in logged.items()} == {
        key: kind(value) for key, value in expected.items()
    }


def test_the_curve_is_logged_step_by_step(finished: Finished) -> None:
    run = run_of(finished.project)
    with (finished.project / "reports/train_curve.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [int(row["step"]) for row in table] == list(range(1, 7))
    for name in ("loss", "validation_loss", "learning_rate"):
        expected = {int(row["step"]): float(row[name]) for row in table if row[name]}
        history = store(finished.project).get_metric_history(run.info.run_id, f"curve/{name}")
        assert len(history) == len(expected) > 0
        assert {point.step: point.value for point in history} == pytest.approx(expected)


def test_charts_begin_with_the_losses_and_the_tuned_model(finished: Finished) -> None:
    """MLflow's pages sort a run's charts by section and name, without regard to case after an update."""
    run = run_of(finished.project)
    keys = [key for key in run.data.metrics if "/" in key and not key.startswith("system/")]
    assert sorted(keys)[:4] == sorted(keys, key=str.casefold)[:4]
    first = {
        "at_a_glance/loss_training": "curve/loss",
        "at_a_glance/loss_validation": "curve/validation_loss",
        "at_a_glance/tuned_accuracy": "tuned/accuracy",
        "at_a_glance/tuned_perplexity": "tuned/perplexity",
    }
    assert sorted(keys)[:4] == list(first)
    client = store(finished.project)
    for shown, known in first.items():
        points, same = (client.get_metric_history(run.info.run_id, key) for key in (shown, known))
        assert [(each.step, each.value) for each in points] == [
            (each.step, each.value) for each in same
        ]


def test_final_metrics_are_logged_as_the_files_have_them(finished: Finished) -> None:
    logged = run_of(finished.project).data.metrics
    for name in ("train", "evaluation", "export"):
        for key, value in flat(report(finished.project, name)).items():
            if isinstance(value, int | float) and not isinstance(value, bool) and key != "rows":
                assert logged[key.replace(".", "/")] == pytest.approx(value, rel=1e-5), key


def model_files(project: Project, run: Run) -> Path:
    """Return the folder of the one model that a run has made."""
    (output,) = store(project).get_run(run.info.run_id).outputs.model_outputs
    location = store(project).get_logged_model(output.model_id).artifact_location
    return Path(location.removeprefix("file://"))


def test_the_adapter_is_a_model_and_the_tables_are_in_the_run(finished: Finished) -> None:
    run = run_of(finished.project)
    name = "adapter_model.safetensors"
    logged = model_files(finished.project, run) / name
    assert logged.read_bytes() == (finished.project / "models/adapter" / name).read_bytes()
    tables = {each.dataset.name: each for each in run.inputs.dataset_inputs}
    assert len(run.inputs.dataset_inputs) == 3 and set(tables) == set(SPLITS)
    for name, table in tables.items():
        assert {tag.key: tag.value for tag in table.tags} == {"mlflow.data.context": name}
    rows = {
        name: report(finished.project, "format")[name]["rows"] for name in ("train", "validation")
    }
    for name, count in rows.items():
        assert json.loads(tables[name].dataset.profile)["num_rows"] == count


def test_the_page_and_the_predictions_are_in_the_run(finished: Finished, tmp_path: Path) -> None:
    """The run's page shows a table with a row for each row of the file."""
    run, client = run_of(finished.project), store(finished.project)
    page = Path(client.download_artifacts(run.info.run_id, "evaluation.html", str(tmp_path)))
    assert page.read_bytes() == (finished.project / "reports/evaluation.html").read_bytes()
    table = Path(client.download_artifacts(run.info.run_id, "predictions.json", str(tmp_path)))
    logged = json.loads(table.read_text())
    rows = pq.read_table(finished.project / "reports/predictions.parquet").to_pylist()
    assert logged["columns"] == list(rows[0])
    assert [line[:4] for line in logged["data"]] == [list(row.values())[:4] for row in rows]
    shown = json.loads(run.data.tags["mlflow.loggedArtifacts"])
    names = ("predictions.json", "decodings.json")
    assert shown == [{"path": name, "type": "table"} for name in names]


def test_the_run_leads_back_to_git_and_to_its_inputs(finished: Finished) -> None:
    tags = run_of(finished.project).data.tags
    assert tags["git_commit"] == tags["mlflow.source.git.commit"] == finished.commit
    assert tags["git_dirty"] == "false"
    assert md5_tags(tags) == locked_md5(finished.project, "fetch", "split", "format")


def test_version_one_is_registered_as_candidate(finished: Finished) -> None:
    client = store(finished.project)
    evaluation, export = (report(finished.project, name) for name in ("evaluation", "export"))
    assert evaluation["gate"]["passed"] is False  # eight tokens an answer: the base never stops
    aliases = client.get_registered_model("financial-qa").aliases
    assert {alias: str(version) for alias, version in aliases.items()} == {"candidate": "1"}
    version = client.get_model_version("financial-qa", "1")
    assert version.run_id == run_of(finished.project).info.run_id
    assert (export["version"], export["aliases"]) == ("1", ["candidate"])
    assert version.tags["git_commit"] == finished.commit
    assert version.tags["gate"] == evaluation["gate"]["reason"]
    (output,) = client.get_run(version.run_id).outputs.model_outputs
    assert version.source == f"models:/{output.model_id}"
    model = client.get_logged_model(output.model_id)
    measured = {each.key: each for each in model.metrics}
    test = next(
        each.dataset
        for each in client.get_run(version.run_id).inputs.dataset_inputs
        if each.dataset.name == "test"
    )
    for key, value in evaluation["tuned"].items():
        if value is not None:
            point = measured[f"tuned/{key}"]
            assert point.value == pytest.approx(value, rel=1e-5)
            assert (point.dataset_name, point.dataset_digest) == ("test", test.digest)
    assert model.params == run_of(finished.project).data.params
    assert json.loads(model.tags["mlflow.modelVersions"]) == [
        {"name": "financial-qa", "version": "1"}
    ]
    assert not any(key.startswith(("tuned_", "mlflow.")) for key in version.tags)
    stages = ("fetch", "split", "format", "train", "evaluate")
    assert md5_tags(version.tags) == locked_md5(finished.project, *stages)


def test_the_last_stage_prints_the_summary_that_results_prints(finished: Finished) -> None:
    told = finished.project.run("python", "-m", "fintune", "results").stdout
    assert told in finished.output
    assert "Registered    financial-qa version 1 (candidate)" in told
    gate = report(finished.project, "evaluation")["gate"]
    assert all(f"  {rule['reason']}\n" in told for rule in gate["rules"])


def test_results_are_those_of_the_registry_that_is_here(
    copy: Callable[[], Project], empty_store: Path
) -> None:
    """A clone has the reports of another machine, whose registry is not its own."""
    project = copy()
    results = ("python", "-m", "fintune", "results")
    client = store(project)
    client.set_registered_model_alias("financial-qa", "champion", "1")
    assert "financial-qa version 1 (candidate, champion)" in project.run(*results).stdout
    lose_mlflow(project)
    told = project.run(*results).stdout
    assert "version 1" not in told and "Registered    nowhere: there is no MLflow store" in told
    assert not (project / "mlflow.db").exists()
    shutil.copy(empty_store, project / "mlflow.db")
    assert "Registered    not in this registry" in project.run(*results).stdout


def test_only_what_is_to_be_registered_becomes_a_version(
    copy: Callable[[], Project], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is not is merged and in MLflow's run all the same."""
    project = copy()
    lose_mlflow(project)
    project.set(merge_export__register="passed")
    told = project.stage("merge_export")
    assert "Registered    no: it failed the gate" in told.stdout
    export = report(project, "export")
    assert (export["version"], export["aliases"]) == (None, [])
    assert store(project).search_registered_models() == []
    monkeypatch.chdir(project.folder)
    always = read_params().merge_export.model_copy(update={"register": "always"})
    never = always.model_copy(update={"register": "never"})
    assert why_not(never, passed=True) == "merge_export.register is never"
    assert why_not(always, passed=False) == ""
    with monkeypatch.context() as search:
        search.setenv("FINTUNE_PARENT_RUN", "a run")
        assert why_not(always, passed=True) == "it is a trial of a search"
    (run,) = runs(project)
    assert (model_files(project, run) / "MLmodel").is_file() and "merged_loss" in run.data.metrics
    assert (project / "models/merged/model.safetensors").is_file()
    project.set(merge_export__register="always")
    project.stage("merge_export")
    assert report(project, "export")["version"] == "1"


def test_dvc_shows_metrics_plots_and_params(finished: Finished, tmp_path: Path) -> None:
    project = finished.project
    metrics = project.run("dvc", "metrics", "show", "--json")
    assert "failed to load" not in metrics.stderr
    shown = json.loads(metrics.stdout)
    names = ("split", "format", "train", "evaluation", "export")
    assert set(shown[""]["data"]) == {f"reports/{name}.json" for name in names}
    project.run("dvc", "params", "diff")
    project.run("dvc", "plots", "show", "--out", str(tmp_path))
    page = (tmp_path / "index.html").read_text()
    pipeline = load_yaml(project / "dvc.yaml")
    stage_plots = [p for stage in pipeline["stages"].values() for p in stage.get("plots", [])]
    drawn = [options for entry in stage_plots for options in entry.values()]
    drawn += [{"title": title, **o} for entry in pipeline["plots"] for title, o in entry.items()]
    assert len(drawn) == 4
    assert "below the line, training helped" in page and '"labelLimit": 0' in page
    for options in drawn:
        for key in ("title", "x_label", "y_label"):
            assert options[key] in page


def test_no_plotted_table_has_an_empty_cell(finished: Finished) -> None:
    """DVC draws one as 0. The training curve has some, in columns that are not plotted from it."""
    for stage in load_yaml(finished.project / "dvc.yaml")["stages"].values():
        for path, options in ((p, o) for each in stage.get("plots", []) for p, o in each.items()):
            rows = list(csv.DictReader((finished.project / path).open()))
            assert rows and all(row[options["y"]] and row[options["x"]] for row in rows), path


def documented_changes() -> dict[str, tuple[list[str], list[str]]]:
    """Read the table in docs/experiments.md: section, stages that read it, stages that may follow."""
    text = (ROOT / "docs/experiments.md").read_text()
    (table,) = re.findall(r"\| a change in \|.*\n\|[-|]+\n((?:\|.*\n)+)", text)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return {
        section.strip("`"): (runs.split(", "), [name for name in then.split(", ") if name])
        for section, runs, then in cells
    }


def other(value: Any) -> Any:
    """Return a different value; DVC does not check whether it makes sense."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case list():
            return [*value, "another"]
    return f"not {value}"


def stages_with_changed_parameters(repo: Repo) -> set[str]:
    """Return the stages whose parameters differ from dvc.lock; unlike `status`, hashes no file."""
    return {
        stage.name
        for stage in repo.index.stages
        if any(dep.status() for dep in stage.deps if isinstance(dep, ParamsDependency))
    }


def test_every_parameter_runs_the_stages_that_the_docs_name(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished.project.folder)
    project, told = finished.project, documented_changes()
    path = project / "params.yaml"
    before = path.read_bytes()
    assert [name for name in told if "." not in name] == list(Params.model_fields)
    try:
        checked = set()
        with Repo() as repo:
            for key, value in flat(load_yaml(path)).items():
                section = key.split(".")[0]
                expected = set(told.get(key, told[section])[0])
                project.set_all({key: other(value)})
                assert stages_with_changed_parameters(repo) == expected, key
                if section not in checked:  # the whole of what DVC compares
                    assert set(repo.status()) == expected, key
                checked.add(section)
                path.write_bytes(before)
        project.set(train__learning_rate=0.003)  # the value it has, the file written anew
        assert json.loads(project.run("dvc", "status", "--json").stdout) == {}
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("section", Params.model_fields)
def test_the_stages_that_may_follow_are_those_that_the_docs_name(
    finished: Finished, section: str
) -> None:
    runs_first, then = documented_changes()[section]
    command = ("dvc", "repro", "--dry", "--force", "--downstream", *runs_first)
    assert sorted(stages_run(finished.project.run(*command).stdout)) == sorted(runs_first + then)


def test_an_experiment_runs_what_depends_on_its_changes(experiment: Finished) -> None:
    assert stages_run(experiment.output) == ["train", "evaluate", "merge_export"]


def test_an_experiment_is_a_second_run_in_the_same_file(
    finished: Finished, experiment: Finished
) -> None:
    first, second = runs(experiment.project)
    assert first.info.run_id == run_of(finished.project).info.run_id
    assert second.info.run_id == run_of(experiment.project).info.run_id
    assert second.info.status == "FINISHED"
    assert json.loads(second.data.params["train.learning_rate"]) == 1e-4
    assert json.loads(second.data.params["train.max_steps"]) == 3
    name = second.data.tags["dvc_experiment"]
    assert second.info.run_name == f"learning_rate=0.0001, max_steps=3 ({name})"
    assert name in experiment.output
    assert second.data.metrics["tuned/loss"] != first.data.metrics["tuned/loss"]


def test_an_experiment_is_registered_with_its_own_lineage(experiment: Finished) -> None:
    """Its version's hashes are its own, not those of the earlier run."""
    client = store(experiment.project)
    version = client.get_model_version_by_alias("financial-qa", "candidate")
    assert str(version.version) == "2"
    assert version.run_id == run_of(experiment.project).info.run_id
    tags = md5_tags(version.tags)
    stages = load_yaml(experiment.project / "dvc.lock")["stages"]
    now = locked_md5(experiment.project, *stages)
    assert tags == {path: md5 for path, md5 in now.items() if path in tags}
    assert tags["models/adapter"] == now["models/adapter"]
    said, figures = version.description.split("\n\n", 1)
    assert said == (
        "Against version 1: train.learning_rate is 0.0001 and was 0.003; train.max_steps is 3 and was 6; "
        "the data are the same."
    )
    evaluation = report(experiment.project, "evaluation")
    assert f"/runs/{version.run_id}/artifacts/evaluation.html" in figures
    rules = evaluation["gate"]["rules"]
    said = {True: "holds", False: "broken"}
    assert all(f"- {said[rule['passed']]}: {rule['reason']}" in figures for rule in rules)
    loss = number(evaluation["tuned"]["perplexity"])
    assert re.search(rf"\| Answer perplexity \| \S+ \| {loss} \|", figures)
    first = client.get_model_version("financial-qa", "1")
    assert first.description.startswith("The first version of financial-qa.\n\n**Evaluated**")


def test_an_experiment_in_a_temporary_folder_logs_to_the_same_file(
    copy: Callable[[], Project],
) -> None:
    project = copy()
    done = project.run("dvc", "exp", "run", "--temp", "-S", "train.max_steps=2", "train")
    assert stages_run(done.stdout) == ["train"]
    _, second = runs(project)
    assert second.info.status == "FINISHED"
    assert json.loads(second.data.params["train.max_steps"]) == 2
    assert second.info.run_name == f"max_steps=2 ({second.data.tags['dvc_experiment']})"
    assert second.data.tags["dvc_experiment"] in done.stdout
    assert ".dvc" not in second.info.artifact_uri
    assert (model_files(project, second) / "adapter_model.safetensors").is_file()
    assert git(project, "status", "--porcelain") == ""


@pytest.mark.parametrize(
    "model", ["financial-qa@candidate", "financial-qa/1", "models/adapter", "models/merged"]
)
def test_a_model_leads_back_to_its_run_data_and_commit(finished: Finished, model: str) -> None:
    told = finished.project.run("python", "-m", "fintune", "lineage", model).stdout
    assert told.startswith("financial-qa version 1 (candidate)")
    assert run_of(finished.project).info.run_id in told
    results = git(finished.project, "rev-parse", "HEAD")  # its dvc.lock has the adapter
    assert f"git checkout {results}" in told and "cannot" not in told
    for path, md5 in locked_md5(finished.project, "fetch", "split", "format", "train").items():
        assert f"{md5}  {path}" in told


def lineage(project: Project, model: str, *options: str) -> str:
    return project.run("python", "-m", "fintune", "lineage", model, *options).stdout


def follow(told: str, origin: Path | str, folder: Path) -> str:
    """Run the commands that lineage prints in a new clone; return the md5 of its adapter."""
    subprocess.run(["git", "clone", "--quiet", str(origin), str(folder)], check=True)
    clone = Project(folder)
    for line in re.findall(r"^  rebuild   (.*)$", told, re.MULTILINE):
        clone.run(*line.split(), *(["train"] if line.startswith("dvc repro") else []))
    return locked_md5(clone, "train")["models/adapter"]


def test_the_documented_order_leads_to_a_commit_that_rebuilds_the_model(
    copy: Callable[[], Project], tmp_path: Path
) -> None:
    """A change, `dvc repro`, a commit: the commit that was there while it trained is another model's."""
    project = copy()
    before = git(project, "rev-parse", "HEAD")
    project.set(train__max_steps=2, train__validate_every_steps=1)
    project.run("dvc", "repro", "train")
    told = lineage(project, "models/adapter")
    assert told.startswith("models/adapter: not registered")
    assert "it cannot be rebuilt yet" in told and "git checkout" not in told
    git(project, "commit", "--quiet", "--all", "--message", "fewer steps")
    commit = git(project, "rev-parse", "HEAD")
    project.set(train__max_steps=1)
    git(project, "commit", "--quiet", "--all", "--message", "a change that was not run")
    told = lineage(project, "models/adapter", "--verify")
    assert f"git checkout {commit}" in told and before not in told
    md5 = locked_md5(project, "train")["models/adapter"]
    assert f"rebuilt   the same adapter, byte for byte: md5 {md5}" in told
    assert follow(told, project.folder, tmp_path / "clone") == md5


def test_a_commit_that_does_not_make_the_model_is_no_recipe(copy: Callable[[], Project]) -> None:
    project = copy()
    project.set(train__max_steps=1)
    git(
        project, "commit", "--quiet", "--all", "--amend", "--message", "results of other parameters"
    )
    git(project, "reflog", "expire", "--expire=now", "--all")
    told = lineage(project, "models/adapter")
    assert "it cannot be rebuilt: train of that commit made another" in told
    assert "  rebuild" not in told
    done = project.run(
        "python", "-m", "fintune", "lineage", "models/adapter", "--verify", check=False
    )
    assert done.returncode == 1 and "error: it cannot be rebuilt" in done.stderr


def test_an_experiment_s_recipe_works_in_a_colleague_s_clone(
    experiment: Finished, tmp_path: Path
) -> None:
    project, name = experiment.project, run_of(experiment.project).data.tags["dvc_experiment"]
    subprocess.run(["git", "init", "--quiet", "--bare", str(tmp_path / "origin")], check=True)
    git(project, "remote", "add", "origin", str(tmp_path / "origin"))
    git(project, "push", "--quiet", "origin", "HEAD:refs/heads/master")
    told = lineage(project, "financial-qa@candidate")
    assert told.startswith("financial-qa version 2 (candidate)")
    assert f"`dvc exp push origin {name}`" in told
    project.run("dvc", "exp", "push", "--no-cache", "origin", name)
    md5 = locked_md5(project, "train")["models/adapter"]
    assert follow(told, tmp_path / "origin", tmp_path / "clone") == md5
    git(project, "remote", "remove", "origin")


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("financial-qa@champion", "not in this registry"),
        ("financial-qa/7", "not in this registry"),
        ("financial-qa", "NAME@ALIAS or NAME/VERSION"),
        ("data/raw", "no registered version has this adapter"),
    ],
)
def test_an_unknown_model_is_named_with_the_way_out(
    finished: Finished, model: str, reason: str
) -> None:
    done = finished.project.run("python", "-m", "fintune", "lineage", model, check=False)
    assert done.returncode != 0
    assert done.stderr.startswith(f"error: {model}: ")
    assert reason in done.stderr
    assert "Traceback" not in done.stderr


def lose_mlflow(project: Project) -> None:
    (project / "mlflow.db").unlink()
    shutil.rmtree(project / "mlartifacts")


def artifacts(project: Project, run: Run) -> set[str]:
    folder = Path(run.info.artifact_uri.removeprefix("file://"))
    assert folder.is_relative_to(project.folder)
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def same(some: list[Any], others: list[Any]) -> bool:
    """Return whether two lists have the same, in any order."""
    return sorted(map(str, some)) == sorted(map(str, others)) and some != []


def test_a_replaced_store_gets_all_of_it_again_once(
    finished: Finished, copy: Callable[[], Project]
) -> None:
    project = copy()
    lose_mlflow(project)
    assert stages_run(project.run("dvc", "repro").stdout) == []
    for _ in range(2):
        project.run("python", "-m", "fintune", "restore")
    (run,), (first,) = runs(project), runs(finished.project)
    assert run.info.run_name == first.info.run_name and run.info.status == "FINISHED"
    assert run.data.tags["first_run_id"] == first.info.run_id
    assert run.data.params == first.data.params
    measured = {key: v for key, v in first.data.metrics.items() if not key.startswith("system/")}
    assert run.data.metrics == pytest.approx(measured, rel=1e-5)
    for key in ("tuned/loss", "merged_loss", "validation_loss"):
        assert len(store(project).get_metric_history(run.info.run_id, key)) == 1
    ours = {k: v for k, v in first.data.tags.items() if not k.startswith("mlflow.")}
    assert set(ours.items()) <= set(run.data.tags.items())
    assert artifacts(project, run) == artifacts(finished.project, first)
    first_files, files = model_files(finished.project, first), model_files(project, run)
    assert names_in(files) == names_in(first_files) >= {"MLmodel", "adapter_config.json"}
    data_sets = ([each.to_dictionary() for each in of.inputs.dataset_inputs] for of in (run, first))
    assert same(next(data_sets), next(data_sets))
    mlflow.set_tracking_uri(f"sqlite:///{project / 'mlflow.db'}")  # by which records are read
    (asked,) = store(project).search_datasets()
    rows = pq.read_table(project / "reports/predictions.parquet").num_rows
    found = store(project).search_traces(locations=[run.info.experiment_id], run_id=run.info.run_id)
    assert len(found) == len(asked.records) == rows
    stored = Path(run.info.artifact_uri.removeprefix("file://"))
    assert all(file.stat().st_mode & 0o200 for file in stored.rglob("*")), (
        "MLflow could not overwrite it"
    )
    (version,) = store(project).search_model_versions()
    before = store(finished.project).get_model_version("financial-qa", "1")
    assert version.run_id == run.info.run_id and version.tags == before.tags
    told, before_told = version.description, before.description
    assert told.replace(run.info.run_id, "") == before_told.replace(first.info.run_id, "")
    aliases = store(project).get_registered_model("financial-qa").aliases
    assert {alias: str(number) for alias, number in aliases.items()} == {"candidate": "1"}


def test_an_experiment_from_dvc_s_cache_is_logged_again_once(
    experiment: Finished, tmp_path: Path
) -> None:
    project = Project(tmp_path / "project")
    shutil.copytree(experiment.project.folder, project.folder, symlinks=True)
    lose_mlflow(project)
    git(project, "checkout", "--", ".")
    project.run("dvc", "checkout", "--force")
    again = project.run(
        "dvc", "exp", "run", "-S", "train.learning_rate=1e-4", "-S", "train.max_steps=3"
    )
    assert stages_run(again.stdout) == [] and "is cached" in again.stdout
    for _ in range(2):
        project.run("python", "-m", "fintune", "restore")
    (run,) = runs(project)
    assert run.data.tags["dvc_experiment"] in experiment.output
    assert json.loads(run.data.params["train.max_steps"]) == 3
    assert {"validation_loss", "tuned/loss", "merged_loss"} <= set(run.data.metrics)


def test_another_adapter_than_dvc_s_is_not_logged(copy: Callable[[], Project]) -> None:
    project = copy()
    (project / "models/adapter/README.md").write_text("mine\n")
    done = project.run("python", "-m", "fintune", "restore", check=False)
    assert done.returncode != 0
    assert "not the adapter of dvc.lock" in done.stderr and "Traceback" not in done.stderr


def test_an_unknown_parameter_is_refused(copy: Callable[[], Project]) -> None:
    project = copy()
    done = project.run("dvc", "exp", "run", "-S", "+train.typo=3", check=False)
    assert done.returncode != 0
    assert "train.typo: unknown key" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(runs(project)) == 1


WATCH_IMPORTS = """
import runpy, sys
import fintune.stage
fintune.stage.leave = lambda status: None
runpy.run_module(f"stages.{sys.argv[1]}", run_name="__main__")
heavy = ("torch", "mlflow", "datasets", "peft", "trl", "accelerate", "sklearn")
print("imported:", *(name for name in heavy if sys.modules.get(name)))
"""


@pytest.mark.parametrize("stage", ["fetch", "split", "format"])
def test_the_data_stages_import_nothing_heavy(finished: Finished, stage: str) -> None:
    """They start in under a second; torch alone takes longer, and so does MLflow."""
    told = finished.project.run("python", "-c", WATCH_IMPORTS, stage)
    assert told.stdout.splitlines()[-1].strip() == "imported:"
    assert "PyTorch was not found" not in told.stderr


def verify(project: Project, *arguments: str) -> tuple[int, list[str]]:
    done = project.run("python", "-m", "fintune", "verify", *arguments, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout.splitlines()


def test_what_params_yaml_leaves_out_is_logged(finished: Finished) -> None:
    logged = json.loads((finished.project / "models/run.json").read_text())["params"]
    names = ("fetch.share", "split.near_duplicate_similarity", "format.overlong")
    assert [logged[name] for name in (*names, "train.max_grad_norm")] == [
        *("1.0", "0.7", "truncate", "1.0")
    ]
    locked = (finished.project / "dvc.lock").read_text()
    assert "rows_per_step" in locked and "max_grad_norm" not in locked


@pytest.mark.parametrize("model", ["models/merged", "models/adapter", "financial-qa@candidate"])
def test_an_untouched_model_is_verified(finished: Finished, model: str) -> None:
    status, lines = verify(finished.project, model)
    assert status == 0, lines
    states = {line.split()[0] for line in lines}
    assert states <= {"holds", "unchecked"}
    held = "\n".join(line for line in lines if line.startswith("holds"))
    assert "dvc.lock has this model" in held and "data/raw in" in held
    assert f"ran that of commit {finished.commit}" in held
    assert "parameters in MLflow's run" in held and "loss in MLflow's run" in held
    figure = {
        "models/merged": r"bom\.cdx\.json: \d\d figures are those",
        "models/adapter": r"reports/evaluation\.json, md5",
        "financial-qa@candidate": r"registry: \d\d figures are those",
    }
    assert re.search(figure[model], held)
    assert ("files are what SHA256SUMS says" in held) == (model != "models/adapter")


def change_text(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.unlink()  # a link to DVC's cache
    file.write_text(text.replace(old, new, 1))


def sum_again(folder: Path) -> None:
    (folder / "SHA256SUMS").unlink()
    write_sums(folder, hash_files(folder))


def test_a_copy_elsewhere_is_verified_by_the_history(copy: Callable[[], Project]) -> None:
    """The folder has moved on: another commit's dvc.lock, and no reports of the model."""
    project = copy()
    shutil.copytree(project / "models/merged", project / "taken")
    (project / "dvc.lock").unlink()
    (project / "reports/evaluation.json").unlink()
    status, lines = verify(project, "taken")
    assert status == 0, lines
    text = "\n".join(lines)
    assert re.search("holds +dvc.lock of commit [0-9a-f]{12} has this model", text)
    assert re.search(r"holds +bom.cdx.json: \d+ figures are those of", text)
    (project / "mlflow.db").unlink()
    status, lines = verify(project, "taken")
    assert status == 0 and "unchecked  MLflow: no store here" in "\n".join(lines)
    assert not (project / "mlflow.db").exists()


def test_what_was_changed_is_found_by_verify(copy: Callable[[], Project]) -> None:
    """Each change is of one thing, with all that its author could make fit."""
    project = copy()
    merged, adapter = project / "models/merged", project / "models/adapter"

    def failures(model: str) -> str:
        status, lines = verify(project, model)
        failed = [line for line in lines if line.startswith("FAILS")]
        assert (status == 1) == bool(failed)
        return "\n".join(failed)

    store_file = sqlite3.connect(project / "mlflow.db")
    store_file.execute(
        "UPDATE logged_model_metrics SET metric_value = 0.01 WHERE metric_name = 'tuned/loss'"
    )
    store_file.execute("UPDATE params SET value = '64' WHERE key = 'train.lora.r'")
    store_file.commit()
    found = failures("financial-qa@candidate")
    assert "registry: loss: 0.01" in found and "train.lora.r is 64" in found
    assert "parameters in MLflow's run" in failures("models/merged")
    deps = load_yaml(project / "dvc.lock")["stages"]["train"]["deps"]
    (code,) = (dep["md5"] for dep in deps if dep["path"] == "fintune/training")
    change_text(project / "dvc.lock", code, "0" * 32 + ".dir")
    assert "code: fintune/training of commit" in failures("models/adapter")
    change_text(project / "dvc.lock", "0" * 32 + ".dir", code)
    shutil.copytree(merged, project / "taken")
    weights = bytearray((merged / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (merged / "model.safetensors").unlink()
    (merged / "model.safetensors").write_bytes(weights)
    assert "model.safetensors: its SHA-256 is" in failures("models/merged")
    sum_again(merged)
    found = failures("models/merged")
    assert "bom.cdx.json: models/merged/model.safetensors" in found and "no dvc.lock here" in found
    change_text(adapter / "training.json", "{", "{ ")
    assert "no dvc.lock here or in git has md5" in failures("models/adapter")
    loss = f"{report(project, 'evaluation')['tuned']['loss']:.6g}"
    change_text(project / "reports/evaluation.json", loss, "0.01")
    found = failures("taken")
    assert "reports/evaluation.json, md5" in found and "bom.cdx.json: tuned.loss" in found
    assert "README.md: " in found
