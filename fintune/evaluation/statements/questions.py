"""Hints of a question at its answer: unit, scale, time, direction, years and the figures given."""

import re
from dataclasses import dataclass

from fintune.evaluation.statements.claims import Claim, read_claims
from fintune.evaluation.statements.directions import DIRECTION
from fintune.evaluation.statements.words import content

ASKS_PER_CENT = re.compile(
    r"per ?cent|%|\brates?\b|\bmargin|\bgrowth|\byield|\breturn|\bshare of", re.IGNORECASE
)
ASKS_TIME = re.compile(
    r"how (?:many|long)(?: in)? ?(month|year|week|day|quarter|hour)s?|in (month|year|day|week)s\b",
    re.I,
)
HEADER = re.compile(
    r"\bin (?:US ?)?[$€£]? ?(?P<words>thousand|million|billion)s\b"
    r"|[$€£]['’]?(?:in )?(?P<short>000|k|thousand|mm?|mn|million|bn|billion)s?(?![0-9A-Za-z,.])",
    re.IGNORECASE,
)
RATE_ASKED = re.compile(
    r"\b(?:a|an|per|each|every) (day|week|month|quarter|hour|year)\b(?=\W*$)", re.IGNORECASE
)
FOCUS = re.compile(
    r"\b(?:what|which) (?:(?:is|was|were|are) )?(?:(?:the|its|their) )?(?P<noun>\w+)", re.IGNORECASE
)
SPENDING = re.compile(r"\b(?:used (?:in|for)|outflows?|spen[dt]|paid)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Asked:
    """The hints of a question at the figures in its answer."""

    claims: tuple[Claim, ...]
    words: frozenset[str]
    focus: frozenset[str]
    direction: int
    per_cent: bool
    scale: float
    time: str | None
    years: frozenset[int]
    rate: str | None


def scale_of(header: re.Match[str]) -> float:
    """Return the scale that a heading tells, such as "in millions" or "$000"."""
    return {"0": 1e3, "k": 1e3, "t": 1e3, "m": 1e6, "b": 1e9}[
        (header["words"] or header["short"])[0].lower()
    ]


def read_question(text: str) -> Asked:
    """Read a question in digits; of an empty one nothing is known."""
    ups = {bool(match["up"]) for match in DIRECTION.finditer(text)}
    if not ups and SPENDING.search(text):
        ups = {False}
    header, time = HEADER.search(text), ASKS_TIME.search(text)
    claims = tuple(read_claims(text))
    return Asked(
        claims,
        content(text),
        content(focus["noun"]) if (focus := FOCUS.search(text)) else frozenset(),
        0 if len(ups) != 1 else 1 if ups == {True} else -1,
        bool(ASKS_PER_CENT.search(text)),
        scale_of(header) if header else 1.0,
        (time[1] or time[2]).lower() if time else None,
        frozenset(c.quantity.date.year for c in claims if c.quantity.date and c.quantity.date.year),
        None
        if any(c.rate for c in claims) or not (rate := RATE_ASKED.search(text))
        else rate[1].lower(),
    )
