"""Results in words: yes and no, directions, ratings, options of a question, names and short phrases."""

import re
from collections.abc import Sequence

from fintune.evaluation.statements.numerals import last_match
from fintune.evaluation.statements.words import FINAL, STOP, content, tokens

LABELS: dict[str, dict[str, str]] = {
    "direction": {
        "up": r"increas\w*|r[io]se[sn]?|rising|gr[eo]w\w*|growth|up(?!on)|higher|climb\w*|jump\w*"
        r"|gain\w*|surg\w+|soar\w*|improv\w+|expand\w*|appreciat\w+|upwards?|larger|bigger|greater|better|stronger",
        "down": r"decreas\w*|declin\w*|f[ae]ll\w*|drop\w*|down(?:wards?)?|lower\w*|shr[aiu]nk\w*|reduc\w+"
        r"|slid|slip\w*|plung\w+|contract(?:ed|ion|s)|deteriorat\w+|depreciat(?:ed|es)|fewer|cut|smaller|worsen\w*"
        r"|weaken\w*|worse|weaker",
        "same": r"neither \w+ nor|unchanged|flat|constant|stable|steady|no change|the same"
        r"|not change|(?:did|do|does|wo|would|has|have)n't changed?|did not move|stay\w* (?:where|as)|level",
    },
    "sentiment": {
        "positive": r"positiv\w+|bullish|optimistic|favou?rable|upbeat",
        "negative": r"negativ\w+|bearish|pessimistic|unfavou?rable|downbeat",
        "neutral": r"neutral",
    },
    "rating": {
        "buy": r"buy(?:ing)?|bought|purchase",
        "sell": r"sell(?:ing)?|sold",
        "hold": r"hold(?:ing)?|keep",
    },
    "decision": {
        "yes": r"approv\w+|accept\w*|grant(?:ed|s)?",
        "no": r"den(?:y|ies|ied)|reject\w*|refus\w+|turned down|declin\w+",
    },
}
OPPOSITES = (
    ("profit", "loss"), ("premium", "discount"), ("debit", "credit"), ("long", "short"),
    ("asset", "liability"),
    ("surplus", "deficit"), ("call", "put"), ("fixed", "variable"), ("fixed", "floating"), ("debt", "equity"),
    ("overvalued", "undervalued"), ("better", "worse"), ("revenue", "expense"), ("direct", "indirect"),
    ("current", "noncurrent"), ("inflow", "outflow"), ("pass", "fail"), ("beat", "miss"), ("exceed", "miss"),
    ("above", "below"), ("meet", "miss"), ("accept", "reject"), ("approve", "reject"), ("win", "lose"),
)  # fmt: skip
YES = (
    r"yes|[ty](?=\W*$)|yeah|yep|yup|true|correct|right|indeed|affirmative|certainly|definitely|absolutely"
    r"|of course|sure|agreed|accurate|valid|exactly"
)
NO = (
    r"no|inaccurate|invalid|(?:an? )?(?:common )?(?:myth|misconception|error|fallacy)|[nf](?=\W*$)"
    r"|nope|false|incorrect|wrong|negative|never|untrue|hardly"
    r"|not (?:true|correct|right|accurate|valid|really|at all|necessarily)"
)
LEADING = re.compile(
    rf"\W*(?:(?:well|generally|usually|typically|in general|in most cases|most likely|likely"
    rf"|probably|basically),? |(?:the |my |final |short |correct )*answer(?: is|:)?:? "
    rf"|(?:i would say|i'd say|i think|in short),? |(?:that|this|it|(?:the|that|this) (?:claim"
    rf"|statement|sentence|assertion))(?:'s| is| was) )*\W*(?:(?P<no>{NO})|(?P<yes>{YES}))\b(?!-)",
    re.IGNORECASE,
)
SAID = re.compile(
    r"(?:\b(?:answer|so|therefore|thus|hence|conclusion)\b(?:,| is| would be|:|\W){0,4}"
    r"|(?<=\w): (?=\w+\W*$))(?:(?P<no>no|false|incorrect)|(?P<yes>yes|true|correct))(?=\W*$|[,.;:!\n])",
    re.IGNORECASE,
)
HOLDS = re.compile(
    r"\b(?:claim|statement|assertion|sentence|it|that) (?:holds|stands|(?P<no>fails"
    r"|(?:does not|doesn't) (?:hold|stand)))(?=\W*$|[.,;])",
    re.IGNORECASE,
)
SHORT_YES = re.compile(
    r"\W*(?:(?:it|they|he|she|we|you|that|this|the \w+) (?:(?:certainly|surely|definitely|indeed) )?"
    r"(?:did|does|do|was|were|is|are|has|have|had|can|will|would|could|should|must|may)"
    r"(?: indeed)?(?=\W*$|[.,;:])|i (?:think|believe|guess|suppose) so\b)",
    re.IGNORECASE,
)
PAIR = re.compile(
    r"\b(?:which|what|who)(?: one| figure| year)? of ([^,.;?]{1,60}?) and ([^,.;?]{1,60}?)"
    r" (?:is|was|are|were|has|had|shows?|grew|fell|rose|paid|pays|earned)\b"
    r"|\b(?:of|between) ([^,.;?]{1,60}?) and ([^,.;?]{1,60}?),? (?:which|what|who)\b",
    re.IGNORECASE,
)
NEGATIVE = re.compile(
    r"\b(?:not(?! only)|cannot|never|nor|without|neither|none|no longer|failed to|unable to)\b|n't\b|\bno\b"
    r"|\b(?:un(?:profitable|likely|able|taxed|secured|affected|changed)|non-?deductible|insolvent"
    r"|ineligible)\b",
    re.IGNORECASE,
)
DENIED = re.compile(
    r"(?:\bnot|n't|\bnever|\brather than|\binstead of|\bneither|\bnor|\bno longer|\bunlike|\bnot from"
    r"|\bthan|\bversus|\bvs\.?"
    r"|\bcompared (?:to|with)|\bagainst|\bformerly|\bpreviously|\bexcept|\bover|\bno|\bwithout|\bfailed to)"
    r"(?: (?!only|but|just|and|so|,)[\w'&-]+){0,3} ?$"
    r"|\b(?:out of|away from|left|after|replac\w*|succeed\w*) $"
)
DENIED_AFTER = re.compile(
    r" ?(?:was|is|were|are|did|doe?s?|has|would|would be)(?: not\b|n't\b| wrong| incorrect)|isn't|wasn't"
    r"| ?(?:was|were|has been|had been) (?:replac|succeed)| ?(?:had )?(?:resign|stepp? down|retir)"
    r"| ?(?:until|before it|before moving)\b"
)
SIDE = re.compile(
    r"\b(?:because|since|although|though|despite|while|whereas|due to|as a result of|even though"
    r"|but only|when(?:ever)?|if|once|as(?! well))\b",
    re.I,
)
HEDGE = re.compile(
    r"\b(?:yes and no|it depends|depends on|maybe|perhaps|hard to say|cannot (?:say|tell)|can't (?:say"
    r"|tell))\b",
    re.I,
)
UN = ("un", "il", "in", "im", "non", "dis")
MOVED = re.compile(
    r"\b\w+ (?:(?:has|have|had|will|would|did|does|should|also|generally|usually|typically"
    r"|tend to) )*(?:increased?|increases|r[io]se[sn]?|gr[eo]ws?|grown|f[ae]lls?|fallen|declined?"
    r"|declines|decreased?|decreases|drop(?:s|ped)?|climb(?:s|ed)|jumped|improved?|worsen(?:s|ed)"
    r"|improves|w[eo]nt (?:up|down)|go(?:es)? (?:up|down)|not change|(?:is|was|are|were|be|gets?"
    r"|got|becomes?|became|stay(?:s|ed)?|remain(?:s|ed)?) (?:\w+ )?(?:higher|lower|up|down"
    r"|unchanged|flat|stable|constant|the same|larger|smaller|greater))\b|\b(?:an?|the) (?:increase"
    r"|decrease|rise|fall|decline|drop)\b(?! in the)|\bno change\b",
    re.IGNORECASE,
)
CLAUSE = re.compile(r"[.;!?\n]|, (?:so|but|and|while|whereas)\b|\bbut\b")


