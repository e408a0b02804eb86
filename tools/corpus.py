"""Read and split plain text, encode it, and score models on held-out text.

The base model and the n-gram baseline both use this module, so that their figures refer to the
same tokens and bytes.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tokenizers import Tokenizer

IntArray = NDArray[np.int64]

BOS, EOS, UNK, PAD = "<s>", "</s>", "<unk>", "<pad>"
PARTS = ("train", "validation", "test")
TRAIN_PERCENT, VALIDATION_PERCENT = 98, 1
SHARED_LENGTH = 13  # tokens; such sequences rarely occur twice by chance


class InputError(ValueError):
    """Unusable input; the message names it and the way out."""


@dataclass(frozen=True)
class Documents:
    """Distinct, non-empty documents, and how many were dropped for which reason."""

    texts: list[str]
    empty: int
    repeated: int


def read_documents(path: Path) -> Documents:
    """Read a .parquet file with a ``text`` column, a .txt file, or a folder of such files.

    A .txt file is one document. Empty documents and exact repeats are dropped and counted.

    Raises:
        InputError: nothing to read, no ``text`` column, or a .txt file that is not UTF-8.
    """
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [file for file in files if file.suffix in (".parquet", ".txt")]
    if not files or not path.exists():
        raise InputError(f"{path}: no .parquet or .txt file there; set --text to one or a folder")
    rows = [text for file in files for text in _read(file)]
    kept = [text for text in rows if text.strip()]
    different = list(dict.fromkeys(kept))
    return Documents(different, len(rows) - len(kept), len(kept) - len(different))


def _read(file: Path) -> list[str]:
    if file.suffix == ".txt":
        try:
            # newline="" preserves line ends, which read_text would change
            with file.open(encoding="utf-8", newline="") as lines:
                return [lines.read()]
        except UnicodeDecodeError as error:
            raise InputError(f"{file}: not UTF-8 at byte {error.start}; convert it") from error
    table = pd.read_parquet(file)
    if "text" not in table.columns:
        raise InputError(f"{file}: no column 'text' among {list(table.columns)}; rename one")
    return [text if isinstance(text, str) else "" for text in table["text"]]


def split_documents(texts: Iterable[str]) -> dict[str, list[str]]:
    """Split 98/1/1 by a hash of each text; parts and their order do not depend on the input order.

    Each part is sorted by the hash, which also shuffles it.

    Raises:
        InputError: a part is empty.
    """
    parts: dict[str, list[tuple[bytes, str]]] = {name: [] for name in PARTS}
    for text in texts:
        digest = hashlib.sha256(text.encode()).digest()
        percentile = int.from_bytes(digest[:8], "big") % 100
        beyond = (percentile >= TRAIN_PERCENT) + (percentile >= TRAIN_PERCENT + VALIDATION_PERCENT)
        parts[PARTS[beyond]].append((digest, text))
    for name, members in parts.items():
        if not members:
            raise InputError(f"the {name} part is empty; give more documents (some hundreds)")
    return {name: [text for _, text in sorted(members)] for name, members in parts.items()}


def byte_count(texts: Sequence[str]) -> int:
    """Count the UTF-8 bytes of the texts."""
    return sum(len(text.encode()) for text in texts)


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """Return the id of a special token.

    Raises:
        InputError: the tokenizer does not have it.
    """
    number = tokenizer.token_to_id(token)
    if number is None:
        raise InputError(f"the tokenizer has no {token}; use one that tools.pretrain_base made")
    return number


def encode_stream(tokenizer: Tokenizer, texts: Sequence[str]) -> IntArray:
    """Concatenate ``<s> document </s>`` for every document into one int64 array ``[tokens]``.

    Text that merely looks like a special token (``<s>`` in a document) is encoded as bytes.
    """
    # a copy, since the setting below would affect the caller's tokenizer
    literal = Tokenizer.from_str(tokenizer.to_str())
    literal.encode_special_tokens = True
    bos, eos = token_id(literal, BOS), token_id(literal, EOS)
    ids: list[IntArray] = []
    # in chunks, since an encoding takes many times the memory of its ids
    for start in range(0, len(texts), 512):
        chunk = list(texts[start : start + 512])
        encodings = literal.encode_batch_fast(chunk, add_special_tokens=False)
        ids += [np.array([bos, *encoding.ids, eos], dtype=np.int64) for encoding in encodings]
    return np.concatenate(ids)


def shared_share(train: IntArray, held_out: IntArray) -> float:
    """Return the share of held-out sequences of ``SHARED_LENGTH`` tokens that also occur in ``train``."""
    if min(len(train), len(held_out)) < SHARED_LENGTH:
        return 0.0
    return float(np.isin(_hashes(held_out), _hashes(train)).mean())


def _hashes(stream: IntArray) -> NDArray[np.uint64]:
    """Compute a 64-bit polynomial hash of each sequence; overflow is intended."""
    count = len(stream) - SHARED_LENGTH + 1
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(SHARED_LENGTH):
        hashes *= np.uint64(0x9E3779B97F4A7C15)
        hashes += stream[offset : offset + count].astype(np.uint64) + np.uint64(1)
    return hashes


@dataclass(frozen=True)
class Score:
    """A model's negative log-likelihood of a held-out text.

    ``tokens`` counts every token of the documents and each ``</s>``; ``<s>`` is given, not
    predicted. ``bytes`` counts the text alone, so the nats of ``</s>`` are attributed to the text.
    """

    nats: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte of text; lower is better, and comparable across tokenizers."""
        return self.nats / math.log(2) / self.bytes

    @property
    def perplexity_per_byte(self) -> float:
        """Two to the power of the bits per byte."""
        return float(2**self.bits_per_byte)

    @property
    def perplexity_per_token(self) -> float:
        """Exponential of the mean nats per token; only comparable with the same tokenizer."""
        return math.exp(self.nats / self.tokens)
