"""Questions in a normalised spelling: the unit of the split and of the references."""

import re
import unicodedata

import pyarrow as pa
import pyarrow.compute as pc
import regex

from fintune.data.unpacking import Row

SPELLINGS = str.maketrans("−×⋅∙÷⁄∕٪", "-***///%")
THOUSANDS = regex.compile(r"(?<=\d),(?=\d{3})")
ALWAYS = r"[\p{Sm}^]--[|~]"  # signs that are operators wherever they stand
NUMBER, NEXT_NUMBER = r"[\d)%]", r"[\d(\p{Sc}]"
BETWEEN = rf"(?<={NUMBER})[*-](?={NEXT_NUMBER})|(?<=\b\p{{L}})[*-](?=\p{{L}}\b)"  # these set off words, too
SPACES = regex.compile(
    rf"(?V1)\s+(?=%)|(?<=\d)\s+(?=\p{{Sc}})|(?<=\p{{Sc}})\s+(?=\d)|\s+(?=[{ALWAYS}])|(?<=[{ALWAYS}])\s+"
    rf"|(?<={NUMBER})\s+(?=[*-]\s+{NEXT_NUMBER})|(?<={NUMBER}\s*[*-])\s+(?={NEXT_NUMBER})"
    r"|(?<=\b\p{L})\s+(?=[*-]\s+\p{L}\b)|(?<=\b\p{L}\s*[*-])\s+(?=\p{L}\b)"
)
KEPT = (
    rf"[\p{{L}}\p{{M}}\p{{N}}\p{{Sc}}%\s]|[{ALWAYS}]|[.\-](?=\d)|(?<=\p{{L}})\#|{BETWEEN}"
    r"|(?<=[+*/^=<>-])\(|\)(?=[+*/^=<>-])"
)
# the class repeats what KEPT begins with, which is found sooner
DROPPED = regex.compile(rf"(?V1)(?:(?!{KEPT})[^\p{{L}}\p{{M}}\p{{N}}\p{{Sc}}%\s])+")
SIGN_BY_SPACE = regex.compile(r"[%\p{Sc}\p{Sm}^*-](?:(?=\s)|(?<=\s.))")  # else SPACES finds none


# Among these characters only letters and digits count; a mark before a digit may be a sign.
UNUSUAL = re.compile(r"[^A-Za-z0-9\s?!'\":;&_@,.()/‘’“”–—-]|[.,]\d|-(?![A-Za-z]{2})|/\(|\)[/-]")
USUAL = str.maketrans(dict.fromkeys("?!'\":;&_@,.()/‘’“”–—-", " "))

# The same for a column: ASCII in which a pattern without looking ahead finds nothing, and its plain spelling.
UNUSUAL_IN_COLUMN = (
    r"[^A-Za-z0-9\s\x0b\x1c-\x1f?!'\":;&_@,.()/-]|[.,][0-9]|-(?:[^A-Za-z]|$|[A-Za-z](?:[^A-Za-z]|$))"
    r"|/\(|\)[/-]"
)
PLAIN = bytes(
    ord(" ")
    if chr(code) in "?!'\":;&_@,.()/-\t\n\v\f\r\x1c\x1d\x1e\x1f"
    else ord(chr(code).lower())
    for code in range(128)
) + bytes(range(128, 256))


class _Spellings(dict[int, str]):
    """Compatible spellings of characters, found once."""

    def __missing__(self, code: int) -> str:
        self[code] = _plain_character(chr(code))
        return self[code]


def questions_of(rows: list[Row]) -> list[str]:
    """Return the normalised question of each row."""
    return [normalize_question(row["input"]) for row in rows]


def normalize_question(text: str) -> str:
    """Fold differences that do not change a question: case, white space, punctuation, Unicode variants.

    NFKC maps compatibility characters (full-width letters, no-break spaces, ligatures), and digits become
    ASCII; invisible format characters and soft hyphens are removed. Signs that make another question stay,
    without spaces beside them: currencies, `%` and operators, `*` and `-` where they stand between numbers or
    single letters; `/` is the operator that is left out. Letters keep their marks: in many scripts these are
    the vowels.
    """
    if not UNUSUAL.search(text):
        return " ".join(text.lower().translate(USUAL).split()) or "?"
    if not text.isascii():
        text = unicodedata.normalize("NFC", text).translate(SPELLED)
    text = text.casefold()
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).translate(SPELLINGS)
    text = THOUSANDS.sub("", text)
    if SIGN_BY_SPACE.search(text):
        text = SPACES.sub("", text)
    kept = DROPPED.sub(" ", text).split() or regex.sub(r"\p{P}", " ", text).split()
    return " ".join(kept) or "?"


def normalized(texts: pa.Array) -> pa.Array:
    """Return what `normalize_question` makes of each text of a column of strings without nulls."""
    unusual = pc.match_substring_regex(texts, UNUSUAL_IN_COLUMN)
    _, offsets, data = texts.buffers()
    if data is None:
        return pa.array(["?"] * len(texts), pa.string())
    plain = pa.py_buffer(data.to_pybytes().translate(PLAIN))
    found = pa.StringArray.from_buffers(len(texts), offsets, plain, None, 0, texts.offset)
    while pc.any(pc.match_substring(found, "  ")).as_py():
        found = pc.replace_substring(found, "  ", " ")
    found = pc.ascii_trim(found, " ")
    found = pc.if_else(pc.equal(found, ""), "?", found)
    others = map(normalize_question, texts.filter(unusual).to_pylist())
    return pc.replace_with_mask(found, unusual, pa.array(others, pa.string()))


def _plain_character(character: str) -> str:
    """Return a character's compatible spelling: an exponent begins with `^`, a fraction with a space."""
    if character.isascii():
        return character
    kind = unicodedata.decomposition(character).partition(" ")[0]
    text = unicodedata.normalize("NFKC", character)
    before = {"<super>": "^", "<fraction>": " "}.get(kind, "") if text[:1].isdigit() else ""
    return before + "".join(
        str(unicodedata.decimal(c, c))
        for c in text
        if c.isspace() or unicodedata.category(c) not in ("Cf", "Cc")
    )


SPELLED = _Spellings()
