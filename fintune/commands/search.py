r"""Search for parameters: Optuna proposes values, and `dvc exp run` trains with them.

    python -m fintune search --trials 20 train.learning_rate=1e-4..1e-2:log train.lora.r=8,16,32
    python -m fintune search --trials 30 --metric reports/evaluation.json:tuned.rouge_l --maximize \
        train.learning_rate=1e-4..1e-2:log train.epochs=1..4

A range is LOW..HIGH (integers if both bounds are), with `:log` for a logarithmic scale; choices are
separated by commas. The same command on the same commit resumes the search, even after a kill: finished
trials count, an interrupted one runs again. `--trials` is the total number.
"""

import argparse
import difflib
import hashlib
import json
import logging
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from ruamel.yaml import YAML

from fintune import paths
from fintune.errors import UserError
from fintune.lineage import PARENT_RUN, git, project_root
from fintune.params import PARAMS_FILE, flatten
from fintune.reports import whole

log = logging.getLogger("fintune")

DIGITS = 4  # of a proposed number: precise enough to search, short enough to read


@dataclass(frozen=True)
class Objective:
    """A number in a metrics file, the stage that writes the file, and whether more is better."""

    file: str
    key: str
    stage: str
    maximize: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for the space, the objective and the sampler."""
    parser.add_argument("space", nargs="+", metavar="key=LOW..HIGH[:log] | key=A,B,C")
    parser.add_argument("--trials", type=int, required=True, help="number of trials in all")
    parser.add_argument(
        "--metric", default=f"{paths.TRAIN_METRICS}:validation_loss", metavar="FILE:KEY"
    )
    parser.add_argument("--maximize", action="store_true", help="more is better")
    parser.add_argument("--sampler", choices=("tpe", "random"), default="tpe")
    parser.add_argument("--seed", type=int, default=0, help="of the sampler")


def main(given: argparse.Namespace) -> None:
    """Check the space and the objective, then search; only one search runs at a time."""
    if given.trials < 1:
        raise UserError(f"--trials {given.trials}: give 1 or more")
    known = flatten(YAML(typ="safe").load(PARAMS_FILE.read_text(encoding="utf-8")))
    space = dict(read_dimension(text, list(known)) for text in given.space)
    objective = read_objective(given.metric, given.maximize)
    root = project_root()
    (root / paths.SCRATCH).mkdir(exist_ok=True)
    try:
        with FileLock(root / paths.SCRATCH / "search.lock", timeout=0):
            search(root, given, space, objective)
    except Timeout:
        raise UserError("another search runs in this project; wait for it or end it") from None


def read_dimension(text: str, known: Sequence[str]) -> tuple[str, Any]:
    """Parse a parameter's key and Optuna distribution from the command line.

    Raises:
        UserError: there is no such parameter, or its values are neither a range nor choices.
    """
    from optuna import distributions

    key, _, values = text.partition("=")
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{text}: {PARAMS_FILE} has no {key}{hint}")
    bounds, _, scale = values.partition(":")
    low, dots, high = bounds.partition("..")
    if not dots:
        choices = [YAML(typ="safe").load(each) for each in values.split(",") if each.strip()]
        if len(choices) < 2:
            raise UserError(f"{text}: give at least two choices, as {key}=A,B, or LOW..HIGH")
        return key, distributions.CategoricalDistribution(choices)
    try:
        if scale not in ("", "log"):
            raise ValueError(f"{scale!r} is no scale; leave it out or give log")
        whole = all(bound.strip().lstrip("+-").isdigit() for bound in (low, high))
        if whole:
            return key, distributions.IntDistribution(int(low), int(high), log=scale == "log")
        return key, distributions.FloatDistribution(float(low), float(high), log=scale == "log")
    except ValueError as error:
        raise UserError(f"{text}: {error}") from None


def read_objective(metric: str, maximize: bool) -> Objective:
    """Parse the metric, and find the stage of dvc.yaml that writes its file.

    Raises:
        UserError: the key is missing, or no stage writes the file.
    """
    file, _, key = metric.partition(":")
    stages = YAML(typ="safe").load(paths.PIPELINE.read_text(encoding="utf-8"))["stages"]
    written = {path: name for name in stages for path in _metrics_files(stages[name])}
    if not key or file not in written:
        raise UserError(f"--metric {metric}: give FILE:KEY with one of {', '.join(written)}")
    return Objective(file, key, written[file], maximize)


def _metrics_files(stage: dict[str, Any]) -> list[str]:
    entries = stage.get("metrics", [])
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


def search(
    root: Path, given: argparse.Namespace, space: dict[str, Any], objective: Objective
) -> None:
    """Run trials until there are `given.trials`, including failed ones, and print the best."""
    import optuna

    from fintune.tracking.client import connect
    from fintune.tracking.database import sqlite_uri
    from fintune.tracking.runs import search_run

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    commit = git(Path(), "rev-parse", "--short=7", "HEAD")
    wanted = repr((sorted(given.space), objective, given.sampler, given.seed))
    name = f"search-{commit}-{hashlib.md5(wanted.encode()).hexdigest()[:6]}"
    study = optuna.create_study(
        storage=sqlite_uri(root / paths.SEARCH_DATABASE),
        study_name=name,
        direction="maximize" if objective.maximize else "minimize",
        load_if_exists=True,
    )
    client = connect(root)
    parent = search_run(client, name, dict(text.split("=", 1) for text in given.space))
    ended = "KILLED"
    try:
        for trial in _trials_to_run(study, space, given):
            _run_trial(study, trial, objective, f"{name}-{trial.number}", parent)
            _log_best(client, parent, study, objective)
        ended = "FINISHED"
    except KeyboardInterrupt:
        raise SystemExit(f"interrupted; the same command goes on with {name}") from None
    finally:
        _log_best(client, parent, study, objective)  # an interruption may have skipped it
        report = describe(study, objective)
        client.set_tag(
            parent, "mlflow.note.content", f"    {report.replace(chr(10), chr(10) + '    ')}"
        )
        client.set_terminated(parent, ended)
    print(report)
    if _best(study) is None:
        raise UserError("no trial has a value")


def _log_best(client: Any, parent: str, study: Any, objective: Objective) -> None:
    """Log the best value so far to the search's run; the step is the number of finished trials."""
    best, key = _best(study), f"best/{objective.key}"
    done = sum(trial.state.is_finished() for trial in study.trials)
    known = client.get_metric_history(parent, key)
    if best is not None and done not in [point.step for point in known]:
        client.log_metric(parent, key, best.value, step=done)


