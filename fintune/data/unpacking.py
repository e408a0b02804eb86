"""Files as bytes and lines: unpacked from gzip, zstd, bzip2 or xz, piece by piece, up to a limit."""

import bz2
import gzip
import lzma
import math
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from fintune.errors import RecordError, brief

PARSER_ERRORS = (
    OSError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    ValueError,
    ArithmeticError,
    pa.ArrowException,
)
AT_ONCE = 2**22  # bytes of lines
LIMIT, LIMIT_GIB = "FINTUNE_SOURCE_GIB", 8  # the variable, and the limit without it

PACKINGS: dict[bytes, Callable[[Any], Any]] = {  # by their first bytes
    b"\x1f\x8b": gzip.open,
    b"\x28\xb5\x2f\xfd": lambda file: pa.CompressedInputStream(pa.PythonFile(file), "zstd"),
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}

Row = dict[str, Any]


class Piece(NamedTuple):
    """Some rows of a table, as they are read: lines of JSON from a line on, values, or an Arrow table."""

    content: bytes | list[Row] | pa.Table
    line: int = 0


@contextmanager
def explained(format_: str) -> Iterator[None]:
    """Make errors of parsers errors of a record."""
    try:
        yield
    except PARSER_ERRORS as error:
        raise RecordError(
            f": not a readable {format_[1:] or 'compressed'} table: {brief(error)}"
        ) from None


def source_limit() -> int:
    """Return the bytes that a source may have, unpacked, from `FINTUNE_SOURCE_GIB`.

    Raises:
        RecordError: that is no number above 0.
    """
    given = os.environ.get(LIMIT, str(LIMIT_GIB))
    try:
        gib = float(given)
    except ValueError:
        gib = 0.0
    if not 0 < gib < math.inf:
        raise RecordError(f"{LIMIT}: {given!r} is no number of GiB above 0")
    return int(gib * 2**30)


def too_large(what: str) -> RecordError:
    """Return the error of a source beyond the limit."""
    gib = source_limit() / 2**30
    return RecordError(
        f": {what} more than {gib:.3g} GiB; if that is right, set {LIMIT} to a larger number"
    )


@contextmanager
def unpacked(path: Path) -> Iterator[Callable[[int], bytes]]:
    """Yield a function that reads bytes of a file, unpacked, up to the limit."""
    limit, count = source_limit(), 0
    with path.open("rb") as file, ExitStack() as stack:
        start = file.read(8)
        file.seek(0)
        stream: Any = file
        if unpack := next(
            (each for begin, each in PACKINGS.items() if start.startswith(begin)), None
        ):
            stream = stack.enter_context(unpack(file))

        def read(size: int) -> bytes:
            nonlocal count
            found: bytes = stream.read(min(size, limit + 1 - count))
            count += len(found)
            if count > limit:
                raise too_large("unpacked, it has" if stream is not file else "it has")
            return found

        yield read


def whole_text(path: Path) -> str:
    """Return a file's text."""
    with unpacked(path) as read:
        return text_of(Piece(read(source_limit() + 1), 1))


def lines_of(path: Path, format_: str) -> Iterator[Piece]:
    """Yield a file's bytes in pieces that end with a line."""
    line, rest = 1, list[bytes]()
    with explained(format_), unpacked(path) as read:
        while found := read(AT_ONCE):
            end = found.rfind(b"\n") + 1
            if end:
                content = b"".join((*rest, found[:end]))
                yield Piece(content, line)
                line += content.count(b"\n")
                rest = []
            rest.append(found[end:])
        if content := b"".join(rest):
            yield Piece(content, line)


def text_of(piece: Piece) -> str:
    content = piece.content
    assert isinstance(content, bytes)
    try:
        return content.decode("utf-8-sig" if piece.line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = piece.line + content.count(b"\n", 0, error.start)
        raise RecordError(f"line {line}: not UTF-8; save the file in that encoding") from None