def decisive(text: str) -> str:
    """Return the part of an answer after its last concluding word; all of it if there is none."""
    last = last_match(FINAL, text)
    return text[last.start() :] if last and len(text) - last.end() > 1 else text


def polarity(text: str, question: str = "") -> bool | None:
    """Return True for yes, False for no, None where the text says neither or both."""
    if HEDGE.search(text):
        return None
    if said := last_match(SAID, text) or LEADING.match(text):
        rest = text[said.end() :]
        if re.match(r" (?:and|or)(?:/or)? (?:yes|no)\b", rest, re.I):
            return None
        return said["yes"] is not None and not re.match(r"\W{0,2} ?not\b", rest, re.IGNORECASE)
    if held := HOLDS.search(text):
        return held["no"] is None
    first = main_clause(re.split(r"[.;\n]", text.strip(), maxsplit=1)[0])
    if SHORT_YES.match(text):
        return True
    if NEGATIVE.search(first) and "unchanged" not in first:
        return False
    if not question:
        return None
    asked = stated_labels(question, "direction")
    if len(asked) == 1 and (said_now := stated_labels(first, "direction")):
        return said_now == asked
    heard, about = set(tokens(first)), set(tokens(question))
    for pair in OPPOSITES:
        for one, other in (pair, pair[::-1]):
            one, other = tokens(one)[0], tokens(other)[0]
            asks = any(word.startswith(one) for word in about) and other not in about
            if asks and (one in heard) != (other in heard):
                return one in heard
    last_words = [w for w in tokens(question) if len(w) > 2 and w not in STOP][-2:]
    if any(h.startswith(prefix + w) for h in heard for w in last_words for prefix in UN):
        return False
    stems = {w[:5] for w in heard}
    return True if last_words and all(w[:5] in stems for w in last_words) else None


