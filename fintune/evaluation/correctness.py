"""Right answers: whether an answer states the result of its reference."""

import re
from dataclasses import dataclass, field
from functools import lru_cache

from fintune.evaluation.statements import labels
from fintune.evaluation.statements.claims import Claim, read_claims
from fintune.evaluation.statements.comparison import results, states_all
from fintune.evaluation.statements.numerals import last_match, plain, with_digits
from fintune.evaluation.statements.options import chooses, letter_of, options_of
from fintune.evaluation.statements.questions import Asked, read_question
from fintune.evaluation.statements.words import content, tokens

LONG = 25  # words; a longer reference is checked if it marks its result
FACT_WORDS = 6
NAMING_WORDS = 12  # of a sentence that names someone or something: "The CEO is Tim Cook."
BESIDE = 8  # words beside figures that no verb connects with them
MARKED = re.compile(
    r"####[ ]*(?P<hash>[^\n]+)|\b(?:final answer|answer|result)(?: is)? ?: *(?P<colon>[^\n]+)"
    r"|\bthe (?:final |correct |right )?(?:answer|result) is:? (?P<said>[^\n]+)"
    r"|[^=\n]= *(?P<equals>[^=\n]{1,60})$",
    re.IGNORECASE,
)
YES_NO = re.compile(
    r"\W*(?:(?P<yes>yes|true|correct)|(?P<no>no|false|incorrect|not true))"
    r"(?=\W*$|[,.;:!]| [-–]|\n| (?:it|they|he|she|we|you|because|the|this|that|since|as)\b)",
    re.IGNORECASE,
)
IMPERATIVE = re.compile(
    r"\W*(?:always|never|please|first|then|also|so|just|instead|if|when|unless|before|only)?,? ?(?:do not"
    r"|don't|save|spend|keep|put|pay|invest|buy (?!\W*$)|sell (?!\W*$)|hold (?!\W*$)|consider|use|try|avoid"
    r"|set|start|make|take|open|build|aim|check|review|ask|look|do|contribute|compare|wait|diversify|spread"
    r"|track|cut|stop|begin|choose|pick|get|give|go|find|talk|consult|speak|read|move|refinance|negotiate"
    r"|list|write|multiply|divide|subtract|add|remember|think|learn|focus|file|claim|limit|budget|automate"
    r"|borrow|calculate|increase (?:your|the)|reduce (?:your|the)|lower your|leave|split|plan|let|work|shop"
    r"|rebalance|stay|stick|treat|know|be|follow|apply|report your|max|prioriti[sz]e|transfer|withdraw|hire"
    r"|meet|insure|automate|donate|cancel|deposit|convert|prefer|seek|visit|download|sign|leave)\b(?!:)",
    re.IGNORECASE,
)
ADVICE = re.compile(
    r"^\W*(?:if|unless|when|once) you\b|\b(?:should|ought|recommend\w*|suggest\w*|advis\w+|consider"
    r"|aim|make sure|need to(?! \w+ [$€£]?[0-9])|have to|better to|might|it depends|depends on"
    r"|i would|i'd|rule of thumb|experts?|worth (?:it|doing|considering)|in my opinion|i think"
    r"|i believe|good|great|bad idea|most people|probably|maybe|perhaps|personally|may want|often"
    r"|it varies|may vary|tends? to|differs?|in most cases|no idea|not sure)\b",
    re.IGNORECASE,
)
VERB = re.compile(
    r"\b(?:is|are|was|were|be|been|should|can|could|will|would|may|might|must|has|have|had|do|does|did"
    r"|need\w*|want\w*|helps?|makes?|depends?|you|i|we|it|they|because|if|when|means|tends?|offers?|allows?"
    r"|gives?|requires?|lets?|represents?|protects?|carry|carries|owns?|provides?|spreads?|comes?|goes"
    r"|keeps?|varies|vary|includes?|refers?|earns?|pays|simply|matters?|a lot)\b",
    re.IGNORECASE,
)
NAMED = re.compile(
    r"\b(?:is|was|are|were|in|by|called|named) (?:the )?(?P<name>[A-Z][\w&.'-]*(?: (?:of |and "
    r"|the )?[A-Z][\w&.'-]*){0,4})\W*$"
)
CORRECTION = re.compile(
    r"(?:[,;:.–!?-]|\.\.\.|\n) ?(?:(?:oh|oops|hmm|ah),? )?(?P<new>(?:no|wait|sorry|correction|scratch that"
    r"|make that|i mean|i meant|or rather|rather|let me correct(?: that| myself)?|on second thoughts?"
    r"|my mistake|actually|i made an? (?:error|mistake)|i was wrong)(?:,|:|;| –| -|\.|!| (?=no\b|it is|it's"
    r"|it was|that is|that's|i mean|make that|actually|sorry|the answer|[$€£]?[0-9])))",
    re.IGNORECASE,
)
LARGER = "larger|higher|greater|bigger|more|largest|highest|greatest|biggest|most"
SMALLER = "smaller|lower|less|lesser|fewer|smallest|lowest|least|fewest"
ASKS_MORE = re.compile(
    r"\band,? (?:if|by|for|at|on|in|to|how|what|when|which|who)\b|\bif (?:so|not),"
)
FACTUAL_SHOULD = re.compile(
    r"\bshould (?!i\b|you|we\b|one\b|my|your|people|someone)", re.IGNORECASE
)
ORDINAL = re.compile(
    r"\b(?:the )?(?:(?P<one>former|first)|(?P<two>latter|second))"
    r"(?: one| option| choice| of (?:the two|these|them))?"
    r"(?=\W*$|[.,;]| (?:is|was|has|had|costs?)\b)",
    re.IGNORECASE,
)
OR = re.compile(r"(?P<one>[^,:;?]+?),? or (?P<two>[^?.,;]+)")
SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")


