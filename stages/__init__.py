"""The pipeline's stages, one script each, run as `python -m stages.NAME` from the project's root."""

import ast
import sys
from pathlib import Path

from fintune.stage import prepare


def take_no_arguments() -> None:
    """End a stage that was given arguments, before it imports or starts anything."""
    called = (each for each in (sys.argv[0], *sys.orig_argv) if each.startswith("stages."))
    name = next(called, "stages.").partition(".")[2]
    script = Path(__file__).with_name(f"{name}.py")
    if len(sys.argv) < 2 or not script.is_file():
        return
    usage = f"usage: python -m stages.{name}, without arguments; `dvc repro` runs it in its place"
    unknown = [each for each in sys.argv[1:] if each not in ("-h", "--help")]
    if unknown:
        wrong = (
            f"error: {unknown[0]}: a stage takes no arguments; its parameters are in params.yaml"
        )
        print(f"{usage}\n{wrong}", file=sys.stderr)
        sys.exit(2)
    print(f"{usage}\n\n{ast.get_docstring(ast.parse(script.read_text(encoding='utf-8')))}")
    sys.exit(0)


take_no_arguments()
prepare()
