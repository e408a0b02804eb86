"""Measure the overhead of DVC and MLflow on a copy of the project with a short training.

python benchmarks/overhead.py --out benchmarks/overhead.json

Each figure is the median of `--repeats`, in seconds; MLflow's are milliseconds per logged step.
"""

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("fetch", "split", "format", "train", "evaluate", "merge_export")
SHORT = {"train.max_steps": 2, "evaluate.max_rows": 4, "merge_export.check_rows": 4}
LOG_STEPS = """
import sys, time
from pathlib import Path
from fintune.tracking.client import connect
from fintune.tracking.points import LiveCurve
client = connect(Path.cwd())
run = client.create_run(client.get_experiment_by_name("financial-qa").experiment_id).info.run_id
curve = LiveCurve(client, run)
values = {"loss": 1.0, "learning_rate": 1e-3}
curve.add(0, values)
start = time.perf_counter()
for step in range(1, 101):
    curve.add(step, values)
print((time.perf_counter() - start) / 100)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        project = copy_project(Path(folder) / "project")
        report = measure(project, given.repeats)
    given.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def copy_project(folder: Path) -> Path:
    """Clone the last commit and run a short pipeline in the clone."""
    run(ROOT, "git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(folder))
    changes = [part for key, value in SHORT.items() for part in ("-S", f"{key}={value}")]
    run(folder, "git", "config", "user.name", "benchmark")
    run(folder, "git", "config", "user.email", "benchmark@example.org")
    run(folder, "dvc", "exp", "run", *changes)
    return folder


def measure(project: Path, repeats: int) -> dict[str, Any]:
    """Measure every figure of the report."""

    def seconds(*command: str) -> float:
        return median(lambda: run(project, *command), repeats)

    python = "python"
    direct = {name: seconds(python, "-m", f"stages.{name}") for name in STAGES[:3]}
    through = {
        name: seconds("dvc", "repro", "--force", "--single-item", name) for name in STAGES[:3]
    }
    report: dict[str, Any] = {
        "cores": os.cpu_count(),
        "python": seconds(python, "-c", "pass"),
        "repro_that_runs_nothing": seconds("dvc", "repro"),
        "imports_of_a_stage": {
            name: seconds(python, "-c", f"import stages.{name}") for name in STAGES
        },
        "first_tokens_of_format": seconds(python, "-c", FIRST_TOKENS),
        "stage_alone": direct,
        "dvc_adds": {name: through[name] - direct[name] for name in direct},
        "mlflow_ms_a_step": {"sqlite": 1000 * float(run(project, python, "-c", LOG_STEPS))},
    }
    report["mlflow_ms_a_step"]["server"] = 1000 * with_server(project)
    return rounded(report)


FIRST_TOKENS = """
from stages.format import leave_torch_out, load_tokenizer, read_params
leave_torch_out()
load_tokenizer(read_params().base, "new")("What is a bond?")
"""


def with_server(project: Path) -> float:
    """Measure the seconds per step with an MLflow server on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(Path(sys.executable).absolute().parent / "mlflow"),
        "server",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    command += ["--backend-store-uri", f"sqlite:///{project}/server.db"]
    server = subprocess.Popen(
        command, cwd=project, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{address}/health", server)
        return float(run(project, "python", "-c", LOG_STEPS, MLFLOW_TRACKING_URI=address))
    finally:
        server.terminate()
        server.wait()


def wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while server.poll() is None and time.monotonic() < deadline:
        try:
            urlopen(url, timeout=1).close()
            return
        except OSError:
            time.sleep(0.2)
    raise SystemExit(f"no server at {url}")


def median(action: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def run(folder: Path, *command: str, **extra: str) -> str:
    """Run a command of this environment and return its output."""
    here = Path(sys.executable).absolute().parent
    path = f"{here}{os.pathsep}{os.environ['PATH']}"
    tracking = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    program = shutil.which(command[0], path=path) or command[0]
    done = subprocess.run(
        [program, *command[1:]],
        cwd=folder,
        env={**tracking, "PATH": path, **extra},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    return done.stdout


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return round(value, 3) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
