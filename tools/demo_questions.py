"""Write the demo's finance questions: made reports with questions on them, and a hand-written core.

    python -m tools.demo_questions --out assets/demo-questions.jsonl

A made row has a passage of its own, on a company of its own; its answer can be read off or worked out
from the passage. The row's column `split` says where it belongs, and some question wordings are kept
for the test rows (demo_questions_wordings.toml). `kind` is the kind of question, `result` the
checkable part of the answer. The core (demo_questions_core.jsonl) is prose without a `result`. The
output is deterministic, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tools.made_reports import Draw, Figure, Report, company_names, several_years, single_year

HERE = Path(__file__).parent
CORE = HERE / "demo_questions_core.jsonl"
WORDINGS = HERE / "demo_questions_wordings.toml"

SEED = "questions 1"
INSTRUCTIONS = {"free": "Answer the money question.", "label": "Label the news."}
USUAL_INSTRUCTION = "Answer from the text."

STARTS = (
    "Al Bel Cor Dar El Fen Gar Hol Jun Kes Lin Mor Nal Or Pel Quin Ros Sel Tal Ul Ver Wes Yar Zan Bran "
    "Cal Dun Har Lan Mar Nor Stan Win"
)
ENDS = (
    "aco ado agan alis andor anta arin aston avia eda egan elio emar enna erin etta eva idan igo imar "
    "inda ira isco iton oban ock odan olin omar ona ordan oria osta oven oza ula umar unda uris uva "
    "wick worth ford bury field mont stead ham ley gate dale burn more land win ridge den cott brook "
    "stone wood hurst mere by ton combe shaw well"
)
KINDS = "Foods Bank Energy Labs Motors Media Paper Steel Textiles Freight Insurance Software Mining"

FORMS = (
    "In {year}, {company} reported {list}.",
    "{company} closed {year} with {list}.",
    "Figures of {company} for {year}: {list}.",
    "{company} had {list} in {year}.",
    "{company} published its {year} results. {sentences}",
    "{company}, {year}. {lines}",
)
TONES = {
    "positive": (
        "raised its outlook for the year",
        "won a large order from a new client",
        "reported record sales",
        "paid off its last loan early",
        "beat the forecasts of all analysts",
        "increased its dividend",
        "doubled its profit",
    ),
    "negative": (
        "cut its outlook for the year",
        "lost its largest client",
        "reported a heavy loss",
        "missed a payment on its loan",
        "fell short of the forecasts of all analysts",
        "suspended its dividend",
        "has to pay a large fine",
    ),
    "neutral": (
        "kept its outlook as it was",
        "moved its head office to another street",
        "will publish its figures on a Monday",
        "named the date of its annual meeting",
        "renewed the contract with its auditor",
        "changed the layout of its annual report",
        "will hold its meeting in the usual hall",
    ),
}
RATINGS = {
    "up": ("raised", "lifted", "upgraded", "improved"),
    "down": ("cut", "lowered", "downgraded", "reduced"),
    "unchanged": ("confirmed", "kept", "affirmed", "left alone"),
}
REASONS = [
    "its debt",
    "its cash",
    "the market",
    "its margins",
    "its management",
    "demand",
    "its costs",
]
MONTHS = "January February March April May June July August September October November December"

Fields = dict[str, Any]
Row = dict[str, str | None]
Task = Callable[[Draw, str], Fields]


# Each task returns its passage and the fields of its wordings.


def read_report(draw: Draw, company: str) -> Fields:
    """Ask for one figure of a year's report."""
    report = single_year(draw, company)
    measure = draw.one(list(report.figures))
    (value,) = report.figures[measure]
    return _of_year(draw, report) | {"measure": measure, "value": value, "result": value}


def read_years(draw: Draw, company: str) -> Fields:
    """Ask for one figure of a table of years."""
    report = several_years(draw, company)
    measure, place = draw.one(list(report.figures)), draw.number(0, len(report.years) - 1)
    value = report.figures[measure][place]
    fields = {"measure": measure, "year": report.years[place], "value": value, "result": value}
    return _of_years(draw, report) | fields


def higher(draw: Draw, company: str) -> Fields:
    """Ask for the larger of two figures."""
    return _compare(draw, company, max)


