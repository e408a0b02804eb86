"""Claims of a text: which of its quantities it states as results, and which are context or operands."""

import re
from bisect import bisect_right
from dataclasses import dataclass

from fintune.evaluation.statements.directions import direction_of
from fintune.evaluation.statements.quantities import Quantity, find_quantities
from fintune.evaluation.statements.words import FINAL, NOT, content, stem

SENTENCE = re.compile(r"(?<!\bInc)(?<!\bCorp)(?<!\bvs)(?<!\bapprox)(?<!\bNo)[.!?](?=\s|$)|[;\n]")
FILLER = (
    r"(?:about|around|approximately|approx\.?|roughly|nearly|almost|just|only|exactly|some|an?|the"
    r"|net|total|at|of|by|to|up|down|still|now|also|then|therefore|thus|equal|over|under|more|less"
    r"|than|negative|minus|annual|estimated|worth|precisely|slightly|well|actually|currently|say"
    r"|probably|rounded|USD|its|their|your|his|her|our)"
)
WEAK = (
    r"(?:[=≈:~→]|\b(?:(?:which|that|this) (?:is|was|equals|makes|means|gives|leaves|comes to)"
    r"|giv(?:es?|ing)|gave|leav(?:es?|ing)|left|mak(?:es?|ing)|made|yield\w*|gets?|got|brings?"
    r"|bring \w+ to|produc\w+|adds?|means?|to|of|at|by|return\w*|saves?|approximately))"
)
STRONG = (
    r"(?:\b(?:is|are|was|were|be|been|being|equals?|equal(?:led|ed)?|total(?:s|ed|led|ing)?|amount(?:s|ed"
    r"|ing)? to|c[oa]m(?:es?|ing) (?:out )?(?:to|at|in at)|st(?:ands?|ood) at|reach(?:es|ed)?|hit|earn(?:s"
    r"|ed)?|report(?:s|ed)?|post(?:s|ed)?|record(?:s|ed)?|generat(?:es|ed)|ha[ds]|have|paid|pays?|owes?"
    r"|costs?(?! of)|needs?|takes?|becomes?|(?:gr[eo]w\w*|r[io]se[sn]?|f[ae]ll\w*|dropp?\w*|climb\w*"
    r"|increas\w+|decreas\w+|declin\w+|jump\w*|improv\w+|surg\w+|reduc\w+|expand\w*|chang\w+)(?: (?:by"
    r"|to))?|raised|put|invest(?:s|ed)?|weighs?|spent|sold|bought|employ(?:s|ed)|opened|(?:\w+ed|took place"
    r"|began|became|came|c[oa]me due|went|set up|was|fell due) (?:in|on|for|at)|on)|'s)"
)
PREDICATE = [
    (strength, re.compile(rf"{verb}(?:[\s(]+{FILLER}\b)*[\s(:$]*$", re.IGNORECASE))
    for strength, verb in (
        (1, r"\b(?:which|that|this) (?:is|was|equals|makes|gives|leaves)"),
        (2, STRONG),
        (1, WEAK),
    )
]
HEAD = re.compile(rf"\W*(?!of\b)(?:{FILLER}\W+)*", re.IGNORECASE)
STATED_OF = re.compile(r" (?:is|are|was|were|had|have)\b", re.IGNORECASE)
OPERATOR = re.compile(
    r"[\s,)]*(?:[+*/×÷]|[-–](?=[ $(]|$)|x(?= )|"
    r"(?:(?!(?:is|was|are|were|and|to|of|be|ha[ds]|have)\b)[a-z]+ ){0,4}"
    r"(?:plus|minus|less(?! than)|times|multiplied by|divided by|added to|subtracted from))"
    r"(?: (?!is\b|was\b|are\b|equals\b|leaves\b|gives\b|than\b)[\w'-]+){0,6}[\s(]*",
    re.IGNORECASE,
)
VERB = r"(?!(?:is|was|were|are|to|equals|came|comes|totaled|totalled|be|reached|of)\b)"
CONTEXT = re.compile(
    r"\b(?:(?:from|between|(?<!more )(?<!less )(?<!fewer )(?<!greater )than|versus|vs\.?|against"
    r"|compared (?:with|to)|relative to|subtract\w*|deduct\w*|minus|plus|divid\w+(?: by)?"
    r"|multipl\w+(?: by)?|adding|out of|down from|up from|previously|rather than|instead of)"
    rf"(?: {VERB}[\w'$-]+){{0,2}}(?: an? (?:loss|gain|profit|decline|total) of)?|(?:versus|vs\.?"
    rf"|against|compared (?:with|to))(?: {VERB}[\w'$-]+){{0,4}} of)[\s($]*$",
    re.IGNORECASE,
)
PLANNED = (
    r"(?:due|plan|planned|scheduled|expected|supposed|meant|intended|hoped|targeted|forecast|budgeted|budget"
    r"|estimated|guidance|originally|initially|first|looks?|seems?|appears?|tempting|naive)"
)
ENDS_FINAL = re.compile(r",? ?(?:[\w ]{0,20}, )?(?:which|that) is (?:the|our) (?:answer|result)\b")
SAME_SUBJECT = re.compile(r"[\w ]*,? (?:and|but) (?:\w+ ){1,2}(?:in|on|by|at|for) (?:the )?")
PARTED = re.compile(r"[,;.](?= |$)|\b(?:and|while|whereas|but|versus|after)\b|\n")
CONTRAST = re.compile(
    rf"\b{PLANNED}\b[^.;]*\b(?:but|yet|however|though|while|whereas)\b", re.IGNORECASE
)
AFTERWARDS_ENDS = re.compile(
    r"[,.;:]| (?:and|while|whereas|but|versus)\b|(?<=\w) (?:is|are|was|were|ha[sd]|have)\b"
)
NEGATION = re.compile(
    rf"(?:{NOT}|\bcannot be)"
    r"(?: (?!only|just|but|merely|because|and)[\w'-]+){0,3}[\s(]*$",
    re.IGNORECASE,
)
REFUTED = re.compile(
    r"\?|[\w ]{0,12}? (?:is|was|would be|are|seems|looks) (?:not\b|wrong|incorrect|false|too |tempting)"
    r"|[^.;]{0,6}isn't",
    re.I,
)
BOUNDS = re.compile(
    r"\b(?P<below>less than|under|below|fewer than|at most|up to|no more than|not more than"
    r"|(?:a )?maximum of)[\s(]*$|\b(?P<above>more than|over|above|at least|exceed(?:s|ed|ing)?"
    r"|no less than|greater than|(?:a )?minimum of)[\s(]*$",
    re.IGNORECASE,
)
RATE = re.compile(
    r",? ?(?:(?:an?|per|each|every|/) ?(day|week|month|quarter|hour|year|annum|yr|mo)\b(?! (?:ago"
    r"|earlier|before|later))|(annually|yearly|monthly|weekly|daily|hourly|quarterly)\b)",
    re.IGNORECASE,
)
RATES = {
    "d": "day",
    "w": "week",
    "m": "month",
    "q": "quarter",
    "h": "hour",
    "y": "year",
    "a": "year",
}