def main_clause(text: str) -> str:
    """Return a sentence up to its first clause of reason, contrast or condition, or after a leading one."""
    if SIDE.match(text.lstrip()) and "," in text:
        text = text.partition(",")[2]
    return SIDE.split(text, maxsplit=1)[0]


def label_of(text: str) -> tuple[str, str] | None:
    """Return the group and the label of a short text that is one, such as ("direction", "up")."""
    words = re.findall(r"[\w'-]+", text)
    for group, names in LABELS.items():
        said = stated_labels(text, group)
        if len(said) == 1 and (len(words) <= 2 or (group == "direction" and len(words) <= 9)):
            name = next(iter(said))
            exact = re.fullmatch(rf"\W*(?:(?:an?|the) )?(?:{names[name]})\W*", text, re.I)
            if exact or (group == "direction" and MOVED.search(text)):
                return group, name
    return None


def stated_labels(text: str, group: str) -> set[str]:
    """Return the labels of a group that a text asserts in its main clauses; denied ones do not count."""
    found = set()
    text = text.lower()
    for name, pattern in LABELS[group].items():
        for match in re.finditer(rf"\b(?:{pattern})\b", text):
            if name == "same" or not DENIED.search(
                text[max(0, match.start() - 50) : match.start()]
            ):
                found.add(name)
    if "same" in found and group == "direction":
        return {"same"}
    return found


def states_label(group: str, name: str, answer: str, question: str = "") -> bool:
    """Return whether an answer asserts this label of a group and no other of what the question is about."""
    said: set[str] = set()
    for part in (answer, decisive(answer), main_clause(answer)):
        said = stated_labels(part, group)
        if len(said) == 1:
            return said == {name}
    subject = content(main_clause(re.split(r"[.;\n] ", question.strip())[-1]))
    for part in (
        []
        if group != "direction"
        else reversed(re.split(r"[.;:,!?\n]|\b(?:but|while|whereas|so|and|as)\b", answer))
    ):
        if content(part) & subject and len(said := stated_labels(part, group)) == 1:
            break
    return said == {name}


def rivals(question: str, wanted: Sequence[str]) -> list[list[str]]:
    """Return what a question offers beside the wanted words: "a premium or a discount?", in words."""
    if (pair := PAIR.search(question)) and wanted:
        both = [tokens(part) for part in pair.groups() if part]
        if list(wanted) in both:
            return [each for each in both if each != list(wanted)]
    head, found, last = question.rpartition(" or ")
    if not found or not wanted:
        return []
    size = len(wanted)
    after = tokens(re.split(r"[?.;]", last, maxsplit=1)[0])
    parts = [tokens(part) for part in re.split(r"[,:;?]", head) if tokens(part)]
    before = [part for part in parts[1:] or parts if len(part) <= 8 or part is parts[-1]]
    if list(wanted) == after[:size] or list(wanted) == after[-size:]:
        others = before
    elif any(list(wanted) == part[-size:] or list(wanted) == part[:size] for part in before):
        others = [
            after,
            after[:size],
            *(p for p in before if list(wanted) not in (p[-size:], p[:size])),
        ]
    else:
        return []
    return [
        each
        for part in others
        for each in (part, part if part is after else part[-size:])  # its last word may be shared
        if each and each != list(wanted)
    ]


def asserted(phrase: Sequence[str], words: Sequence[str]) -> bool:
    """Return whether a phrase occurs in normalised words without being denied or compared with."""
    size = len(phrase)
    for place in range(len(words) - size + 1) if size else ():
        if words[place] == phrase[0] and list(words[place : place + size]) == list(phrase):
            before = " ".join(words[max(0, place - 5) : place])
            after = " ".join(words[place + size : place + size + 3])
            left = (
                "from" in words[max(0, place - 3) : place]
                and "to" in words[place + size : place + size + 4]
            )
            if (
                not left
                and not DENIED.search(before + " " if before else "")
                and not DENIED_AFTER.match(after)
            ):
                return True
    return False


def clauses(text: str) -> list[list[str]]:
    """Return a text's clauses in normalised words."""
    return [found for part in CLAUSE.split(text) if (found := tokens(part))]


def opposites(phrase: Sequence[str]) -> list[list[str]]:
    """Return the phrases with a word exchanged for its opposite."""
    found = []
    for pair in OPPOSITES:
        for one, two in (pair, pair[::-1]):
            if (token := tokens(one)) and len(token) == 1 and token[0] in phrase:
                found.append([tokens(two)[0] if w == token[0] else w for w in phrase])
    return found
