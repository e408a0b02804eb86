"""Validate a model that is being trained."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fintune.data.prompt import end_token_id
from fintune.evaluation.scores import Question, measure_of, result_of, score
from fintune.generation.decoding import Decoding
from fintune.generation.generate import generate
from fintune.model.batch import TokenRow
from fintune.model.likelihood import likelihood
from fintune.params import Train

log = logging.getLogger("fintune")

MOST_QUESTIONS = 128
TOKENS_SHARE = 0.04  # of the tokens trained on between two validations
TEMPERATURE, MIN_P = 1.0, 0.1  # ends and does not loop, on any base that was tried


def validator(
    params: Train,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    tokens: dict[str, list[TokenRow]],
) -> Callable[[Any], dict[str, float]]:
    """Return what measures the model at a validation, as `train` takes it.

    Args:
        rows: the validation rows.
        tokens: prompt and completion token ids of the rows of `train` and `validation`.
    """

    def loss(model: Any) -> dict[str, float]:
        return {"loss": likelihood(model, tokens["validation"], "validate").loss}

    if params.keep != "best_answers":
        return loss
    row = sum(len(p) + len(c) for p, c in tokens["train"]) / len(tokens["train"])
    between = int(params.validate_every_steps * params.rows_per_step * row)
    answers = _Answers(tokenizer, rows, tokens["validation"], between, params.seed)
    return lambda model: {**loss(model), "answers": answers(model)}


class _Answers:
    """Answers the first validation questions, always with the same random numbers."""

    def __init__(
        self,
        tokenizer: Any,
        rows: Sequence[dict[str, Any]],
        tokens: Sequence[TokenRow],
        trained_tokens: int,
        seed: int,
    ) -> None:
        """Choose the questions: as many as the time allows.

        Args:
            rows, tokens: the validation rows, as a table and as prompt and completion token ids.
            trained_tokens: those of the steps between two validations.
        """
        limit = max(len(completion) for _, completion in tokens[:MOST_QUESTIONS])
        count = max(1, min(MOST_QUESTIONS, int(TOKENS_SHARE * trained_tokens) // limit))
        self.tokenizer = tokenizer
        self.questions = [
            Question(prompt, [row["output"]], result_of(row), row["input"])
            for row, (prompt, _) in zip(rows, tokens[:count], strict=False)
        ]
        self.decoding = Decoding(
            end_token_id(tokenizer), limit, TEMPERATURE, min_p=MIN_P, seed=seed
        )
        self.measure = measure_of(self.questions)
        log.info("kept: the step with the best %s of %d answers", self.measure, count)

    def __call__(self, model: Any) -> float:
        """Return the mean accuracy or likeness of the model's answers."""
        prompts = [question.prompt for question in self.questions]
        answers = generate(model, self.tokenizer, prompts, self.decoding, "validation answers")
        return float(np.nanmean(score(self.questions, answers)[self.measure]))