@dataclass(frozen=True)
class Claim:
    """A quantity with what the text says of it.

    `strength`: 3 after a word that concludes (so, answer), 2 after a verb that states (is, totals) or at the
    head of the text, 1 after one that continues (=, which is, leaves), else 0. `direction` is -1 after words
    such as loss or fell by, 1 after gain or rose by. `words` stand between the last figure and this one,
    `words_after` up to the next comma, verb or figure; `beside` are those of both sides that no comma parts
    from it. `computed` follows an operator in its sentence, `contrasted` a plan or an appearance with "but";
    `rate` is the time of "a month" or "annually" after it.
    """

    quantity: Quantity
    place: int
    sentence: int
    strength: int
    operand: bool
    negated: bool
    direction: int
    bound: int
    words: frozenset[str]
    words_after: frozenset[str]
    beside: frozenset[str]
    computed: bool
    contrasted: bool
    rate: str | None
    subject: str
    year: int | None
    partner: int | None = None


def read_claims(text: str) -> list[Claim]:
    """Read the quantities of a text in digits as claims, in order."""
    found = find_quantities(text)
    breaks = [0, *(match.end() for match in SENTENCE.finditer(text))]
    figure_starts = [each.start for each in found if each.kind != "date"] + [len(text)]
    claims: list[Claim] = []
    figure_end, operand_next, computed_in = 0, False, -1
    for place, each in enumerate(found):
        sentence = bisect_right(breaks, each.start) - 1
        begin = max(breaks[sentence], each.start - 200)
        last = found[place - 1] if place else None
        following = found[place + 1] if place + 1 < len(found) else None
        lead, tail = text[begin : each.start], text[each.end : each.end + 40]
        segment = text[max(begin, last.end if last else 0) : each.start]
        gap = text[each.end : following.start][:60] if following else ""
        since = text[max(begin, figure_end) : each.start]
        until = min(figure_starts[bisect_right(figure_starts, each.start)], each.end + 60)
        context = None if each.joined else CONTEXT.search(segment[-60:])
        if (
            context and each.date and context[0].startswith("from")
        ):  # "from May 2" alone is a result
            context = re.match(r" (?:to|until|through)\b| ?[-–]", tail)
        operates = bool(following and not each.joined and OPERATOR.fullmatch(gap))
        operand = operand_next or bool(context) or operates
        share = each.kind in ("percent", "number") and re.fullmatch(
            r" of (?:the |all |its |a )?", gap
        )
        part = re.fullmatch(
            r" of (?:[a-z]+ ){1,4}of ", gap
        )  # "$1 million of total assets of $4 million"
        operand_next = operates or bool((part or share) and following and following.kind != "date")
        words = content(segment if each.date else since)
        if SAME_SUBJECT.fullmatch(segment):
            words |= content(" ".join(lead.split()[:3]))
        claims.append(
            Claim(
                each,
                place,
                sentence,
                _strength(lead, segment, tail, place == 0),
                operand,
                bool(NEGATION.search(segment[-50:]) or REFUTED.match(tail)),
                direction_of(lead, tail),
                _bound(segment, each),
                words,
                content(AFTERWARDS_ENDS.split(tail[: len(gap) if gap else None], maxsplit=1)[0]),
                content(PARTED.split(since)[-1])
                | content(PARTED.split(text[each.end : until], maxsplit=1)[0]),
                computed_in == sentence,
                bool(CONTRAST.search(lead)),
                RATES.get((rate[1] or rate[2])[0].lower()) if (rate := RATE.match(tail)) else None,
                _subject(lead),
                _year(text, found, place),
                place - 1 if last and last.joined else place + 1 if each.joined else None,
            )
        )
        if operates:
            computed_in = sentence
        if each.kind != "date":
            figure_end = each.end
    return claims


