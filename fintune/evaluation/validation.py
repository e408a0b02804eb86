"""Validate a model that is being trained."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fintune.data.prompt import end_token_id
from fintune.evaluation.scores import Question, measure_of, result_of, score
from fintune.generation.decoding import Decoding
from fintune.generation.generate import generate
from fintune.model.batch import TokenRow, lengths_of
from fintune.model.likelihood import likelihood
from fintune.params import Train
from fintune.training.train import total_steps

log = logging.getLogger("fintune")

MOST_QUESTIONS = 128
MOST_TOKENS = 128  # of an answer to a validation question
TIME_SHARE = 0.1  # of the training, at most, for answers
TOKENS_SHARE = (
    0.04  # of the tokens trained on between two validations, which takes less time than that
)
LATENCY = 500  # tokens that a GPU trains on while it adds one token to each answer, about
TEMPERATURE, MIN_P = 1.0, 0.1  # ends and does not loop, on any base that was tried


def validator(
    params: Train,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    tokens: Mapping[str, Sequence[TokenRow]],
) -> Callable[[Any, int], dict[str, float]]:
    """Return what measures the model at a validation, as `train` takes it.

    Args:
        rows: the validation rows.
        tokens: prompt and completion token ids of the rows of `train` and `validation`.
    """

    def loss(model: Any, step: int) -> dict[str, float]:
        return {"loss": likelihood(model, tokens["validation"], "validate").loss}

    if params.keep != "best_answers":
        return loss
    answers = _Answers(params, tokenizer, rows, tokens)

    def both(model: Any, step: int) -> dict[str, float]:
        return loss(model, step) | ({"answers": answers(model)} if answers.due(step) else {})

    return both


class _Answers:
    """Answers the first validation questions, always with the same random numbers."""

    def __init__(
        self,
        params: Train,
        tokenizer: Any,
        rows: Sequence[dict[str, Any]],
        tokens: Mapping[str, Sequence[TokenRow]],
    ) -> None:
        """Choose the questions and the validations at which they are asked: as many as the time allows.

        Args:
            rows: the validation rows.
            tokens: as `validator` takes them.
        """
        validation, trained = tokens["validation"], tokens["train"]
        limit = min(MOST_TOKENS, max(len(completion) for _, completion in validation))
        row = sum(lengths_of(trained)) / len(trained)
        between = params.validate_every_steps * params.rows_per_step * row  # tokens
        waiting = limit * LATENCY if torch.cuda.is_available() else 0
        every = max(1, math.ceil(waiting / (TIME_SHARE * between)))
        count = int(TOKENS_SHARE * every * between) // limit
        count = max(1, min(MOST_QUESTIONS, len(validation), count))
        self.every = every * params.validate_every_steps
        self.last = total_steps(params, len(trained))
        self.tokenizer = tokenizer
        self.questions = [
            Question(prompt, [row["output"]], result_of(row), row["input"])
            for row, (prompt, _) in zip(rows, validation[:count], strict=False)
        ]
        self.decoding = Decoding(
            end_token_id(tokenizer), limit, TEMPERATURE, min_p=MIN_P, seed=params.seed
        )
        self.measure = measure_of(self.questions)
        log.info(
            "kept: the step with the best %s of %d answers, measured every %d steps and at the end",
            *(self.measure, count, self.every),
        )

    def due(self, step: int) -> bool:
        """Return whether the questions are asked after this step."""
        return step % self.every == 0 or step == self.last

    def __call__(self, model: Any) -> float:
        """Return the mean accuracy or likeness of the model's answers."""
        prompts = [question.prompt for question in self.questions]
        answers = generate(model, self.tokenizer, prompts, self.decoding, "validation answers")
        return float(np.nanmean(score(self.questions, answers)[self.measure]))