def lower(draw: Draw, company: str) -> Fields:
    """Ask for the smaller of two figures."""
    return _compare(draw, company, min)


def _compare(draw: Draw, company: str, choose: Callable[[Iterable[Figure]], Figure]) -> Fields:
    report = single_year(draw, company)
    one, other = draw.some(_in_dollars(report), 2)
    (first,), (second,) = report.figures[one], report.figures[other]
    result = one if choose([first, second]) == first else other
    fields = {"one": one, "other": other, "first": first, "second": second, "result": result}
    return _of_year(draw, report) | fields


def better_year(draw: Draw, company: str) -> Fields:
    """Ask for the year with the larger figure."""
    report = several_years(draw, company)
    measure = draw.one(list(report.figures))
    figures = dict(zip(report.years, report.figures[measure], strict=True))
    one, other = draw.some(report.years, 2)
    result = one if figures[one] > figures[other] else other
    fields = {"measure": measure, "one": one, "other": other, "result": result}
    return _of_years(draw, report) | fields | {"first": figures[one], "second": figures[other]}


def above(draw: Draw, company: str) -> Fields:
    """Ask if a figure is above a limit."""
    return _limit(draw, company, +1)


def below(draw: Draw, company: str) -> Fields:
    """Ask if a figure is below a limit."""
    return _limit(draw, company, -1)


