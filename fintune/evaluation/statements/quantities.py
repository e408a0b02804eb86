"""Quantities in a text: amounts of money, per cents, durations, counts, plain numbers and dates."""

import re
from dataclasses import dataclass, replace

from fintune.evaluation.statements.dates import Date, find_dates
from fintune.evaluation.statements.numerals import read_numeral
from fintune.evaluation.statements.units import (
    AFTER,
    BEFORE,
    COUNTS,
    CURRENCIES,
    DAYS,
    GLUED,
    MONTHS,
    NUMBER,
    SCALE,
    SCALES,
    UNIT,
)

# numbers that are part of a name: Form 1040, S&P 500, 401(k), 10-K, Note 7
NAMED_BEFORE = re.compile(
    r"(?:S&P|Russell|FTSE|Fortune|Nasdaq|Nikkei|DAX|CAC|Stoxx|Dow|Level|Note|Form|Section|Sec\."
    r"|Page|p\.|Item|ASC|ASU|IFRS|IAS|SFAS|FAS|Topic|Step|Part|Table|Figure|Chapter|Rule|Article"
    r"|Schedule|Tier|Phase|Exhibit|Class|Series|Title|Boeing|Basel|No\.) ?-?$",
    re.IGNORECASE,
)
COUNTED = re.compile(
    r" (?!(?:in|for|of|and|or|to|as|is|was|are|were|after|before|per|an?|the|which|so|by|on|at|from|because"
    r"|since|with|more|less|if|when|but|not|rather|higher|lower|up|down|over|compared|versus|vs|each"
    r"|that)\b)[a-z]+"
)
NAMED_AFTER = re.compile(
    r" ?\([a-z]\)|k (?:plan|account)|-[KQF]\b|b plan|(?:st|nd|rd|th)\b"
    r"|/[0-9]+\b(?! ?[=+*×÷)]| of\b)|:(?!1\b)[0-9]|[A-Za-z]{2,}[0-9]"
    r"| (?:decimal|significant)\b|[A-Za-z]*_|(?i: plan| portfolio| rule| split)\b"
)
MARKER = re.compile(r"(?:^|\n) ?(?:\(?[0-9]{1,2}[.)]|step [0-9]+:) (?=\S)", re.IGNORECASE)
RANGE = re.compile(r" ?(?P<dash>-|–) ?| (?P<to>(?:up )?to|through|until|till) | (?P<and>and) ")
SPANNING = re.compile(
    r"(?:\b(?:rang|vari|anywhere|span|somewhere)\w*(?: \w+)? |^\W*|\b(?:is|are|be|was|were|expects?"
    r"|takes?|lasts?) )from\W*$",
    re.IGNORECASE,
)
CASE = re.compile(
    r" (?:for|if|when|where)\b"
)  # "$7,000, or $8,000 for those over 50" names two cases
LISTED = 3
COMPUTED = re.compile(r"[ )]*(?:[=*/×÷+≈]|(?:is|equals|gives|leaves|makes)\b)")
ALTERNATIVE = re.compile(
    r",? ?(?:\bor\b|/)(?: (?:maybe|perhaps|possibly|even|else|it is|it's))*:? ?", re.I
)


@dataclass(frozen=True)
class Quantity:
    """A quantity as written: `value` in the basic unit of its `kind`, `place` the worth of its last digit.

    Kinds: money, percent, points (also of basis points, then `basis` is true), months, days, times, count,
    number, date. `unit` is a currency or a counted thing. `sign` is -1 or 1 where one is written, else 0.
    """

    start: int
    end: int
    kind: str
    value: float = 0.0
    place: float = 1.0
    unit: str | None = None
    sign: int = 0
    scaled: bool = False
    basis: bool = False
    counted: bool = False  # a plain number before a word that it counts: "2 prices"
    date: Date | None = None
    factor: float = 1.0  # basic units in one written unit: 1e6 for "4.2 million", 12 for "2 years"
    joined: int = 0  # 1: the first of a range, 2: of an alternative


