"""Words of a text: normalised and without endings; words that conclude, deny and compare."""

import re
import unicodedata

FINAL = re.compile(
    r"####|\b(?:so(?! far| that| much| many)|therefore|thus|hence|consequently|answer|final(?:ly)?"
    r"|altogether|in conclusion|in total|the result|to conclude|overall|(?:right|correct) (?:option"
    r"|choice|one))\b",
    re.IGNORECASE,
)
NOT = (
    r"\bnot|n't|\bnever|\brather than|\binstead of|\bneither|\bnor|\bno longer|\bunlike|\bfar from"
)
STOP = frozenset(
    re.findall(
        r"\w+",
        "a an the and or but for of in on at to by was were is are be been being with that this these from what"  # noqa: E501
        " which who how much many did do does doe has had have been will would its it their our"
        " your his her my about than then per as not can could should must may shall need you there"
        " company therefore answer million billion thousand dollar percent cent year day week month"
        " hour quarter if when",
    )
)
ARTICLES = frozenset(("a", "an", "the"))
COMPANY_FORMS = frozenset(
    re.findall(
        r"\w+",
        "inc incorporated corp corporation co company ltd limited plc llc ag nv sa group holdings llp lp",
    )
)


def stem(word: str) -> str:
    """Return a word without the endings in which "leases", "leased" and "leasing" differ from "lease"."""
    if len(word) > 3 and word.endswith("s") and not word.endswith("ss"):
        word = word[:-1]
    if len(word) > 4 and word.endswith("ied"):
        word = word[:-2]
    for ending in ("ing", "ed", "e"):
        if len(word) > 2 + len(ending) and word.endswith(ending):
            word = word[: -len(ending)]
            break
    if len(word) > 4 and word[-1] == word[-2] and word[-1] not in "sl":
        word = word[:-1]
    return word[:-1] + "i" if len(word) > 2 and word.endswith("y") else word


def tokens(text: str) -> list[str]:
    """Return a text's words normalised as in SQuAD's evaluation, without accents, endings, company forms."""
    text = re.sub(r"(?<=[a-z] )A\b", "a_", text)  # Plan A: no article
    text = unicodedata.normalize("NFKD", text.lower().replace("&", " and "))
    text = "".join(c for c in text if not unicodedata.combining(c))
    text = re.sub(r"(?<=\w)'s\b", "", text).replace(".", "").replace("'", "")
    words = [w for w in re.findall(r"\w+", text) if w not in ARTICLES]
    return [stem(word) for word in [w for w in words if w not in COMPANY_FORMS] or words]


def content(text: str) -> frozenset[str]:
    """Return the stems of the words of a text that tell what it is about, and its years."""
    words = re.findall(r"[a-z]{2,}|\b(?:19|20)[0-9]{2}\b", text.lower())
    return frozenset(stem(word) for word in words if word not in STOP) - STOP
