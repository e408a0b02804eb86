"""Scores of generated answers: similarity to the references, length and repetition."""

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import regex

from fintune.data.words import UNSPACED, bare_words, split_words
from fintune.errors import UserError
from fintune.params import Embedding

SCORES = ("rouge_1", "rouge_2", "rouge_l", "chrf", "distinct_2", "longest_repeat", "loop_rate")
LENGTHS = ("words", "reference_words")
TIMES = 3  # that a loop says its passage
LEAST_WORDS = {1: 16, 2: 16}  # of a loop, by the different words in its passage; else 9
UNIT = regex.compile(
    rf"(?V1){UNSPACED.pattern}\p{{M}}*|\p{{Hangul}}"
    rf"|(?P<run>[[\p{{L}}\p{{M}}\p{{N}}]--{UNSPACED.pattern}--\p{{Hangul}}]+)(?:[.,'’%/&-](?&run))*"
)
ENUMERATION = re.compile(r"(?m)^\s*[-*•#]+\s+|(?:^|(?<=\s))\(?(?:\d{1,3}|[a-z])[.)]\s+")
ONE_WORD = 40  # characters; a longer one is looked at by character
SERIAL_WORDS = 150_000  # of answers and references: 3 seconds, about as long as starting processes
TEXTS_PER_PASS = 64


def text_scores(
    answers: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, np.ndarray]:
    """Compare answers with their references; of several references, the best counts.

    Equal answers to equal references are scored once; large jobs use all cores.

    Args:
        answers: (rows,).
        references: one or more for each answer.

    Returns:
        Arrays of shape (rows,): ROUGE-1, -2 and -L as F1 of stems (Lin 2004), from 0 to 1;
        `chrf` (Popović 2015), from 0 to 100; `distinct_2`, the fraction of distinct word bigrams, 1 if
        there are none; `longest_repeat`, the length in words of the longest stretch that occurs earlier
        in the answer; `loop_rate`, 1 for an answer that ends in a loop, else 0; `words`,
        and `reference_words` of the reference nearest in length.
    """
    jobs = [(answer, tuple(each)) for answer, each in zip(answers, references, strict=True)]
    different = list(dict.fromkeys(jobs))
    words = {text: len(split_words(text)) for a, each in different for text in (a, *each)}
    work = sum(words[text] for answer, each in different for text in (answer, *each))
    if work < SERIAL_WORDS:
        scored = [_score(job) for job in different]
    else:
        from joblib import Parallel, delayed

        scored = Parallel(n_jobs=-1, batch_size=8)(delayed(_score)(job) for job in different)
    by_job = dict(zip(different, scored, strict=True))
    table = np.array([by_job[job] for job in jobs]).reshape(len(jobs), -1)
    return dict(zip((*SCORES, *LENGTHS), table.T, strict=True))


def _score(job: tuple[str, tuple[str, ...]]) -> tuple[float, ...]:
    answer, references = job
    stems, rouge_scorer, chrf = _scorers()
    rouge = rouge_scorer.score_multi(references, answer)
    words = split_words(answer)
    lengths = [len(split_words(reference)) for reference in references]
    return (
        *(rouge[kind].fmeasure for kind in ("rouge1", "rouge2")),
        max(_rouge_l(stems(answer), stems(each)) for each in references),
        chrf.sentence_score(answer, references).score,
        distinct_2(words),
        longest_repeat(words),
        ends_in_loop(answer),
        len(words),
        min(lengths, key=lambda length: (abs(length - len(words)), length)),
    )


def _rouge_l(words: Sequence[str], reference: Sequence[str]) -> float:
    """Return the F1 of the longest common subsequence, which rouge_score looks for in Python."""
    from rapidfuzz.distance import LCSseq
    from rouge_score.scoring import fmeasure

    common = LCSseq.similarity(words, reference)
    return float(fmeasure(common / max(1, len(words)), common / max(1, len(reference))))


class _Words:
    """ROUGE's tokenizer with cached stems, which take half of the time, and for any script.

    Its own knows the letters a to z only. Those of other scripts are kept here, without stems.
    """

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer

        self.stem = lru_cache(maxsize=None)(PorterStemmer().stem)
        self.tokenize = lru_cache(maxsize=1024)(self._tokenize)

    def _tokenize(self, text: str) -> list[str]:
        from rouge_score.tokenize import tokenize

        if text.isascii():
            words: list[str] = tokenize(text, self)
            return words
        found = bare_words(unicodedata.normalize("NFKC", text).lower())
        return [
            stem for word in found for stem in (tokenize(word, self) if word.isascii() else [word])
        ]


