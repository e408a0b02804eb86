"""The documentation: each command parses, each link leads somewhere, README is short."""

import argparse
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from ruamel.yaml import YAML

from fintune.__main__ import COMMANDS, build_parser
from fintune.commands.search import read_dimension, read_objective
from fintune.params import flatten
from support.project import ROOT

PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob(".github/*.md")],
    key=lambda path: path.as_posix(),
)
PARAMS = flatten(YAML(typ="safe").load((ROOT / "params.yaml").read_text()))
HELD = [ROOT / "docs/faults.md", ROOT / "docs/security.md"]  # each row names its test
TARGETS = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
OURS = ("python", ".venv/bin/python", "dvc", "mlflow", "make")


class Command(NamedTuple):
    page: str
    words: list[str]


def code_lines(text: str) -> Iterator[str]:
    """Yield the lines of indented and fenced code, with continued lines joined."""
    fenced = False
    for line in re.sub(r" *\\\n\s*", " ", text).splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line.strip()


def commands() -> Iterator[Command]:
    """Yield the commands of all pages that a parser here can check, without comments and variables."""
    for page in PAGES:
        for line in code_lines(page.read_text()):
            for part in re.split(r" && | \| ", re.sub(r"(^|\s)#.*", "", line)):
                plain = re.sub(r"^([A-Z_]+=\S+ )+", "", part)
                if plain.split(" ")[0] in OURS:
                    yield Command(page.name, shlex.split(plain))


COMMANDS_SHOWN = list(commands())


class Parsed(Exception):
    """A program's parser has accepted its arguments."""


def parse_program(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a program up to its own `parse_args`."""
    plain = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser) -> None:
        plain(parser)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(Parsed):
        if words[0].endswith(".py"):
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        else:
            runpy.run_module(words[0], run_name="__main__")


def parse_ours(words: list[str]) -> None:
    given = build_parser(words[0]).parse_args(words[1:])
    if words[0] == "search":
        assert all(read_dimension(text, list(PARAMS)) for text in given.space)
        assert read_objective(given.metric, given.maximize)


def parse_dvc(words: list[str]) -> None:
    from dvc.cli import parse_args

    given = parse_args(words)
    assert all(change.split("=")[0] in PARAMS for change in getattr(given, "set_param", None) or [])
    if words[0] == "repro":
        stages = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]
        assert set(given.targets) <= set(stages)


def parse_mlflow(words: list[str]) -> None:
    from click import Context
    from mlflow.cli import cli

    command: Any = cli
    while hasattr(command, "get_command") and words:
        command, name, words = command.get_command(Context(cli), words[0]), words[0], words[1:]
    command.make_context(name, list(words))


@pytest.mark.parametrize(
    "command", COMMANDS_SHOWN, ids=lambda each: f"{each.page}: {' '.join(each.words)}"[:75]
)
def test_commands_parse(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    program, *words = command.words
    if program == "make":
        assert {word for word in words if "=" not in word} <= TARGETS
    elif program == "dvc":
        parse_dvc(words)
    elif program == "mlflow":
        parse_mlflow(words)
    elif words[:2] == ["-m", "fintune"]:
        if words[2:] and words[2] != "NAME":
            parse_ours(words[2:])
    elif words[:1] == ["-m"] and words[1].startswith("tools"):
        parse_program(words[1:], monkeypatch)
    elif words[0].startswith("benchmarks/"):
        assert (ROOT / words[0]).is_file()
        if len(words) > 1:
            parse_program(words, monkeypatch)
    else:
        assert (
            words[:2] in (["-m", "venv"], ["-m", "pytest"], ["-m", "dvc"])
            or words[1][:7] == "stages."
        )


def test_the_commands_are_found() -> None:
    """A parser of pages that finds nothing would pass."""
    shown = {each.words[2:4][-1] for each in COMMANDS_SHOWN if each.words[1:3] == ["-m", "fintune"]}
    assert set(COMMANDS) <= shown
    assert len(COMMANDS_SHOWN) > 40


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in slugs, target


@pytest.mark.parametrize("page", HELD, ids=lambda page: page.stem)
def test_each_fault_names_its_test(page: Path) -> None:
    text = page.read_text()
    rows = re.findall(r"^\|.*\| `(tests/[\w/.]+)::(\w+)` \|$", text, re.MULTILINE)
    table = [line for line in text.splitlines() if line.startswith("| ")]
    heads = [line for line in table if line.startswith(("| fault", "| from where"))]
    assert len(rows) == len(table) - len(heads) > 8
    for file, name in rows:
        assert f"def {name}(" in (ROOT / file).read_text(), name


def test_readme_is_read_to_its_end() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_old_spellings_are_gone() -> None:
    for page in PAGES:
        if page.name != "CHANGELOG.md":
            assert not re.search(r"-m fintune\.\w+", page.read_text()), page.name