def find_quantities(text: str) -> list[Quantity]:
    """Find the quantities of a text in digits (see `with_digits`), in order and without overlaps."""
    dates = [
        each for each in find_dates(text) if not (each[2].is_year and _measures(text, each[1]))
    ]
    covered = bytearray(len(text) + 1)
    for start, end, _ in dates:
        covered[start:end] = b"\1" * (end - start)
    markers = [m.span() for m in MARKER.finditer(text)]
    for start, end in markers if len(markers) > 1 else []:
        covered[start:end] = b"\1" * (end - start)
    glued = {match.end() for match in GLUED.finditer(text)}
    found = [Quantity(s, e, "date", float(d.year or 0), date=d) for s, e, d in dates]
    position = 0
    starts = sorted(glued | {match.start() for match in NUMBER.finditer(text)})
    for start in starts:
        if start < position or covered[start]:
            continue
        match = NUMBER.match(text, start) or NUMBER.match(text[start : start + 60])
        if match is None:
            continue
        end = start + len(match[0])
        if quantity := _read(text, start, end, match):
            found.append(quantity)
            end = quantity.end
        position = end
    found.sort(key=lambda each: each.start)
    return _compound(text, _propagated(text, found))


def _measures(text: str, end: int) -> bool:
    """Return whether a unit follows directly: "2024 shares" tells no year."""
    if unit := UNIT.match(text, end):
        return unit.lastgroup not in COUNTS or unit[0].strip(" -").count(" ") == 0
    scale = SCALE.match(text, end)
    return bool(AFTER.match(text, end) or (scale and scale["word"]))


def _currency(match: re.Match[str] | None) -> str | None:
    return next((c for c in CURRENCIES if match and match[c]), None)


def _read(text: str, start: int, end: int, match: re.Match[str]) -> Quantity | None:
    """Read a number with what stands before and after it; None if it is part of a name."""
    window = text[max(0, start - 24) : start]
    before = BEFORE.search(window)
    opened = bool(before and (before["open"] or before["inner"]))
    closed = opened and text[end : end + 1] == ")"
    end += closed
    tail = text[end : end + 40]
    if (
        match[0] == "000"
        or NAMED_BEFORE.search(text[max(0, start - 10) : start])
        or NAMED_AFTER.match(tail)
    ):
        return None
    value, place = read_numeral(match[0][: len(match[0]) - len(match["power"] or "")])
    if match["power"]:
        value, place = (
            float(f"{v:.17g}") * float(f"1e{match['exponent']}") for v in (value, place)
        )
    currency, scaled, factor = _currency(before), False, 1.0
    if scale := SCALE.match(tail):
        name = (scale["word"] or scale["header"] or scale["letter"] or scale["spaced"]).lower()
        if not scale["spaced"] or currency:
            scaled, factor = True, SCALES[name]
            end += scale.end()
            tail = text[end : end + 40]
    kind, unit, basis = "number", None, False
    if after := UNIT.match(tail):
        kind = str(after.lastgroup)
        if kind == "bps":
            kind, basis, factor = "points", True, factor / 100
        elif kind == "permille":
            kind, factor = "percent", factor / 10
        elif kind == "money":
            unit = "GBP" if after["money"].lower().startswith("p") else None
            factor /= 100
        elif kind == "duration":
            word = after["duration"].lower()
            kind = "days" if word in DAYS else "months"
            factor *= DAYS.get(word) or MONTHS[word]
        elif kind in COUNTS:
            kind, unit = "count", kind
        end += after.end() if not (currency and kind == "count") else 0
    elif after := AFTER.match(tail):
        kind, unit = "money", _currency(after)
        end += after.end()
    if currency and kind in ("number", "count"):
        kind, unit = "money", unit if kind == "money" and unit else currency
    begin = start - len(before[0].lstrip()) if before else start
    if opened and not closed and text[end : end + 1] == ")":
        closed, end = True, end + 1
    if (sign := _sign(text, begin, before, closed)) == 0:
        begin = start - len(window) + before.start(currency) if before and currency else start
    counted = kind == "number" and not factor > 1 and bool(COUNTED.match(text, end))
    read = Quantity(begin, end, kind, value, place, unit, sign, basis=basis, counted=counted)
    return _times(read, factor, scaled)


