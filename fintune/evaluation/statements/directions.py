"""Words that give a figure a sign: a loss of, fell by, 5% higher."""

import re

from fintune.evaluation.statements.numerals import last_match

DOWN = (
    r"outflows?|used(?: net)? cash|loss(?:es)?|los[te]s?|deficits?(?! (?:is|was)\b)|overdrawn|overdrafts?"
    r"|decreas\w+|declin\w+|fell|falls?|fallen|falling|drop\w*|down(?! payment)|reduc\w+|lower(?:ed)?"
    r"|shr[aiu]nk\w*|contract(?:ed|ion)|slipped|slid|shortfall|plunged|negative|less|fewer|weaker|cut"
)
UP = (
    r"profits?|raised|credit balance|gain\w*|income|earnings|surplus|increas\w+|r[io]se[sn]?|rising|grew"
    r"|grow\w*|up|higher|climb\w*|jump\w*|improv\w+|positive|surged?|soared|more|expanded|made money"
)
DIRECTION = re.compile(rf"\b(?:(?P<down>{DOWN})|(?P<up>{UP}))\b", re.IGNORECASE)
BETWEEN = re.compile(
    r"(?:[\s(,:$]|\b(?:of|by|was|is|were|are|be|about|around|approximately|roughly|nearly|almost|just|only"
    r"|exactly|an?|the|its|their|rates?|net|in|for|full|year|quarter|fiscal|ended|some|over|more|than"
    r"|total(?:ed|led|ing)?|FY[0-9]*|Q[1-4]|[0-9]{4}|per (?:basic |diluted |ordinary |common )?share|came"
    r"|comes|amount(?:s|ed) ?|equal(?:s|ed)?|stood at|value|revenue|sales|-)\b)*",
    re.IGNORECASE,
)
AFTERWARDS = re.compile(
    rf" (?:\w+ )?(?:(?P<down>{DOWN}|in the red)|(?P<up>{UP}))\b"
    rf"(?! from operations| than| the\b| its\b| your\b)",
    re.I,
)


def direction_of(lead: str, tail: str) -> int:
    """Return -1 or 1 if the words around a figure make it a fall or a rise, a loss or a gain, else 0.

    Args:
        lead: its sentence up to the figure.
        tail: what follows it.
    """
    last = last_match(DIRECTION, lead[-80:])
    if last and BETWEEN.fullmatch(lead[-80:][last.end() :]):
        if last["up"] and last["up"].lower() in ("more", "up") and lead.rstrip().endswith("than"):
            return 0
        if re.search("(?:lower|higher|more|less):", lead[-80:]):
            return 0
        if last["down"] and last["down"].lower() in ("less", "fewer"):
            return 0
        return -1 if last["down"] else 1
    if after := AFTERWARDS.match(tail):
        return -1 if after["down"] else 1
    return 0
