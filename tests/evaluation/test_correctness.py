"""Right answers: tables of pairs written by hand, and properties over many values and notations."""

import calendar
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fintune.evaluation.correctness import is_correct
from support.project import ROOT

TABLES = [
    ROOT / "tests/evaluation/correctness_pairs.jsonl",
    ROOT / "tests/evaluation/correctness_pairs_heldout.jsonl",
]
LEAST = 0.99  # of precision and of recall of "right"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def judge(row: dict[str, Any]) -> bool | None:
    return is_correct(row["reference"], row["answer"], row.get("question"))


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_precision_and_recall_on_a_table(path: Path) -> None:
    rows = [row for row in read(path) if row["right"] is not None]
    judged = [judge(row) for row in rows]
    found = sum(verdict is True for verdict in judged)
    right = sum(row["right"] for row in rows)
    both = sum(v is True and row["right"] for v, row in zip(judged, rows, strict=True))
    wrong = [row for v, row in zip(judged, rows, strict=True) if v is not row["right"]]
    assert both >= LEAST * found, wrong
    assert both >= LEAST * right, wrong


def test_a_reference_without_a_result_is_not_judged() -> None:
    rows = [row for path in TABLES for row in read(path)]
    for row in rows:
        assert (judge(row) is None) == (row["right"] is None), row
    assert sum(row["right"] is None for row in rows) >= 40


def test_the_tables_are_balanced_and_have_no_row_twice() -> None:
    rows = read(TABLES[0])
    right = sum(row["right"] is True for row in rows)
    wrong = sum(row["right"] is False for row in rows)
    assert right + wrong >= 600 and 0.45 < right / (right + wrong) < 0.55
    every = [row for path in TABLES for row in read(path)]
    keys = {(row["reference"], row["answer"], row.get("question")) for row in every}
    assert len(keys) == len(every)


def test_a_checkable_reference_is_right_for_itself() -> None:
    rows = [row for path in TABLES for row in read(path)]
    for row in rows:
        verdict = is_correct(row["reference"], row["reference"], row.get("question"))
        assert verdict is not False, row


# Values in all notations: every notation of a value is right for every other one.

Notation = Callable[[int], str]
MONEY: list[Notation] = [  # of a whole number of dollars, a multiple of 1,000
    lambda n: f"${n:,}",
    lambda n: f"{n} dollars",
    lambda n: f"USD {n:,}.00",
    lambda n: f"US${n / 1000:,.0f}k",
    lambda n: f"{n / 1e6:.3f} million dollars",
    lambda n: f"${n / 1e9:.6f}bn",
    lambda n: f"{n:,}".replace(",", " ") + " USD",
    lambda n: "$" + f"{n:,}".replace(",", "'"),
    lambda n: f"The total is ${n:,}.",
    lambda n: f"In 2019, it came to {n / 1000:,.0f} thousand dollars.",
]
PER_CENT: list[Notation] = [  # of tenths of a per cent
    lambda n: f"{n / 10:.1f}%",
    lambda n: f"{n / 10:.1f} per cent",
    lambda n: f"{n / 10:.1f} percent",
    lambda n: f"{n / 10:.2f} %",
    lambda n: f"The margin was {n / 10:.1f}% in 2021.",
]
POINTS: list[Notation] = [
    lambda n: f"{n * 10} basis points",
    lambda n: f"{n * 10} bps",
    lambda n: f"{n / 10:.1f} percentage points",
    lambda n: f"The spread widened by {n / 10:.1f} percentage points.",
]
TIME: list[Notation] = [
    lambda n: f"{n} years",
    lambda n: f"{12 * n} months",
    lambda n: f"The term is {n} years.",
    lambda n: f"It takes {12 * n} months.",
]
DATES: list[Callable[[tuple[int, int, int]], str]] = [
    lambda d: f"{MONTHS[d[1] - 1]} {d[2]}, {d[0]}",
    lambda d: f"{d[2]} {MONTHS[d[1] - 1]} {d[0]}",
    lambda d: f"{d[0]}-{d[1]:02}-{d[2]:02}",
    lambda d: f"{MONTHS[d[1] - 1][:3]}. {d[2]}, {d[0]}",
    lambda d: f"{d[1]}/{d[2]}/{d[0]}",
    lambda d: f"{d[2]}.{d[1]}.{d[0]}",
    lambda d: f"It is due on {d[2]} {MONTHS[d[1] - 1]}, {d[0]}.",
]
MONTHS = list(calendar.month_name)[1:]