def _sign(text: str, begin: int, before: re.Match[str] | None, closed: bool) -> int:
    """Return the written sign: of a minus, or of parentheses where an amount is expected."""
    if before is None:
        return 0
    earlier = text[max(0, begin - 16) : begin].rstrip()
    said = re.search(r"(?:^|[$€£:=]|\b(?:is|was|were|are|of|to|at|be|by|or|and|from))$", earlier)
    if closed and (before["inner"] or said):
        return -1
    sign = (before["sign"] or before["sign2"] or "").strip()
    spaced = (before["sign"] or "").endswith(" ")
    binary = re.search(r"(?:[0-9%)€£$]|[0-9] ?(?:[a-z%]+|[A-Z]{1,3}))$", earlier)
    if before["word"]:
        return 0 if binary else -1
    if (
        not sign
        or binary
        or spaced
        or (sign == "–" and earlier[-1:].isalnum() and text[begin - 1] != " ")
    ):
        return 0
    if earlier[-1:].isalnum() and text[begin - 1 : begin] != " ":
        return 0
    return 1 if sign == "+" else -1


def _propagated(text: str, found: list[Quantity]) -> list[Quantity]:
    """Mark ranges and alternatives, and give both of their ends the unit that one of them has."""
    for place in reversed(range(len(found) - 1)):
        one, two = found[place], found[place + 1]
        gap = text[one.end : two.start]
        if len(gap) > 30:
            continue
        join = _join(text, one, two, gap)
        if not join or (one.kind == "date") != (two.kind == "date"):
            continue
        ratio = two.kind == "percent" and one.value < 1 < two.value  # "0.157, or 15.7%"
        if (one.kind == "number" and not ratio) or (
            one.kind == "money" and two.scaled and one.value < 1000
        ):
            if one.factor == 1.0:
                one = _times(one, two.factor, two.scaled)
            if one.kind == "number":
                one = replace(one, kind=two.kind, unit=two.unit, basis=two.basis)
        if two.kind == "number" and one.kind == "money":
            two = replace(two, kind=one.kind, unit=one.unit)
        if (
            join == 1 and one.kind == two.kind
        ):  # "$1.5 to $2 million" has one decimal place at both ends
            one, two = (replace(q, place=min(one.place, two.place)) for q in (one, two))
        found[place], found[place + 1] = replace(one, joined=join % LISTED), two
    return found


def _join(text: str, one: Quantity, two: Quantity, gap: str) -> int:
    """Return 1 if two neighbours are ends of a range, 2 if alternatives, LISTED if in a list, else 0."""
    enumerated = one.kind == two.kind != "date" and re.fullmatch("[,;]? ", gap)
    if (gap.startswith(", or") and CASE.match(text, two.end)) or (
        "/" in gap and COMPUTED.match(text, two.end)
    ):
        return 0
    if "/" in gap and one.kind == two.kind == "number":
        return 0
    if ALTERNATIVE.fullmatch(gap) or (enumerated and (one.place <= two.place or one.scaled)):
        return 2
    before = text[max(0, one.start - 40) : one.start].rstrip().lower()
    listed = re.fullmatch(r",? and |, ", gap) and one.kind == "number"
    if listed and not (one.counted or one.scaled or before.endswith("between")):
        return LISTED if two.kind != "count" or gap != ", " else 0
    if not (match := RANGE.fullmatch(gap)):
        return 0
    if match["and"]:
        return int(
            re.search(r"(?<!gap )(?<!difference )(?<!spread )\bbetween$", before) is not None
        )
    if match["to"]:
        return int(not before.endswith("from") or bool(SPANNING.search(before)))
    return int(not COMPUTED.match(text, two.end))


def _times(one: Quantity, factor: float, scaled: bool) -> Quantity:
    """Return the quantity in a larger unit."""
    value, place = one.value * factor, one.place * factor
    return replace(one, value=value, place=place, factor=one.factor * factor, scaled=scaled)


def _compound(text: str, found: list[Quantity]) -> list[Quantity]:
    """Add up amounts in two units: 1 year and 6 months, 5 dollars and 25 cents."""
    result: list[Quantity] = []
    for each in found:
        last = result[-1] if result else None
        if (
            last
            and last.kind == each.kind
            and each.kind in ("months", "days", "money")
            and not (last.joined or last.scaled or each.scaled)
            and last.place > each.place
            and each.value < (last.place if each.kind != "money" else 1)
            and re.fullmatch(r"(?:,? and|,)? ", text[last.end : each.start])
            and (each.kind != "money" or each.unit in (None, last.unit))
        ):
            result[-1] = replace(
                last, end=each.end, value=last.value + each.value, place=each.place
            )
        else:
            result.append(each)
    return result
