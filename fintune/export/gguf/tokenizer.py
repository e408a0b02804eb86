"""Convert a Hugging Face tokenizer to GGUF metadata; reject what llama.cpp cannot reproduce.

Two kinds are supported. Byte-level BPE (GPT-2, also with single digits, and Llama-3) keeps its merges,
and names one of llama.cpp's rules for splitting text. SentencePiece BPE with byte fallback (Llama-2,
Mistral) has scores instead of merges: llama.cpp merges the two neighbours whose joint token has the
highest score.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fintune.errors import UserError

log = logging.getLogger("fintune")

# llama.cpp's names of its pre-tokenization rules, and whether they imply ignore_merges: a piece that
# is a token is used directly, without merges.
GPT_2 = ("gpt-2", False)
GPT_2_DIGITS = ("smollm", False)  # GPT-2's, after every digit is split off
LLAMA_3 = ("llama-bpe", True)
LLAMA_3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPACE = "▁"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # gguf.TokenType


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer metadata of a GGUF file.

    `tokens` and `types` have an entry for each row of the embedding. Either `merges` or `scores` is set.
    `adds_bos`: each text begins with the bos token. `adds_space`: and then with a space.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] | None
    scores: list[float] | None
    adds_bos: bool
    adds_space: bool


def read_vocabulary(tokenizer: Any, rows: int) -> Vocabulary:
    """Read a fast tokenizer's parts as transformers uses them, which may differ from tokenizer.json.

    Args:
        rows: of the embedding; rows without a token get an unused one.

    Raises:
        UserError: llama.cpp has no equivalent for a part, so that it would tokenize texts differently.
    """
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    model, added = parts["model"], {each["id"]: each for each in parts["added_tokens"]}
    if model["type"] != "BPE":
        raise _unsupported(f"its model is {model['type']}")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise _unsupported(f"its model has {name}: {model[name]!r}")
    for each in added.values():
        if each["lstrip"] or each["rstrip"] or each["single_word"]:
            raise _unsupported(f"its token {each['content']} takes part of what stands beside it")
    texts = {i: text for text, i in model["vocab"].items()}
    texts |= {i: each["content"] for i, each in added.items()}
    if max(texts) >= rows:
        raise UserError(
            f"gguf: the tokenizer has the token {max(texts)}, the embedding {rows} rows"
        )
    tokens = [texts.get(i, f"[unused {i}]") for i in range(rows)]
    types = [UNUSED if i not in texts else NORMAL for i in range(rows)]
    for i, each in added.items():
        types[i] = CONTROL if each["special"] else USER_DEFINED
    if model.get("byte_fallback"):
        return _sentencepiece(tokenizer, parts, tokens, types)
    pre, ignores_merges = _split_rule(parts)
    if bool(model.get("ignore_merges")) != ignores_merges:
        raise _unsupported(f"ignore_merges is {not ignores_merges} with the splitting of {pre}")
    pairs = _pairs(model)
    return Vocabulary(
        model="gpt2",
        pre=pre,
        tokens=tokens,
        types=types,
        merges=[f"{left} {right}" for left, right in pairs],
        scores=None,
        adds_bos=_adds_bos(tokenizer, parts),
        adds_space=False,
    )


def _split_rule(parts: dict[str, Any]) -> tuple[str, bool]:
    """Return llama.cpp's name for the way a byte-level tokenizer splits text, and its ignore_merges."""
    if parts["normalizer"] is not None:
        raise _unsupported(f"its normalizer is {parts['normalizer']['type']}")
    splitter = parts["pre_tokenizer"] or {"type": "none"}
    steps = splitter["pretokenizers"] if splitter["type"] == "Sequence" else [splitter]
    *splits, last = steps
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        raise _unsupported(f"its pre-tokenizer is {json.dumps(splitter)}")
    if not splits and last["use_regex"]:
        return GPT_2
    if splits == [{"type": "Digits", "individual_digits": True}] and last["use_regex"]:
        return GPT_2_DIGITS
    llama_3 = {
        "type": "Split",
        "pattern": {"Regex": LLAMA_3_PATTERN},
        "behavior": "Isolated",
        "invert": False,
    }
    if splits == [llama_3] and not last["use_regex"]:
        return LLAMA_3
    raise _unsupported(f"its pre-tokenizer is {json.dumps(splitter)}")


