"""Plain writing of a text: one form of spaces, signs and digits, number words as digits."""

import math
import re
import unicodedata

UNITS = (  # noqa: SIM905
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
    " sixteen seventeen eighteen nineteen"
).split()
TENS = re.findall(r"\w+", "twenty thirty forty fifty sixty seventy eighty ninety")
VALUES = {word: value for value, word in enumerate(UNITS)}
VALUES |= {word: 10 * place for place, word in enumerate(TENS, 2)}
LOW = rf"(?:(?:{'|'.join(TENS)})(?:[ -](?:{'|'.join(UNITS[1:10])}))?|{'|'.join(reversed(UNITS))})"
BIG = r"(?:thousand|million|billion|trillion|lakh|crore)"
# "one" is a number before these only: "one of the reasons" counts nothing
COUNTED = (
    rf"(?:{BIG}|dozen|per ?cent|percentage|basis|years?|months?|weeks?|days?|quarters?"
    rf"|hours?|decades?|shares?"
    r"|units?|dollars?|euros?|pounds?|cents?|times|employees?|stores?|customers?"
    rf"|(?:to|or) {LOW})\b"
)
WORDS = re.compile(
    rf"\b(?:(?P<hundreds>{LOW}|an?) hundred(?:(?: and)? (?P<rest>{LOW}))?|(?P<low>{LOW}))\b"
    r"(?: and (?P<part>(?:a|one)[ -]half|(?:a|one)[ -]quarter|three[ -]quarters))?(?P<dozen> dozen)?\b",
    re.IGNORECASE,
)
PARTS = {"half": 0.5, "quarter": 0.25, "quarters": 0.75}
SPAN = "(?=(?:year|month|week|day|hour|decade)"
FRACTIONS = (
    (rf"\b(?:half an?|an? half) {SPAN}\b)", "0.5 "),
    (rf"\banother {SPAN}\b)|\ba (?=decade\b)", "1 "),
    (r"\ba fortnight\b", "2 weeks"),
    (r"^\W*twice\W*$", "2 times"),
    (r"\bdoubled\b(?! (?:to|from|the|its|their|your)\b)", "rose 100%"),
    (r"\b(?:tripled|trebled)\b(?! (?:to|from|the|its|their|your)\b)", "rose 200%"),
    (r"\bquadrupled\b(?! (?:to|from|the|its|their|your)\b)", "rose 300%"),
    (r"\bhalved\b(?! (?:to|from|the|its|their|your)\b)", "fell 50%"),
    (r"\b(?:an?|one) (year|month|week|hour|quarter) and a half\b", r"1.5 \1s"),
    (rf"(?<!and )(?<!and a )\b(?:one[ -]|an? )?half (?:an? |of an? )?(?={BIG}|percent)", "0.5 "),
    (rf"\b(?:a|one)[ -]quarter (?:of )?an? (?={BIG}|percent)", "0.25 "),
    (rf"\bthree[ -]quarters (?:of )?an? (?={BIG}|percent)", "0.75 "),
    (rf"(?<!half )(?<!and )\b(?:an?|one)(?= {BIG}\b)", "1"),
    (r"\bthree[ -](?:quarters|fourths)(?=\W*$| of\b)", "0.75"),
    (r"\btwo[ -]thirds\b", "0.667"),
    (r"\b(?:one|a)[ -]third\b(?! [a-z]+(?<!of)(?<!more)(?<!less)(?<!higher)(?<!lower)\b)", "0.333"),
    (r"\b(?:one|a)[ -](?:quarter|fourth)(?=\W*$| of (?!20|the year|fiscal))", "0.25"),
    (r"(?:(?<=\bby )|^|(?<=\bis )|(?<=\babout )|\b(?:one|a)[ -])half(?=\W*$| of\b)", "0.5"),
    (r"\ba(?= (?:dollar|euro|pound) and [\w-]+ (?:cents|pence)\b)", "1"),
    (rf"\bone(?= (?:in|out of) (?:{LOW}|[0-9]+)\b)", "1"),
    (r"\ba dozen\b", "12"),
    (r"\bhalf a dozen\b", "6"),
    (r"\b(?:nil|nought)\b", "0"),
)
FRACTIONS_FOUND = [(re.compile(pattern, re.IGNORECASE), digits) for pattern, digits in FRACTIONS]
DIGIT_FRACTION = re.compile(
    r"(?<![0-9A-Za-z_.,/])(?:([0-9]{1,6})[ -])?([0-9]{1,2})/([2-6]|8|10|16)(?![0-9/])"
)
VULGAR = str.maketrans({"½": " 1/2", "¼": " 1/4", "¾": " 3/4", "⅓": " 1/3", "⅔": " 2/3"})
RESPECTIVELY = re.compile(
    r"([^,;\n]{1,60}) and ([^,;\n]{1,60}?) (is|are|was|were|of|at|in|came to|totall?ed)"
    r" ([^,;\n]{1,40}) and ([^,;\n]{1,40}),? respectively"
)
SIGNS = str.maketrans(
    {"−": "-", "‐": "-", "‑": "-", "—": "–", "’": "'", "‘": "'", "“": '"', "”": '"'}
)