def _limit(draw: Draw, company: str, sign: int) -> Fields:
    report = single_year(draw, company)
    measure = draw.one(_in_dollars(report))
    (value,) = report.figures[measure]
    yes = draw.number(0, 1) == 1
    distance = value.tenths * draw.number(15, 60) // 100
    tenths = value.tenths + (-sign if yes else sign) * distance
    limit = Figure(min(9990, tenths if value.tenths < 100 else tenths // 10 * 10), value.unit)
    fields = {"measure": measure, "value": value, "limit": limit} | _verdict(yes)
    return _of_year(draw, report) | fields


def rose(draw: Draw, company: str) -> Fields:
    """Ask if a figure rose from one year to the next."""
    report = several_years(draw, company)
    measure, place = draw.one(list(report.figures)), draw.number(0, len(report.years) - 2)
    before, after = report.figures[measure][place : place + 2]
    fields = {"measure": measure, "one": report.years[place], "other": report.years[place + 1]}
    fields |= {"before": before, "after": after} | _verdict(after > before)
    return _of_years(draw, report) | fields


def _verdict(true: bool) -> Fields:
    word = "yes" if true else "no"
    return {"truth": "true" if true else "false", "verdict": word, "result": word}


def total(draw: Draw, company: str) -> Fields:
    """Ask for the sum of two figures, of two digits like each of them."""
    return _work_out(draw, company, +1)


def difference(draw: Draw, company: str) -> Fields:
    """Ask for the difference of two figures."""
    return _work_out(draw, company, -1)


def _work_out(draw: Draw, company: str, sign: int) -> Fields:
    scale = draw.one(("units", "tens"))
    while True:
        report = single_year(draw, company, scale)
        one, other = draw.some(_in_dollars(report), 2)
        (first,), (second,) = report.figures[one], report.figures[other]
        result = Figure(first.tenths + sign * second.tenths, first.unit)
        if 0 < result.tenths < (100 if scale == "units" else 1000):
            break
    fields = {"one": one, "other": other, "first": first, "second": second, "result": result}
    return _of_year(draw, report) | fields


def tone(draw: Draw, company: str) -> Fields:
    """Ask for the tone of two pieces of news that agree."""
    result = draw.one(list(TONES))
    one, other = draw.some(TONES[result], 2)
    when = f"{draw.one(MONTHS.split())} {draw.number(1996, 2025)}"
    return {"passage": f"{when}: {company} {one} and {other}.", "result": result}


def rating(draw: Draw, company: str) -> Fields:
    """Ask in which direction a rating went."""
    result = draw.one(list(RATINGS))
    verb, reason = draw.one(RATINGS[result]), draw.one(REASONS)
    when = f"{draw.one(MONTHS.split())} {draw.number(1996, 2025)}"
    passage = f"{when}: the rating of {company} was {verb} because of {reason}."
    return {"passage": passage, "result": result}


def _in_dollars(report: Report) -> list[str]:
    return [name for name, figures in report.figures.items() if figures[0].unit == "$"]


def _of_year(draw: Draw, report: Report) -> Fields:
    """Write a year's report as a passage."""
    facts = [(name, str(figure)) for name, (figure,) in report.figures.items()]
    link = draw.one((" of ", " at "))
    parts = [f"{name}{link}{figure}" for name, figure in facts]
    fields = {"company": report.company, "year": report.years[0]}
    passage = draw.one(FORMS).format(
        **fields,
        list=", ".join(parts[:-1]) + " and " + parts[-1],
        sentences=" ".join(f"The {name} was {figure}." for name, figure in facts),
        lines="; ".join(f"{name}: {figure}" for name, figure in facts) + ".",
    )
    return fields | {"passage": passage}


def _of_years(draw: Draw, report: Report) -> Fields:
    """Write several years as a table, or as sentences."""
    if draw.number(0, 1):
        head = f"{report.company}, $ million\nyear | " + " | ".join(report.figures)
        columns = zip(report.years, *report.figures.values(), strict=True)
        lines = [" | ".join([str(year), *(f.number for f in row)]) for year, *row in columns]
        return {"passage": "\n".join([head, *lines])}
    sentences = []
    for name, figures in report.figures.items():
        parts = [f"{f} in {y}" for f, y in zip(figures, report.years, strict=True)]
        sentences.append(f"The {name} was {', '.join(parts[:-1])} and {parts[-1]}.")
    return {"passage": f"{report.company}: {' '.join(sentences)}"}


TASKS: dict[Task, int] = {  # and the number of rows of each
    read_report: 384,
    read_years: 272,
    higher: 144,
    lower: 128,
    better_year: 128,
    above: 144,
    below: 128,
    rose: 128,
    total: 192,
    difference: 160,
    tone: 288,
    rating: 144,
}


def split_of(place: int) -> str:
    """Return the split of the row at this place: of 16 rows in a row, 2 are test and 1 validation."""
    return {0: "validation", 1: "test", 9: "test"}.get(place % 16, "train")


def core_rows(lines: Iterable[str]) -> Iterator[Row]:
    """Yield every question of the core with each of its answers."""
    for place, line in enumerate(lines):
        entry = json.loads(line)
        for answer in entry["answers"]:
            yield _row("free", entry["question"], answer, None, split_of(place))


def task_rows(task: Task, count: int, names: Iterator[str], wordings: Fields) -> Iterator[Row]:
    """Yield rows of one task; every fourth test row has a reserved wording."""
    draw = Draw(f"{SEED} {task.__name__}")  # tasks do not affect each other
    for place in range(count):
        fields = {"company": None} | task(draw, next(names))
        split = split_of(place)
        reserved = split == "test" and place % 32 == 1
        question = draw.one(wordings["reserved" if reserved else "questions"]).format(**fields)
        answer = draw.one(wordings["answers"]).format(**fields)
        text = f"{fields['passage']}\n{question}"
        yield _row(wordings["kind"], text, answer, str(fields["result"]), split)


def _row(kind: str, question: str, answer: str, result: str | None, split: str) -> Row:
    return {
        "instruction": INSTRUCTIONS.get(kind, USUAL_INSTRUCTION),
        "input": question,
        "output": answer,
        "result": result,
        "kind": kind,
        "split": split,
    }


def render() -> str:
    """Render the whole file from the sources beside this module."""
    wordings = tomllib.loads(WORDINGS.read_text(encoding="utf-8"))
    names = company_names(Draw(SEED), STARTS, ENDS, KINDS)
    rows = list(core_rows(CORE.read_text(encoding="utf-8").splitlines()))
    for task, count in TASKS.items():
        rows.extend(task_rows(task, count, names, wordings[task.__name__]))
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows)


def main() -> None:
    """Write the file completely or not at all."""
    parser = argparse.ArgumentParser(description="Write the demo's finance questions.")
    parser.add_argument("--out", type=Path, required=True, help="the JSON Lines file to write")
    out: Path = parser.parse_args().out
    text = render()
    unfinished = out.with_name(out.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8", newline="\n")
    unfinished.replace(out)
    print(f"{out}: {text.count(chr(10)):,} rows")


if __name__ == "__main__":
    main()