@dataclass(frozen=True)
class _Result:
    """The result that a reference states: one field is filled, or `yes` and `figures`."""

    figures: list[Claim] = field(default_factory=list)
    yes: bool | None = None
    label: tuple[str, str] | None = None
    letter: str | None = None
    fact: tuple[str, ...] = ()
    items: tuple[tuple[str, ...], ...] = ()  # of a fact that lists several


def is_correct(reference: str, answer: str, question: str | None = None) -> bool | None:
    """Return whether an answer states the result of a reference.

    The rules are those of docs/evaluation.md, "Right answers". Texts of any content are accepted; the work is
    linear in their length.

    Args:
        reference: the right answer, or the short result of it.
        answer: the text to judge.
        question: the question of both; it tells options, direction, year and scale.

    Returns:
        True or False; None if the reference states no result that can be checked.
    """
    expected = _expected(reference, question or "")
    if expected is None:
        return None
    asks, asked, right, result = expected
    said = _named(_corrected(plain(answer)), asks)
    if result.yes is not None and labels.polarity(said, asks) is not result.yes:
        return False
    if result.figures:
        moves = [labels.stated_labels(text, "direction") for text in (asks, right, said)]
        if (
            moves[0] == {"up", "down"}
            and len(moves[1]) == len(moves[2]) == 1
            and moves[1] != moves[2]
        ):
            return False
        return states_all(result.figures, with_digits(said), asked)
    if result.yes is not None:
        return True
    if result.letter:
        options = options_of(asks) or {result.letter: re.sub(r"^\W*\w[).:]", "", right)}
        return chooses(result.letter, said, options)
    if result.label:
        return labels.states_label(*result.label, said, asks)
    if len(result.items) > 1 and (parts := _items(said)) and len(parts) == len(result.items):
        ends = {part[-size:] for part in parts for size in range(1, FACT_WORDS)}
        ends |= {part[:size] for part in parts for size in range(1, FACT_WORDS)}
        return ends.issuperset(result.items)
    return _states_fact(list(result.fact), said, asks)


@lru_cache(maxsize=4096)
def _expected(reference: str, question: str) -> tuple[str, Asked, str, _Result] | None:
    """Read a question and its reference, once for all answers: both as plain texts, and what they state."""
    asks, right = plain(question), plain(reference)
    asked = read_question(with_digits(asks))
    result = _result(right, asks, asked)
    return (asks, asked, right, result) if result else None


def _result(right: str, asks: str, asked: Asked) -> _Result | None:
    """Find the result that a reference states; None if it states none that can be checked."""
    if marked := last_match(MARKED, right):
        right = next(part for part in marked.groups() if part is not None).strip()
    if letter := letter_of(right, options_of(asks)):
        return _Result(letter=letter)
    if polar := YES_NO.match(right):
        figures = read_claims(with_digits(right[polar.end() :])) if ASKS_MORE.search(asks) else []
        return _Result(
            yes=polar["yes"] is not None, figures=results(figures, right, asked) if figures else []
        )
    if len(right.split()) > LONG or not re.search(r"\w", right):
        return None
    should = FACTUAL_SHOULD.search(asks) and not re.search(r"\byou", right)
    stated = [
        s
        for s in SENTENCE.split(right)
        if not _advises(s.replace("should", "will") if should else s)
    ]
    right = " ".join(stated)
    digits = with_digits(right)
    if claims := read_claims(digits):
        covered = sum(len(digits[c.quantity.start : c.quantity.end].split()) for c in claims)
        if len(digits.split()) - covered > BESIDE and not any(c.strength for c in claims):
            return None
        return _Result(figures=results(claims, digits, asked))
    if label := labels.label_of(right):
        return _Result(label=label)
    if len(right.split()) <= NAMING_WORDS and (named := NAMED.search(right)):
        right = named["name"]
    words = tokens(right)
    if 0 < len(words) <= FACT_WORDS and not VERB.search(right):
        return _Result(fact=tuple(words), items=_items(right))
    return None


