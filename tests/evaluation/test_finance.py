"""The finance tasks on made rows in their data sets' schemas, served at the pinned commits."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq
import pytest
from mlflow.tracking import MlflowClient

from fintune.evaluation.harness import TASKS, task_manager
from fintune.params import Harness
from fintune.reports import whole
from support.hub import Hub
from support.project import ROOT, Project

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

SUITE = TASKS / "finance"
NEWER = "f" * 40  # a later commit of every data set, whose rows are no rows of ours
NUMBERS = importlib.util.find_spec("fintune.evaluation.correctness") is not None
CHOICES = {
    "fpb": ["negative", "neutral", "positive"],
    "fiqa": ["negative", "neutral", "positive"],
    "tfns": ["negative", "neutral", "positive"],
    "headlines": ["No", "Yes"],
    "cfa": ["A", "B", "C"],
}


def headline(number: int, kind: str, answer: str) -> dict[str, Any]:
    return {
        "id": f"h{number}",
        "query": f"Say it.\nText: gold case h{number} was discussed: quietly\nAnswer:",
        "answer": answer,
        "choices": ["Yes", "No"],
        "gold": 0 if answer == "Yes" else 1,
        "label_type": kind,
    }


def exam(number: int, answer: str) -> dict[str, Any]:
    question = f"Q:Of exam case c{number}, what is due?,CHOICES: A: rent.,B: tax.,C: interest."
    row = {"query": f"Choose one. {question} Answer:", "answer": answer, "text": question}
    return row | {"choices": ["A", "B", "C"], "gold": "ABC".index(answer)}


def report(number: int, answer: str) -> dict[str, Any]:
    question = f"what was the growth in finqa case q{number}?"
    context = f"sales note q{number}:\n|2013|50|\n|2014|60|"
    query = f"Answer this.\nContext: {context}\nQuestion: {question}\nAnswer:"
    return {"id": f"q{number}", "query": query, "answer": answer, "text": question}


# a row as its hub would have it, a text that only its prompt has, and the right reply
ROWS: dict[str, list[tuple[dict[str, Any], str, str]]] = {
    "fpb": [
        ({"sentence": f"Sales of case p{i} moved .", "label": label}, f"case p{i} ", reply)
        for i, (label, reply) in enumerate(
            [(0, "negative"), (1, "neutral"), (1, "neutral"), (2, "positive"), (1, "neutral")]
        )
    ],
    "fiqa": [
        (
            {"_id": str(i), "sentence": f"Post s{i} on it", "target": f"Firm s{i}", "score": score}
            | {"aspect": "Stock", "type": "post"},
            f"Post s{i} ",
            reply,
        )
        for i, (score, reply) in enumerate(
            [
                (-0.11, "negative"),
                (-0.1, "neutral"),
                (0.0, "neutral"),
                (0.1, "positive"),
                (0.9, "positive"),
            ]
        )
    ],
    "tfns": [
        ({"text": f'$T{i} "went", they say', "label": label}, f"$T{i} ", reply)
        for i, (label, reply) in enumerate(
            [(0, "negative"), (1, "positive"), (2, "neutral"), (2, "neutral"), (1, "positive")]
        )
    ],
    "headlines": [
        (headline(i, kind, reply), f"case h{i} ", reply)
        for i, (kind, reply) in enumerate(
            [
                ("Price or Not", "Yes"),
                ("Price or Not", "Yes"),
                ("Price or Not", "No"),
                ("Direction Up", "No"),
                ("Direction Up", "Yes"),
                ("Asset Comparision", "No"),
            ]
        )
    ],
    "cfa": [(exam(i, reply), f"case c{i},", reply) for i, reply in enumerate("BACBB")],
    "finqa": [(report(i, reply), f"case q{i}?", reply) for i, reply in enumerate(["0.2", "150"])],
}


def pinned(task: str) -> tuple[str, str]:
    """Read a task's data set and revision from its file."""
    text = (SUITE / f"{task}.yaml").read_text()
    found = re.search(r"dataset_path: (\S+)\ndataset_kwargs: {revision: (\w+)}", text)
    assert found, task
    return found[1], found[2]


def f1(pairs: list[tuple[str, str]], average: str) -> float:
    """Compute the F1 of (right, chosen) pairs from its definition."""
    total, weights = 0.0, 0
    for label in {each for pair in pairs for each in pair}:
        hits = sum(right == chosen == label for right, chosen in pairs)
        rows = sum(right == label for right, _ in pairs)
        chosen = sum(choice == label for _, choice in pairs)
        weight = rows if average == "weighted" else 1
        total += weight * 2 * hits / (rows + chosen)
        weights += weight
    return total / weights


