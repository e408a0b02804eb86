"""A Hugging Face tokenizer as the metadata of a GGUF file; what llama.cpp cannot do alike is refused.

Two kinds are known. Byte-level BPE (GPT-2's, Llama-3's) keeps its merges, and llama.cpp splits texts by a
rule of its own that has a name. SentencePiece's BPE with byte fallback (Llama-2's, Mistral's) has scores
instead of merges: of two neighbours llama.cpp joins those whose joint token has the highest score.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fintune.errors import UserError

log = logging.getLogger("fintune")

# llama.cpp's names of the rules that split a text before merging, and whether they come with
# ignore_merges: a piece that is a token is not merged up to it.
GPT_2 = ("gpt-2", False)
LLAMA_3 = ("llama-bpe", True)
LLAMA_3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPACE = "▁"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # gguf.TokenType


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says about its tokenizer.

    `tokens` and `types` have an entry for each row of the embedding. Of `merges` and `scores` one is
    there. `adds_bos`: each text begins with the bos token. `adds_space`: and then with a space.
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
    """Read a fast tokenizer's parts as transformers uses them, which need not be tokenizer.json's.

    Args:
        rows: of the embedding; rows without a token get an unused one.

    Raises:
        UserError: a part of it has no equal in llama.cpp, so that texts would be other tokens there.
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
    """The name that llama.cpp has for how a byte-level tokenizer splits a text."""
    if parts["normalizer"] is not None:
        raise _unsupported(f"its normalizer is {parts['normalizer']['type']}")
    splitter = parts["pre_tokenizer"] or {"type": "none"}
    steps = splitter["pretokenizers"] if splitter["type"] == "Sequence" else [splitter]
    *splits, last = steps
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        raise _unsupported(f"its pre-tokenizer is {json.dumps(splitter)}")
    if not splits and last["use_regex"]:
        return GPT_2
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
    """Whether a text gets a space before it, and that spaces are otherwise left as they are."""
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
    """Scores that make llama.cpp join what the merges join, in their order.

    A token's score falls with the rank of the first merge that makes it. That is the same tokenizer if
    the merges of a token stand together, and if every two tokens that make up a third are a merge.
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
    # A letter is what merging starts from; its score is never looked at.
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
    """Whether texts begin with the bos token. An end that the tokenizer adds has no place in a prompt."""
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
        f"gguf: this tokenizer cannot be exported: {reason}. Byte-level BPE as GPT-2 or Llama-3 splits "
        "texts, and SentencePiece's BPE with byte fallback (Llama-2, Mistral) can"
    )
