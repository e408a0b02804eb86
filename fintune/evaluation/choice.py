"""Choose the decoding on validation rows.

The candidates are compared by successive halving (Jamieson and Talwalkar 2016): all of them answer a few
prompts, the better half answers twice as many, and so on. At the end the one-standard-error rule (Breiman
et al. 1984) prefers a simpler decoding to one that is hardly better.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fintune.evaluation.scores import Question, measure_of, score
from fintune.generation.decoding import SETTINGS, title
from fintune.generation.generate import Answer

MIN_STOP_RATE, MAX_LOOP_RATE = 0.95, 0.02
FEWEST_PROMPTS = 8
QUARTER = 4  # the best of so many go on
CANDIDATES: tuple[dict[str, float], ...] = tuple(
    dict(zip(SETTINGS, values, strict=True))
    for values in (  # temperature, top_p, min_p, top_k, repetition_penalty; the simpler first
        (0.0, 1.0, 0.0, 0, 1.0),
        (1.0, 1.0, 0.0, 0, 1.0),
        (0.0, 1.0, 0.0, 0, 1.05),
        (0.0, 1.0, 0.0, 0, 1.1),
        (0.0, 1.0, 0.0, 0, 1.2),
        (1.0, 1.0, 0.05, 0, 1.0),
        (1.0, 1.0, 0.1, 0, 1.0),
        (0.2, 0.95, 0.0, 0, 1.0),
        (0.7, 0.95, 0.0, 0, 1.0),
        (0.7, 1.0, 0.05, 0, 1.0),
        (0.8, 1.0, 0.05, 0, 1.0),
        (0.8, 1.0, 0.1, 0, 1.0),
        (0.7, 0.95, 0.0, 0, 1.05),
        (0.7, 0.95, 0.0, 0, 1.1),
        (1.0, 1.0, 0.1, 0, 1.05),
        (1.0, 1.0, 0.1, 0, 1.1),
    )
)


@dataclass
class Tried:
    """A candidate with the scores of its answers so far, each (prompts,)."""

    settings: dict[str, float]
    place: int  # in the list of candidates
    scores: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, scores: dict[str, np.ndarray]) -> None:
        """Add the scores of further prompts."""
        for name, values in scores.items():
            self.scores[name] = np.concatenate([self.scores.get(name, np.empty(0)), values])

    def rate(self, name: str) -> float:
        """Return the mean of a score, without the rows that have none; 0 if no row has one."""
        known = self.scores[name][~np.isnan(self.scores[name])]
        return float(known.mean()) if len(known) else 0.0

    @property
    def shortfall(self) -> float:
        """Distance from the least stop rate and the highest loop rate, beyond one standard error."""
        n = len(self.scores["stop_rate"])
        errors = [np.sqrt(p * (1 - p) / n) for p in (MIN_STOP_RATE, MAX_LOOP_RATE)]
        short = MIN_STOP_RATE - self.rate("stop_rate") - errors[0]
        return max(0.0, short) + max(0.0, self.rate("loop_rate") - MAX_LOOP_RATE - errors[1])


def choose(
    questions: Sequence[Question],
    answer: Callable[[list[list[int]], list[dict[str, float]]], list[Answer]],
    budget: int,
) -> dict[str, Any]:
    """Choose the decoding with the best answers to validation questions.

    Those that end and do not loop (MIN_STOP_RATE, MAX_LOOP_RATE) come first. Of these the share of right
    answers decides if enough results can be checked, else the likeness (`scores.measure_of`). If none ends
    without loops, the one that comes nearest is taken.

    Args:
        answer: answers each prompt with its settings.
        budget: the number of answers that may be generated, about.

    Returns:
        `settings`, `reason`, `decided_by` (`accuracy` or `likeness`) and `candidates`: the settings and
        figures of each, the best first.
    """
    fewer = max(FEWEST_PROMPTS, budget // 2 // len(CANDIDATES))
    most = min(len(questions), max(FEWEST_PROMPTS, budget // 2 * QUARTER // len(CANDIDATES)))
    decided_by = measure_of(questions[:most])
    tried = [Tried(settings, place) for place, settings in enumerate(CANDIDATES)]
    out: list[Tried] = []
    answered = 0
    for count in (min(fewer, most), most):
        asked = questions[answered:count]
        if asked:
            pairs = [(candidate, question) for candidate in tried for question in asked]
            found = answer([q.prompt for _, q in pairs], [c.settings for c, _ in pairs])
            scores = score([q for _, q in pairs], found)
            for i, candidate in enumerate(tried):
                part = slice(i * len(asked), (i + 1) * len(asked))
                candidate.add({name: values[part] for name, values in scores.items()})
            answered = count
        tried.sort(key=lambda c: (c.shortfall, -c.rate(decided_by), c.place))
        best = tried[0]
        chosen = min((c for c in tried if _no_worse(c, best, decided_by)), key=lambda c: c.place)
        if not out:
            ranked = [chosen, *(c for c in tried if c is not chosen)]
            kept = len(tried) // QUARTER
            tried, out = ranked[:kept], ranked[kept:]
    figures = (
        f"{decided_by} {chosen.rate(decided_by):.3f} on {len(chosen.scores['stop_rate'])} prompts"
    )
    why = "the best of those that end and do not loop"
    if best.shortfall:
        why = "none ends without loops; this one comes nearest"
    elif chosen is not best:
        why = f"within one standard error of {title(best.settings)}, and simpler"
    order = [chosen, *(c for c in tried if c is not chosen), *out]
    return {
        "settings": chosen.settings,
        "decided_by": decided_by,
        "reason": f"{title(chosen.settings)}: {why} ({figures})",
        "candidates": [_row(candidate) for candidate in order],
    }


def _no_worse(candidate: Tried, best: Tried, name: str) -> bool:
    """Return whether a candidate is within one standard error of the best."""
    known = best.scores[name][~np.isnan(best.scores[name])]
    error = known.std() / np.sqrt(max(1, len(known)))
    near = candidate.rate(name) >= best.rate(name) - error
    return candidate is best or (candidate.shortfall <= best.shortfall and bool(near))


def _row(candidate: Tried) -> dict[str, Any]:
    figures = {name: candidate.rate(name) for name in candidate.scores}
    if np.isnan(candidate.scores["accuracy"]).all():
        figures.pop("accuracy")
    words, of_references = figures.pop("words"), figures.pop("reference_words")
    return {
        "title": title(candidate.settings),
        **candidate.settings,
        "prompts": len(candidate.scores["accuracy"]),
        **figures,
        "length_ratio": words / max(of_references, 1e-9),
    }