def scores(task: str, replies: list[str]) -> dict[str, float]:
    """Compute a task's metrics; the headlines' F1 is the mean over the questions."""
    pairs = [(right, said) for (_, _, right), said in zip(ROWS[task], replies, strict=True)]
    kinds = [row.get("label_type", "") for row, _, _ in ROWS[task]]
    found = {"acc": sum(right == said for right, said in pairs) / len(pairs)}
    for name, average in (("f1", "weighted"), ("f1_macro", "macro")):
        parts = [
            f1([pair for pair, of in zip(pairs, kinds, strict=True) if of == kind], average)
            for kind in sorted(set(kinds))
        ]
        found[name] = sum(parts) / len(parts)
    return found


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with Hub() as hub:
        for task, rows in ROWS.items():
            folder = tmp_path_factory.mktemp(task)
            table = pa.Table.from_pylist([row for row, _, _ in rows])
            if task == "tfns":
                csv.write_csv(table, folder / "sent_train.csv")
                csv.write_csv(table, folder / "sent_valid.csv")
            else:
                (folder / "data").mkdir()
                for split in ("train", "test"):
                    pq.write_table(table, folder / f"data/{split}-00000-of-00001-ab.parquet")
            path, revision = pinned(task)
            hub.add("datasets", path, folder, revision=revision)
            later = tmp_path_factory.mktemp("later")
            pq.write_table(pa.table({"other": ["x"]}), later / "test.parquet")
            hub.add("datasets", path, later, revision=NEWER)
        yield hub


MODELS = {
    "knowing": {task: [reply for _, _, reply in rows] for task, rows in ROWS.items()},
    "constant": {task: [CHOICES.get(task, ["7"])[0]] * len(rows) for task, rows in ROWS.items()},
    "shuffled": {
        task: [reply for _, _, reply in rows[1:] + rows[:1]] for task, rows in ROWS.items()
    },
}


