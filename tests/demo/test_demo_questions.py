"""The demo questions: every checkable result follows from its passage, and no split knows another.

The results are worked out again from the texts alone: figures are read from the passage, and a
question's measures, years and limit from its words. The generator's own fields are not used.
"""

from __future__ import annotations

import json
import random
import re
import sys
import tomllib
from collections import Counter, defaultdict
from fractions import Fraction
from functools import cache
from pathlib import Path

import pytest

from fintune.data.questions import normalize_question
from tools import demo_questions
from tools.demo_questions import INSTRUCTIONS, KINDS, USUAL_INSTRUCTION, WORDINGS
from tools.made_reports import MEASURES

ROOT = Path(__file__).parents[2]
FILE = ROOT / "assets" / "demo-questions.jsonl"
CORE = ROOT / "tools" / "demo_questions_core.jsonl"

COMPANY = re.compile(rf"\b[A-Z][a-z]+ (?:{'|'.join(KINDS.split())})\b")
MEASURE = re.compile("|".join(sorted(MEASURES, key=len, reverse=True)))
FIGURE = re.compile(r"\$\d+(?:\.\d)? million|\d+(?:\.\d)?%|\b\d{2,3}\b")  # a year has four digits
YEAR = re.compile(r"\b(?:19|20)\d\d\b")
CHECKED = ("read_off", "comparison", "yes_no", "arithmetic")

Row = dict[str, str]
Facts = dict[tuple[str, str], str]  # the figure of a measure in a year


@cache
def rows() -> list[Row]:
    """Read the rows of the shipped file."""
    return [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]


def made(*kinds: str) -> list[Row]:
    """Select the made rows, or those of some kinds."""
    return [row for row in rows() if row["kind"] in kinds or (not kinds and row["kind"] != "free")]


def parts_of(row: Row) -> tuple[str, str]:
    """Separate a made row's passage from its question."""
    passage, _, question = row["input"].rpartition("\n")
    return passage, question


def facts_of(passage: str) -> Facts:
    """Read a passage's figures: a table of years, sentences about years, or a year's list."""
    lines = passage.split("\n")
    if len(lines) > 1:
        _, *names = lines[1].split(" | ")
        cells = (line.split(" | ") for line in lines[2:])
        return {
            (name, year): f"${value} million"
            for year, *values in cells
            for name, value in zip(names, values, strict=True)
        }
    facts: Facts = {}
    for name, figures in re.findall(
        rf"The ({MEASURE.pattern}) was (\S+ million in \d.*?)\.(?: |$)", passage
    ):
        facts |= {(name, year): f for f, year in re.findall(r"(\$\S+ million) in (\d+)", figures)}
    if not facts:
        (year,) = YEAR.findall(passage)
        stated = re.findall(
            rf"({MEASURE.pattern})(?: of | at | was |: )({FIGURE.pattern})", passage
        )
        facts = {(name, year): figure for name, figure in stated}
    return facts


def amount(figure: str) -> Fraction:
    """Parse a figure."""
    return Fraction(figure.strip("$%").removesuffix(" million"))


def dollars(value: Fraction) -> str:
    """Write millions of dollars; a tenth only where there is one."""
    assert value > 0 and (value * 10).denominator == 1
    return f"${float(value):g} million"


