"""Invent companies and their figures: what the demo's questions and the base's practice texts share.

Each of the two has its own company names, sentence forms and seed; names of measures and the
ranges of figures are the same.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

MONEY = (
    "revenue",
    "net income",
    "operating cost",
    "cash",
    "long-term debt",
    "capital spending",
    "research spending",
    "interest expense",
    "marketing cost",
    "rent",
)
RATES = ("gross margin", "tax rate", "market share", "sales growth", "payout ratio")
COUNTS = ("headcount", "store count", "branch count", "fleet size")
MEASURES = MONEY + RATES + COUNTS


class Draw:
    """Random choices that are stable across Python versions: only `random()` guarantees its sequence."""

    def __init__(self, seed: str) -> None:
        """Start the sequence of this seed."""
        self._rng = random.Random(seed)

    def number(self, low: int, high: int) -> int:
        """Draw a number from low up to and including high."""
        return low + int(self._rng.random() * (high - low + 1))

    def one(self, options: Sequence[T]) -> T:
        """Draw one of the options."""
        return options[self.number(0, len(options) - 1)]

    def some(self, options: Sequence[T], count: int) -> list[T]:
        """Draw different places of the options, in random order."""
        left = list(options)
        return [left.pop(self.number(0, len(left) - 1)) for _ in range(count)]


@dataclass(frozen=True, order=True)
class Figure:
    """A figure in tenths of its unit: millions of dollars (`$`), percent (`%`) or pieces (empty)."""

    tenths: int
    unit: str

    @property
    def number(self) -> str:
        """The number without its unit, as a table shows it."""
        return f"{self.tenths // 10}" + (f".{self.tenths % 10}" if self.tenths % 10 else "")

    def __str__(self) -> str:
        """Write the figure with its unit."""
        return {"$": f"${self.number} million", "%": f"{self.number}%"}.get(self.unit, self.number)


@dataclass(frozen=True)
class Report:
    """A company's figures: for each measure one figure a year, years ascending."""

    company: str
    years: list[int]
    figures: dict[str, list[Figure]]


def company_names(draw: Draw, starts: str, ends: str, kinds: str) -> Iterator[str]:
    """Yield names such as `Velmora Foods` from lists of words; no first word comes twice."""
    words = [start + end for start in starts.split() for end in ends.split()]
    for word in draw.some(words, len(words)):
        yield f"{word} {draw.one(kinds.split())}"


def single_year(draw: Draw, company: str, scale: str | None = None) -> Report:
    """Draw a year's report of three or four measures, at least two of them in dollars."""
    money = draw.some(MONEY, 2)
    others = [name for name in MEASURES if name not in money]
    measures = money + draw.some(others, draw.number(1, 2))
    measures = draw.some(measures, len(measures))
    scale = scale or draw.one(("units", "tens", "hundreds"))
    figures: dict[str, list[Figure]] = {}
    for name in measures:
        figures[name] = [_figure(draw, name, scale, [f for (f,) in figures.values()])]
    return Report(company, [draw.number(1996, 2025)], figures)


def several_years(draw: Draw, company: str, scale: str | None = None) -> Report:
    """Draw a report of one to two measures in dollars for two or three years in a row."""
    first, count = draw.number(1996, 2023), draw.number(2, 3)
    scale = scale or draw.one(("units", "tens", "hundreds"))
    figures: dict[str, list[Figure]] = {}
    for name in draw.some(MONEY, draw.number(1, 2)):
        row: list[Figure] = []
        for _ in range(count):
            row.append(_figure(draw, name, scale, row))
        figures[name] = row
    return Report(company, [first + i for i in range(count)], figures)


def _figure(draw: Draw, measure: str, scale: str, taken: list[Figure]) -> Figure:
    """Draw a figure that differs from those taken."""
    while True:
        if measure in MONEY:
            low, high, step = {"units": (11, 99, 1), "tens": (11, 99, 10)}.get(
                scale, (101, 989, 10)
            )
            figure = Figure(draw.number(low, high) * step, "$")
        elif measure in RATES:
            figure = Figure(draw.number(11, 489), "%")
        else:
            figure = Figure(draw.number(12, 980) * 10, "")
        if figure not in taken:
            return figure