@pytest.fixture(scope="module")
def found(hub: Hub, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run all models on the tasks, beside a task of the user's."""
    own = tmp_path_factory.mktemp("own")
    (own / "mine.json").write_text('{"q": "Is tax due?", "a": 0}\n')
    (own / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ntest_split: test\noutput_type: multiple_choice\n"
        f"dataset_kwargs: {{data_files: {{test: {own / 'mine.json'}}}}}\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: [due, not]\ndoc_to_target: a\n'
    )
    single = [f"finance_{task}" for task in CHOICES]
    asked = {
        "tasks": ["finance", "mine"] if NUMBERS else [*single, "mine"],
        "include_path": str(own),
        "base": str(tiny_base),
        "models": {
            name: {"Is tax due?": "due"}
            | {key: r for t in ROWS for (_, key, _), r in zip(ROWS[t], replies[t], strict=True)}
            for name, replies in MODELS.items()
        },
    }
    environment = os.environ | hub.environment(tmp_path_factory.mktemp("home"))
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/support/finance_standins.py")],
        input=json.dumps(asked),
        env=environment | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("task", CHOICES)
@pytest.mark.parametrize("model", MODELS)
def test_a_model_gets_the_scores_of_what_it_says(
    found: dict[str, Any], model: str, task: str
) -> None:
    expected = scores(task, MODELS[model][task])
    assert (expected["acc"] == 1.0) == (model == "knowing")
    metrics = found[model][f"finance_{task}"]
    assert {name: value["tuned"] for name, value in metrics.items()} == pytest.approx(expected)


def test_constant_answers_get_the_f1_computed_by_hand(found: dict[str, Any]) -> None:
    """Five rows, one of them negative: F1 is 2/6 for negative and 0 for neutral and positive."""
    metrics = found["constant"]["finance_fpb"]
    assert metrics["acc"]["tuned"] == pytest.approx(1 / 5)
    assert metrics["f1"]["tuned"] == pytest.approx((2 / 6) / 5)
    assert metrics["f1_macro"]["tuned"] == pytest.approx((2 / 6) / 3)


def test_numbers_are_compared_as_numbers(found: dict[str, Any]) -> None:
    pytest.importorskip("fintune.evaluation.correctness")
    assert found["knowing"]["finance_finqa"]["exact_match"]["tuned"] == 1.0
    assert found["constant"]["finance_finqa"]["exact_match"]["tuned"] == 0.0
    assert "exact_match" in found["tiny"]["finance_finqa"]


def test_base_and_tuned_model_take_every_task(found: dict[str, Any]) -> None:
    tasks = {f"finance_{task}" for task in CHOICES} | ({"finance_finqa"} if NUMBERS else set())
    assert set(found["tiny"]) == tasks | {"mine"}
    for task in CHOICES:
        metrics = found["tiny"][f"finance_{task}"]
        assert set(metrics) == {"acc", "f1", "f1_macro"}
        assert all({"base", "tuned"} <= set(value) for value in metrics.values())
    changed = [f"finance_{task}" for task in CHOICES]
    assert any(found["tiny"][t]["acc"]["base"] != found["tiny"][t]["acc"]["tuned"] for t in changed)


def test_prompts_have_the_text_and_no_label(found: dict[str, Any]) -> None:
    """Two prompts of a task differ in nothing but what the row says, whatever its label is."""
    for task in CHOICES:
        prompts = [p for p in found["prompts"] if any(key in p for _, key, _ in ROWS[task])]
        assert len(prompts) == len(ROWS[task])
        bare = set()
        for row, key, _ in ROWS[task]:
            (prompt,) = [prompt for prompt in prompts if key in prompt]
            text = row.get("sentence") or row.get("text") or "was discussed: quietly"
            assert task == "cfa" or text in prompt
            question = row.get("label_type", "")
            bare.add((question, re.sub(r"\d", "", prompt)))
        assert len(bare) == len({question for question, _ in bare}), bare
    (exam,) = [prompt for prompt in found["prompts"] if "case c0," in prompt]
    assert "what is due?\nChoices: A: rent.,B: tax.,C: interest.\n" in exam
    assert "Choose one." not in exam


def test_every_data_set_is_read_at_its_pinned_commit(found: dict[str, Any], hub: Hub) -> None:
    for task in CHOICES:
        path, revision = pinned(task)
        assert found["data"][f"finance_{task}"] == f"{path}@{revision}"
        read = [r.path for r in hub.requests if f"{path}/resolve/" in r.path and r.method == "GET"]
        files = [path for path in read if path.endswith((".parquet", ".csv"))]
        assert files and all(f"/resolve/{revision}/" in path for path in files)
    assert not any(NEWER in request.path for request in hub.requests)


def test_finance_stands_for_the_suite_beside_other_tasks(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("task: finance_cfa\ndataset_path: json\n")
    names = ["finance", "finance_headlines", "hellaswag"]
    manager = task_manager(Harness(tasks=names, include_path=None, limit=None))
    assert manager.task_index["finance"].tags == {f"finance_{task}" for task in ROWS}
    assert manager.task_index["finance_cfa"].yaml_path == SUITE / "cfa.yaml"
    own = task_manager(Harness(tasks=names, include_path=str(tmp_path), limit=None))
    assert own.task_index["finance_cfa"].yaml_path == tmp_path / "mine.yaml"


@pytest.mark.parametrize(
    ("task", "change", "told"),
    [
        ("fpb", {"label": 3}, "row 1 of the data set: 3 is none of 0, 1, 2"),
        ("fpb", {"sentence": None}, "row 1 of the data set: sentence is empty"),
        ("headlines", {"label_type": "Mood"}, "row 1 of the data set: 'Mood' is none of Price or"),
        ("headlines", {"query": "gold"}, "row 1 of the data set: 'gold' has no text between"),
        ("cfa", {"answer": "D"}, "row 1 of the data set: 'D' is none of A, B, C"),
    ],
)
def test_a_wrong_row_is_named(task: str, change: dict[str, Any], told: str) -> None:
    from datasets import Dataset

    from fintune.evaluation.tasks.finance import rows

    made = [row for row, _, _ in ROWS[task]]
    made[1] = made[1] | change
    with pytest.raises(ValueError, match=re.escape(told)):
        getattr(rows, task)(Dataset.from_list(made))
    with pytest.raises(ValueError, match=r"no column .*, only other"):
        getattr(rows, task)(Dataset.from_list([{"other": 1}]))


@pytest.mark.end_to_end
def test_the_stage_records_scores_and_data(
    hub: Hub, make_project: Callable[..., Project], tmp_path: Path
) -> None:
    """The scores are in evaluation.json, MLflow and the page; data that is missing stops it at once."""
    project = make_project(evaluate__harness__tasks=["finance_headlines", "finance_fpb"])
    path, revision = pinned("headlines")
    (tmp_path / "a.csv").write_text("a\n1\n")
    for state, told in (
        ("missing", "not on the hub"),
        ("gated", "is gated: accept its terms at"),
        ("moved", f"has no revision {revision}"),
    ):
        with Hub() as other:
            if state != "missing":
                commit = NEWER if state == "moved" else revision
                other.add("datasets", path, tmp_path, revision=commit)
            if state == "gated":
                other.gate("datasets", path, token="hf_AAAA", accepted=True)
            done = project.stage("evaluate", False, **other.environment(tmp_path / state))
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert f"error: evaluate.harness: finance_headlines: {path}" in done.stderr
        assert told in done.stderr
        assert "take it out of evaluate.harness.tasks" in done.stderr
    for stage in ("fetch", "split", "format", "train"):
        project.stage(stage)
    project.stage("evaluate", **hub.environment(tmp_path / "home"))

    report = whole(json.loads((project / "reports/evaluation.json").read_text()))
    page = (project / "reports/evaluation.html").read_text()
    client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    (run,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
    for task in ("headlines", "fpb"):
        where = "@".join(pinned(task))
        assert report["evaluated"][f"data_of_finance_{task}"] == where
        assert where in page and f"finance_{task}" in page
        assert run.data.tags[f"harness_data.finance_{task}"] == where
        for metric in ("acc", "f1", "f1_macro"):
            for side in ("base", "tuned"):
                value = report["harness"][f"finance_{task}"][metric][side]
                assert 0 <= value <= 1
                logged = run.data.metrics[f"harness/finance_{task}/{metric}/{side}"]
                assert logged == pytest.approx(value, rel=1e-5)  # the file is rounded