def work_out(row: Row) -> tuple[str, list[str]]:
    """Work out a row's result, and the figures that its answer has to state, in order."""
    passage, question = parts_of(row)
    question = COMPANY.sub("", question)
    facts = facts_of(passage)
    names, years = MEASURE.findall(question), YEAR.findall(question)
    limits = FIGURE.findall(question)
    years_known = sorted({year for _, year in facts})
    if row["kind"] == "read_off":
        ((name,), (year,)) = names, years or years_known
        return facts[name, year], [facts[name, year]]
    if row["kind"] == "comparison":
        places = [(name, year) for name in names for year in years or years_known]
        assert len(places) == 2
        least = re.search(r"\b(lower|smaller|less)\b", question)
        assert least or re.search(r"\b(higher|larger|greater|bigger|more)\b", question)
        best = (min if least else max)(places, key=lambda place: amount(facts[place]))
        assert amount(facts[places[0]]) != amount(facts[places[1]])
        return best[1 if years else 0], [facts[place] for place in places]
    if row["kind"] == "arithmetic":
        first, second = (facts[name, years_known[0]] for name in names)
        adds = re.search(r"\b(sum|total|together|add)\b", question, re.IGNORECASE)
        sign = 1 if adds else -1
        assert adds or re.search(r"\b(than|difference|exceed|Subtract)\b", question)
        result = dollars(amount(first) + sign * amount(second))
        return result, [first, second, result]
    (name,) = names
    if limits:
        (limit,), figure = limits, facts[name, years_known[0]]
        under = re.search(r"\b(below|less than|under|lower than)\b", question)
        assert under or re.search(r"\b(exceed|above|more than|over)\b", question)
        difference = amount(figure) - amount(limit)
        assert difference != 0
        order = [limit, figure] if under else [figure, limit]
        return "yes" if (difference < 0) == bool(under) else "no", order
    before, after = (facts[name, year] for year in sorted(years))
    assert re.search(r"\b(rise|higher|increase|grown)\b", question)
    return "yes" if amount(after) > amount(before) else "no", [after, before]


@pytest.mark.parametrize("kind", CHECKED)
def test_every_result_follows_from_the_passage(kind: str) -> None:
    """The answer's other figures do, too."""
    for row in made(kind):
        result, figures = work_out(row)
        assert row["result"] == result, row
        assert FIGURE.findall(COMPANY.sub("", row["output"])) == figures, row


def test_every_answer_states_its_result() -> None:
    for row in made():
        result, output = re.escape(row["result"]), row["output"]
        if row["kind"] == "yes_no":
            assert output.endswith(f"is {'true' if result == 'yes' else 'false'}: {result}."), row
        else:
            assert re.search(rf"(?<![\w.$]){result}(?![\w%]|\.\d)", output), row
    assert all(row["result"] is None for row in rows() if row["kind"] == "free")


def test_a_label_is_one_that_the_question_offers_and_news_has_one_label() -> None:
    labels: defaultdict[str, set[str]] = defaultdict(set)
    for row in made("label"):
        passage, question = parts_of(row)
        assert re.search(rf"\b{row['result']}\b", question), row
        news = re.sub(r" because of .*", "", COMPANY.split(passage)[1])
        for piece in news.strip(" .").split(" and "):
            labels[piece].add(row["result"])
    assert len(labels) > 30
    assert all(len(each) == 1 for each in labels.values()), labels


def test_guessing_does_not_pay() -> None:
    """No result, no place in the question and no place in the passage is right most of the time."""
    for kind in ("yes_no", "label"):
        counts = Counter(row["result"] for row in made(kind))
        shares = {result: count / counts.total() for result, count in counts.items()}
        assert max(shares.values()) < (0.6 if kind == "yes_no" else 0.4), shares
    named, listed = [], []
    for row in made("comparison"):
        passage, question = parts_of(row)
        options = YEAR.findall(question) or MEASURE.findall(COMPANY.sub("", question))
        named.append(options.index(row["result"]) == 0)
        listed.append(row["result"] == min(options, key=passage.index))
    for each in (named, listed):
        assert 0.4 < sum(each) / len(each) < 0.6


# --- Between the splits


def by_split(rows: list[Row]) -> dict[str, list[Row]]:
    splits: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    for row in rows:
        splits[row["split"]].append(row)
    return splits


def test_no_company_and_no_passage_of_one_row_is_in_another() -> None:
    """So neither is a company's figure, in whichever split."""
    companies = Counter(
        name for row in made() for name in {*COMPANY.findall(row["input"] + row["output"])}
    )
    assert len(companies) == len(made()) and set(companies.values()) == {1}
    assert len({name.split()[0] for name in companies}) == len(companies)
    assert len({parts_of(row)[0] for row in made()}) == len(made())


def test_a_question_of_the_core_is_in_one_split() -> None:
    splits: defaultdict[str, set[str]] = defaultdict(set)
    for row in rows():
        splits[normalize_question(row["input"])].add(row["split"])
    assert all(len(each) == 1 for each in splits.values())