def values(count: int = 40) -> Iterator[tuple[random.Random, int]]:
    draw = random.Random(0)
    for _ in range(count):
        yield draw, draw.randrange(11, 10 ** draw.randrange(2, 6))


def other_digit(draw: random.Random, number: int) -> int:
    """Return the number with one of its digits changed."""
    digits = list(str(number))
    place = draw.randrange(len(digits))
    digits[place] = draw.choice([d for d in "123456789" if d != digits[place]])
    return int("".join(digits))


@pytest.mark.parametrize(
    "notations", [MONEY, PER_CENT, POINTS, TIME], ids=["money", "%", "points", "time"]
)
def test_a_value_is_right_in_every_notation_and_no_other_value_is(
    notations: list[Notation],
) -> None:
    step = 1000 if notations is MONEY else 1
    for draw, number in values():
        changed = other_digit(draw, number) * step
        for one in notations:
            for two in notations:
                reference, answer = one(number * step), two(number * step)
                assert is_correct(reference, answer) is True, (reference, answer)
                assert is_correct(reference, two(changed)) is False, (reference, two(changed))


def test_dates_are_right_in_every_notation_and_no_other_date_is() -> None:
    draw = random.Random(1)
    for _ in range(40):
        date = (draw.randrange(1950, 2060), draw.randrange(1, 13), draw.randrange(13, 29))
        year, month, day = date
        others = [(year + 1, month, day), (year, month % 12 + 1, day), (year, month, day - 1)]
        for one in DATES:
            for two in DATES:
                assert is_correct(one(date), two(date)) is True, (one(date), two(date))
                for other in others:
                    assert is_correct(one(date), two(other)) is False, (one(date), two(other))


def test_another_scale_unit_currency_or_sign_is_wrong() -> None:
    for _, number in values():
        amount = f"${number / 100:.2f} million"
        for answer in (
            "{} billion",
            "{} thousand",
            "€{} million",
            "-${} million",
            "{}%",
            "{} years",
        ):
            given = answer.format(f"{number / 100:.2f}")
            assert is_correct(amount, given) is False, (amount, given)
        assert is_correct(f"-{amount}", amount) is False
        assert is_correct(f"a loss of {amount}", f"a profit of {amount}") is False
        assert is_correct(f"{number}%", f"{number} percentage points") is False


def test_the_stated_places_decide_what_is_near_enough() -> None:
    """The limit is half a unit of the last stated place, inclusive, on both sides."""
    for _, number in values():
        for near, right in ((0.5, True), (-0.5, True), (0.49, True), (0.51, False), (-0.51, False)):
            answer = f"${(number + near) / 10:.4f} million"
            assert is_correct(f"${number / 10:.1f} million", answer) is right, (number, answer)


def test_half_of_two_results_is_wrong() -> None:
    for draw, number in values():
        other = other_digit(draw, number)
        both = f"Sales were ${number} million and costs ${other} million"
        assert is_correct(both, f"Costs of ${other} million; sales of ${number} million.") is True
        assert is_correct(both, f"Sales were ${number} million.") is False
        assert (
            is_correct(both, f"Sales were ${other} million and costs ${number} million.") is False
        )
        assert is_correct(f"${number} million", f"${number} million or ${other} million") is False
        assert (
            is_correct(f"${number} million", f"Not ${number} million but ${other} million.")
            is False
        )


RULES = [  # one wrong answer for each rule, where a share of the tables would not show its loss
    ("$20", "more than $20"),
    ("at least 20%", "at most 20%"),
    ("$250 a month", "$250 a year"),
    ("$25", "The fee is $25. So the yearly cost comes to $300."),
    ("$40", "The answer is $40. Actually, it is $45."),
    ("$40", "It is $40 or $45."),
    ("$40", "It lies between $40 and $45."),
    ("$40", "It is not $40."),
    ("$40", "It rose from $40 to $45."),
    ("$40", "$40 less $10 is $30."),
    ("Dublin", "Dublin or Cork"),
    ("Dublin", "It moved from Dublin to Cork."),
    ("Yes", "Yes and no."),
    ("No", "That is correct."),
    ("increase", "It did not increase."),
    ("B", "A or B"),
    ("$40 in 2019 and $45 in 2020", "$45 in 2019 and $40 in 2020"),
    ("Paris and Lyon", "Lyon and Nice"),
    ("Dublin", "It moved out of Dublin."),
    ("2012", "It was planned for 2012, but it took place in 2013."),
]


