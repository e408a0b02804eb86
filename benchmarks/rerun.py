"""Run benchmarks again by the commands that their results name, and print old beside new.

    python benchmarks/rerun.py --into FOLDER                                        # all of them
    python benchmarks/rerun.py --into FOLDER benchmarks/training_speed.json         # some

New results are written to FOLDER, under the old ones' names. The commands run in the current folder, which
needs what they name: base7b, a base of random_base.py; FiQA's rows as fiqa_qa.parquet. Numbers on other
hardware tell of the hardware; both machines are printed.
"""

import argparse
import json
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SKIPPED = ("date", "command", "versions", "losses", "note")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="*", type=Path, help="default: all beside this program")
    parser.add_argument("--into", type=Path, required=True, help="folder for the new results")
    given = parser.parse_args()
    given.into.mkdir(parents=True, exist_ok=True)
    failed = 0
    for path in given.results or sorted(HERE.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        for name, old in reports(found):
            out = given.into / f"{path.stem}{'-' * bool(name)}{name}.json"
            print(f"\n{out.stem}: {old.get('command', 'names no command')}", flush=True)
            if "command" not in old:
                continue
            if not rerun(old["command"], out):
                failed += 1
                continue
            new = json.loads(out.read_text(encoding="utf-8"))
            for each in ("device", "hardware", "machine"):
                if each in old:
                    print(f"  {each}: {old[each]} | {new.get(each)}")
            for line in compared(old, new):
                print(line)
    raise SystemExit(f"{failed} commands failed" if failed else 0)


def reports(found: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each report of a result file, which is one or has several by name."""
    if "command" in found or not all(isinstance(each, dict) for each in found.values()):
        yield "", found
    else:
        yield from found.items()


def rerun(command: str, out: Path) -> bool:
    """Run a command with another `--out`; return whether it wrote that."""
    words = shlex.split(command)
    if "&" in words or "--out" not in words:
        print("  several commands, which wrote files of their own: run them by hand")
        return False
    words[words.index("--out") + 1] = str(out)
    out.unlink(missing_ok=True)
    ended = subprocess.run(words, capture_output=True, text=True)
    if not out.is_file():
        print("  " + (ended.stderr.strip().splitlines() or ["failed without a word"])[-1][:300])
    return out.is_file()


def compared(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each number of the old report: it, the new one, and their ratio."""
    now = dict(numbers(new))
    for key, before in numbers(old):
        after = now.get(key)
        if after is None:
            yield f"  {key:<60} {before:>12,.4g} {'missing':>12}"
        else:
            ratio = f"{after / before:8.3f}" if before else ""
            yield f"  {key:<60} {before:>12,.4g} {after:>12,.4g} {ratio}"


def numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of a report with their keys; items of a list by their name, if they have one."""
    if isinstance(value, dict):
        for name, item in value.items():
            if name not in SKIPPED:
                yield from numbers(item, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            name = item.get("name", i) if isinstance(item, dict) else i
            yield from numbers(item, f"{key}.{name}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, float(value)


if __name__ == "__main__":
    main()