def _strength(lead: str, segment: str, tail: str, first: bool) -> int:
    if FINAL.search(lead) or ENDS_FINAL.match(tail):
        return 3
    if first and HEAD.fullmatch(lead):
        return 2
    window = segment[-60:]
    return next(
        (strength for strength, verb in PREDICATE if verb.search(window)),
        int(bool(STATED_OF.match(tail))),
    )


def _bound(segment: str, each: Quantity) -> int:
    match = BOUNDS.search(segment[-24:])
    if match is None or each.kind == "date":
        return 0
    if each.kind in ("months", "days") and re.search(r"(?:over|under)[\s(]*$", segment):
        return 0  # "over 5 years" tells a time
    return -1 if match["below"] else 1


def _subject(lead: str) -> str:
    """Return the word before the last verb that states, in lower case; empty if there is none."""
    match = re.search(
        r"([A-Za-z]+)(?: (?:in|for) (?:fiscal |FY)?[0-9]{4})? (?:of|is|was|are|were|equals"
        r"|totaled)\b[^.;]{0,30}$",
        lead,
    )
    return stem(match[1].lower()) if match else ""


def _year(text: str, found: list[Quantity], place: int) -> int | None:
    """Return the year of the date that a figure belongs to: the next one, else one just before."""
    each = found[place]
    if each.kind == "date":
        return None

    def near(one: Quantity, two: Quantity, stops: str) -> bool:
        gap = text[one.end : two.start]
        return len(gap) < 50 and not re.search(stops, gap)

    if place + 1 < len(found) and found[place + 1].kind == "date":
        date = found[place + 1]
        if date.date and near(each, date, r"[.;,(]|\bto\b|\band\b|\bthan\b"):
            return date.date.year
    if place and (before := found[place - 1].date) and near(found[place - 1], each, r"[.;]"):
        return before.year
    return None
