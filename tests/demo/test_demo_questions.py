"""The demo questions: the content of the file, and the correctness of every computed answer.

The arithmetic is checked from the text alone. The wordings serve as patterns that extract the numbers of
a question and of its answer; each number of the answer is then recomputed with fractions, month by
month or year by year where the generator uses a formula.
A wording that gives a field the wrong name ("a tip of {total}") is the only mistake that this cannot
detect: proofread new wordings.
"""

from __future__ import annotations

import json
import random
import re
import sys
import tomllib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import cache
from math import ceil, floor
from pathlib import Path
from typing import Any

import pytest

from tools import demo_questions
from tools.demo_questions_kinds import Draw, Fields

ROOT = Path(__file__).parents[2]
FILE = ROOT / "assets" / "demo-questions.jsonl"
CORE = ROOT / "tools" / "demo_questions_core.jsonl"
WORDINGS = ROOT / "tools" / "demo_questions_wordings.toml"

Numbers = dict[str, Fraction]
NUMBER = r"\$?\d{1,3}(?:,\d{3})*(?:\.\d+)?%?"
WORD = r"[A-Za-z]+(?: [a-z]+)?"
PERIODS = {"annually": 1, "quarterly": 4, "monthly": 12}


@cache
def rows() -> list[dict[str, str]]:
    """Read the rows of the shipped file."""
    return [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]


@cache
def core() -> list[dict[str, Any]]:
    """Read the entries of the hand-written core."""
    return [json.loads(line) for line in CORE.read_text(encoding="utf-8").splitlines()]


@cache
def computed() -> list[dict[str, str]]:
    """Select the rows whose question is not in the core."""
    written = {entry["question"] for entry in core()}
    return [row for row in rows() if row["input"] not in written]


@cache
def wordings() -> dict[str, dict[str, list[str]]]:
    """Read the wordings by kind."""
    return tomllib.loads(WORDINGS.read_text(encoding="utf-8"))


def folded(text: str) -> str:
    """Fold to lower-case words without punctuation."""
    return " ".join(re.sub(r"[^\w\s]|_", "", text.casefold()).split())


# --- Reading the numbers back from the text


@cache
def pattern(wording: str) -> re.Pattern[str]:
    """Compile a wording with a group for each field; repeated fields must have the same text."""
    parts: list[str] = []
    for place, part in enumerate(re.split(r"{(\w+)}", wording)):
        if place % 2 == 0:
            parts.append(re.escape(part))
        elif f"(?P<{part}>" in "".join(parts):
            parts.append(f"(?P={part})")
        else:
            parts.append(f"(?P<{part}>{NUMBER}|{WORD})")
    return re.compile("".join(parts))