def _sentencepiece(
    tokenizer: Any, parts: dict[str, Any], tokens: list[str], types: list[int]
) -> Vocabulary:
    model = parts["model"]
    if model.get("ignore_merges"):
        raise _unsupported("it has byte fallback and ignore_merges")
    for i, text in enumerate(tokens):
        if types[i] == NORMAL and len(text) == 6 and text.startswith("<0x"):
            types[i] = BYTE
    if sum(each == BYTE for each in types) != 256:
        raise _unsupported("it has byte fallback, but not a token for each of the 256 bytes")
    unknown = tokenizer.unk_token_id
    if unknown is not None:
        types[unknown] = UNKNOWN
    return Vocabulary(
        model="llama",
        pre="default",
        tokens=tokens,
        types=types,
        merges=None,
        scores=_scores(model, tokens, types),
        adds_bos=_adds_bos(tokenizer, parts),
        adds_space=_adds_space(parts),
    )


def _adds_space(parts: dict[str, Any]) -> bool:
    """Return true if texts get a leading space; reject any other change of spaces."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    normalizer, splitter = parts["normalizer"], parts["pre_tokenizer"]
    if splitter is None and normalizer == {"type": "Sequence", "normalizers": [replace]}:
        return False
    prepend = {"type": "Prepend", "prepend": SPACE}
    if splitter is None and normalizer == {"type": "Sequence", "normalizers": [prepend, replace]}:
        return True
    if (
        normalizer is None
        and (splitter or {}).get("type") == "Metaspace"
        and splitter["replacement"] == SPACE
        and not splitter["split"]
    ):
        if splitter["prepend_scheme"] == "never":
            return False
        log.info(
            "gguf: llama.cpp puts a space before a text that follows a special token or begins with a "
            "space, too, where this tokenizer does not; other texts are the same tokens"
        )
        return True
    raise _unsupported(
        f"its normalizer is {json.dumps(normalizer)} and its pre-tokenizer {json.dumps(splitter)}"
    )


def _scores(model: dict[str, Any], tokens: list[str], types: list[int]) -> list[float]:
    """Compute scores that make llama.cpp apply the merges in their order.

    A token's score falls with the rank of the first merge that produces it. The result is equivalent if the
    merges that produce a token are consecutive, and any two tokens that form a third are a merge.
    """
    pairs = _pairs(model)
    rank: dict[str, int] = {}
    former = None
    for i, (left, right) in enumerate(pairs):
        joint = left + right
        if joint in rank and joint != former:
            raise _unsupported(f"its merges to {joint!r} do not stand together")
        rank.setdefault(joint, i)
        former = joint
    known, merges = set(model["vocab"]), set(pairs)
    for text, kind in zip(tokens, types, strict=True):
        if kind != NORMAL:
            continue
        for cut in range(1, len(text)):
            pair = (text[:cut], text[cut:])
            if pair[0] in known and pair[1] in known and pair not in merges:
                raise _unsupported(f"{text!r} is a token, but {pair} is no merge")
    # Merging starts from letters, whose scores are never used.
    return [-float(rank.get(text, len(pairs))) for text in tokens]


def _pairs(model: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = []
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if " " in left + right:
            raise _unsupported(f"its merge {left!r} {right!r} holds a space")
        pairs.append((left, right))
    return pairs


def _adds_bos(tokenizer: Any, parts: dict[str, Any]) -> bool:
    """Return true if texts begin with the bos token; an eos token does not matter to prompts."""
    processor = parts["post_processor"] or {"type": "ByteLevel"}
    steps = processor["processors"] if processor["type"] == "Sequence" else [processor]
    steps = [step for step in steps if step["type"] != "ByteLevel"]
    if any(step["type"] != "TemplateProcessing" for step in steps) or len(steps) > 1:
        raise _unsupported(f"its post-processor is {json.dumps(processor)}")
    single: Sequence[dict[str, Any]] = steps[0]["single"] if steps else [{"Sequence": {"id": "A"}}]
    before = [e["SpecialToken"]["id"] for e in single[: _place_of_text(single)]]
    if before not in ([], [tokenizer.bos_token]):
        raise _unsupported(f"it begins texts with {' '.join(before)}")
    return bool(before)


def _place_of_text(template: Sequence[dict[str, Any]]) -> int:
    return next(i for i, each in enumerate(template) if "Sequence" in each)


def _unsupported(reason: str) -> UserError:
    return UserError(
        f"gguf: this tokenizer cannot be exported: {reason}. Byte-level BPE as GPT-2 (also "
        "with single digits) or Llama-3 splits texts, and SentencePiece's BPE with byte fallback (Llama-2, "
        "Mistral) can"
    )