def _advises(sentence: str) -> bool:
    """Return whether a sentence tells what to do, or an opinion, rather than a fact."""
    commands = IMPERATIVE.match(sentence) and (len(sentence.split()) > 2 or sentence[-1] in ".!")
    return bool(commands or ADVICE.search(sentence) or sentence[-1] in "!?")


def _corrected(text: str) -> str:
    """Return an answer after its last correction of itself: "$5 million, no, $6 million"."""
    last_word = len(text.rstrip(" .,;:!?-–\n"))
    starts = [m.start("new") for m in CORRECTION.finditer(text) if m.end() < last_word]
    return text[starts[-1] :] if starts else text


def _states_fact(fact: list[str], said: str, asks: str) -> bool:
    """Return whether an answer asserts a name or phrase, and nothing that excludes it."""
    words = tokens(said)
    if words == fact or (
        re.fullmatch("[a-z]_?", fact[-1]) and said.strip(" .()").lower() == fact[-1][0]
    ):
        return True
    head = re.match(r"([^,.;]+), (?:who|which|with|as|at|because|since)", said)
    if head and tokens(head[1]) == fact:
        return True
    if _says_else(fact, said, asks):
        return False
    first = next(iter(labels.clauses(said)), [])
    if len(first) <= len(fact) + 2 and labels.asserted(fact, first) and not _offered(fact, words):
        return True
    others = labels.rivals(asks, fact) + labels.opposites(fact)
    for part in dict.fromkeys((said, labels.decisive(said), _ranked(said, asks))):
        heard = labels.clauses(part)
        if not any(labels.asserted(fact, each) for each in heard):
            continue
        if _offered(fact, tokens(part)):
            return False
        if not any(labels.asserted(other, each) for other in others for each in heard):
            return True
    return _predicated(fact, others, said, asks)


def _ranked(said: str, asks: str) -> str:
    """Return the last clause that ranks something as the question asks, such as "the rent is the lower"."""
    found = said
    for way in (LARGER, SMALLER):
        if re.search(rf"\b(?:{way})\b", asks, re.IGNORECASE):
            ranks = rf"(?:^|[,:;.] )([^,:;.]{{1,60}} (?:is|was|are|were) (?:the )?(?:{way})\b)"
            if last := last_match(re.compile(ranks, re.IGNORECASE), said):
                found = last[1]
    return found


def _named(said: str, asks: str) -> str:
    """Return an answer with what "the former" and "the second option" mean in the question's "A or B"."""
    offer = OR.search(asks)
    return ORDINAL.sub(lambda m: offer[m.lastgroup or 0].strip(), said) if offer else said


def _says_else(fact: list[str], said: str, asks: str) -> bool:
    """Return whether a clause about what the question asks names another, and none about it the fact."""
    asked = content(asks)
    shared = {True: 0, False: 0}
    for clause in labels.CLAUSE.split(said):
        named = NAMED.search(clause)
        has = labels.asserted(fact, tokens(clause))
        if has or (named and not set(tokens(named["name"])) & {*fact, *tokens(asks)}):
            shared[has] = max(shared[has], len(content(clause) & asked))
    return shared[False] > shared[True]


def _items(text: str) -> tuple[tuple[str, ...], ...]:
    """Return the items of a list in normalised words: "cash, land and debt", or a numbered one."""
    body = re.sub(r"^[^:]{0,60}:", "", text.strip(" ."))
    parts = re.split(
        r"\s*(?:[,;\n]|\band\b)\s*(?:\W*[0-9][.)] )?", re.sub(r"^\s*[0-9][.)] ", "", body)
    )
    return tuple(tuple(words) for part in parts if (words := tokens(part) or part.split()))


def _offered(fact: list[str], words: list[str]) -> bool:
    """Return whether the words name the fact as one of alternatives: "either Dublin or Cork"."""
    size = len(fact)
    for place in range(len(words) - size + 1):
        around = (words[place - 1] if place else "", *words[place + size : place + size + 1])
        if words[place : place + size] == fact and "or" in around:
            return True
    return False


def _predicated(fact: list[str], others: list[list[str]], said: str, asks: str) -> bool:
    """Return whether a clause that says what the question asks ("is higher") names the fact alone."""
    named = {word for phrase in (fact, *others) for word in phrase}
    asked = {w for w in tokens(asks) if len(w) > 2} - named - {"which", "what"}
    main = tokens(labels.main_clause(SENTENCE.split(said)[0]))
    for words in (main, *labels.clauses(said)):
        if asked.intersection(words) and labels.asserted(fact, words):
            return not any(labels.asserted(other, words) for other in others)
    return False
