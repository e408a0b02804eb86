"""Time `dvc repro` of a recipe stage by stage, on a base of random weights.

python benchmarks/random_base.py --tokenizer assets/demo-base --out base7b
python benchmarks/whole_run.py --base base7b --rows fiqa_qa.parquet --out benchmarks/whole_run.json

Such a base ends no answer, so each has `--new-tokens` tokens, and it passes no gate, so the model is
registered without one. Python's bytecode is there before the clock starts, as an installation leaves it.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fintune.hardware import hardware

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("assets", "fintune", "recipes", "stages", ".dvc/config", ".dvc/plots", "dvc.yaml")
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "mlflow", "dvc")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True, help="folder of random_base.py")
    parser.add_argument("--rows", type=Path, required=True, help="FiQA's rows as a parquet file")
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes/mistral-7b.yaml")
    parser.add_argument("--new-tokens", type=int, default=384, help="tokens of each answer")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder) / "project"
        copy_project(project, given)
        time_stages(project, environment_of(Path(folder)), given.out)


def copy_project(project: Path, given: argparse.Namespace) -> None:
    """Copy what a run needs, without git, and set the recipe for the base."""
    project.mkdir()
    for part in PARTS:
        source, target = ROOT / part, project / part
        if source.is_dir():
            shutil.copytree(source, target)
        elif source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    config = project / ".dvc/config"
    config.write_text(config.read_text().replace("[core]", "[core]\n    no_scm = true"))
    for name in ("data/source", "models", "reports"):
        (project / name).mkdir(parents=True, exist_ok=True)
    shutil.copy2(given.rows, project / "data/source/rows.parquet")
    yaml = YAML()
    params = yaml.load(given.recipe)
    params["fetch"] |= {"source": "data/source/rows.parquet", "revision": None}
    params["base"] = {"model": str(given.base.resolve()), "revision": None}
    params["generation"]["max_new_tokens"] = given.new_tokens
    params["merge_export"]["register"] = "always"
    yaml.dump(params, project / "params.yaml")


def environment_of(folder: Path) -> dict[str, str]:
    """Make `python` this interpreter, and let it keep its bytecode."""
    programs = folder / "bin"
    programs.mkdir()
    script = programs / "python"  # a link would leave a virtual environment
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
    script.chmod(0o755)
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    kept |= {"PATH": f"{programs}{os.pathsep}{kept['PATH']}", "PYTHONUNBUFFERED": "1"}
    if kept.pop("PYTHONDONTWRITEBYTECODE", None):  # then the packages may have no bytecode either
        kept["PYTHONPYCACHEPREFIX"] = str(folder / "bytecode")
        command = [sys.executable, "-m", "compileall", "-qq", "-j", "0"]
        subprocess.run([*command, *filter(os.path.isdir, sys.path[1:])], env=kept, check=False)
    return kept


def time_stages(project: Path, environment: dict[str, str], out: Path) -> None:
    """Run the pipeline; write the report at each line, so that a broken run leaves its part."""
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": f"python {' '.join(sys.argv)}",
        "device": hardware(),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in PACKAGES},
    }
    begun: list[tuple[str, float]] = []
    lines: list[str] = []
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro"],
        cwd=project,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout
    for line in process.stdout:
        now = time.perf_counter() - start
        lines.append(f"{now:.1f} {line.strip()}"[:160])
        print(lines[-1], flush=True)
        if stage := re.match(r"Running stage '(\w+)'", line):
            begun.append((stage[1], now))
        ends = [at for _, at in begun[1:]] + [now]
        report["seconds"] = round(now, 1)
        report["stage_seconds"] = {
            name: round(end - at, 1) for (name, at), end in zip(begun, ends, strict=False)
        }
        out.write_text(json.dumps(report | {"lines": lines}, indent=2) + "\n", encoding="utf-8")
    if process.wait():
        raise SystemExit(f"dvc repro ended with {process.returncode}")
    report["seconds"] = round(time.perf_counter() - start, 1)
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
