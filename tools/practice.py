"""Write practice texts for pretraining: what teaches a small model to copy and compare.

Repeated passages are a document's sentences, followed by the same sentences in another order. Fact
sheets give made companies' figures and then say again what they say: single figures, which is larger,
sums and differences, what is true of them. They are prose without questions or prompts, and their
company names are none of the demo questions'. Measures, ranges of figures and plain phrases are the
same, so a sum or a sentence such as `That $4 million is over $3 million is true.` can be that of an answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from tools.made_reports import Draw, Figure, Report, company_names, several_years, single_year

SEED = "practice 1"
STARTS = "Ab Bo Chi Di Ez Fa Gu Hu Ig Jo Ku Lo Mu Ni Oph Pi Ri Sa Te Uz Vo Wi Xa Ye Zo"
ENDS = (
    "bba cana deva fino gami hano jira kato lira mazo nevo pino rado savo tami vado xano zemi brix cor "
    "dex fax lan max nex pak rix tek vax zon"
)
KINDS = "Corp Group Holdings Partners Industries Trading Works Systems"

REPEATED_SENTENCES = 6
REPORTS = 4  # in a fact sheet
STATEMENTS = 6  # on each of its reports
TWO_DIGITS = 990  # tenths; larger figures are compared, but neither added nor subtracted

OF_YEAR = (
    "{company} in {year}: {list}.",
    "For {year}, {company} showed {list}.",
    "{year} brought {company} {list}.",
    "{company} ({year}) {lines}",
    "The {year} accounts of {company} are out. {sentences}",
)
RESTATED = (
    "{company}, {name}: {figure}.",
    "Its {name} came to {figure}.",
    "The {name} stood at {figure}.",
    "On {name}, the accounts show {figure}.",
)
RESTATED_YEAR = (
    "{name}, {year}: {figure}.",
    "The {year} accounts show {name} at {figure}.",
    "On {name} for {year}, the accounts show {figure}.",
)


def repeated_passage(draw: Draw, document: str) -> str | None:
    """Take some sentences of a document and repeat them in another order; None: it has too few."""
    sentences = [s for s in re.split(r"(?<=[.!?])\s+", document) if 30 < len(s) < 300]
    if len(sentences) < REPEATED_SENTENCES:
        return None
    start = draw.number(0, len(sentences) - REPEATED_SENTENCES)
    taken = sentences[start : start + REPEATED_SENTENCES]
    return " ".join(taken) + "\n" + " ".join(draw.some(taken, len(taken)))


def fact_sheet(draw: Draw, companies: Sequence[str]) -> str:
    """Write a document of some companies' reports, each with statements on it."""
    parts = []
    for company in draw.some(companies, REPORTS):
        if draw.number(0, 2):
            report = single_year(draw, company)
            parts += [_of_year(draw, report), _statements(draw, report)]
        else:
            report = several_years(draw, company)
            parts += [_of_years(draw, report), _statements(draw, report)]
    return "\n".join(parts)


def sums(draw: Draw) -> str:
    """Write a document of sums, differences and comparisons of figures of two digits."""
    lines = []
    for _ in range(20):
        step = draw.one((1, 10))
        one, other = (Figure(draw.number(11, 99) * step, "$") for _ in range(2))
        lines.append(draw.one((_sum, _difference, _order))(draw, one, other))
    return "\n".join(line for line in lines if line)


def _sum(draw: Draw, one: Figure, other: Figure) -> str:
    total = Figure(one.tenths + other.tenths, "$")
    return draw.one(("{} and {} make {}.", "{} + {} = {}.", "{} plus {} is {}.")).format(
        one, other, total
    )


def _difference(draw: Draw, one: Figure, other: Figure) -> str:
    low, high = sorted([one, other])
    rest = Figure(high.tenths - low.tenths, "$")
    return draw.one(("{} less {} leaves {}.", "{} - {} = {}.", "{} minus {} is {}.")).format(
        high, low, rest
    )


def _order(draw: Draw, one: Figure, other: Figure) -> str:
    if one == other:
        return f"{one} equals {other}."
    text = (
        "Of {one} and {other}, {more} is the larger.",
        "Of {one} and {other}, {less} is the smaller.",
        "That {one} is over {other} is {true}.",
        "That {one} is under {other} is {false}.",
    )
    true, false = ("true", "false") if one > other else ("false", "true")
    sizes = {"more": max(one, other), "less": min(one, other), "true": true, "false": false}
    return draw.one(text).format(one=one, other=other, **sizes)


def _of_year(draw: Draw, report: Report) -> str:
    facts = [(name, str(figure)) for name, (figure,) in report.figures.items()]
    parts = [f"{name}{draw.one((' of ', ' at ', ' '))}{figure}" for name, figure in facts]
    return draw.one(OF_YEAR).format(
        company=report.company,
        year=report.years[0],
        list=", ".join(parts[:-1]) + " and " + parts[-1],
        lines="; ".join(f"{name}: {figure}" for name, figure in facts) + ".",
        sentences=" ".join(f"The {name} was {figure}." for name, figure in facts),
    )


