"""Compare a GGUF file's answers in llama.cpp with those of the folder it was written from.

Both take the most likely token after the folder's repetition penalty.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from fintune.data.prompt import encode
from fintune.errors import UserError
from fintune.export.gguf.llama_cpp import Completion, llama_cpp_answers, llama_cpp_tokens


@dataclass(frozen=True)
class Agreement:
    """The agreement of two lists of greedy answers, as shares from 0 to 1.

    `equal_prompts`: prompts with the same tokens. `equal_answers`: answers that are entirely equal.
    `equal_tokens`: positions with the same token, relative to the longer answer; after a first difference
    the rest usually differs too. `equal_choices`: equal tokens among those chosen after an equal prefix.
    """

    answers: int
    equal_prompts: float
    equal_answers: float
    equal_tokens: float
    equal_choices: float


def check_gguf(
    file: Path,
    expected: Sequence[Completion],
    prompts: Sequence[str],
    max_new_tokens: int,
    min_equal_choices: float,
) -> Agreement:
    """Answer the prompts with llama.cpp and compare the answers with `expected`.

    Raises:
        UserError: the file cannot be run, or `equal_choices` is less than `min_equal_choices`.
    """
    found = llama_cpp_answers(file, prompts, max_new_tokens)
    agreement = compare(expected, found)
    if agreement.equal_choices < min_equal_choices:
        raise UserError(
            f"gguf: {file}: after equal tokens, llama.cpp chose the folder's next token in "
            f"{agreement.equal_choices:.2%} of the cases, which is less than {min_equal_choices:.2%}"
        )
    return agreement


def check_tokens(file: Path, texts: Mapping[str, Sequence[int]]) -> None:
    """Check that llama.cpp reads texts as the tokens that the model was trained on.

    Args:
        texts: the tokens of each text.

    Raises:
        UserError: the file cannot be run, or a text's tokens differ.
    """
    found = llama_cpp_tokens(file, list(texts))
    for (text, expected), tokens in zip(texts.items(), found, strict=True):
        if list(expected) != tokens:
            raise UserError(
                f"gguf: {file}: llama.cpp reads {text!r} as the tokens {tokens}, and transformers as "
                f"{list(expected)}; the file is not the same model"
            )


def compare(expected: Sequence[Completion], found: Sequence[Completion]) -> Agreement:
    """Compare answers to the same prompts, pair by pair."""
    pairs = list(zip(expected, found, strict=True))
    places = sum(max(len(a.answer), len(b.answer)) for a, b in pairs)
    equal = sum(x == y for a, b in pairs for x, y in zip(a.answer, b.answer, strict=False))
    before = sum(_until_different(a.answer, b.answer) for a, b in pairs)
    different = sum(a.answer != b.answer for a, b in pairs)
    return Agreement(
        answers=len(pairs),
        equal_prompts=sum(a.prompt == b.prompt for a, b in pairs) / max(1, len(pairs)),
        equal_answers=sum(a.answer == b.answer for a, b in pairs) / max(1, len(pairs)),
        equal_tokens=equal / max(1, places),
        equal_choices=before / max(1, before + different),
    )


def _until_different(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def transformers_answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int
) -> list[Completion]:
    """Generate with transformers' own loop, and the end tokens and penalty of the generation config.

    To compare with an f16 file, load the folder in float32: bfloat16 has larger rounding errors.

    Args:
        prompts: as returned by `fintune.data.prompt.render_prompt`.
    """
    import torch  # here, so that the llama.cpp process does not import it

    answers = []
    for prompt in prompts:
        prompt_ids, _ = encode(tokenizer, prompt, "")
        ids = torch.tensor([prompt_ids], device=model.device)
        tokens = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            min_p=None,
            top_k=None,
        )[0].tolist()
        answer = tokens[len(prompt_ids) :]
        text = tokenizer.decode(answer, skip_special_tokens=True)
        answers.append(Completion(prompt_ids, answer, text))
    return answers
