"""The metrics files: what experiments compare, and the rest in a list that DVC leaves out."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from fintune.reports import OF_EVALUATION, OF_MODELS, OF_TRAINING, compact, whole
from fintune.stage import read_json

ROOT = Path(__file__).parents[1]
REPORTS = {"train": OF_TRAINING, "evaluation": OF_EVALUATION}


def recorded(name: str) -> dict[str, Any]:
    return whole(read_json(ROOT / f"reports/{name}.json"))


def test_a_report_comes_back_whole() -> None:
    for name, compared in REPORTS.items():
        report = recorded(name)
        kept = compact(report, compared)
        assert whole(kept) == report == whole(report)
        assert set(kept) <= {*report, "details"} and isinstance(kept["details"], list)
    kept = compact(recorded("evaluation"), OF_EVALUATION)
    assert all(set(kept[side]) == set(OF_MODELS) for side in ("base", "tuned"))
    assert set(kept["improvement"]) == {"loss", "accuracy"} == set(kept["improvement"])
    assert set(kept["improvement"]["loss"]) == {"value", "low", "high"}
    assert kept["gate"] == recorded("evaluation")["gate"] and "calibration" not in kept


def test_what_is_empty_or_lacking_comes_back_as_it_was() -> None:
    for report in (
        {"base": {}, "tuned": {"loss": 1.0}, "champion": {"compared": False, "metrics": {}}},
        {"forgetting": {"rise": {"value": 1.0, "low": None}, "tuned": 2.0}, "rows": 3},
        {"rows": 3},
        {},
    ):
        assert whole(compact(report, OF_EVALUATION)) == report
    assert compact({"rows": 3}, OF_EVALUATION) == {"rows": 3}


def moved(report: Any) -> Any:
    """Change every number and text."""
    if isinstance(report, dict):
        return {key: moved(value) for key, value in report.items()}
    if isinstance(report, list):
        return [moved(value) for value in report]
    return report + "!" if isinstance(report, str) else not report if report in (0, 1) else 9.5


def test_a_diff_of_two_experiments_is_short(tmp_path: Path) -> None:
    """Even where every figure of training and evaluation differs."""

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout

    names = [f"{name}.json" for name in REPORTS]
    (tmp_path / "dvc.yaml").write_text(json.dumps({"metrics": names}))
    reports = {name: recorded(name) for name in REPORTS}
    for change in (dict, moved):
        for name, compared in REPORTS.items():
            text = json.dumps(change(compact(reports[name], compared)))
            (tmp_path / f"{name}.json").write_text(text)
        if change is dict:
            run("git", "init", "--quiet")
            run(sys.executable, "-m", "dvc", "init", "--quiet")
            run("git", "add", "--all")
            run("git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "first")
    found = json.loads(run(sys.executable, "-m", "dvc", "metrics", "diff", "--json"))
    lines = {name: set(values) for name, values in found.items()}
    assert {"train_loss", "learning_rate", "seconds"} - lines["train.json"] <= {"learning_rate"}
    assert {"tuned.loss", "base.loss", "gate.reason"} <= lines["evaluation.json"]
    assert not any("details" in line for of_file in lines.values() for line in of_file)
    assert sum(map(len, lines.values())) <= 50  # those of the base differ only with the decoding
