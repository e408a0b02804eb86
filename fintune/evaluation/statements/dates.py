"""Dates in a text: days, months, quarters, halves and years, calendar or fiscal."""

import re
from collections.abc import Callable
from typing import NamedTuple

MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
MONTH = (
    r"(?P<month>jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?"
    r"|sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\b\.?"
)
DAY = r"(?P<day>[0-9]{1,2})(?:st|nd|rd|th)?"
YEAR = r"(?P<year>(?:19|20|21)[0-9]{2})"
SHORT_YEAR = r"(?:(?:19|20|21)[0-9]{2}|'?[0-9]{2})"
FISCAL = r"(?:(?:fiscal(?: year)?|financial year|FY|CY|calendar(?: year)?)[ -]?'?)"
OF = r"(?: of(?: the)?|,)? ?"
ORDINAL = r"(?P<ordinal>first|second|third|fourth|1st|2nd|3rd|4th)"
PATTERNS = (
    rf"\b{YEAR}-(?P<number>[0-9]{{2}})-{DAY}\b",
    rf"\b{YEAR}/(?P<number>[0-9]{{1,2}})/{DAY}\b",
    r"\b(?P<one>[0-9]{1,2})(?P<sep>[/.-])(?P<two>[0-9]{1,2})(?P=sep)(?P<year>(?:19|20|21)[0-9]{2}"
    r"|[0-9]{2})\b",
    r"(?<![0-9/])(?P<number>0?[1-9]|1[0-2])/(?P<year>(?:19|20)[0-9]{2})\b",
    rf"\b{MONTH} {DAY}\b(?![.,][0-9]{{3}}|%)(?:,? ?{YEAR})?\b",
    rf"\b{DAY}(?: day)?(?: of)?[ -]{MONTH}(?:[ ,-]{{1,2}}{YEAR}\b)?",
    rf"\b{MONTH}{OF}[ -]?{YEAR}\b",
    rf"\b(?:Q(?P<quarter>[1-4])|(?P<before>[1-4])Q|H(?P<half>[12])|(?P<half_before>[12])H)\b"
    rf"(?:{OF}[ -]?{FISCAL}?(?P<year>{SHORT_YEAR})\b)?",
    rf"\b(?P<before>[1-4])Q ?'?(?P<year>{SHORT_YEAR})\b",
    rf"\b{YEAR}[ -]?Q(?P<quarter>[1-4])\b",
    rf"\b{ORDINAL}[ -](?P<span>quarter|half)(?:{OF}{FISCAL}?{YEAR}\b)?",
    rf"\b{FISCAL}(?P<year>{SHORT_YEAR})\b(?!%)",
    rf"(?<![0-9A-Za-z$€£¥.,#+])(?<![^0-9]-){YEAR}(?![0-9A-Za-z]|[.,][0-9]|[ -]?[%€£])",
)
FOUND = [re.compile(pattern, re.IGNORECASE) for pattern in PATTERNS]


class Date(NamedTuple):
    """A date as far as it is stated; what is not stated is None."""

    year: int | None = None
    part: str | None = None  # "Q1" to "Q4", "H1" or "H2"
    month: int | None = None
    day: int | None = None

    @property
    def is_year(self) -> bool:
        """Tell whether only a year is stated."""
        return self[1:] == (None, None, None)

    def states(self, other: "Date") -> bool:
        """Return whether everything that `other` says is also said here."""
        return all(b is None or a == b for a, b in zip(self, other, strict=True))


def find_dates(text: str) -> list[tuple[int, int, Date]]:
    """Find dates; a numeric one with two readings is read month first.

    Returns:
        Start, end and date of each, in order and without overlaps.
    """
    found: list[tuple[int, int, Date]] = []
    taken = bytearray(len(text))
    for pattern in FOUND:
        for match in pattern.finditer(text):
            start, end = match.span()
            date = _read(match.groupdict().get)
            if date is None or any(taken[start:end]):
                continue
            taken[start:end] = b"\1" * (end - start)
            found.append((start, end, date))
    return sorted(found)


def _read(part: Callable[[str], str | None]) -> Date | None:
    year = int((part("year") or "0").lstrip("'"))
    year += 2000 if 0 < year < 70 else 1900 if 70 <= year < 100 else 0
    quarter, half = part("quarter") or part("before"), part("half") or part("half_before")
    if ordinal := part("ordinal"):
        place = {"f": 1, "s": 2, "t": 3}.get(ordinal[0].lower()) or ordinal[0]
        place = 4 if ordinal.lower().startswith("fo") else place
        if (part("span") or "").lower() == "half":
            half = str(place)
        else:
            quarter = str(place)
    span = f"Q{quarter}" if quarter else f"H{half}" if half in ("1", "2") else None
    month = int(part("number") or 0)
    if name := part("month"):
        month = MONTHS.index(name[:3].lower()) + 1
    day = int(part("day") or 0)
    if part("one"):
        month, day = int(part("one") or 0), int(part("two") or 0)
        if month > 12:
            month, day = day, month
    if month > 12 or day > 31 or not (year or span or month):
        return None
    return Date(year or None, span, month or None, day or None)
