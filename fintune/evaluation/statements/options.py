"""Options that a question letters: "(a) stocks (b) bonds", and the one that a text chooses."""

import re
from collections.abc import Sequence

from fintune.evaluation.statements.labels import asserted, clauses, decisive
from fintune.evaluation.statements.words import tokens

ORDINALS = ("first", "second", "third", "fourth")


def options_of(question: str) -> dict[str, str]:
    """Return the lettered options that a question names, such as {"a": "Stocks", "b": "Bonds"}."""
    marks = list(re.finditer(r"(?:^|[\s(])(?:option )?([A-Ea-e])[.):] ?", question))
    marks = [m for place, m in enumerate(marks) if m[1].lower() == "abcde"[min(place, 4)]]
    ends = [m.start() for m in marks[1:]] + [len(question)]
    found = {
        m[1].lower(): question[m.end() : end].strip(" ,;?.\n(")
        for m, end in zip(marks, ends, strict=False)
    }
    return found if len(found) > 1 else {}


def letters(text: str, known: Sequence[str]) -> set[str]:
    """Return the option letters that a text names."""
    found = {m[1].lower() for m in re.finditer(r"\(([A-Ea-e])\)|(?<=\b)([A-E])\)", text) if m[1]}
    found |= {
        m[1].lower()
        for m in re.finditer(
            r"\b(?:option|answer(?: is|:)?|choice) \W*([A-Ea-e])\b(?! [a-z])", text, re.I
        )
    }
    if match := re.match(r"\W*([A-Ea-e])(?:[.):,]|\W*$)", text):
        found.add(match[1].lower())
    found |= {
        "abcd"[ORDINALS.index(m[1].lower())]
        for m in re.finditer(
            rf"\b({'|'.join(ORDINALS)}) (?:option|choice|answer|one)\b", text, re.I
        )
    }
    found |= {
        m[1].lower() for m in re.finditer(r"\b([B-E]|A(?= (?:or|and) [B-E]\b))\b(?!['&])", text)
    }
    return {each for each in found if not known or each in known}


def letter_of(right: str, options: dict[str, str]) -> str | None:
    """Return the letter of the option that a reference names by letter or by text."""
    if match := re.fullmatch(
        r"\W*(?:option |answer |choice )?\(?([A-Ea-e])\)?[.:]?\W*", right, re.IGNORECASE
    ):
        return match[1].lower()
    match = re.match(r"\W*(?:option )?\(?([A-Ea-e])[).] ?\S", right)
    if match and (not options or match[1].lower() in options):
        return match[1].lower()
    words = tokens(right)
    return next((each for each, text in options.items() if words and tokens(text) == words), None)


def chooses(letter: str, said: str, options: dict[str, str]) -> bool:
    """Return whether an answer chooses the option of this letter, by letter or by text, and no other."""
    for part in dict.fromkeys((said, decisive(said), said.split("\n")[0])):
        named = _options_named(part, options)
        if len(named) == 1:
            return named == {letter}
    return False


def _options_named(part: str, options: dict[str, str]) -> set[str]:
    named = {
        each
        for each in letters(part, list(options) if len(options) > 1 else [])
        if not _denied(part, each)
    }
    if not named or not re.match(r"\W*[A-Ea-e]\b", part):
        heard = clauses(part)
        for each, text in options.items():
            if any(asserted(tokens(text), words) for words in heard):
                named.add(each)
    return named


def _denied(part: str, letter: str) -> bool:
    return bool(
        re.search(
            rf"(?:\bnot|n't|rather than|instead of) (?:option |answer )?\(?{letter}\b", part, re.I
        )
    )