def readings(text: str, column: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield every kind with a wording that matches the whole text, with its fields as printed."""
    for kind, texts in wordings().items():
        for wording in texts[column]:
            match = pattern(wording).fullmatch(text)
            if match:
                yield kind, match.groupdict()


def numbers(printed: dict[str, str]) -> Numbers:
    """Parse fields as numbers: plain, in dollars or in percent, and periods per year for a word."""
    values = {
        name: str(PERIODS.get(text, text)).strip("$%").replace(",", "")
        for name, text in printed.items()
    }
    return {name: Fraction(text) for name, text in values.items() if text[0].isdigit()}


# --- Printing, independent of the generator's


def show(value: Fraction, places: int) -> str:
    """Format the value with this number of decimals, rounded half up."""
    whole, rest = divmod(floor(value * 10**places + Fraction(1, 2)), 10**places)
    return f"{whole:,}.{rest:0{places}d}" if places else f"{whole:,}"


def cents(value: Fraction) -> str:
    """Format dollars with cents, rounded."""
    return "$" + show(value, 2)


def exact(value: Fraction) -> str:
    """Format whole dollars, or else a whole number of cents."""
    assert (value * 100).denominator == 1, f"{value} was printed as if it were exact"
    return "$" + show(value, 0 if value.denominator == 1 else 2)


# --- Independent arithmetic, one function per kind, from the question's numbers to the printed fields


def grown(amount: Fraction, rate: Fraction, periods: Fraction) -> Fraction:
    """Add the rate, in percent per period, period by period."""
    for _ in range(int(periods)):
        amount += amount * rate / 100
    return amount


@cache
def instalment(principal: Fraction, rate: Fraction, months: int) -> Fraction:
    """Compute the monthly payment that pays off a loan, month by month.

    The debt is always (loan) - (paid) x payment; both parts accrue the month's interest.
    """
    loan, paid = principal, Fraction(0)
    for _ in range(months):
        loan += loan * rate / 1200
        paid += paid * rate / 1200 + 1
    return loan / paid


def compound_interest(n: Numbers) -> Fields:
    """Compound period by period."""
    each_year = n["compounding"]
    total = grown(n["principal"], n["rate"] / each_year, n["years"] * each_year)
    return {"total": cents(total), "interest": cents(total - n["principal"])}


def simple_interest(n: Numbers) -> Fields:
    """Sum over the years."""
    yearly = n["rate"] * n["principal"] / 100
    return {
        "yearly": exact(yearly),
        "interest": exact(sum([yearly] * int(n["years"])) + Fraction()),
    }


def loan_payment(n: Numbers) -> Fields:
    """Derive the payment from the loan's account."""
    months = int(n["years"]) * 12
    return {
        "months": str(months),
        "payment": cents(instalment(n["principal"], n["rate"], months)),
    }


def loan_interest(n: Numbers) -> Fields:
    """Sum the printed payments."""
    printed = loan_payment(n)
    payment = numbers(printed)["payment"]
    paid = sum([payment] * int(printed["months"])) + Fraction()
    return printed | {"paid": cents(paid), "interest": cents(paid - n["principal"])}


def savings_goal(n: Numbers) -> Fields:
    """Divide the missing amount into equal parts."""
    missing = n["goal"] - n["saved"]
    return {"missing": exact(missing), "monthly": cents(missing / n["months"])}


def percent_change(n: Numbers) -> Fields:
    """Compute the ratio of the two values, minus one."""
    ratio = n["new"] / n["old"] - 1
    return {
        "change": exact(abs(n["new"] - n["old"])),
        "direction": "an increase" if ratio > 0 else "a decrease",
        "percent": show(abs(ratio) * 100, 1) + "%",
    }


def rule_of_72(n: Numbers) -> Fields:
    """Divide 72 by the rate."""
    return {"double": exact(n["amount"] + n["amount"]), "years": show(1 / (n["rate"] / 72), 1)}


def dividend_yield(n: Numbers) -> Fields:
    """Compute the dividends on a hundred dollars of shares."""
    return {"yield": show(100 / n["price"] * n["dividend"], 2) + "%"}


def bond_current_yield(n: Numbers) -> Fields:
    """Scale the coupon rate from face value to price."""
    income = n["face"] / 100 * n["coupon"]
    return {"income": exact(income), "yield": show(n["coupon"] * n["face"] / n["price"], 2) + "%"}


def earnings_per_share(n: Numbers) -> Fields:
    """Multiply the profit by one share's part."""
    return {"earnings": cents(n["profit"] * (1 / n["shares"]))}


def price_to_earnings(n: Numbers) -> Fields:
    """Invert the earnings per dollar of shares."""
    return {"ratio": show(1 / (n["earnings"] / n["price"]), 1)}


def inflation_value(n: Numbers) -> Fields:
    """Divide the amount by the growth of prices, year by year."""
    return {"value": cents(n["amount"] / grown(Fraction(1), n["inflation"], n["years"]))}


def break_even_units(n: Numbers) -> Fields:
    """Find the smallest number of units without a loss."""
    units = ceil(n["fixed"] / (n["price"] - n["cost"]))
    results = [k * n["price"] - k * n["cost"] - n["fixed"] for k in (units - 1, units)]
    assert results[0] < 0 <= results[1]
    return {"contribution": exact(n["price"] - n["cost"]), "units": f"{units:,}"}


def profit_margin(n: Numbers) -> Fields:
    """Compute the remainder of a hundred dollars of revenue."""
    margin = 100 - n["cost"] / n["revenue"] * 100
    return {"profit": exact(n["revenue"] - n["cost"]), "margin": show(margin, 1) + "%"}


def markup(n: Numbers) -> Fields:
    """Compute the ratio of price to cost, minus one."""
    ratio = n["price"] / n["cost"] - 1
    return {"gain": exact(n["price"] - n["cost"]), "markup": show(ratio * 100, 1) + "%"}


def card_interest(n: Numbers) -> Fields:
    """Apply the monthly rate to the balance."""
    interest = n["apr"] / 12 / 100 * n["balance"]
    return {"yearly": exact(interest * 12), "interest": cents(interest)}


def debt_to_income(n: Numbers) -> Fields:
    """Add up each payment's share of income."""
    ratio = n["housing"] / n["income"] + n["other"] / n["income"]
    return {"debts": exact(n["housing"] + n["other"]), "ratio": show(ratio * 100, 1) + "%"}


def net_worth(n: Numbers) -> Fields:
    """Subtract debts from assets."""
    return {
        "assets": exact(n["cash"] + n["investments"]),
        "worth": exact(n["cash"] - n["debt"] + n["investments"]),
    }


def sales_tax(n: Numbers) -> Fields:
    """Scale the price up; the difference is the tax."""
    total = n["price"] * (100 + n["rate"]) / 100
    return {"total": cents(total), "tax": cents(total - n["price"])}


def tip_total(n: Numbers) -> Fields:
    """Scale the bill up; the difference is the tip."""
    total = n["bill"] * (100 + n["rate"]) / 100
    return {"total": cents(total), "tip": cents(total - n["bill"])}


def tax_saving(n: Numbers) -> Fields:
    """Subtract the after-tax deduction from the deduction."""
    return {"saving": exact(n["deduction"] - n["deduction"] * (1 - n["rate"] / 100))}


def emergency_fund(n: Numbers) -> Fields:
    """Sum over the months."""
    return {"fund": exact(sum([n["expenses"]] * int(n["months"])) + Fraction())}


def annual_pay(n: Numbers) -> Fields:
    """Sum over the weeks."""
    weekly = n["hours"] * n["wage"]
    return {"weekly": exact(weekly), "annual": exact(sum([weekly] * 52) + Fraction())}


def currency_conversion(n: Numbers) -> Fields:
    """Divide dollars by the price of one unit in dollars."""
    return {"result": show(n["amount"] / (1 / n["rate"]), 2)}


def straight_line_depreciation(n: Numbers) -> Fields:
    """Take equal parts each year, which leave the salvage value."""
    yearly = n["cost"] / n["years"] - n["salvage"] / n["years"]
    assert n["cost"] - sum([yearly] * int(n["years"])) == n["salvage"]
    return {"base": exact(n["cost"] - n["salvage"]), "yearly": cents(yearly)}


def mileage_deduction(n: Numbers) -> Fields:
    """Compute cents first, then dollars."""
    return {"deduction": exact(n["cents"] * n["miles"] / 100)}


def after_fee_return(n: Numbers) -> Fields:
    """Subtract the fee from the gain, in dollars."""
    gain = n["amount"] * n["growth"] / 100 - n["amount"] * n["fee"] / 100
    net = n["growth"] - n["fee"]
    places = next(p for p in range(3) if (net * 10**p).denominator == 1)
    return {"net": show(net, places) + "%", "gain": exact(gain)}


CENT, ONE, TWO = "to the nearest cent", "to one decimal place", "to two decimal places"
ROUNDED_UP, EXACT = "rounded up", ""

# Each kind's arithmetic, and the rounding that every answer must state.
CHECKS: dict[str, tuple[Callable[[Numbers], Fields], str]] = {
    "compound_interest": (compound_interest, CENT),
    "simple_interest": (simple_interest, EXACT),
    "loan_payment": (loan_payment, CENT),
    "loan_interest": (loan_interest, CENT),
    "savings_goal": (savings_goal, CENT),
    "percent_change": (percent_change, ONE),
    "rule_of_72": (rule_of_72, ONE),
    "dividend_yield": (dividend_yield, TWO),
    "bond_current_yield": (bond_current_yield, TWO),
    "earnings_per_share": (earnings_per_share, CENT),
    "price_to_earnings": (price_to_earnings, ONE),
    "inflation_value": (inflation_value, CENT),
    "break_even_units": (break_even_units, ROUNDED_UP),
    "profit_margin": (profit_margin, ONE),
    "markup": (markup, ONE),
    "card_interest": (card_interest, CENT),
    "debt_to_income": (debt_to_income, ONE),
    "net_worth": (net_worth, EXACT),
    "sales_tax": (sales_tax, CENT),
    "tip_total": (tip_total, CENT),
    "tax_saving": (tax_saving, EXACT),
    "emergency_fund": (emergency_fund, EXACT),
    "annual_pay": (annual_pay, EXACT),
    "currency_conversion": (currency_conversion, TWO),
    "straight_line_depreciation": (straight_line_depreciation, CENT),
    "mileage_deduction": (mileage_deduction, EXACT),
    "after_fee_return": (after_fee_return, EXACT),
}


@pytest.mark.parametrize("kind", sorted(wordings()))
def test_every_answer_of_a_kind_is_right(kind: str) -> None:
    """Each number and word in an answer is the question's own or follows from it."""
    work, rounding = CHECKS[kind]
    checked = 0
    for row in computed():
        asked = [printed for found, printed in readings(row["input"], "questions") if found == kind]
        if not asked:
            continue
        expected = asked[0] | work(numbers(asked[0]))
        told = [printed for found, printed in readings(row["output"], "answers") if found == kind]
        assert len(told) == 1, f"no single wording of {kind} fits {row['output']!r}"
        assert told[0] == {name: expected[name] for name in told[0]}, row["input"]
        assert rounding in row["output"]
        checked += 1
    assert checked == demo_questions.ROWS_PER_KIND


def test_every_computed_question_is_read_in_one_way() -> None:
    """So the check above covers every computed row, once."""
    assert set(CHECKS) == set(wordings())
    for row in computed():
        assert len(list(readings(row["input"], "questions"))) == 1, row["input"]


def test_no_kind_asks_twice_about_the_same_numbers() -> None:
    """Not even in other words."""
    asked = [
        (kind, sorted(printed.items()))
        for row in computed()
        for kind, printed in readings(row["input"], "questions")
        if not {"item", "loan"} & set(printed)
    ]
    assert [key for key, times in Counter(map(repr, asked)).items() if times > 1] == []


@pytest.mark.parametrize("kind", sorted(wordings()))
def test_wordings_are_many_and_all_used(kind: str) -> None:
    """At least six questions and three answers per kind, each in the file."""
    questions, answers = wordings()[kind]["questions"], wordings()[kind]["answers"]
    assert len(set(questions)) >= 6
    assert len(set(answers)) >= 3
    for wording in questions:
        assert any(pattern(wording).fullmatch(row["input"]) for row in computed())
    for wording in answers:
        assert any(pattern(wording).fullmatch(row["output"]) for row in computed())


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


def test_counts() -> None:
    """Enough rows, enough prose, balanced topics, and some forum-like questions."""
    assert len(rows()) >= 1_500
    assert len({row["input"] for row in rows()} & {e["question"] for e in core()}) >= 150
    topics = Counter(str(entry["topic"]) for entry in core())
    assert set(topics) == set(demo_questions.TOPICS)
    assert max(topics.values()) <= 1.5 * min(topics.values())
    answers: defaultdict[str, set[str]] = defaultdict(set)
    for row in rows():
        answers[row["input"]].add(row["output"])
    assert sum(len(different) in (2, 3) for different in answers.values()) >= 30


def test_every_answer_of_the_core_is_in_the_file() -> None:
    """No hand-written answer is lost."""
    pairs = {(row["input"], row["output"]) for row in rows()}
    for entry in core():
        assert {(entry["question"], answer) for answer in entry["answers"]} <= pairs


def test_texts_are_clean() -> None:
    """One line each, no stray spaces, not empty, no special tokens of the prompt."""
    for row in rows():
        assert list(row) == ["instruction", "input", "output"]
        for text in row.values():
            assert text
            assert text == " ".join(text.split())
            assert "<response" not in text
            assert text.isprintable()


def test_no_article_stands_before_a_drawn_number() -> None:
    """A rate of 7% may become one of 8%, but "a 7%" would have to become "an 8%"."""
    for row in computed():
        assert not re.search(r"\b[Aa]n? \$?\d", row["input"] + " " + row["output"])


def test_answers_are_short() -> None:
    """Prose 15 to 60 words, computed answers 15 to 45."""
    lengths = {id(row): len(row["output"].split()) for row in rows()}
    assert all(15 <= length <= 60 for length in lengths.values())
    assert all(lengths[id(row)] <= 45 for row in computed())


def test_questions_are_distinct() -> None:
    """No two questions differ only in case and punctuation, and only the core's repeat."""
    by_fold: defaultdict[str, list[dict[str, str]]] = defaultdict(list)
    for row in rows():
        by_fold[folded(row["input"])].append(row)
    several = {entry["question"]: len(entry["answers"]) for entry in core()}
    for same in by_fold.values():
        assert len({row["input"] for row in same}) == 1
        assert len({row["output"] for row in same}) == len(same)
        assert len(same) == several.get(same[0]["input"], 1)


def test_instructions_depend_on_the_question_alone() -> None:
    """Five instructions, about equally frequent, one for each question."""
    given: defaultdict[str, set[str]] = defaultdict(set)
    for row in rows():
        given[row["input"]].add(row["instruction"])
    assert all(len(one) == 1 for one in given.values())
    shares = Counter(row["instruction"] for row in rows())
    assert set(shares) == set(demo_questions.INSTRUCTIONS)
    assert len(shares) == 5
    assert min(shares.values()) > len(rows()) / 10


# --- What the generator refuses


def test_a_kind_with_too_few_numbers_is_refused() -> None:
    """It must not write fewer rows or repeat one."""

    def narrow(draw: Draw) -> Fields:
        return {"amount": str(draw.number(1, 5, 1))}

    texts = {"questions": ["What is {amount}?"], "answers": ["It is {amount}."]}
    with pytest.raises(ValueError, match="narrow: only 5 distinct questions"):
        list(demo_questions.kind_rows(narrow, texts))


GOOD = '{"topic": "taxes", "question": "Why pay?", "answers": ["Because."]}'


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD, "{'topic'"], "line 2: not JSON"),
        (['{"topic": "gossip", "question": "Who?", "answers": ["Nobody."]}'], "line 1.*gossip"),
        (['{"topic": "taxes", "question": "Why?", "answers": []}'], "line 1"),
        (
            [GOOD, '{"topic": "taxes", "question": "why, PAY", "answers": ["So."]}'],
            "line 2: repeated question 'why, PAY'",
        ),
    ],
)
def test_a_broken_core_is_refused(lines: list[str], message: str) -> None:
    """The message names the line."""
    with pytest.raises(ValueError, match=message):
        list(demo_questions.core_rows(lines))
