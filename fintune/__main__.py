"""Run a command: `python -m fintune NAME ...`; without a name, list the commands."""

import argparse
import ast
import difflib
import importlib
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fintune.stage import prepare, run

PROGRAM = "python -m fintune"
FOLDER = Path(__file__).parent / "commands"  # one file per command
COMMANDS = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))


def summary(name: str) -> str:
    """Return the first line of a command's docstring, without importing the command."""
    source = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").splitlines()[0]


def build_parser(name: str) -> argparse.ArgumentParser:
    """Build the parser of one command, importing only that command."""
    command = importlib.import_module(f"fintune.commands.{name}")
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} {name}",
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    parser.set_defaults(main=command.main)
    return parser


def main(arguments: list[str]) -> None:
    """Run the command that the arguments name."""
    prepare()
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        lines = [f"  {command:<11} {summary(command)}" for command in COMMANDS]
        print("\n".join([f"usage: {PROGRAM} COMMAND [--help] ...", "", *lines]))
    elif name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        sys.exit(f"error: {name}: no such command; {hint}")
    else:
        run(lambda: _run(name, arguments[1:]), interrupted="interrupted")


def _run(name: str, arguments: list[str]) -> None:
    given = build_parser(name).parse_args(arguments)
    given.main(given)


@contextmanager
def while_read() -> Iterator[None]:
    """End without a word when the program that reads the output has ended, as `head` does."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        sys.exit(128 + signal.SIGPIPE)


if __name__ == "__main__":
    with while_read():
        main(sys.argv[1:])