@lru_cache
def _scorers() -> tuple[Callable[[str], list[str]], Any, Any]:
    """Return what splits a text into stems, and what computes ROUGE and chrF."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.chrf import CHRF

    words = _Words()
    return words.tokenize, RougeScorer(["rouge1", "rouge2"], tokenizer=words), CHRF()


def distinct_2(words: Sequence[str]) -> float:
    """Return the fraction of distinct word bigrams; 1 if there are none."""
    pairs = list(pairwise(words))
    return len(set(pairs)) / len(pairs) if pairs else 1.0


def longest_repeat(words: Sequence[str]) -> int:
    """Return the length in words of the longest stretch that also occurs earlier; the two may overlap.

    "to be or not to be" repeats two words, and "no no no no" three.
    """
    number: dict[str, int] = {}
    ids = np.array([number.setdefault(word, len(number)) for word in words])
    longest = 0
    for offset in range(1, len(ids)):
        if len(ids) - offset <= longest:
            break
        equal = np.concatenate([[False], ids[offset:] == ids[:-offset], [False]])
        ends = np.flatnonzero(np.diff(equal.astype(np.int8)))
        if len(ends):
            longest = max(longest, int((ends[1::2] - ends[::2]).max()))
    return longest


def ends_in_loop(text: str) -> bool:
    """Return whether a text ends in a passage said three times in a row or more, the last perhaps cut off.

    Case, punctuation and the marks of a list count for nothing. A passage of one or two different words
    counts from 16 words on, any other from nine: a row of a table may well hold a few equal cells.
    """
    units = [
        unit
        for word in (m.group() for m in UNIT.finditer(ENUMERATION.sub("", text.casefold())))
        for unit in (word if len(word) > ONE_WORD else [word])
    ]
    return _loops(units) or (len(units) > 1 and _loops(units[:-1], cut_off=units[-1]))


def _loops(units: Sequence[str], cut_off: str = "") -> bool:
    """Return whether the units end in a loop that goes on with a word that begins with `cut_off`."""
    number: dict[str, int] = {}
    ids = np.array([number.setdefault(unit, len(number)) for unit in units])
    for period in range(1, len(ids) // TIMES + 1):
        same = ids[period:] == ids[:-period]
        run = int(same[::-1].argmin()) if not same.all() else len(same)
        length = run + period
        if length < TIMES * period or not units[-period].startswith(cut_off):
            continue
        if length >= LEAST_WORDS.get(len(set(units[-period:])), 9):
            return True
    return False


def similarities(
    answer_sets: Mapping[str, Sequence[str]],
    references: Sequence[Sequence[str]],
    embedding: Embedding,
    device: Any,
) -> dict[str, np.ndarray]:
    """Compute the similarity in meaning of each model's answers to their references.

    A text's embedding is the mean of the model's last hidden states (Reimers and Gurevych 2019); the cosine
    with the nearest reference counts.

    Returns:
        For each set of answers an array of shape (rows,), from -1 to 1; 0 for an empty answer.

    Raises:
        UserError: the model cannot be loaded, or has no safetensors weights.
    """
    every = [text for answers in answer_sets.values() for text in answers]
    every += [text for each in references for text in each]
    different = sorted({text for text in every if text.strip()}, key=lambda t: (len(t), t))
    place = {text: i for i, text in enumerate(different)}
    vectors = _embed(different, embedding, device)

    def nearest(answer: str, each: Sequence[str]) -> float:
        if not answer.strip():
            return 0.0
        return float((vectors[[place[text] for text in each]] @ vectors[place[answer]]).max())

    return {
        name: np.array([nearest(a, each) for a, each in zip(answers, references, strict=True)])
        for name, answers in answer_sets.items()
    }


def _embed(texts: Sequence[str], embedding: Embedding, device: Any) -> np.ndarray:
    import torch
    from transformers import AutoModel, AutoTokenizer

    source: dict[str, Any] = {"revision": embedding.revision, "trust_remote_code": False}
    if Path(embedding.model).is_dir():
        source = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(embedding.model, **source)
        model = AutoModel.from_pretrained(embedding.model, use_safetensors=True, **source)
    except Exception as error:  # the hub client also raises its transport's errors
        raise UserError(
            f"evaluate.embedding: {embedding.model}: cannot be loaded: {error}; set "
            "evaluate.embedding: null to do without"
        ) from error
    model = model.to(device).eval()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    limit = getattr(model.config, "max_position_embeddings", 512)
    limit = min(limit, tokenizer.model_max_length)
    vectors = []
    for start in range(0, len(texts), TEXTS_PER_PASS):
        batch = tokenizer(
            list(texts[start : start + TEXTS_PER_PASS]),
            padding=True,
            truncation=True,
            max_length=limit,
            return_tensors="pt",
        ).to(device)
        mask = batch["attention_mask"]
        with torch.no_grad():
            hidden = model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        mean = (hidden.float() * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        vectors.append(torch.nn.functional.normalize(mean, dim=-1).cpu().numpy())
    return np.concatenate(vectors)