ASKED = [  # and one for each rule that reads the question
    ("40%", "It sold at 40% of its value, a discount of 60%.", "At what discount did it sell?"),
    ("Yes, by $3", "Yes, by $4", "Did it rise, and by how much?"),
    ("Loan A", "The latter.", "Which is cheaper, Loan A or Loan B?"),
    ("Oslo", "It knows Oslo. The seat is in Bergen.", "Where is the seat?"),
    ("down", "Costs fell, but profit rose.", "Did profit go up or down?"),
]


@pytest.mark.parametrize(("reference", "answer", "question"), ASKED)
def test_each_rule_of_the_question_refuses(reference: str, answer: str, question: str) -> None:
    assert is_correct(reference, answer, question) is False
    assert is_correct(reference, reference, question) is True


@pytest.mark.parametrize(("reference", "answer"), RULES)
def test_each_rule_refuses(reference: str, answer: str) -> None:
    assert is_correct(reference, answer) is False
    assert is_correct(reference, reference) is True


def test_a_long_reference_is_checked_only_if_it_marks_its_result() -> None:
    text = "The fee that the fund charged in that year was $40, and " + "as it said then, " * 6
    assert is_correct(text, "$40") is None
    assert is_correct(f"{text}\nAnswer: $40", "$40") is True
    assert is_correct(f"{text}\nAnswer: $40", "$45") is False


def odd_texts(draw: random.Random, count: int) -> Iterator[str]:
    letters = "0123456789.,%$€-–()/ \n'aAbBkmMxQHor=+×½²٣Ⅷﷺ\0\ud800🙂éß¥₹:;!?#*\\{}"
    words = (
        "yes no not $5 5% 7 million or and between to from 2024 Q1 so is = answer (a) B. A) bps years - – "
        "( ) 1/2 one hundred a half dozen ,no, wait Plan A $ € USD lakh x times #### minus FY23 12/31/2020 "
        "99/99/2020 1e99 0/0"
    )
    pieces = words.split()
    for _ in range(count):
        if draw.random() < 0.4:
            yield "".join(draw.choice(letters) for _ in range(draw.randrange(60)))
        elif draw.random() < 0.2:
            yield "".join(chr(draw.randrange(0x11000)) for _ in range(draw.randrange(30)))
        else:
            yield " ".join(draw.choice(pieces) for _ in range(draw.randrange(20)))


def test_no_text_raises() -> None:
    draw = random.Random(2)
    texts = list(odd_texts(draw, 1000))
    for reference, answer, question in zip(texts, texts[1:], texts[2:], strict=False):
        assert is_correct(reference, answer, question) in (True, False, None)
        assert is_correct(reference, answer) in (True, False, None)
    assert is_correct("9" * 5000, "9" * 5000) in (True, False, None)


REPEATED = (
    *(
        "1,",
        "1 ",
        "one hundred and ",
        "(((",
        "yes or no, ",
        "$5 million or ",
        "= 5 ",
        "not ",
        ", no,",
        "- ",
    ),
    *("Revenue was $5 million in 2019. ", "A. x B. y ", "1/2", "is about ", "from 5 to ", "a a "),
)


@pytest.mark.parametrize("piece", REPEATED)
def test_the_work_grows_with_the_text_and_no_faster(piece: str) -> None:
    """Calls are counted, of Python's and of C's: of eight times the text, ten times those at most."""

    def work(repeats: int) -> int:
        text = piece * repeats
        calls = 0

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1

        before = sys.getprofile()
        sys.setprofile(count)
        try:
            for reference in ("$5 million", "Tim Cook", "Yes", "increase", "B"):
                is_correct(reference, text, text)
        finally:
            sys.setprofile(before)
        return calls

    work(1)  # fills caches of patterns
    assert work(400) < 10 * work(50) + 1000
