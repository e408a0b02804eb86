"""Comparison of the quantities that an answer states with those of a reference."""

import re
from collections.abc import Sequence
from dataclasses import replace

from fintune.evaluation.statements.claims import Claim, read_claims
from fintune.evaluation.statements.quantities import Quantity
from fintune.evaluation.statements.questions import HEADER, Asked, scale_of
from fintune.evaluation.statements.units import DAYS, DOLLARS, MONTHS

EXACT_BELOW = 1000  # a whole count or amount below this is not a rounded one
CONCLUDES = re.compile(r"(?:[.;]|, (?:so|and)) (?:[Tt]hat|[Tt]his)\b", re.IGNORECASE)
NOTHING = re.compile(r"\W*(?:none|nothing|no)\b", re.IGNORECASE)
UNDECIDED = re.compile(
    r"\b(?:could|might|may) (?:also )?be\b|\b(?:maybe|perhaps|possibly)\b", re.IGNORECASE
)
ALIKE = {"number", "money", "count", "times"}


def results(claims: Sequence[Claim], text: str, asked: Asked) -> list[Claim]:
    """Select the claims of a reference, given with its text in digits, that an answer must state.

    Operands, figures of the question and dates beside other figures are context. Of a computation the
    last result counts, of a text with a concluding word ("so", "that makes") what follows it.
    """
    chosen = [c for c in claims if not c.negated] or list(claims)
    chosen = [c for c in chosen if c.quantity.kind != "date" and "everi" not in c.words] or chosen
    chosen = [c for c in chosen if not c.operand] or chosen
    given = {_key(c) for c in asked.claims}
    chosen = [c for c in chosen if _key(c) not in given] or chosen
    written = [
        round(c.quantity.value / c.quantity.factor, 9)
        for c in chosen
        if c.quantity.kind != "number"
    ]
    chosen = [c for c in chosen if c.quantity.kind != "number" or c.quantity.value not in written]
    last = [c for c in chosen if c.sentence == chosen[-1].sentence and c.strength]
    if final := [c for c in chosen if c.strength == 3]:
        chosen = [c for c in final if c.sentence == final[-1].sentence]
    elif last and any(c.computed for c in claims):
        chosen = last[-1:]
    elif last and (begins := [m.end() for m in CONCLUDES.finditer(text)]):
        chosen = [c for c in chosen if c.quantity.start >= begins[-1]] or chosen
    return chosen


def _key(claim: Claim) -> tuple[object, ...]:
    """Return what two mentions of the same quantity have in common."""
    return claim.quantity.kind, claim.quantity.value, claim.quantity.date


def agrees(wanted: Claim, claim: Claim, asked: Asked) -> bool:
    """Return whether a claim has the wanted value, unit and sign, to the places that the reference states."""
    if wanted.rate and claim.rate and wanted.rate != claim.rate:
        return False
    if not wanted.rate and asked.rate and claim.rate not in (None, asked.rate):
        return False
    return _value_agrees(wanted.quantity, claim.quantity, asked) and _sign_agrees(
        wanted, claim, asked
    )


def comparable(one: Quantity, two: Quantity, asked: Asked) -> bool:
    """Return whether the second can be meant as a value of what the first measures."""
    if one.kind == two.kind:
        return one.kind != "count" or one.unit == two.unit
    if "date" in (one.kind, two.kind):
        return one.kind == "number" and two.date is not None and two.date.is_year
    if two.kind == "number":
        return True
    if one.kind == "number":
        if two.kind in ("percent", "points"):
            return asked.per_cent or (one.value < 1 and one.place < 1)
        return True
    return {one.kind, two.kind} == {"percent", "points"} and (one.basis or two.basis)


def _value_agrees(one: Quantity, two: Quantity, asked: Asked) -> bool:
    if not comparable(one, two, asked):
        return False
    if one.kind == "date" and one.date and two.date:
        said = two.date
        if said.year is None and len(asked.years) == 1:
            said = said._replace(year=next(iter(asked.years)))
        return said.states(one.date)
    if one.kind == two.kind == "money" and not _same_currency(one.unit, two.unit):
        return False
    readings = [two.value]
    if two.kind == "number" and one.kind in ("months", "days"):
        readings = [two.value * one.factor]
    elif one.kind == "number" and two.kind in ("months", "days"):
        readings = [two.value / ((MONTHS | DAYS)[asked.time] if asked.time else two.factor)]
    elif two.kind == "number" and not two.scaled:
        if one.kind == "percent" and two.place < 1:
            readings.append(two.value * 100)
        if one.scaled:
            readings.append(two.value * asked.scale)
    elif one.kind == "number" and two.kind == "percent" and one.value < 1.5 and one.place < 1:
        readings = [two.value / 100, two.value] if asked.per_cent else [two.value / 100]
    if one.kind in ALIKE and not one.scaled and asked.scale != 1.0 and two.scaled:
        readings.append(two.value / asked.scale)
    exact = one.place >= one.factor and not one.scaled and one.kind not in ("percent", "points")
    exact = exact and one.value / one.factor < EXACT_BELOW
    exact = exact and not (one.kind == "money" and two.place < 0.1)  # $142.86 rounds to $143
    tolerance = 0.0 if exact else one.place / 2
    return any(
        abs(r - one.value) <= tolerance * (1 + 1e-9) + 1e-9 * abs(one.value) for r in readings
    )


def _same_currency(one: str | None, two: str | None) -> bool:
    """Return whether the second may be meant where the first is wanted; a bare $ may be any dollar."""
    dollars = (two == "dollar" and one in DOLLARS) or (one == "dollar" and two == "USD")
    return one == two or None in (one, two) or dollars


