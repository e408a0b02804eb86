"""Words and sentence ends of a text in any script.

Chinese, Japanese, Thai, Lao, Khmer and Burmese are written without spaces between words; ICU finds
their words with its dictionaries. Where a script has spaces, words are what stands between them.
"""

from collections.abc import Iterator

import regex

UNSPACED = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Line_Break=Complex_Context}ー々〆]")
# An ASCII mark ends a sentence before white space only, since it also stands in numbers and names.
SENTENCE_END = regex.compile(
    r"(?V1)(?:[.!?…](?P<closing>[\p{Sentence_Break=Close}--[\p{Ps}\p{Pi}]]*)(?=\s)"
    r"|(?:[\p{Sentence_Break=STerm}--[!?]]+|．(?!\d))(?&closing))"
)
WORD_END = regex.compile(r"(?<=\S)\s")
RUN = regex.compile(r"[\p{L}\p{M}\p{N}]+")
SPOKEN = regex.compile(r"[\p{L}\p{N}]")
NO_START = regex.compile(r"(?V1)[[\p{P}\p{M}\s]--[\p{Ps}\p{Pi}]]")  # of what follows a cut
NO_END = regex.compile(r"[\p{Ps}\p{Pi}\s]")


def split_words(text: str) -> list[str]:
    """Split a text into words: at white space, and by ICU where a script has none; marks stay on words."""
    if text.isascii() or not UNSPACED.search(text):
        return text.split()
    return [word for part in text.split() for word in _words(part)]


def bare_words(text: str) -> list[str]:
    """Split a text into its runs of letters and digits, and by ICU where a script has no spaces."""
    return [word for run in RUN.findall(text) for word in _words(run)]


def _words(part: str) -> list[str]:
    if not UNSPACED.search(part):
        return [part]
    return [part[start:end] for start, end in _segments(part) if SPOKEN.search(part[start:end])]


def sentence_ends(text: str) -> list[int]:
    """Return where the text's sentences end, their closing quotes and brackets included."""
    return [match.end() for match in SENTENCE_END.finditer(text)]


def word_ends(text: str, end: int) -> list[int]:
    """Return where the text's words end, up to `end`; never before a mark that belongs to the word."""
    ends = {match.start() for match in WORD_END.finditer(text, 0, end)}
    if UNSPACED.search(text, 0, end):
        ends |= {
            place
            for _, place in _segments(text)
            if place <= end
            and place < len(text)
            and (UNSPACED.match(text[place - 1]) or UNSPACED.match(text[place]))
            and not NO_START.match(text[place])
            and not NO_END.match(text[place - 1])
        }
        # after a mark that closes a sentence or a clause
        ends |= {m.end() for m in regex.finditer(r"[、，。；：！？」』）]+(?=\S)", text[:end])}
    return sorted(ends)


def _segments(text: str) -> Iterator[tuple[int, int]]:
    """Yield the start and end of each of ICU's words, in characters."""
    from icu4py.breakers import WordBreaker

    start = 0
    for segment in WordBreaker(text, ""):
        yield start, start + len(segment)
        start += len(segment)
