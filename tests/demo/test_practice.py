"""The practice texts: true, stable, and apart from the demo's questions."""

import json
import re
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

from fintune.data.prompt import SPECIAL_TOKENS, render_prompt
from tools import demo_questions, practice
from tools.made_reports import MEASURES
from tools.practice import practice_texts, repeated_passage

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    " ".join(
        f"Report {i} says that sales in district {j} were {i * j} percent up." for j in range(9)
    )
    for i in range(1, 20)
]
REPEATED, SHEETS = 20, 240
NAME = "|".join(sorted(MEASURES, key=len, reverse=True))
FIGURE = r"\$\d+(?:\.\d)? million"


@cache
def texts(part: str = "train") -> list[str]:
    return list(practice_texts(DOCUMENTS, REPEATED, SHEETS, part))


def sheets() -> list[str]:
    return texts()[REPEATED:]


@cache
def rows() -> list[dict[str, str]]:
    lines = (ROOT / "assets/demo-questions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def amount(figure: str) -> Fraction:
    return Fraction(re.sub(r"[$%]| million", "", figure))


def test_texts_are_stable_and_differ_between_parts() -> None:
    assert len(texts()) == REPEATED + SHEETS == len(set(texts()))
    assert list(practice_texts(DOCUMENTS, REPEATED, SHEETS, "train")) == texts()
    assert not set(texts()) & set(texts("validation"))


def test_a_repeated_passage_is_the_same_sentences_in_another_order() -> None:
    for text in texts()[:REPEATED]:
        first, again = (re.split(r"(?<=\.) ", line) for line in text.split("\n"))
        assert len(first) == 6 and sorted(first) == sorted(again)
        every = {sentence for document in DOCUMENTS for sentence in re.split(r"(?<=\.) ", document)}
        assert set(first) <= every
    assert repeated_passage(practice.Draw("x"), DOCUMENTS[0][:200]) is None


def test_no_company_of_the_questions_can_occur() -> None:
    words = [
        {(start + end).lower() for start in made.STARTS.split() for end in made.ENDS.split()}
        for made in (practice, demo_questions)
    ]
    assert len(words[0]) > 500 < len(words[1])
    assert not words[0] & words[1]
    kinds = [set(made.KINDS.lower().split()) for made in (practice, demo_questions)]
    assert not kinds[0] & kinds[1]
    names = {row["input"].split("\n")[0] for row in rows() if row["kind"] != "free"}
    named = {word.lower() for text in names for word in re.findall(r"\b[A-Z]\w+", text)}
    said = {word.lower() for text in sheets() for word in re.findall(r"\b[A-Z]\w+", text)}
    assert len(named & words[1]) > 2000 and len(said & words[0]) > 400
    assert not said & words[1] and not named & words[0]


def test_there_is_no_question_no_prompt_and_no_passage() -> None:
    """Single sentences of a report and sums can be those of an answer, and the base's card says so."""
    said = "\n".join(sheets())
    prompt = [line.split(":")[0] + ":" for line in render_prompt("", "").split("\n")[:2]]
    for piece in ("?", *SPECIAL_TOKENS, *prompt, *{row["instruction"] for row in rows()}):
        assert piece not in said
    for row in rows():
        passage, _, question = row["input"].rpartition("\n")
        assert question not in said and (row["kind"] == "free" or passage not in said)
        assert row["kind"] not in ("free", "label") or row["output"] not in said


def equal(first: str, second: str, third: str) -> bool:
    return amount(first) == amount(second) + amount(third)


CLAIMS: list[tuple[str, Callable[..., bool]]] = [
    (rf"({FIGURE}) (?:and|\+|plus) ({FIGURE}) (?:make|=|is) ({FIGURE})", lambda a, b, c: equal(c, a, b)),
    (rf"({FIGURE}) (?:less|-|minus) ({FIGURE}) (?:leaves|=|is) ({FIGURE})", equal),
    (
        rf"Of ({FIGURE}) and ({FIGURE}), ({FIGURE}) is the (larger|smaller)",
        lambda a, b, c, word: c == (max if word == "larger" else min)(a, b, key=amount),
    ),
    (
        rf"That ({FIGURE}) is (over|under) ({FIGURE}) is (true|false)",
        lambda one, side, other, said: (
            (said == "true") == ((amount(one) > amount(other)) == (side == "over"))
        ),
    ),
    (
        rf"is (over|under) ({FIGURE}): with ({FIGURE}) to ({FIGURE}) it is (true|false)",
        lambda side, limit, figure, again, said: (
            (said == "true") == ((amount(figure) > amount(limit)) == (side == "over"))
            and limit == again
        ),
    ),
    (
        rf"A (rise|fall) of .*?: ({FIGURE}), then ({FIGURE}), so (true|false)",
        lambda claim, before, after, said: (
            (said == "true") == ((amount(after) > amount(before)) == (claim == "rise"))
        ),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("form", "holds"), CLAIMS)
def test_what_is_worked_out_is_right(form: str, holds: Callable[..., bool]) -> None:
    claims = [found for text in sheets() for found in re.findall(form, text)]
    assert len(claims) > 40
    assert [claim for claim in claims if not holds(*claim)] == []


def test_what_is_restated_stands_in_the_report() -> None:
    """A measure and its figure, in the report and in the statements below it."""
    pair = rf"({NAME})(?: of [A-Z]\w+ \w+)?(?: of | at | was |: | )({FIGURE}|\d+(?:\.\d)?%?)(?=[,;.\s])"
    said = rf"(?i)({NAME})(?:, the accounts show | came to | stood at |: )({FIGURE}|\d+(?:\.\d)?%?)(?=\.)"
    checked = 0
    for sheet in sheets():
        lines = sheet.split("\n")
        for report, statements in zip(lines[::2], lines[1::2], strict=False):
            if len(lines) != 8 or len(set(re.findall(r"\b(?:19|20)\d\d\b", report))) != 1:
                continue  # tables and several years
            stated = {(name.lower(), figure) for name, figure in re.findall(pair, report)}
            restated = {(name.lower(), figure) for name, figure in re.findall(said, statements)}
            assert restated <= stated, (report, statements)
            checked += len(restated)
    assert checked > 200


def test_a_comparison_names_the_right_measure() -> None:
    form = (
        rf"Of ({NAME}) and ({NAME}), ({FIGURE}) or ({FIGURE}), the ({NAME}) is the (larger|smaller)"
        rf"|The (lesser) of ({NAME}) and ({NAME}): ({FIGURE}), ({FIGURE}); the ({NAME})"
        rf"|Comparing ({NAME}) with ({NAME}): ({FIGURE}) to ({FIGURE}), the ({NAME}) (wins)"
    )
    checked = 0
    for sheet in sheets():
        lines = sheet.split("\n")
        for report, statements in pairwise(lines):
            for found in re.findall(form, statements):
                parts = [part for part in found if part]
                three = [part for part in parts if part in MEASURES]
                figures = {
                    name: re.search(rf"{name}(?: of | at | was |: | )({FIGURE})", report)[1]  # type: ignore[index]
                    for name in three
                }
                least = {"smaller", "lesser"} & set(parts)
                best = (min if least else max)(three[:2], key=lambda name: amount(figures[name]))
                said = [part for part in parts if "$" in part]
                assert three[2] == best, (report, found)
                assert said == [figures[name] for name in three[:2]], (report, found)
                checked += 1
    assert checked > 100
