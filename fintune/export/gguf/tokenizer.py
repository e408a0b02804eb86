"""Read from a tokenizer.json what llama.cpp's converter does not: splitting rules and SentencePiece pieces.

The converter knows a byte-level tokenizer by the tokens of one text, so a vocabulary that it has never seen
is unknown to it, even with GPT-2's splitting. SentencePiece's BPE it reads from a file tokenizer.model,
which fast tokenizers do not save: llama.cpp merges the two neighbours whose joint token has the highest
score, and the scores that tokenizer.json lacks follow from its merges.
"""

import json
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # gguf.TokenType
LLAMA_3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def splitting(parts: dict[str, Any]) -> str:
    """Return llama.cpp's name for the way a byte-level BPE tokenizer splits text.

    Args:
        parts: of tokenizer.json.

    Raises:
        ValueError: it is no BPE, or none of GPT-2's, GPT-2's after single digits, and Llama 3's.
    """
    if parts["model"]["type"] != "BPE":
        raise ValueError(f"llama.cpp does not know its tokenizer, a {parts['model']['type']}")
    splitter = parts["pre_tokenizer"] or {"type": "none"}
    steps = splitter["pretokenizers"] if splitter["type"] == "Sequence" else [splitter]
    *splits, last = steps
    whole = bool(parts["model"].get("ignore_merges"))  # a piece that is a token needs no merges
    llama_3 = {"type": "Split", "pattern": {"Regex": LLAMA_3_PATTERN}}
    if parts["normalizer"] is None and last["type"] == "ByteLevel" and not last["add_prefix_space"]:
        if last["use_regex"] and not whole and not splits:
            return "gpt-2"
        if last["use_regex"] and not whole and [s["type"] for s in splits] == ["Digits"]:
            return "smollm"
        if whole and len(splits) == 1 and splits[0].items() >= llama_3.items():
            return "llama-bpe"
    raise ValueError(f"llama.cpp has no name for its splitting of text: {json.dumps(splitter)}")


def is_sentencepiece(parts: dict[str, Any]) -> bool:
    """Return whether a tokenizer.json holds SentencePiece's BPE with byte fallback."""
    model = parts["model"]
    return model["type"] == "BPE" and bool(model.get("byte_fallback"))


def pieces(parts: dict[str, Any], rows: int) -> tuple[list[bytes], list[float], list[int]]:
    """Return a SentencePiece vocabulary: texts, scores and types, an entry for each row of the embedding.

    Raises:
        ValueError: no scores make llama.cpp apply the merges in their order.
    """
    model, added = parts["model"], {each["id"]: each for each in parts["added_tokens"]}
    texts = {i: text for text, i in model["vocab"].items()}
    texts |= {i: each["content"] for i, each in added.items()}
    tokens = [texts.get(i, f"[unused {i}]") for i in range(max(rows, max(texts) + 1))]
    types = [NORMAL if i in texts else UNUSED for i in range(len(tokens))]
    for i, text in texts.items():
        if i in added:
            types[i] = CONTROL if added[i]["special"] else USER_DEFINED
        elif len(text) == 6 and text.startswith("<0x"):
            types[i] = BYTE
        if text == model.get("unk_token"):
            types[i] = UNKNOWN
    return [text.encode() for text in tokens], _scores(model, tokens, types), types


def adds_space(parts: dict[str, Any]) -> bool:
    """Return whether a SentencePiece tokenizer puts a space before a text."""
    normalizer, splitter = parts["normalizer"] or {}, parts["pre_tokenizer"] or {}
    steps = normalizer.get("normalizers", [normalizer])
    return any(step.get("type") == "Prepend" for step in steps) or (
        splitter.get("type") == "Metaspace" and splitter["prepend_scheme"] != "never"
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
            raise ValueError(f"its merges to {joint!r} do not stand together")
        rank.setdefault(joint, i)
        former = joint
    known, merges = set(model["vocab"]), set(pairs)
    for text, kind in zip(tokens, types, strict=True):
        if kind != NORMAL:
            continue
        for cut in range(1, len(text)):
            pair = (text[:cut], text[cut:])
            if pair[0] in known and pair[1] in known and pair not in merges:
                raise ValueError(f"{text!r} is a token, but {pair} is no merge")
    # Merging starts from letters, whose scores are never used.
    return [-float(rank.get(text, len(pairs))) for text in tokens]


def _pairs(model: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = []
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if " " in left + right:
            raise ValueError(f"its merge {left!r} {right!r} holds a space")
        pairs.append((left, right))
    return pairs
