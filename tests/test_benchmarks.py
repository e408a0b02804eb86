"""The program that runs benchmarks again."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAM = """
import json, sys
json.dump({"device": "new", "settings": [{"name": "fast", "speed": 30.0}]}, open(sys.argv[2], "w"))
"""


def rerun(folder: Path, report: object) -> subprocess.CompletedProcess[str]:
    (folder / "old.json").write_text(json.dumps(report))
    (folder / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(ROOT / "benchmarks/rerun.py"), "--into", "new", "old.json"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_old_and_new_numbers_are_printed_side_by_side(tmp_path: Path) -> None:
    settings = [{"name": "slow", "speed": 5}, {"name": "fast", "speed": 20.0}]
    command = f"{sys.executable} program.py --out old.json"
    old = {"command": command, "device": "old", "settings": settings, "date": 1}
    ended = rerun(tmp_path, {"a": old, "b": old})
    assert ended.returncode == 0, ended.stderr
    lines = [line.split() for line in ended.stdout.splitlines()]
    assert ["settings.slow.speed", "5", "missing"] in lines
    assert ["settings.fast.speed", "20", "30", "1.500"] in lines
    assert ["device:", "old", "|", "new"] in lines
    assert json.loads((tmp_path / "old.json").read_text())["a"] == old
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"old-a.json", "old-b.json"}


def test_a_benchmark_that_fails_is_named_and_fails_the_rest_not(tmp_path: Path) -> None:
    wrong = {"command": f"{sys.executable} missing.py --out old.json", "speed": 1}
    right = {"command": f"{sys.executable} program.py --out old.json", "speed": 1}
    ended = rerun(tmp_path, {"a": wrong, "b": right})
    assert ended.returncode == 1 and "1 commands failed" in ended.stderr
    assert "missing.py" in ended.stdout
    assert (tmp_path / "new/old-b.json").is_file()