def _sign_agrees(wanted: Claim, claim: Claim, asked: Asked) -> bool:
    """Compare signs: a written minus, or words such as loss and fell by, also those of the question."""
    sign, said = claim.quantity.sign, claim.direction
    negative = sign < 0 or (sign == 0 and said < 0)
    positive = sign > 0 or (sign == 0 and said > 0)
    if wanted.quantity.sign < 0:
        return negative or (not positive and asked.direction < 0)
    expected = 1 if wanted.quantity.sign > 0 else wanted.direction or asked.direction
    if negative:
        return expected < 0
    return not positive or expected >= 0


def states_all(wanted: Sequence[Claim], answer: str, asked: Asked) -> bool:
    """Return whether an answer in digits states all wanted results and concludes with none other."""
    claims = read_claims(answer)
    header = HEADER.search(answer)
    if header and asked.scale == 1.0:
        asked = replace(asked, scale=scale_of(header))
    found = [_find(each, wanted, claims, answer, asked) for each in wanted]
    chosen = [each for each in found if each is not None]
    if len(wanted) == 1 and wanted[0].quantity.value == 0 and NOTHING.match(answer):
        return True
    if len({each.place for each in chosen}) < len(
        {(w.quantity.value, w.quantity.date) for w in wanted}
    ):
        return False
    return len(wanted) == 1 or not _swapped(wanted, chosen)


def _find(
    one: Claim, wanted: Sequence[Claim], claims: Sequence[Claim], answer: str, asked: Asked
) -> Claim | None:
    """Return the claim that states a result; None if there is none, or if another one overrules it."""
    pool = [c for c in claims if comparable(one.quantity, c.quantity, asked)]
    range_wanted = one.partner is not None
    free = [c for c in pool if not c.negated and (range_wanted or not c.operand)]
    good = [
        c
        for c in free
        if agrees(one, c, asked)
        and c.bound in (0, one.bound, 0 if one.partner is None else one.partner - one.place)
        and (
            c.partner is None
            or c.partner >= len(claims)
            or any(agrees(w, claims[c.partner], asked) for w in wanted)
        )
    ]
    if len(asked.years) == 1 and (years := {c.year for c in claims}) & asked.years:
        good = [c for c in good if c.year is None or c.year in asked.years or len(years) == 1]
    if not good:
        return None
    given = {_key(c) for c in asked.claims}
    rivals = [
        c
        for c in free
        if _key(c) not in given
        and not any(agrees(w, c, asked) for w in wanted)
        and not (c.quantity.counted and c.quantity.kind != one.quantity.kind)
    ]
    if final := [c for c in (*good, *rivals) if c.strength == 3]:
        sentence = max(c.sentence for c in final)
        if stated := [c for c in good if c.strength == 3 and c.sentence == sentence]:
            return stated[-1]
        last = [c for c in free if c.strength == 3 and c.sentence == sentence]
        if not any(agrees(w, c, asked) for w in wanted for c in last):
            return None
    if rivals and len(UNDECIDED.findall(answer)) > 1:
        return None
    best = max(good, key=lambda c: (c.strength, c.place))
    used = any(c.operand and c.place > best.place and _key(c) == _key(best) for c in claims)
    step = best.computed and used
    return None if any(_overrules(c, best, step, asked) for c in rivals) else best


def _overrules(rival: Claim, best: Claim, step: bool, asked: Asked) -> bool:
    """Return whether another result of the same kind makes a matching one a mere step, or contradicts it."""
    together = rival.sentence == best.sentence
    told = together and (rival.quantity.kind == "date" or bool(rival.words_after & asked.words))
    if rival.strength == 0 and not told:
        return False
    if rival.year and rival.year != best.year and rival.year not in asked.years:
        return False
    later = rival.place > best.place
    hits, own = _shared(rival, asked, together), _shared(best, asked, together)
    if told and later and rival.strength == 0:  # "62% came from goods, the other 38% from services"
        hits += 2 * len((best.words_after - rival.words_after) & asked.words)
    if rival.contrasted and later and not best.contrasted:
        return True
    if (hits > own and (later or together or rival.strength > best.strength)) or (
        step and later and hits == own
    ):
        return True
    if rival.quantity.kind == "date" or rival.strength == 0:
        return False
    if best.strength == 2:
        if rival.strength < 2:
            return False
        same = rival.subject == best.subject or (later and rival.subject in ("it", "that", "this"))
        return same and rival.subject != "" and rival.words == best.words
    if later:
        return rival.strength >= best.strength and hits >= own
    return best.strength == 0 and rival.strength == 2 and hits >= own


def _shared(claim: Claim, asked: Asked, together: bool) -> int:
    """Count the words of the question beside a figure; within a sentence those after it tell more."""
    after = claim.words_after & asked.words if together else ()
    focus = 9 * (claim.subject in asked.focus)
    return len(claim.words & asked.words) + 2 * len(after) + focus


def _swapped(wanted: Sequence[Claim], chosen: Sequence[Claim]) -> bool:
    """Return whether results are stated of what the reference states others, by the words beside them."""
    straight = crossed = 0
    for one, said in zip(wanted, chosen, strict=True):
        for other in wanted:
            if other is not one and other.quantity.kind == one.quantity.kind:
                own, its = one.beside - other.beside, other.beside - one.beside
                straight += bool(said.beside & own and not said.beside & its)
                crossed += bool(said.beside & its and not said.beside & own)
    return crossed > straight
