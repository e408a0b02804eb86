"""Kill the pipeline at many moments, go on with `dvc repro`, and compare with an undisturbed run.

    python -m tools.kills --moments 100 --out benchmarks/kills.json

The last commit is cloned, with short parameters. The moments are spread over all stages and the gaps between
them; the signals are SIGKILL, SIGTERM and SIGINT, to DVC and the stage at once, as a machine's end and Ctrl-C
are. After a third of the moments, the run that goes on is killed as well. Each must end with the undisturbed
adapter and reports, one run in MLflow, one version, each point of a metric once, and nothing left behind.
"""

import argparse
import csv
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from fintune.reports import whole

ROOT = Path(__file__).parents[1]
STAGES = ("fetch", "split", "format", "train", "evaluate", "merge_export")
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT")
RUNNING, LOCK = ".dvc/tmp/rwlock", "dvc.lock"  # DVC writes both in place
POLL, LIMIT = 0.005, 900.0  # seconds
SHORT = {
    "format.max_tokens": 192,
    "train.lora.dropout": 0.1,  # the result depends on the random state
    "train.max_steps": 11,
    "train.rows_per_step": 4,
    "train.validate_every_steps": 4,
    "train.checkpoint_every_steps": 3,
    "evaluate.max_rows": 8,
    "evaluate.bootstrap_samples": 100,
    "evaluate.samples_per_prompt": 2,
    "generation.decoding": {
        **{"temperature": 0.7, "top_p": 0.95, "min_p": 0.05, "top_k": 0},
        "repetition_penalty": 1.0,
    },
    "generation.max_new_tokens": 8,
    "merge_export.check_rows": 8,
    "merge_export.register": "always",  # so short a training does not pass the gate
}
# what two undisturbed runs differ in, by parts of a key
VARIES = ("seconds", "per_second", "memory", "mfu", "run", "version", "path", "time")


@dataclass(frozen=True)
class Moment:
    """When to kill: a share of a stage's usual time, or as soon as a file appears."""

    stage: str
    signal: str
    share: float | None = None
    appears: str | None = None


def start(project: Path, log: Path, *target: str) -> subprocess.Popen[bytes]:
    """Start `dvc repro` in a process group of its own, with MLflow's file in the project."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "DVC_"))}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    return subprocess.Popen(
        ["dvc", "repro", *target],
        cwd=project,
        env=environment,
        stdout=log.open("ab"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=_heed_ctrl_c,
    )


def _heed_ctrl_c() -> None:
    """Undo that a shell's background jobs ignore SIGINT, which the processes that they start inherit."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def kill_at(project: Path, moment: Moment, usual: dict[str, float], *target: str) -> bool:
    """Run `dvc repro` and kill it and its stage at a moment; return whether it came to that."""
    log = project.with_name(f"{project.name}.log")
    log.write_bytes(b"")
    process = start(project, log, *target)
    begun: float | None = None
    end = time.monotonic() + LIMIT
    while process.poll() is None:
        assert time.monotonic() < end, f"hangs: {log.read_text()}"
        if begun is None and f"Running stage '{moment.stage}'" in log.read_text(errors="replace"):
            begun = time.monotonic()
        if begun is not None and _has_come(project, moment, usual, time.monotonic() - begun):
            os.killpg(process.pid, getattr(signal, moment.signal))
            process.wait(LIMIT)
            _wait_for_group(process.pid)
            return True
        time.sleep(POLL)
    return False


def _has_come(project: Path, moment: Moment, usual: dict[str, float], passed: float) -> bool:
    if moment.appears:
        return any(project.glob(moment.appears))
    return passed >= (moment.share or 0.0) * usual[moment.stage]


def _wait_for_group(group: int) -> None:
    """Wait for the stage, which may outlive DVC for the time that it takes to end."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(POLL)
    os.killpg(group, signal.SIGKILL)


def go_on(project: Path, *target: str) -> tuple[dict[str, float], str]:
    """Run `dvc repro` to the end; return each stage's seconds, and what was wrong with it."""
    log = project.with_name(f"{project.name}.log")
    log.write_bytes(b"")
    process = start(project, log, *target)
    begun: dict[str, float] = {}
    while process.poll() is None:
        text = log.read_text(errors="replace")
        for stage in STAGES:
            if f"Running stage '{stage}'" in text:
                begun.setdefault(stage, time.monotonic())
        time.sleep(POLL)
    text = log.read_text(errors="replace")
    times = [*begun.values(), time.monotonic()]
    seconds = {stage: times[i + 1] - times[i] for i, stage in enumerate(begun)}
    return seconds, text[-2000:] if process.returncode or "Traceback" in text else ""


def results(project: Path) -> dict[str, Any]:
    """Read what must be as it is without a kill."""
    found: dict[str, Any] = {}
    for file in sorted((project / "models/adapter").iterdir()):
        found[f"adapter/{file.name}"] = file.read_bytes().hex()
    for file in sorted((project / "reports").glob("*.json")):
        for key, value in _flat(whole(json.loads(file.read_text())), file.name):
            if not any(part in key for part in VARIES):
                found[key] = value
    for file in sorted((project / "reports").glob("*.csv")):
        found[file.name] = file.read_text()
    return found


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}")
    else:
        yield name, value