def _trials_to_run(study: Any, space: dict[str, Any], given: argparse.Namespace) -> Iterator[Any]:
    """Yield interrupted trials, then new ones, as frozen trials with the overrides to run."""
    import optuna

    running = (optuna.trial.TrialState.RUNNING,)
    for trial in study.get_trials(states=running):
        if "overrides" in trial.user_attrs:
            yield trial
        else:  # killed before the overrides were stored
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    makers = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
    while (done := len(study.trials)) < given.trials:
        study.sampler = makers[given.sampler](
            seed=given.seed + done
        )  # a resumed search must not repeat its draws
        proposed = study.ask(space)
        overrides = {key: _short(value) for key, value in proposed.params.items()}
        proposed.set_user_attr("overrides", overrides)
        yield study.trials[proposed.number]


def _short(value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _run_trial(study: Any, trial: Any, objective: Objective, name: str, parent: str) -> None:
    """Run one trial outside the workspace; store a failure and its reason instead of raising."""
    import optuna

    overrides = trial.user_attrs["overrides"]
    complete = (optuna.trial.TrialState.COMPLETE,)
    same = [t for t in study.get_trials(states=complete) if t.user_attrs["overrides"] == overrides]
    if same:
        value, reason = same[0].value, f"as trial {same[0].number}"
    else:
        value, reason = _measure(name, overrides, objective, parent)
    shown = " ".join(f"{key}={each}" for key, each in overrides.items())
    if value is None:
        study.set_user_attr(f"failure of trial {trial.number}", reason)
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        log.warning("trial %d  %s  failed: %s", trial.number, shown, reason)
    else:
        study.tell(trial.number, value)
        log.info("trial %d  %s  %s %.5g  %s", trial.number, shown, objective.key, value, reason)


def _measure(
    name: str, overrides: dict[str, Any], objective: Objective, parent: str
) -> tuple[float | None, str]:
    """Return the metric of experiment `name` and a note, running it if needed; or None and the reason."""
    if (value := _value(name, objective)) is not None:  # saved before the search was killed
        return value, "was done"
    output = project_root() / paths.SCRATCH / f"search/{name}.log"
    output.parent.mkdir(parents=True, exist_ok=True)
    sets = [part for key, each in overrides.items() for part in ("-S", f"{key}={_yaml(each)}")]
    here, path = Path(sys.executable).absolute().parent, os.environ.get("PATH", "")
    with output.open("w") as file:
        process = subprocess.Popen(
            ["dvc", "exp", "run", "--temp", "--name", name, *sets, objective.stage],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PATH": f"{here}{os.pathsep}{path}", PARENT_RUN: parent},
            start_new_session=True,  # Ctrl-C must reach it only once, from here
        )
        try:
            code = process.wait()
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGINT)
            process.wait()
            raise
    value = _value(name, objective) if code == 0 else None
    if value is not None:
        return value, ""
    errors = re.findall(r"^(?:error: |\w*Error: |ERROR: ).*", output.read_text(), re.MULTILINE)
    errors = [line for line in errors if "failed to reproduce" not in line] or errors
    reason = errors[-1] if errors else f"dvc exited {code} or {objective.key} is no number"
    return None, f"{reason}; all of it in {output.relative_to(project_root())}"


def _value(name: str, objective: Objective) -> float | None:
    """Return the metric of experiment `name`; None if it does not exist or has no finite number."""
    refs = git(Path(), "for-each-ref", "--format=%(refname)", "refs/exps/").splitlines()
    found = [ref for ref in refs if ref.endswith(f"/{name}")]
    text = git(Path(), "show", f"{found[0]}:{objective.file}") if found else ""
    value = flatten(whole(json.loads(text or "{}"))).get(objective.key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _best(study: Any) -> Any:
    import optuna

    complete = study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    sign = -1 if study.direction.name == "MAXIMIZE" else 1
    return min(complete, key=lambda trial: sign * trial.value, default=None)


def describe(study: Any, objective: Objective) -> str:
    """Format the best trial, the command that reproduces it, and the number of trials."""
    states = [trial.state.name for trial in study.trials if trial.state.is_finished()]
    failed = f", {states.count('FAIL')} failed" if "FAIL" in states else ""
    best = _best(study)
    if best is None:
        return f"{study.study_name}: {len(states)} trials{failed}, none with a value"
    overrides = best.user_attrs["overrides"]
    sets = [f"-S {shlex.quote(f'{key}={_yaml(each)}')}" for key, each in overrides.items()]
    return "\n".join(
        [
            f"{study.study_name}: {len(states)} trials{failed}; the best is trial {best.number}:",
            f"{objective.key} {best.value:.6g} with",
            *(f"  {key}: {each}" for key, each in overrides.items()),
            "reproduce it, with all later stages:",
            f"  dvc exp run {' '.join(sets)}",
        ]
    )