def plain(text: str) -> str:
    """Return the text without mark-up, in compatible characters, with single spaces within lines."""
    text = re.sub("(?<=10)[⁰¹²³⁴-⁹⁻]+", lambda m: f"^{m[0]}", text)
    text = unicodedata.normalize("NFKC", text.translate(VULGAR).translate(SIGNS)).translate(SIGNS)
    text = re.sub(r"\\(?:boxed|text|mathbf|mathrm)\{|\\[()\[\],;!]|[*`{}]{1,3}|__", "", text)
    text = re.sub(r"\\([$%&#])", r"\1", text)
    text = re.sub(r"\\times|\\cdot", "×", text)
    text = re.sub(r"[^\S\n]+", " ", text).strip()
    return RESPECTIVELY.sub(r"\1 \3 \4 and \2 \3 \5", text)


def last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    """Return the last match of a pattern."""
    found = None
    for found in pattern.finditer(text):  # noqa: B007
        pass
    return found


def with_digits(text: str) -> str:
    """Return a plain text with its number words and fractions in digits: "two and a half" as 2.5."""
    text = DIGIT_FRACTION.sub(_divided, text)
    for pattern, digits in FRACTIONS_FOUND:
        text = pattern.sub(digits, text)
    text = WORDS.sub(_spelled, text)
    return re.sub(
        r"\b([0-9]{1,3}) thousand(?: and|,)? ([0-9]{1,3})\b(?![.,%]|[0-9])",
        lambda m: str(1000 * int(m[1]) + int(m[2])),
        text,
    )


def _divided(match: re.Match[str]) -> str:
    whole, over, under = match[1], int(match[2]), int(match[3])
    if over >= under:
        return match[0]
    places = 3 if under in (3, 6) else 4
    return f"{round(int(whole or 0) + over / under, places):g}"


def _low(words: str) -> int:
    return sum(VALUES[word] for word in re.split("[ -]", words.lower()))


def _spelled(match: re.Match[str]) -> str:
    if match["hundreds"]:
        first = match["hundreds"].lower()
        value = 100.0 * (1 if first in ("a", "an") else _low(first))
        value += _low(match["rest"]) if match["rest"] else 0
    else:
        value = _low(match["low"])
        around = match.string[match.end() : match.end() + 14].lstrip(" -")
        alone = len(match.string) < match.end() + 3 and match.start() < 3
        said = re.search(
            r"\b(?:only|just|exactly|is|was|has|had|be) $",
            match.string[: match.start()][-9:],
            re.I,
        )
        alone = alone or bool(said and re.match(r"[.,;:!]|$", around))
        alone = alone or bool(match["part"] or match["dozen"])
        if value == 1 and not alone and not re.match(COUNTED, around, re.IGNORECASE):
            return match[0]
    value += PARTS[re.split("[ -]", match["part"].lower())[-1]] if match["part"] else 0
    return f"{value * (12 if match['dozen'] else 1):g}"


def read_numeral(text: str) -> tuple[float, float]:
    """Read digits with any separators, such as 1,234.5 or 1.234,56 or 1 234.

    Returns:
        The value, and the worth of one unit of its last stated place.
    """
    text = re.sub(r"[ ']", "", text)
    point = None
    dots, commas = text.count("."), text.count(",")
    if dots and commas:
        point = max(text.rfind("."), text.rfind(","))
        if text.count(text[point]) > 1:
            point = None
    elif dots == 1:
        point = text.rfind(".")
    elif commas == 1 and (len(text) - text.find(",") != 4 or text.startswith("0")):
        point = text.find(",")  # a decimal comma: 4,2 or 0,125
    digits = re.sub("[.,]", "", text)
    if len(digits) > 40:
        return math.inf, 1.0
    places = 0 if point is None else len(text) - point - 1
    return float(f"{digits}e-{places}"), float(f"1e-{places}")