def faults(project: Path, expected: dict[str, Any]) -> list[str]:
    """Return what is wrong with a project after a kill and `dvc repro`."""
    found = results(project)
    wrong = [f"differs: {k}" for k in {*found, *expected} if found.get(k) != expected.get(k)]
    with closing(sqlite3.connect(project / "mlflow.db")) as database:

        def rows(query: str) -> list[Any]:
            return database.execute(query).fetchall()

        states = [status for (status,) in rows("select status from runs")]
        if states != ["FINISHED"]:
            wrong.append(f"runs: {states}")
        if rows("select count(*) from model_versions") != [(1,)]:
            wrong.append("not one version")
        twice = rows(
            "select key, step, count(*) from metrics where key not like 'system/%' "
            "group by run_uuid, key, step having count(*) > 1"
        )
        wrong += [f"logged twice: {key} at step {step}" for key, step, _ in twice]
        logged = rows("select step, value from metrics where key = 'curve/loss' order by step")
    with (project / "reports/train_curve.csv").open() as file:
        curve = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]
    if [step for step, _ in logged] != [step for step, _ in curve]:
        wrong.append(f"curve/loss: steps {[step for step, _ in logged]}")
    left = [
        *project.glob("*/.*partial*"),
        *project.glob("*/*/.*partial*"),
        *project.glob(".*.partial*"),
    ]
    left += [path for path in (project / ".checkpoints").iterdir() if path.is_dir()]
    return wrong + [f"left behind: {path.relative_to(project)}" for path in left]


def mend(project: Path, fault: str) -> str | None:
    """Take the way out of docs/faults.md where DVC was killed in writing a file of its own; return which."""
    if RUNNING in fault:
        (project / RUNNING).unlink()
        return RUNNING
    if f"'./{LOCK}' validation failed" in fault or f"'./{LOCK}' is invalid" in fault:
        subprocess.run(["git", "checkout", "--quiet", "--", LOCK], cwd=project, check=True)
        return LOCK
    return None


def make_project(folder: Path, changes: dict[str, Any]) -> None:
    """Clone the last commit, with other parameters."""
    clone = ["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(folder)]
    subprocess.run(clone, check=True)
    yaml = YAML()
    params = yaml.load((folder / "params.yaml").read_text())
    for key, value in changes.items():
        *sections, last = key.split(".")
        section = params
        for name in sections:
            section = section[name]
        section[last] = value
    with (folder / "params.yaml").open("w") as file:
        yaml.dump(params, file)


def moments(count: int, rng: random.Random) -> list[Moment]:
    """Spread moments over the stages; the last of each stage's lie in the gap after it."""
    return [
        Moment(STAGES[i % len(STAGES)], SIGNALS[i // len(STAGES) % 3], share=rng.uniform(0, 1.05))
        for i in range(count)
    ]


def main() -> None:
    """Kill, go on, compare; print and write a line a moment."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    rng = random.Random(given.seed)
    told: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        prepared = {}
        for schedule in ("constant", "cosine"):
            folder = Path(scratch) / schedule
            make_project(folder, SHORT | {"train.schedule": schedule})
            prepared[schedule] = prepare(folder)
        for i, moment in enumerate(moments(given.moments, rng)):
            schedule = ("constant", "cosine")[i % 2]
            before, usual, expected = prepared[schedule]
            project = Path(scratch) / "killed"
            shutil.rmtree(project, ignore_errors=True)
            shutil.copytree(before[moment.stage], project, symlinks=True)
            killed = kill_at(project, moment, usual)
            again = None
            if i % 3 == 0:
                later = STAGES[STAGES.index(moment.stage) :]
                again = Moment(rng.choice(later), rng.choice(SIGNALS), share=rng.uniform(0, 1.05))
                kill_at(project, again, usual)
            _, fault = go_on(project)
            dvc_s_own = mend(project, fault)
            if dvc_s_own:
                _, fault = go_on(project)
            wrong = [fault] if fault else faults(project, expected)
            told.append(
                {
                    "schedule": schedule,
                    "moment": asdict(moment),
                    "again": again and asdict(again),
                    "killed": killed,
                    "cut off by DVC": dvc_s_own,
                    "wrong": wrong,
                }
            )
            print(
                f"{i + 1:3}  {moment.stage} {moment.share:.2f} {moment.signal}  {wrong or 'right'}"
            )
            right = sum(not each["wrong"] for each in told)
            report = {"moments": len(told), "right": right, "each": told}
            given.out.write_text(json.dumps(report, indent=1) + "\n")


def prepare(folder: Path) -> tuple[dict[str, Path], dict[str, float], dict[str, Any]]:
    """Run the pipeline stage by stage, and keep a copy before each.

    Returns:
        The copies, the seconds of each stage, and the results.
    """
    before, usual = {}, {}
    for stage in STAGES:
        before[stage] = folder.with_name(f"{folder.name}-before-{stage}")
        shutil.copytree(folder, before[stage], symlinks=True)
        seconds, fault = go_on(folder, stage)
        assert not fault, fault
        usual |= seconds
    return before, usual, results(folder)


if __name__ == "__main__":
    main()