def _of_years(draw: Draw, report: Report) -> str:
    if draw.number(0, 1):
        head = f"{report.company} (millions of dollars)\nyear | " + " | ".join(report.figures)
        columns = zip(report.years, *report.figures.values(), strict=True)
        lines = [" | ".join([str(year), *(f.number for f in row)]) for year, *row in columns]
        return "\n".join([head, *lines])
    sentences = []
    for name, figures in report.figures.items():
        parts = [f"{f} in {y}" for f, y in zip(figures, report.years, strict=True)]
        sentences.append(f"The {name} of {report.company} was {' and '.join(parts)}.")
    return " ".join(sentences)


def _statements(draw: Draw, report: Report) -> str:
    """Say some true things about a report, in random order."""
    said = [_restatement(draw, report) for _ in range(2)]
    for _ in range(STATEMENTS - 2):
        if len(report.years) > 1:
            said.append(draw.one((_restatement, _change, _best_year, _rise))(draw, report))
        else:
            said.append(draw.one((_restatement, _comparison, _worked_out, _limit))(draw, report))
    return " ".join(draw.some(said, len(said)))


def _restatement(draw: Draw, report: Report) -> str:
    name = draw.one(list(report.figures))
    place = draw.number(0, len(report.years) - 1)
    forms = RESTATED if len(report.years) == 1 else RESTATED_YEAR
    text = draw.one(forms).format(
        company=report.company,
        name=name,
        year=report.years[place],
        figure=report.figures[name][place],
    )
    return text[0].upper() + text[1:]


def _two_in_dollars(draw: Draw, report: Report) -> tuple[str, Figure, str, Figure]:
    one, other = draw.some([n for n, f in report.figures.items() if f[0].unit == "$"], 2)
    return one, report.figures[one][0], other, report.figures[other][0]


def _comparison(draw: Draw, report: Report) -> str:
    one, first, other, second = _two_in_dollars(draw, report)
    forms = (
        ("Of {one} and {other}, {first} or {second}, the {best} is the larger.", max),
        ("Of {one} and {other}, {first} or {second}, the {best} is the smaller.", min),
        ("Comparing {one} with {other}: {first} to {second}, the {best} wins.", max),
        ("The lesser of {one} and {other}: {first}, {second}; the {best}.", min),
    )
    text, choose = draw.one(forms)
    best = one if choose(first, second) == first else other
    return text.format(one=one, other=other, first=first, second=second, best=best)


def _worked_out(draw: Draw, report: Report) -> str:
    one, first, other, second = _two_in_dollars(draw, report)
    if max(first, second).tenths > TWO_DIGITS:
        return _comparison(draw, report)
    if draw.number(0, 1):
        total = Figure(first.tenths + second.tenths, "$")
        return f"The total of {one} and {other}: {first} and {second} make {total}."
    if first < second:
        one, first, other, second = other, second, one, first
    rest = Figure(first.tenths - second.tenths, "$")
    return f"The gap from {one} down to {other}: {first} less {second} leaves {rest}."


def _limit(draw: Draw, report: Report) -> str:
    name, figure, _, _ = _two_in_dollars(draw, report)
    limit = figure
    while limit == figure:
        limit = Figure(figure.tenths * draw.number(40, 160) // 100, "$")
        if limit.tenths >= 100:
            limit = Figure(limit.tenths // 10 * 10, "$")
    side = draw.one(("over", "under"))
    true = (figure > limit) == (side == "over")
    return f"That {name} is {side} {limit}: with {figure} to {limit} it is {'true' if true else 'false'}."


def _change(draw: Draw, report: Report) -> str:
    name = draw.one(list(report.figures))
    place = draw.number(0, len(report.years) - 2)
    before, after = report.figures[name][place : place + 2]
    low, high = sorted([before, after])
    if high.tenths > TWO_DIGITS:
        return _rise(draw, report)
    word = "added" if after > before else "lost"
    rest = Figure(high.tenths - low.tenths, "$")
    return f"From {report.years[place]} to {report.years[place + 1]}, {name} {word} {rest}."


def _best_year(draw: Draw, report: Report) -> str:
    name = draw.one(list(report.figures))
    figures = dict(zip(report.years, report.figures[name], strict=True))
    one, other = draw.some(report.years, 2)
    best = max(one, other, key=lambda year: figures[year])
    return f"Between {one} and {other}, {name} had {figures[one]} to {figures[other]}, larger in {best}."


def _rise(draw: Draw, report: Report) -> str:
    name = draw.one(list(report.figures))
    place = draw.number(0, len(report.years) - 2)
    before, after = report.figures[name][place : place + 2]
    claim = draw.one(("rise", "fall"))
    true = (after > before) == (claim == "rise")
    years = f"from {report.years[place]} to {report.years[place + 1]}"
    return f"A {claim} of {name} {years}: {before}, then {after}, so {'true' if true else 'false'}."


def practice_texts(
    documents: Sequence[str], repeated: int, sheets: int, part: str
) -> Iterator[str]:
    """Yield up to this many repeated passages, and fact sheets; of three sheets, one holds only sums.

    A document with too few sentences gives no passage. A passage can be repeated again, like a document.
    `part` names the part of the corpus: another part has other texts.
    """
    sources = list(documents)
    draw = Draw(f"{SEED} {part}")
    companies = list(company_names(draw, STARTS, ENDS, KINDS))
    for _ in range(repeated):
        text = repeated_passage(draw, draw.one(sources))
        if text is not None:
            sources.append(text)
            yield text
    for place in range(sheets):
        yield sums(draw) if place % 3 == 0 else fact_sheet(draw, companies)