def wording(row: Row) -> str:
    """Return a question with its company, measures, figures and years left out."""
    text = COMPANY.sub("COMPANY", parts_of(row)[1])
    return YEAR.sub("YEAR", FIGURE.sub("FIGURE", MEASURE.sub("MEASURE", text)))


@pytest.mark.parametrize("kind", [*CHECKED, "label"])
def test_a_fifth_of_the_test_questions_have_wordings_that_no_other_split_has(kind: str) -> None:
    splits = by_split(made(kind))
    known = {wording(row) for name in ("train", "validation") for row in splits[name]}
    assert len(known) < 30  # all that differs between two questions of a wording is left out
    new = [row for row in splits["test"] if wording(row) not in known]
    assert len(new) >= 0.2 * len(splits["test"])
    assert len(new) <= 0.8 * len(splits["test"])  # the known wordings are tested, too


def test_every_split_has_every_kind() -> None:
    shares = {name: len(part) / len(rows()) for name, part in by_split(rows()).items()}
    assert 0.04 < shares["validation"] < 0.1 < shares["test"] < 0.2
    for name, part in by_split(rows()).items():
        kinds = Counter(row["kind"] for row in part)
        assert set(kinds) == {"free", "label", *CHECKED}
        assert min(kinds.values()) >= 10, name


# --- The file


def test_the_file_is_what_the_generator_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte, without leftover temporary files."""
    out = tmp_path / "again.jsonl"
    random.seed(7)  # the global state must not matter
    monkeypatch.setattr(sys, "argv", ["demo_questions", "--out", str(out)])
    demo_questions.main()
    assert out.read_bytes() == FILE.read_bytes(), (
        "run `python -m tools.demo_questions --out assets/demo-questions.jsonl`"
    )
    assert list(tmp_path.iterdir()) == [out]


def test_tasks_do_not_affect_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer rows of one task change no other row but its company."""
    written = demo_questions.TASKS[demo_questions.read_report]
    monkeypatch.setitem(demo_questions.TASKS, demo_questions.read_report, 16)
    fewer = [json.loads(line) for line in demo_questions.render().splitlines()]

    def texts(rows: list[Row]) -> set[str]:
        return {COMPANY.sub("COMPANY", row["input"] + row["output"]) for row in rows}

    assert texts(fewer) < texts(rows())
    assert len(fewer) == len(rows()) - written + 16


def test_every_answer_of_the_core_is_in_the_file() -> None:
    entries = [json.loads(line) for line in CORE.read_text(encoding="utf-8").splitlines()]
    pairs = Counter((row["input"], row["output"]) for row in rows() if row["kind"] == "free")
    assert pairs == Counter((e["question"], answer) for e in entries for answer in e["answers"])


def test_every_wording_is_used_and_the_reserved_ones_in_the_test_rows_alone() -> None:
    tasks = tomllib.loads(WORDINGS.read_text(encoding="utf-8"))
    assert set(tasks) == {task.__name__ for task in demo_questions.TASKS}
    for task in tasks.values():
        for column in ("questions", "reserved", "answers"):
            for text in task[column]:
                parts = map(re.escape, re.split(r"{\w+}", text))
                fitting = re.compile("[^?]+".join(parts))
                found = {
                    row["split"]
                    for row in made(task["kind"])
                    if fitting.fullmatch(row["output"] if column == "answers" else parts_of(row)[1])
                }
                assert found, text
                assert column != "reserved" or found == {"test"}, text


def test_texts_are_clean() -> None:
    """No stray spaces, no empty line, no special tokens of the prompt, no field left open."""
    for row in rows():
        assert list(row) == ["instruction", "input", "output", "result", "kind", "split"]
        expected = INSTRUCTIONS.get(row["kind"], USUAL_INSTRUCTION)
        assert row["instruction"] == expected
        for text in (row["instruction"], row["output"], *row["input"].split("\n")):
            assert text and text == " ".join(text.split()) and text.isprintable()
            assert not re.search(r"[{}<>]", text)
        assert row["kind"] == "free" or len(row["output"].split()) < 20


def test_only_the_core_asks_a_question_twice() -> None:
    asked = Counter(normalize_question(row["input"]) for row in made())
    assert set(asked.values()) == {1}
