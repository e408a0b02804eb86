"""Each row's contribution to the metrics of a model."""

from collections.abc import Sequence

import numpy as np

from fintune.data.prompt import RESPONSE_END
from fintune.evaluation.correctness import is_correct
from fintune.evaluation.measure import ModelResult
from fintune.evaluation.rows import Chosen
from fintune.evaluation.scores import result_of
from fintune.evaluation.statistics import Row, Sums
from fintune.evaluation.texts import text_scores
from fintune.generation.generate import Answer


def metric_sums(
    result: ModelResult, chosen: Chosen, similarity: np.ndarray | None
) -> tuple[Sums, Sums]:
    """Compute each metric's numerator and denominator for every row.

    Returns:
        Those of all metrics, an answer's being the mean of a row's samples; and those of the greedy
        answers' metrics.
    """
    scores, rows = result.scores, chosen.rows
    answer_bytes = [len(row["completion"].removesuffix(RESPONSE_END).encode()) for row in rows]
    *drawn, greedy = answer_sums([*zip(*result.answers, strict=True), result.greedy], chosen)
    sums = {
        "loss": (scores.nll, scores.tokens),
        "perplexity": (scores.nll, scores.tokens),
        "bits_per_byte": (scores.nll / np.log(2), np.array(answer_bytes, dtype=float)),
        "token_accuracy": (scores.correct, scores.tokens),
        **({} if similarity is None else {"similarity": (similarity, np.ones(len(rows)))}),
        **{
            name: (
                np.mean([sample[name][0] for sample in drawn], axis=0),
                np.mean([sample[name][1] for sample in drawn], axis=0),
            )
            for name in drawn[0]
        },
    }
    return sums, greedy


def answer_sums(sets: Sequence[Sequence[Answer]], chosen: Chosen) -> list[Sums]:
    """Compute the metrics' numerators and denominators of each set of answers, one to each row."""
    every = [answer.text for answers in sets for answer in answers]
    scores = text_scores(every, chosen.references * len(sets))
    parts = {name: np.split(values, len(sets)) for name, values in scores.items()}
    return [
        _sums(answers, {name: values[i] for name, values in parts.items()}, chosen.rows)
        for i, answers in enumerate(sets)
    ]


def _sums(answers: Sequence[Answer], texts: dict[str, np.ndarray], rows: Sequence[Row]) -> Sums:
    right = [
        is_correct(result_of(row), answer.text, row["input"])
        for row, answer in zip(rows, answers, strict=True)
    ]
    checkable = np.array([float(each is not None) for each in right])
    one = np.ones(len(rows))
    share = {key: texts[key] for key in ("rouge_1", "rouge_2", "rouge_l", "chrf", "loop_rate")}
    share |= {key: texts[key] for key in ("distinct_2", "longest_repeat")}
    share["stop_rate"] = np.array([float(each.stopped) for each in answers])
    share["empty_rate"] = np.array([float(not each.text) for each in answers])
    share["mean_answer_tokens"] = np.array([float(each.tokens) for each in answers])
    return {
        "accuracy": (np.array([float(each is True) for each in right]), checkable),
        "checkable_rows": (checkable * len(rows), one),
        **{key: (values, one) for key, values in share.items()},
        "length_ratio": (texts["words"], texts["reference_words"]),
    }
